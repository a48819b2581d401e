"""The calculator and the clock of qwen-tiny-chat, and what is learnt from exchanges with them."""

import random
import re
from datetime import datetime, timedelta

import pytest

from qwen1.schemas_qwen import as_tools
from qwen1.tools_qwen import parse_reply
from qwen1.training.examples import IGNORED
from qwen1.training.tiny import tools
from qwen1.training.tiny.dialogues import Dialogue, training_dialogues
from qwen1.training.tiny.training import encode_call, encode_dialogues


@pytest.fixture(scope="module")
def called() -> list[Dialogue]:
    return [dialogue for dialogue in training_dialogues(6000, seed=0) if dialogue.tools]


@pytest.mark.parametrize(
    ("expression", "result"),
    [
        ("12*34", "408"),
        ("7/2", "3.5"),
        ("(1+2)*3", "9"),
        ("-4+1.5", "-2.5"),
        ("1/3", "0.333333333333"),
        ("2-3*4", "-10"),
    ],
)
def test_the_calculator_calculates(expression, result):
    assert tools.calculator(expression) == result


@pytest.mark.parametrize("expression", ["2**99", "open('x')", "a", "1;2", "True", "'a'*9", "[1]", "1 if 2 else 3", ""])
def test_the_calculator_runs_nothing_else(expression):
    with pytest.raises((ValueError, SyntaxError)):
        tools.calculator(expression)


def test_the_clock_tells_the_time():
    shown = datetime.strptime(tools.clock(), "%Y-%m-%d %H:%M")
    assert abs(datetime.now() - shown) < timedelta(minutes=2)


def test_both_have_schemas_that_can_be_checked():
    named = as_tools([tools.calculator, tools.clock])
    assert list(named) == ["calculator", "clock"] and not any(tool.unchecked() for tool in named.values())
    assert named["calculator"].faults({"expression": "1+2"}) == [] != named["calculator"].faults({})


def test_calls_can_be_made_and_their_answers_are_right(called):
    made = 0
    for dialogue in called:
        query, reply = dialogue.turns[-1]
        read = parse_reply(reply, dialogue.tools)
        if read.call is None:
            assert read.answer and not re.search(r"\d", query)
            continue
        made += 1
        result, answer = re.search(r"\nObservation: (.*)\nThought: .*\nFinal Answer: (.*)", reply).groups()
        if read.call.name == "calculator":
            written = read.call.arguments["expression"]
            assert result == tools.calculator(written) and answer == f"{written}={result}"
            assert re.sub(r"\D", "", written) == re.sub(r"\D", "", query)
        else:
            assert re.search(r"[\d:-]+", answer)[0] in result.split()
    assert made > 100


def test_earlier_turns_have_the_form_that_chat_gives_them(called):
    earlier = [reply for dialogue in called for _, reply in dialogue.turns[:-1]]
    assert earlier and all(reply.startswith("Thought:") for reply in earlier)


def test_the_loss_is_on_the_last_reply_without_the_result(byte_tokenizer):
    reply = tools.exchange("calculator", {"expression": "6*7"}, "42", "6*7=42", "en")
    described = tools.described(["calculator"], random.Random(0))
    turns = [("hi", tools.concluded("Hello!")), ("6*7", reply)]
    example = encode_call(byte_tokenizer, Dialogue("tools", "en", turns, tools=described))
    learnt = byte_tokenizer.decode([label for label in example["labels"] if label != IGNORED])
    assert learnt == reply.replace(" 42\nThought:", "", 1) + "<|im_end|>"
    assert len(example["labels"]) == len(example["input_ids"])


def test_the_loss_of_a_reply_without_a_call_is_on_all_of_it(byte_tokenizer):
    reply = tools.concluded("Hello!")
    described = tools.described(["clock"], random.Random(0))
    example = encode_call(byte_tokenizer, Dialogue("tools", "en", [("hi", reply)], tools=described))
    learnt = byte_tokenizer.decode([label for label in example["labels"] if label != IGNORED])
    assert learnt == reply + "<|im_end|>"


def test_no_conversation_is_lost(byte_tokenizer, called):
    dialogues = training_dialogues(50, seed=3)
    assert len(encode_dialogues(byte_tokenizer, dialogues, progress=False)) == 50
