"""`qwen1-chat` as its users see it: in a pseudo-terminal."""

import json

import pytest

from qwen1.terminal.editor import LEAVING

pytestmark = pytest.mark.slow

CTRL_C, CTRL_D, ENTER, ALT_ENTER, UP = "\x03", "\x04", "\r", "\x1b\r", "\x1b[A"
PROMPT = "\n>"

# The model writes what the question asks for; a reply to "slowly" takes its time.
OBEDIENT = """
import time, torch
from transformers import LogitsProcessor
from qwen1 import QWenLMHeadModel

REPLIES = {replies!r}

class Obedient(LogitsProcessor):
    def __init__(self, reply):
        self.left = [*reply.encode(), 258]
        self.pause = 0.05 if reply.startswith("Once") else 0

    def __call__(self, input_ids, scores):
        time.sleep(self.pause)
        chosen = torch.full_like(scores, -torch.inf)
        chosen[:, self.left.pop(0)] = 0
        return chosen

chat_stream = QWenLMHeadModel.chat_stream

def obey(model, tokenizer, query, *arguments, **settings):
    reply = REPLIES.get(query, f"You said {{query!r}}.")
    return chat_stream(model, tokenizer, query, *arguments, logits_processor=[Obedient(reply)], **settings)

QWenLMHeadModel.chat_stream = obey
"""
LONG = "\n\n".join(f"Paragraph **{number}**." for number in range(60))


@pytest.fixture
def start_obedient(start, checkpoint_folder):
    """Start a conversation with a checkpoint in the published format that gives these replies: {query: reply}."""

    def start_it(replies, *arguments, **options):
        program = start(
            *("--checkpoint", checkpoint_folder, "--max-new-tokens", 5000),
            *arguments,
            preparation=OBEDIENT.format(replies=replies),
            **options,
        )
        program.wait_for(PROMPT)
        return program

    return start_it


def test_a_conversation_with_the_shipped_model(start, tmp_path):
    program = start("--stats")
    program.wait_for(PROMPT)
    program.type(f"My name is Tavolin. 👋{ENTER}")
    program.wait_for("tokens/s")
    program.type(f"你叫什么名字？{ENTER}")
    program.wait_for("qwen-tiny-chat", times=2)
    program.wait_for("tokens/s", times=2)
    program.type(f":stats off{ENTER}What is my name?{ENTER}")
    program.wait_for("Tavolin", times=3)
    program.type(f":save {tmp_path / 'talk.json'}{ENTER}")
    program.wait_for("Saved 3 turns")
    program.type(f":config top_p=2{ENTER}:nonsense{ENTER}:q{ENTER}")
    assert program.end() == 0
    shown = "\n".join(program.lines())
    assert "> My name is Tavolin. 👋" in shown and "> 你叫什么名字？" in shown
    assert shown.count("tokens/s") == 2
    assert "top_p=2" in shown and "`:nonsense` is unknown" in shown
    messages = json.loads((tmp_path / "talk.json").read_text(encoding="utf-8"))["messages"]
    assert messages[1]["content"] == "My name is Tavolin. 👋" and len(messages) == 7


def test_a_reply_longer_than_the_screen_is_there_when_scrolled_back(start_obedient):
    program = start_obedient({"tell": LONG})
    program.type(f"tell{ENTER}")
    program.wait_for("Paragraph 59.")
    program.type(f"next{ENTER}")
    program.wait_for("You said 'next'.")
    program.type(f":exit{ENTER}")
    assert program.end() == 0
    lines = program.lines()
    first = lines.index("> tell") + 1
    expected = [line for number in range(60) for line in (f"Paragraph {number}.", "")]
    assert lines[first : first + 120] == [*expected[:-1], "> next"]


def test_ctrl_c_stops_the_reply_and_keeps_the_conversation(start_obedient):
    program = start_obedient({"slowly": "Once upon a time. " * 100})
    program.type(f"slowly{ENTER}")
    program.wait_for("Once upon a time.")
    program.type(CTRL_C)
    program.wait_for(PROMPT, times=2)
    assert "(Stopped.)" in program.lines()
    program.type(f"and now?{ENTER}")
    program.wait_for("You said 'and now?'.")
    program.type(f":his{ENTER}")
    program.wait_for("[2] Assistant: You said 'and now?'.")
    assert any(line.startswith("[1] Assistant: Once upon") for line in program.lines())
    program.wait_for(PROMPT, times=4)
    program.type(CTRL_C)
    program.wait_for(PROMPT, times=5)
    assert program.lines().count(LEAVING) == 1
    program.type(CTRL_C)
    assert program.end() == 0
    assert "^C" not in "\n".join(program.lines())


def test_escape_sequences_of_a_reply_are_shown_not_obeyed(start_obedient):
    program = start_obedient({"attack": "before \x1b]0;owned\x07 \x1b[2J &#x202e; after\n\n`\x1b[31m`"})
    program.type(f"attack{ENTER}")
    program.wait_for("[31m")
    program.type(f":his{ENTER}")
    program.wait_for(PROMPT, times=3)
    program.type(CTRL_D)
    assert program.end() == 0
    assert "> attack" in program.lines()
    for sequence in (b"\x1b]0;owned", b"\x07", b"\x1b[2J", b"\x1b[31m", "\u202e".encode()):
        assert sequence not in program.output


def test_several_lines_and_earlier_messages(start_obedient):
    program = start_obedient({})
    messages = (
        (f"one{ALT_ENTER}two", r"one\ntwo"),
        ("\x1b[200~three\nfour\n五\x1b[201~", r"three\nfour\n五"),
        (f"six\\{ENTER}seven", r"six\nseven"),
        (f'"""{ENTER}八 👋{ENTER}九{ENTER}"""', r"八 👋\n九"),
    )
    for number, (keys, said) in enumerate(messages, start=1):
        program.type(keys + ENTER)
        program.wait_for(PROMPT, times=number + 1)
        assert f"You said '{said}'." in program.lines()
    program.type(CTRL_D)
    assert program.end() == 0

    program = start_obedient({}, "--no-history")
    program.type(f"{UP}secret{ENTER}")
    program.wait_for("You said 'secret'.")
    program.wait_for(PROMPT, times=2)
    program.type(CTRL_D)
    assert program.end() == 0

    program = start_obedient({}, "--plain")
    program.type(f"{UP}{ENTER}")
    program.wait_for(r"You said '八 👋\n九'.")
    program.wait_for(PROMPT, times=2)
    program.type(CTRL_D)
    assert program.end() == 0
