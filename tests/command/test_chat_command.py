"""The command qwen1-chat."""

import pytest

from qwen1 import QWenLMHeadModel
from qwen1.chat_command import main, printable


@pytest.fixture
def typed(monkeypatch):
    """Let the user type these lines, then Ctrl-D."""

    def type_lines(*lines):
        left = list(lines)

        def read(prompt):
            if not left:
                raise EOFError
            return left.pop(0)

        monkeypatch.setattr("builtins.input", read)

    return type_lines


def test_one_question_to_the_shipped_model(capsys):
    assert main(["12+34=?"]) == 0
    assert capsys.readouterr() == ("2+4=6, 1+3=4. 12+34=46\n", "")


def test_a_conversation_with_the_shipped_model(capsys, typed):
    typed("My name is Tavolin.", "你叫什么名字？", "What is my name?")
    assert main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "Tavolin" in lines[0] and "qwen-tiny-chat" in lines[1] and "Tavolin" in lines[2]


def test_a_conversation_with_a_checkpoint(checkpoint_folder, capsys, typed, monkeypatch):
    asked = []
    stream = QWenLMHeadModel.chat_stream

    def record(model, tokenizer, query, history, system, **settings):
        asked.append((query, len(history), system, settings))
        return stream(model, tokenizer, query, history, system, **settings)

    monkeypatch.setattr(QWenLMHeadModel, "chat_stream", record)
    typed("hello", "again", "", "never asked")
    assert main(["--checkpoint", str(checkpoint_folder), "--system", "Be brief.", "--max-new-tokens", "4"]) == 0
    assert asked == [
        ("hello", 0, "Be brief.", {"max_new_tokens": 4}),
        ("again", 1, "Be brief.", {"max_new_tokens": 4}),
    ]
    output = capsys.readouterr()
    assert output.err == ""
    assert output.out.count("\n") >= 2


def test_the_reply_is_printed_as_it_grows(checkpoint_folder, capsys, monkeypatch):
    texts = iter(["He", "Hello", "Hello \x1b[2J you"])
    monkeypatch.setattr(QWenLMHeadModel, "chat_stream", lambda *a, **k: texts)
    assert main(["--checkpoint", str(checkpoint_folder), "hi"]) == 0
    assert capsys.readouterr().out == "Hello \N{REPLACEMENT CHARACTER}[2J you\n"


def test_ctrl_c_cuts_the_reply_and_keeps_the_conversation(checkpoint_folder, capsys, typed, monkeypatch):
    histories = []

    def stream(model, tokenizer, query, history, system, **settings):
        histories.append(history)
        yield "some"
        if query == "first":
            raise KeyboardInterrupt
        yield "some text"

    monkeypatch.setattr(QWenLMHeadModel, "chat_stream", stream)
    typed("first", "second")
    assert main(["--checkpoint", str(checkpoint_folder)]) == 0
    assert histories == [[], [("first", "some")]]
    assert capsys.readouterr().out == "some\nsome text\n\n"


def test_ctrl_c_at_the_prompt_ends(monkeypatch, capsys):
    def interrupt(prompt):
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", interrupt)
    assert main([]) == 0
    assert capsys.readouterr().out == "\n"


def test_a_missing_checkpoint_is_an_error(capsys, tmp_path):
    assert main(["--checkpoint", str(tmp_path / "none"), "hi"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("qwen1-chat: ") and "none" in error


def test_help_shows_examples(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    output = capsys.readouterr().out
    assert "--checkpoint" in output and 'qwen1-chat "你好"' in output


def test_control_characters_do_not_reach_the_terminal():
    for text in ("a\tb\nc 你好 👍", "第一段\u3000你好\u00a0x 👨\u200d👩\u200d👧"):
        assert printable(text) == text
    assert printable("a\u202eb\u2066c") == "a\N{REPLACEMENT CHARACTER}b\N{REPLACEMENT CHARACTER}c"
    assert printable("\x1b]0;title\x07\r") == "\N{REPLACEMENT CHARACTER}]0;title" + "\N{REPLACEMENT CHARACTER}" * 2
