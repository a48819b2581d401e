"""Any reply, tool and schema: read without ever raising, and a call is one that fits its schema."""

import json

from hypothesis import example, given
from hypothesis import strategies as st

from qwen1.schemas_qwen import Tool, as_tools
from qwen1.tools_qwen import OBSERVATION, parse_reply, react_prompt

from .conftest import objects, texts, values

_names = [
    "type",
    "properties",
    "required",
    "items",
    "enum",
    "anyOf",
    "minimum",
    "maxLength",
    "pattern",
    "nullable",
    "a",
]
words = st.sampled_from(
    ["object", "string", "integer", "array", "number", "boolean", "null", "a", "[", "(?P<", "x" * 3]
)
schemas = st.recursive(
    st.dictionaries(st.sampled_from(_names), words | st.lists(words, max_size=2) | values, max_size=3),
    lambda inner: st.dictionaries(
        st.sampled_from(_names),
        inner | st.lists(inner, max_size=2) | st.dictionaries(words, inner, max_size=2),
        max_size=3,
    ),
    max_leaves=5,
)
TOOLS = [
    Tool("f", parameters={"type": "object", "properties": {"a": {"type": "integer", "minimum": 0}}, "required": ["a"]}),
    Tool("g h", parameters={"type": "object", "properties": {"b": {"anyOf": [{"type": "string"}, {"type": "null"}]}}}),
]
steps = st.sampled_from(
    ["Thought: t\n", "Action: f\n", "Action: g h\n", "Action Input: ", '{"a": 1}', '{"b": null}', "\n"]
)
replies = st.lists(steps | texts | values.map(json.dumps), max_size=6).map("".join)


@given(replies)
@example("Action: f\nAction Input: " + "[" * 100_000)
@example('Action: f\nAction Input: {"a": ' + "9" * 5000 + "}")
def test_replies(text):
    reply = parse_reply(text, TOOLS)
    assert [reply.call, reply.answer, reply.problem].count(None) == 2
    assert OBSERVATION not in reply
    assert reply.message()["role"] == "assistant"
    if reply.call is not None:
        (tool,) = [tool for tool in TOOLS if tool.name == reply.call.name]
        assert tool.faults(reply.call.arguments) == []


@given(texts, schemas | values, values)
@example("f", {"nullable": "object"}, None)  # null in place of an object with arguments
@example("f", {"type": ["object", "null"]}, None)
def test_schemas(name, parameters, arguments):
    """What is taken for a schema checks anything; what can't be one is an error when it is given."""
    try:
        tool = Tool(name, parameters=parameters)
    except ValueError as error:
        assert str(error)
        return
    tool.describe()
    tool.unchecked()
    assert all(isinstance(fault, str) for fault in tool.faults(arguments))
    assert (tool.faults(arguments) == []) <= isinstance(arguments, dict)


@given(
    objects | st.lists(objects | st.fixed_dictionaries({"name": texts, "parameters": schemas | values}), max_size=3),
    texts,
)
def test_anything_as_tools(value, query):
    try:
        named = as_tools(value)
    except ValueError as error:
        assert str(error)
    else:
        assert query in react_prompt(query, named.values())
