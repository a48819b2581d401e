"""Reading replies: what is a call, what is an answer, and that everything else is reported."""

import copy
import json
import pickle
import random

import pytest

from qwen1 import Tool, ToolCall, parse_reply

ADD = {
    "name": "add",
    "parameters": {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}, "words": {"type": "string"}},
        "required": ["a"],
    },
}


@pytest.mark.parametrize(
    ("text", "thought", "name", "arguments"),
    [
        ('Thought: I add.\nAction: add\nAction Input: {"a": 1, "b": 2}', "I add.", "add", {"a": 1, "b": 2}),
        ('Thought: I add.\nAction: add\nAction Input: {"a": 1}\nObservation: 7', "I add.", "add", {"a": 1}),
        ('Action:add\nAction Input:\n{\n  "a": 1\n}\n', "", "add", {"a": 1}),
        (
            'Thought: 一\n二\nAction: add\nAction Input: {"a": 1, "words": "你好\\n"}',
            "一\n二",
            "add",
            {"a": 1, "words": "你好\n"},
        ),
        ('Action: add\nAction Input: {"a": 1}\nObservation: 3\nFinal Answer: 3', "", "add", {"a": 1}),
    ],
)
def test_calls(text, thought, name, arguments):
    reply = parse_reply(text, [ADD])
    assert (reply.thought, reply.call, reply.answer, reply.problem) == (thought, ToolCall(name, arguments), None, None)
    assert text.startswith(reply) and "Observation" not in reply


@pytest.mark.parametrize(
    ("text", "thought", "answer"),
    [
        ("Thought: I now know.\nFinal Answer: 3 and\n4", "I now know.", "3 and\n4"),
        ("Final Answer:", "", ""),
        ("Hello there!", "", "Hello there!"),
        ("Thought: Hello there!", "", "Hello there!"),
        ("", "", ""),
        ('Final Answer: 3\nAction: add\nAction Input: {"a": 1}', "", '3\nAction: add\nAction Input: {"a": 1}'),
        ("The next Action: add, my Action Input: none", "", "The next Action: add, my Action Input: none"),
    ],
)
def test_answers(text, thought, answer):
    reply = parse_reply(text, [ADD])
    assert (reply.thought, reply.call, reply.answer, reply.problem) == (thought, None, answer, None)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("Action: add", "Action: without Action Input:"),
        ("Action: add\nThought: hm", "Action: without Action Input:"),
        ('Action Input: {"a": 1}', "without the name of a tool"),
        ('Action:\nAction Input: {"a": 1}', "without the name of a tool"),
        ('Action: sub\nAction Input: {"a": 1}', "there is no tool 'sub'; the tools are [add]"),
        ('Action: ADD\nAction Input: {"a": 1}', "there is no tool 'ADD'"),
        ('Action: add(1)\nAction Input: {"a": 1}', "there is no tool 'add(1)'"),
        ("Action: __import__('os')\nAction Input: {}", "there is no tool"),
        ("Action: add\nAction Input: ", "no JSON object"),
        ("Action: add\nAction Input: a=1", "no JSON object"),
        ("Action: add\nAction Input: {'a': 1}", "no JSON object"),
        ('Action: add\nAction Input: {"a": 1', "no JSON object"),
        ('Action: add\nAction Input: {"a": 1} and more', "no JSON object"),
        ('Action: add\nAction Input: {"a": 1}\nFinal Answer: 3', "no JSON object"),
        ('Action: add\nAction Input: {"a": 1}\nAction: add\nAction Input: {"a": 2}', "no JSON object"),
        ('Action: add\nAction Input: {"a": 1, "a": 2}', "twice"),
        ('Action: add\nAction Input: {"a": NaN}', "no number of JSON"),
        ('Action: add\nAction Input: {"a": 1e999}', "no number of JSON"),
        ('Action: add\nAction Input: {"a": ' + "9" * 5000 + "}", "no JSON object"),
        ("Action: add\nAction Input: " + "[" * 100_000, "no JSON object"),
        ("Action: add\nAction Input: [1]", "the arguments must be of type object, got [1]"),
        ("Action: add\nAction Input: 1", "the arguments must be of type object"),
        ("Action: add\nAction Input: {}", "the arguments lack 'a'"),
        ('Action: add\nAction Input: {"a": "1"}', "'a' must be of type integer, got '1'"),
        ('Action: add\nAction Input: {"a": true}', "'a' must be of type integer, got True"),
        ('Action: add\nAction Input: {"a": 1, "c": 2}', "unknown name 'c'; known are ['a', 'b', 'words']"),
    ],
    ids=lambda text: text[:60],
)
def test_problems(text, problem):
    reply = parse_reply(text, [ADD])
    assert reply.call is None and reply.answer is None
    assert problem in reply.problem and len(reply.problem) < 500


