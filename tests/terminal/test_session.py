"""The conversation's loop, without a terminal."""

import os
import signal

import pytest

from qwen1.terminal.colon_commands import Commands
from qwen1.terminal.plain import PlainDisplay
from qwen1.terminal.session import converse, talk


class Typed:
    """A reader of messages that were typed before."""

    def __init__(self, *texts):
        self.texts = list(texts)

    def read(self):
        return self.texts.pop(0) if self.texts else None


@pytest.fixture
def speak(conversation, capsys):
    """Hold a conversation of these messages: -> (standard output, standard error)."""

    def run(*texts, **options):
        converse(conversation, Commands(conversation, lambda: None, **options), Typed(*texts), PlainDisplay())
        return capsys.readouterr()

    return run


@pytest.fixture
def interrupted_stream(conversation, monkeypatch):
    """Let Ctrl-C be pressed after some texts of the next reply: (*texts, presses)."""

    def prepare(*texts, presses=1):
        def stream(*arguments, **settings):
            yield from texts
            for _ in range(presses):
                os.kill(os.getpid(), signal.SIGINT)
            yield "too late"

        monkeypatch.setattr(type(conversation.model), "chat_stream", stream)

    return prepare


def test_replies_and_commands(speak, conversation):
    out, err = speak("12+34=?", ":seed 3", ":his", ":q", "never said")
    assert out.splitlines() == [
        "2+4=6, 1+3=4. 12+34=46",
        "The seed is 3.",
        "[1] User: 12+34=?",
        "[1] Assistant: 2+4=6, 1+3=4. 12+34=46",
    ]
    assert err == ""


def test_errors_do_not_end_the_conversation(speak, conversation, monkeypatch):
    answer = type(conversation.model).chat_stream

    def refuse_some(model, tokenizer, query, *args, **kwargs):
        if query == "too long":
            raise ValueError("no room")
        return answer(model, tokenizer, query, *args, **kwargs)

    monkeypatch.setattr(type(conversation.model), "chat_stream", refuse_some)
    out, err = speak(":nonsense", "too long", "12+34=?")
    assert "`:nonsense` is unknown" in err and "no room" in err
    assert out.splitlines()[-1] == "2+4=6, 1+3=4. 12+34=46"
    assert len(conversation.history) == 1


def test_a_blank_before_the_colon_makes_it_a_message(speak, conversation):
    speak(" :help")
    assert conversation.history[0][0] == ":help"


def test_several_lines_are_one_message(speak, conversation):
    speak('"""\nHello\nthere\n"""')
    assert [query for query, _ in conversation.history] == ["Hello\nthere"]


def test_statistics_follow_replies_on_request(speak):
    assert "tokens/s" in speak("你好", show_statistics=True).out
    assert "tokens/s" not in speak("你好").out
    assert "tokens/s" in speak(":stats").out
    assert "tokens/s" in speak(":stats on", "你好").out


@pytest.mark.parametrize("presses", [1, 2])
def test_ctrl_c_stops_the_reply_and_keeps_the_conversation(speak, conversation, interrupted_stream, presses):
    interrupted_stream("some", "some text", presses=presses)
    out, _ = speak("tell me", ":his")
    assert "(Stopped.)" in out and "too late" not in out
    assert conversation.history == [("tell me", "some text")]


def test_ctrl_c_before_the_reply_began(speak, conversation, interrupted_stream):
    interrupted_stream()
    assert "forgotten" in speak("tell me").out
    assert conversation.history == []


def test_ctrl_c_means_what_it_did_before_once_the_reply_is_over(conversation, interrupted_stream):
    interrupted_stream("x")
    before = signal.getsignal(signal.SIGINT)
    assert talk(conversation, "hello", PlainDisplay()) is True
    assert signal.getsignal(signal.SIGINT) is before
