"""What is said with the calculator and the clock of `programs/tools.py`, in the ReAct form."""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Sequence
from datetime import datetime, timezone

from ...programs.tools import calculator, clock
from ...schemas_qwen import Tool, as_tools

_DESCRIPTIONS = {
    "calculator": ("Calculate a result", "Calculate", "Does sums", "Compute an expression", "计算算式"),
    "clock": ("Tell the date and the time", "Tell the time", "The current date and time", "告诉现在的时间"),
}
_EXPRESSION = (
    "Numbers with +, -, * and / between them",
    "What to calculate",
    "The expression, such as 1+2",
    "要计算的算式",
)

QUESTIONS: dict[str, dict[str, tuple[str, ...]]] = {
    "calculator": {
        "en": ("what is {x}", "{x}=?", "{x}", "how much is {x}", "calculate {x}", "compute {x}", "{x} = ?"),
        "zh": ("{x}等于多少", "{x}=?", "{x}", "计算{x}", "{x}是多少", "算一下{x}", "{x}等于几"),
    },
    "time": {
        "en": ("what time is it", "what is the time", "tell me the time", "how late is it", "what time is it now"),
        "zh": ("现在几点", "几点了", "现在是什么时间", "现在几点了", "请告诉我时间"),
    },
    "date": {
        "en": ("what is the date", "what day is it", "what is today's date", "which date is it today"),
        "zh": ("今天几号", "今天是几月几号", "今天的日期是什么", "今天是什么日子"),
    },
}
ABOUT_TIME = {question for kind in ("time", "date") for texts in QUESTIONS[kind].values() for question in texts}
ANSWERS = {
    "time": {"en": "It is {x}.", "zh": "现在是{x}。"},
    "date": {"en": "Today is {x}.", "zh": "今天是{x}。"},
}
_THOUGHTS = {
    "calculator": {"en": "I need the calculator.", "zh": "我需要计算器。"},
    "clock": {"en": "I look at the clock.", "zh": "我看一下时钟。"},
}
_SIGNS: dict[str, dict[str, tuple[str, ...]]] = {
    "+": {"en": ("+", " + ", " plus "), "zh": ("+", "加")},
    "-": {"en": ("-", " - ", " minus "), "zh": ("-", "减")},
    "*": {"en": ("*", " * ", " times ", "×"), "zh": ("*", "×", "乘以", "乘")},
    "/": {"en": ("/", " / ", " divided by ", "÷"), "zh": ("/", "÷", "除以")},
}
CONCLUSION = "Thought: I now know the final answer.\nFinal Answer: "


def concluded(reply: str) -> str:
    """A reply as it stands in conversations with tools."""
    return reply if reply.startswith("Thought:") else CONCLUSION + reply


@functools.cache
def _shipped() -> dict[str, Tool]:
    """Read from the functions once, for many thousand conversations."""
    return dict(as_tools([calculator, clock]))


def described(names: Sequence[str], chance: random.Random) -> list[Tool]:
    """Tools with these names, described as here or, now and then, in other words."""
    tools = _shipped()
    if chance.random() < 0.6:
        return [tools[name] for name in names]
    varied = []
    for name in names:
        parameters = json.loads(json.dumps(tools[name].parameters))
        if name == "calculator":
            parameters["properties"]["expression"]["description"] = chance.choice(_EXPRESSION)
        varied.append(Tool(name, chance.choice(_DESCRIPTIONS[name]), parameters))
    return varied


def expression(chance: random.Random, language: str) -> tuple[str, str]:
    """What a calculator is given, and the words of a question for it."""
    parts = [_number(chance)]
    asked = parts[0]
    for _ in range(chance.choice((1, 1, 1, 1, 2, 2, 3))):
        sign, number = chance.choice("+-**/"), _number(chance)
        parts += [sign, number]
        asked += chance.choice(_SIGNS[sign][language]) + number
    written = "".join(parts)
    if len(parts) > 3 and chance.random() < 0.3:  # brackets are asked for as they are written
        written = asked = f"({''.join(parts[:3])}){''.join(parts[3:])}"
    return written, asked


def _number(chance: random.Random) -> str:
    if chance.random() < 0.1:
        return f"{chance.randrange(1, 1000)}.{chance.randrange(1, 100)}"
    return str(chance.randrange(1, 10 ** chance.choice((1, 2, 2, 3, 3, 4, 4, 5, 6))))


def moment(chance: random.Random) -> str:
    """What a clock shows at some time."""
    seconds = chance.randrange(946_684_800, 2_524_608_000)
    return datetime.fromtimestamp(seconds - seconds % 60, timezone.utc).strftime("%Y-%m-%d %H:%M")


def exchange(name: str, arguments: dict[str, str], result: str, answer: str, language: str) -> str:
    """A whole reply: the call, its result, the answer."""
    call = f"Action: {name}\nAction Input: {json.dumps(arguments, ensure_ascii=False)}"
    return f"Thought: {_THOUGHTS[name][language]}\n{call}\nObservation: {result}\n{CONCLUSION}{answer}"
