"""Typing: several lines, pasting, earlier messages, the end."""

import os
import shutil
import stat

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.history import InMemoryHistory
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from qwen1.terminal.editor import LEAVING, Editor, history_file, is_unfinished, message, open_history

ENTER, ALT_ENTER, CTRL_C, CTRL_D, TAB = "\r", "\x1b\r", "\x03", "\x04", "\t"


@pytest.fixture
def typed():
    """What the editor makes of keys: (keys, history) -> the messages, up to the end of the conversation."""

    def read(keys, history=None):
        with create_pipe_input() as keyboard, create_app_session(input=keyboard, output=DummyOutput()):
            keyboard.send_text(keys + CTRL_D)
            editor = Editor(InMemoryHistory() if history is None else history)
            return list(iter(editor.read, None))

    return read


def pasted(text):
    return f"\x1b[200~{text}\x1b[201~"


@pytest.mark.parametrize(
    "keys, sent",
    [
        (f"hello{ENTER}", ["hello"]),
        (f"你好 👋{ENTER}再见{ENTER}", ["你好 👋", "再见"]),
        (f"a{ALT_ENTER}b{ENTER}", ["a\nb"]),
        (f"a\\{ENTER}b\\{ENTER}c{ENTER}", ["a\nb\nc"]),
        (f'"""a{ENTER}b{ENTER}{ENTER}c"""{ENTER}', ['"""a\nb\n\nc"""']),
        (pasted("a\nb\n\nc") + ENTER, ["a\nb\n\nc"]),
        (pasted("a\r\nb\r\n") + ENTER, ["a\nb\n"]),
        (f"{ENTER}  {ENTER}x{ENTER}", ["x"]),
        (f":help{ENTER}", [":help"]),
        (f":hist{TAB}{ENTER}", [":history"]),
    ],
)
def test_messages(typed, keys, sent):
    assert typed(keys) == sent


def test_ctrl_c_gives_a_line_up_and_twice_it_ends(typed, capsys):
    assert typed(f"never sent{CTRL_C}sent{ENTER}{CTRL_C}again{ENTER}{CTRL_C}{CTRL_C}never read{ENTER}") == [
        "sent",
        "again",
    ]
    assert capsys.readouterr().out == f"{LEAVING}\n" * 3


def test_the_history_file_lasts(typed, tmp_path):
    path = tmp_path / "state" / "history"
    assert typed(f"one{ENTER}first\\{ENTER}line{ENTER}", open_history(path)) == ["one", "first\nline"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(open_history(path).load_history_strings()) == ["first\nline", "one"]


def test_a_history_file_that_cannot_be_is_none(typed, tmp_path):
    (tmp_path / "file").write_text("")
    history = open_history(tmp_path / "file" / "history")
    assert typed(f"one{ENTER}", history) == ["one"]
    assert history.get_strings() == ["one"]


def test_a_history_file_that_can_no_longer_be_written_does_not_end_the_conversation(typed, tmp_path):
    history = open_history(tmp_path / "state" / "history")
    shutil.rmtree(tmp_path / "state")
    assert typed(f"one{ENTER}two{ENTER}", history) == ["one", "two"]
    assert history.get_strings() == ["one", "two"]


def test_where_the_history_is(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert history_file().name == "chat_history" and history_file().parent.name == "qwen1"


@pytest.mark.parametrize(
    "text, sent",
    [
        ("  hello ", "hello"),
        ("    indented\n  code\n\n", "    indented\n  code"),
        ('"""a\nb"""', "a\nb"),
        ('"""\n  a\n  b\n"""\n', "  a\n  b"),
        ('""""""', ""),
        ('"""open', '"""open'),
        ('say """x"""', 'say """x"""'),
    ],
)
def test_what_is_sent(text, sent):
    assert message(text) == sent


def test_a_block_is_unfinished_until_its_last_quotation_marks():
    assert is_unfinished('"""') and is_unfinished('"""a\n') and is_unfinished('"""a""" b')
    assert not is_unfinished('"""a"""') and not is_unfinished('""""""') and not is_unfinished("a\n")


@pytest.mark.parametrize("kind", ["pipe", "device", "too large"])
def test_a_history_that_cannot_be_read_stays_in_memory(tmp_path, kind):
    path = tmp_path / "chat_history"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.touch()
        os.truncate(path, 10 * 2**30)
    history = open_history(path)
    history.append_string("hello")
    assert history.get_strings() == ["hello"]
