"""Histories that leave the process: plain lists, as in 2023, which a process without this code reads."""

import copy
import enum
import io
import json
import pickle
import shelve
import subprocess
import sys
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
import yaml

from qwen1 import ChatHistory, Tool, ToolReply

TURNS = [("你好", "Hello 😀"), ("b", "")]
ELSEWHERE = """
import pickle, shelve, sys
sys.modules["qwen1"] = sys.modules["torch"] = sys.modules["transformers"] = None  # can't be imported
for path in sys.argv[2:]:
    with open(path, "rb") as file:
        assert repr(pickle.load(file)) == sys.argv[1], path
with shelve.open("shelf") as shelf:
    assert repr(shelf["history"]) == sys.argv[1] and type(shelf["history"]) is list
"""


@pytest.fixture
def history(chat_model, byte_tokenizer):
    """As `chat` returns it, with keys and values."""
    _, history = chat_model.chat(byte_tokenizer, "q", TURNS)
    assert history.kept is not None
    return history


def test_another_process_without_this_code_reads_it(history, tmp_path):
    paths = [str(tmp_path / f"protocol{protocol}") for protocol in range(pickle.HIGHEST_PROTOCOL + 1)]
    for protocol, path in enumerate(paths):
        with open(path, "wb") as file:
            pickle.dump(history, file, protocol)
    with shelve.open(str(tmp_path / "shelf")) as shelf:
        shelf["history"] = history
    command = [sys.executable, "-I", "-X", "utf8", "-c", ELSEWHERE, repr(list(history)), *paths]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=60)


@pytest.mark.parametrize(
    "dump",
    [
        *(lambda value, protocol=protocol: pickle.dumps(value, protocol) for protocol in range(6)),
        lambda value: pickle._dumps(value),
        lambda value: pickle.dumps({"nested": [value, value]}),
        lambda value: bytes(ForkingPickler.dumps(value)),
        lambda value: json.dumps(value).encode(),
        lambda value: yaml.dump(value).encode(),
        lambda value: yaml.dump(value, Dumper=yaml.Dumper).encode(),
        lambda value: yaml.safe_dump(value, allow_unicode=True).encode(),
        lambda value: yaml.safe_dump({"nested": [value]}).encode(),
        repr,
    ],
)
def test_stored_as_a_plain_list_is(history, dump):
    """Byte by byte, or, where pickle says that a list is made, without a name of ours."""
    stored, plain = dump(history), dump(list(history))
    if plain[:1] in ("[", b"[", b"-", b"n"):
        assert stored == plain
    else:
        assert b"qwen" not in stored and b"kept" not in stored and b"ChatHistory" not in stored


def test_what_is_read_back_is_a_list(history):
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        (first, second) = pickle.loads(pickle.dumps([history, history], protocol))
        assert type(first) is list and first == history and first is second
    assert yaml.safe_load(yaml.safe_dump(history)) == [list(turn) for turn in history]
    assert yaml.load(yaml.dump(history), yaml.FullLoader) == list(history)
    buffer = io.BytesIO()
    torch.save(history, buffer)
    buffer.seek(0)
    assert type(torch.load(buffer, weights_only=False)) is list


def test_dill(history):
    dill = pytest.importorskip("dill")
    assert type(dill.loads(dill.dumps(history, recurse=True))) is list


def test_it_goes_on_from_what_is_read_back(chat_model, byte_tokenizer, history):
    expected = chat_model.chat(byte_tokenizer, "r", history)
    for stored in (pickle.loads(pickle.dumps(history)), json.loads(json.dumps(history))):
        assert chat_model.chat(byte_tokenizer, "r", stored) == expected


def test_copies_are_lists_of_their_own(history):
    """Within the process they carry the keys; the turns of a deep copy are apart."""
    history.append(["c", "d"])
    for other in (copy.copy(history), history.copy(), copy.deepcopy(history)):
        assert isinstance(other, list) and other == history == list(history) and other.kept is history.kept
        other.append(("e", "f"))
        assert len(history) == 4
    deep, twice = copy.deepcopy(history), copy.deepcopy([history, history])
    deep[-1][1] = "changed"
    assert history[-1] == ["c", "d"] and twice[0] is twice[1]


def test_texts_of_other_classes_become_plain(chat_model, byte_tokenizer, forced):
    class Question(str, enum.Enum):
        WHY = "why?"

    tools = {"tools": [Tool("look", function=lambda: "x")], "logits_processor": forced("Final Answer: a")}
    reply, history = chat_model.chat(byte_tokenizer, Question.WHY, **tools)
    assert type(reply) is ToolReply
    _, longer = chat_model.chat(byte_tokenizer, "r", [*history, (Question.WHY, reply)], logits_processor=forced("b"))
    _, (batch,) = chat_model.batch_chat(byte_tokenizer, [Question.WHY], [longer], logits_processor=forced("c"))
    assert batch[0] == ("why?", "Final Answer: a") == batch[1] and len(batch) == 4
    assert {type(text) for turn in batch for text in turn} == {str}


def test_a_new_history_is_an_empty_list():
    assert ChatHistory() == [] and pickle.loads(pickle.dumps(ChatHistory())) == []