def test_random_replies_are_a_call_an_answer_or_a_problem():
    """Whatever stands in them, nothing raises, and a call always fits its tool."""
    rng = random.Random(0)
    pieces = [
        "Thought: ", "Action: ", "Action:", "Action Input: ", "Observation:", "Observation", "Final Answer: ", "add",
        "sub", "\n", "\n", "\n", " ", "{", "}", '"a"', '"b"', ": ", ", ", "1", "-2.5", "null", "true", '"x"', "[", "]",
        '{"a": 1}', '{"a": 1}', '{"words": "\\ud800"}', "你", "\ud800", "\x00", "\u2028", "```json\n", "```", "\\", "'",
    ]  # fmt: skip
    forms = ["{}", "Thought: {}\nAction: {}\nAction Input: {}", "Action: add\nAction Input: {}", "Action: add\n{}"]
    forms.append('Action: add\nAction Input: {{"a": 1{}}}')
    kinds = {"call": 0, "answer": 0, "problem": 0}
    for _ in range(6000):
        form = rng.choice(forms)
        parts = ["".join(rng.choices(pieces, k=rng.randint(0, 6))) for _ in range(3)]
        reply = parse_reply(form.format(*parts), [ADD])
        (kind,) = (name for name in kinds if getattr(reply, name) is not None)
        kinds[kind] += 1
        if reply.call:
            assert reply.call.name == "add" and isinstance(reply.call.arguments["a"], int)
    assert min(kinds.values()) > 100, kinds


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda reply: pickle.loads(pickle.dumps(reply))])
def test_copies_of_a_reply_keep_what_it_says(copied):
    reply = parse_reply('Thought: t\nAction: add\nAction Input: {"a": 1}', [ADD])
    other = copied(reply)
    assert other == reply and (other.call, other.thought) == (reply.call, "t")


NESTED = {
    "type": "object",
    "properties": {
        "list": {"type": "array", "items": {"type": "number", "minimum": 0}, "minItems": 1, "maxItems": 2},
        "inner": {"type": "object", "properties": {"x": {"type": "boolean"}}, "required": ["x"]},
        "either": {"anyOf": [{"type": "integer"}, {"type": "array", "items": {"type": "string"}}]},
        "several": {"type": ["string", "null"], "maxLength": 3},
        "none": {"type": "integer", "nullable": True},
        "choice": {"enum": [1, "a", None]},
        "code": {"type": "string", "pattern": "^[a-z]+$", "minLength": 2},
        "below": {"type": "number", "exclusiveMaximum": 1, "exclusiveMinimum": -1},
        "most": {"type": "number", "maximum": 1},
        "any": {},
        "map": {"type": "object", "additionalProperties": {"type": "integer"}},
        "open": {"type": "object"},
    },
}


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        ({"list": [0, 1.5]}, None),
        ({"list": []}, "'list' has minItems 1, got []"),
        ({"list": [1, 2, 3]}, "'list' has maxItems 2"),
        ({"list": [1, -1]}, "'list'[1] has minimum 0, got -1"),
        ({"list": [True]}, "'list'[0] must be of type number, got True"),
        ({"inner": {"x": False}}, None),
        ({"inner": {}}, "'inner' lack 'x'"),
        ({"inner": {"x": 0}}, "'x' must be of type boolean, got 0"),
        ({"inner": {"x": True, "y": 1}}, "unknown name 'y'"),
        ({"either": 5}, None),
        ({"either": ["a"]}, None),
        ({"either": [5]}, "'either' fits none of the forms"),
        ({"several": None}, None),
        ({"several": "abcd"}, "'several' has maxLength 3"),
        ({"several": 1}, "'several' must be of type string or null"),
        ({"none": None}, None),
        ({"none": 1.0}, "'none' must be of type integer"),
        ({"choice": None}, None),
        ({"choice": True}, "'choice' must be one of [1, 'a', None], got True"),
        ({"code": "ab"}, None),
        ({"code": "a"}, "'code' has minLength 2"),
        ({"code": "A1"}, "'code' has pattern '^[a-z]+$'"),
        ({"below": 1}, "'below' has exclusiveMaximum 1"),
        ({"below": -1}, "'below' has exclusiveMinimum -1"),
        ({"most": 1.5}, "'most' has maximum 1"),
        ({"any": [{"x": None}]}, None),
        ({"map": {"p": 1}}, None),
        ({"map": {"p": "1"}}, "'p' must be of type integer"),
        ({"open": {"p": "1"}}, None),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)
def test_arguments_against_a_schema(arguments, fault):
    tool = Tool("t", "", NESTED)
    assert tool.unchecked() == []
    faults = tool.faults(arguments)
    assert faults == [] if fault is None else len(faults) == 1 and fault in faults[0]


def test_extra_names_where_the_schema_allows_them():
    allowed = {**ADD["parameters"], "additionalProperties": True}
    assert Tool("t", "", allowed).faults({"a": 1, "z": 2}) == []
    assert Tool("t", "", {**allowed, "additionalProperties": False}).faults({"a": 1, "z": 2}) != []


def test_parameters_in_the_older_form_are_checked():
    older = [
        {"name": "q", "required": True, "schema": {"type": "string"}},
        {"name": "n", "schema": {"type": "integer"}},
    ]
    tool = Tool("t", "", older)
    assert tool.faults({"q": "a", "n": 1}) == []
    assert len(tool.faults({"n": "1"})) == 2


def test_keywords_that_are_not_checked_are_known():
    schema = {"properties": {"a": {"oneOf": [], "type": "date", "description": "d"}}, "not": {}}
    assert Tool("t", "", schema).unchecked() == ["not", "oneOf", "type date"]
