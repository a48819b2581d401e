"""Training data of every form, and texts to calibrate on: control tokens stand around what was said, never in it."""

import json

import pytest
import torch

from qwen1 import QWenTokenizer
from qwen1.conversion.quantising.calibration import make_rows, read_calibration
from qwen1.training.data import read_conversations, read_texts
from qwen1.training.examples import IGNORED, encode_all
from qwen1.training.preferences import encode_pairs, read_preferences

from .conftest import ATTACKS, SHIPPED, controls, turns


def write(path, records):
    path.write_text("\n".join(json.dumps(record) for record in records), encoding="utf-8")
    return path


TEXTS = [attack.replace("\0", "") for attack in ATTACKS]


def as_published(text):
    said = [("system", text), ("human", text), ("gpt", text)]
    return {"conversations": [{"from": role, "value": content} for role, content in said], "id": text}


def as_messages(text):
    return {"messages": [{"role": role, "content": text} for role in ("system", "user", "assistant")]}


def as_alpaca(text):
    return {"instruction": text, "input": text, "output": text, "system": text, "history": [[text, text]]}


def as_tools(text):
    function = {"name": "look", "description": text, "parameters": {"type": "object", "properties": {text: {}}}}
    call = {"type": "function", "function": {"name": "look", "arguments": {text: text}}}
    said = [("system", text), ("user", text), ("tool", text), ("assistant", text)]
    messages = [{"role": role, "content": content} for role, content in said]
    messages.insert(2, {"role": "assistant", "content": text, "tool_calls": [call]})
    return {"messages": messages, "tools": [{"type": "function", "function": function}]}


@pytest.mark.parametrize(
    "record, count, answers", [(as_published, 3, 1), (as_messages, 3, 1), (as_alpaca, 5, 2), (as_tools, 3, 1)]
)
def test_conversations(tokenizer, tmp_path, record, count, answers):
    examples = encode_all(tokenizer, read_conversations(write(tmp_path / "a.jsonl", map(record, TEXTS)))).examples
    assert len(examples) == len(TEXTS)
    for example in examples:
        assert controls(tokenizer, example["input_ids"]) == turns(count, is_open=False)
        assert controls(tokenizer, [i for i in example["labels"] if i != IGNORED]) == ["<|im_end|>"] * answers


def test_preferences(tokenizer, tmp_path):
    records = [
        {"prompt": text, "system": text, "history": [[text, text]], "chosen": text, "rejected": f"{text}!"}
        for text in TEXTS
    ]
    pairs = encode_pairs(tokenizer, read_preferences(write(tmp_path / "a.jsonl", records)), progress=False).examples
    assert len(pairs) == len(TEXTS)
    for pair in pairs:
        assert controls(tokenizer, pair["prompt_ids"]) == turns(4)
        assert [controls(tokenizer, pair[f"{side}_ids"]) for side in ("chosen", "rejected")] == [["<|im_end|>"]] * 2


def test_texts(tokenizer, tmp_path):
    for path in (write(tmp_path / "a.jsonl", ({"text": text} for text in TEXTS)), tmp_path / "a.txt"):
        if not path.exists():
            path.write_text("\n\n".join(text.encode("utf-8", "replace").decode() for text in TEXTS), newline="")
        for example in encode_all(tokenizer, read_texts(path)).examples:
            assert controls(tokenizer, example["input_ids"]) == ["<|endoftext|>"]


def test_texts_to_calibrate_on(tmp_path):
    """Between which stand an end of text each."""
    tokenizer = QWenTokenizer(SHIPPED / "qwen.tiktoken")  # the class that reads them
    records = [*({"text": text} for text in TEXTS), *map(as_messages, TEXTS)]
    rows = make_rows(read_calibration(write(tmp_path / "a.jsonl", records)), tokenizer, 10**6, 16, 0)
    ids = torch.cat([rows.held_out.flatten(), rows.seen.flatten()]).tolist()
    found = controls(tokenizer, ids)
    left_out = len(found) - found.count("<|endoftext|>")
    assert set(found) == {"<|endoftext|>", "<|im_start|>", "<|im_end|>"}
    assert found.count("<|endoftext|>") <= 2 * len(TEXTS) and left_out <= 6 * len(TEXTS)
