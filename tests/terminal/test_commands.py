"""The command qwen1-chat without a terminal: its options, single questions, pipes."""

import importlib.util
import io
import json
import os
import signal
import subprocess
import sys

import pytest
from transformers import AutoModelForCausalLM

from qwen1 import QWenLMHeadModel
from qwen1.programs.printing import printable
from qwen1.programs.shipped import TINY_CHAT
from qwen1.qwen_generation_utils import DEFAULT_SYSTEM
from qwen1.terminal.commands import SYSTEM, main, parse_arguments


@pytest.fixture
def piped(monkeypatch):
    """Let standard input be these lines."""
    return lambda *lines: monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))


@pytest.fixture
def streams(monkeypatch):
    """Let the model stream what a function yields: function(model, tokenizer, query, history, system, **settings)."""
    return lambda stream: monkeypatch.setattr(QWenLMHeadModel, "chat_stream", stream)


def test_one_question_to_the_shipped_model(capsys):
    assert main(["12+34=?"]) == 0
    assert capsys.readouterr() == ("2+4=6, 1+3=4. 12+34=46\n", "")


@pytest.mark.slow
def test_one_question_loads_nothing_for_conversations():
    code = """
import sys
from qwen1.terminal.commands import main
assert main(["12+34=?"]) == 0
print(sorted({"prompt_toolkit", "rich.live", "rich.markdown", "markdown_it"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, encoding="utf-8")
    assert done.stdout.splitlines() == ["2+4=6, 1+3=4. 12+34=46", "[]"], done.stderr


def test_a_question_may_look_like_a_command(capsys, streams):
    streams(lambda model, tokenizer, query, *arguments, **settings: (text for text in [query]))
    assert main([":help"]) == 0
    assert capsys.readouterr().out == ":help\n"


def test_statistics_stay_out_of_the_reply(capsys):
    assert main(["--stats", "12+34=?"]) == 0
    output = capsys.readouterr()
    assert output.out == "2+4=6, 1+3=4. 12+34=46\n" and "tokens/s" in output.err


def test_a_conversation_from_a_pipe(capsys, piped):
    piped("My name is Tavolin.", "你叫什么名字？", "", "What is my name?")
    assert main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert "Tavolin" in lines[0] and "qwen-tiny-chat" in lines[1] and "Tavolin" in lines[2]


def test_a_conversation_with_a_checkpoint(checkpoint_folder, capsys, piped, streams):
    asked = []
    stream = QWenLMHeadModel.chat_stream

    def record(model, tokenizer, query, history, system, stopping_criteria, **settings):
        asked.append((query, len(history), system, settings))
        return stream(model, tokenizer, query, history, system, stopping_criteria=stopping_criteria, **settings)

    streams(record)
    piped("hello", ":seed 5", "again", ":q", "never asked")
    assert main(["--checkpoint", str(checkpoint_folder), "--system", "Be brief.", "--max-new-tokens", "4"]) == 0
    assert asked == [
        ("hello", 0, "Be brief.", {"max_new_tokens": 4}),
        ("again", 1, "Be brief.", {"max_new_tokens": 4, "seed": 5}),
    ]
    assert capsys.readouterr().err == ""


def test_a_command_that_fails_ends_a_pipe(capsys, piped):
    piped("12+34=?", ":load missing.json", "never asked")
    assert main([]) == 1
    output = capsys.readouterr()
    assert output.out == "2+4=6, 1+3=4. 12+34=46\n"
    assert output.err.startswith("qwen1-chat: missing.json can't be read")


def test_the_reply_is_printed_as_it_grows(checkpoint_folder, capsys, streams):
    streams(lambda *arguments, **settings: (text for text in ["He", "Hello", "Hello \x1b[2J you"]))
    assert main(["--checkpoint", str(checkpoint_folder), "hi"]) == 0
    assert capsys.readouterr().out == "Hello \N{REPLACEMENT CHARACTER}[2J you\n"


@pytest.mark.parametrize("question", [["first"], []])
def test_ctrl_c_ends_with_what_was_written(checkpoint_folder, capsys, piped, streams, question):
    def stream(*arguments, **settings):
        yield "some"
        os.kill(os.getpid(), signal.SIGINT)
        yield "some text"

    streams(stream)
    piped("first", "never asked")
    assert main(["--checkpoint", str(checkpoint_folder), *question]) == 130
    assert capsys.readouterr().out == "some\n"


def test_a_missing_checkpoint_is_an_error(capsys, tmp_path):
    assert main(["--checkpoint", str(tmp_path / "none"), "hi"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("qwen1-chat: ") and "none" in error


def test_packages_that_few_bits_need_are_named(capsys, checkpoint_folder, monkeypatch):
    """As a published Int4 folder asks for."""
    config = json.loads((checkpoint_folder / "config.json").read_text())
    quantization = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    (checkpoint_folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    find = importlib.util.find_spec
    absent = ("gptqmodel", "optimum")
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *more: None if name in absent else find(name, *more))
    assert main(["--checkpoint", str(checkpoint_folder), "hello"]) == 1
    assert "pip install gptqmodel optimum" in capsys.readouterr().err


def test_a_limit_that_cannot_be_is_an_error(capsys):
    assert main(["--max-new-tokens", "0", "hi"]) == 1
    assert "max_new_tokens=0" in capsys.readouterr().err


def test_help_shows_examples(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    output = capsys.readouterr().out
    assert "--checkpoint" in output and 'qwen1-chat "你好"' in output


def test_the_system_message_is_that_of_the_chats():
    assert SYSTEM == DEFAULT_SYSTEM


def test_control_characters_do_not_reach_the_terminal():
    for text in ("a\tb\nc 你好 👍", "第一段\u3000你好\u00a0x 👨\u200d👩\u200d👧"):
        assert printable(text) == text
    assert printable("a\u202eb\u2066c") == "a\N{REPLACEMENT CHARACTER}b\N{REPLACEMENT CHARACTER}c"
    assert printable("\x1b]0;title\x07\r") == "\N{REPLACEMENT CHARACTER}]0;title" + "\N{REPLACEMENT CHARACTER}" * 2


# --- the checkpoint and the question ---


@pytest.fixture
def parsed(checkpoint_folder, monkeypatch):
    """Parse a line where the folder `model` is a checkpoint: (*words) -> checkpoint, question."""
    checkpoint_folder.rename(checkpoint_folder.with_name("model"))
    monkeypatch.chdir(checkpoint_folder.parent)

    def parse(*words):
        options = parse_arguments(words)
        return str(options.checkpoint), options.query

    return parse


@pytest.mark.parametrize(
    "words, checkpoint, question",
    [
        (["model"], "model", None),
        (["./model", "Hello"], "./model", "Hello"),
        (["model", "Tell", "me", "more."], "model", "Tell me more."),
        (["model", "--seed", "1", "Hello", "--stats"], "model", "Hello"),
        (["model", "-m", "Hello"], "model", "Hello"),
        (["-c", "model"], "model", None),
        (["--checkpoint-path", "model", "Hello"], "model", "Hello"),
        (["--checkpoint", "model", "and/or"], "model", "and/or"),
        (["Qwen/Qwen-7B-Chat"], "Qwen/Qwen-7B-Chat", None),
        (["./modle", "Hello"], "./modle", "Hello"),
        (["model", "--", "-3+4=?"], "model", "-3+4=?"),
        (["你好"], str(TINY_CHAT), "你好"),
        (["Tell", "me", "more."], str(TINY_CHAT), "Tell me more."),
        (["-m", "Qwen/Qwen-7B-Chat"], str(TINY_CHAT), "Qwen/Qwen-7B-Chat"),
        ([""], str(TINY_CHAT), ""),
        ([], str(TINY_CHAT), None),
    ],
)
def test_what_is_the_checkpoint_and_what_the_question(parsed, words, checkpoint, question):
    assert parsed(*words) == (checkpoint, question)


@pytest.mark.parametrize(
    "words, said",
    [
        (["Hello", "model"], "model is the folder of a model: name it first, as in qwen1-chat model 'Hello'"),
        (["-c", "model", "model"], "two checkpoints, model and model"),
        (["-c", "model", "./other", "Hello"], "two checkpoints, model and ./other"),
        (["model", "Hello", "-m", "Bye"], "two questions, 'Hello' and 'Bye' of -m"),
    ],
)
def test_what_is_named_twice_is_wrong_usage(parsed, capsys, words, said):
    with pytest.raises(SystemExit) as end:
        parsed(*words)
    assert end.value.code == 2 and said in capsys.readouterr().err


def test_a_folder_that_is_asked_as_a_question_is_pointed_out(parsed, capsys):
    assert parsed("-m", "model") == (str(TINY_CHAT), "model")
    assert "the question 'model' is the name of a folder" in capsys.readouterr().err


def test_the_options_of_the_published_demo(parsed):
    options = parse_arguments(["-c", "model", "-s", "1234", "--cpu-only"])
    assert (options.checkpoint, options.seed, options.cpu_only, options.query) == ("model", 1234, True, None)


def test_cpu_only_leaves_accelerators_alone(parsed, monkeypatch, streams, capsys):
    placed = []
    load = AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(
        AutoModelForCausalLM,
        "from_pretrained",
        lambda *names, **options: placed.append(options["device_map"]) or load(*names, **options),
    )
    streams(lambda *arguments, **settings: (text for text in ["Hello"]))
    assert main(["model", "hi"]) == main(["model", "hi", "--cpu-only"]) == 0
    assert placed == ["auto", "cpu"]


def test_a_word_that_is_no_checkpoint_may_have_been_a_question(parsed, capsys):
    assert main(["./nothing"]) == 1
    assert "If it is a question: qwen1-chat -m './nothing'" in capsys.readouterr().err
    assert main(["."]) == 1
    error = capsys.readouterr().err
    assert "name model, for example" in error and "question" not in error
