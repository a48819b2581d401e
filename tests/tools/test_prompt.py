"""The prompt that tells the model of its tools, to the letter, and the forms in which tools are given."""

import pytest

from qwen1 import Tool, react_prompt
from qwen1.tools_qwen import as_tools

SEARCH = {
    "name_for_human": "夸克搜索",
    "name_for_model": "quark_search",
    "description_for_model": "夸克搜索是一个通用搜索引擎。",
    "parameters": [
        {"name": "search_query", "description": "搜索关键词或短语", "required": True, "schema": {"type": "string"}}
    ],
}
WEATHER = {
    "name": "get_weather",
    "description": "Get the current weather in a given city.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "unit": {"type": "string", "enum": ["C", "F"]}},
        "required": ["city"],
    },
}
OLDER_FORM = """\
Answer the following questions as best you can. You have access to the following tools:

quark_search: Call this tool to interact with the 夸克搜索 API. What is the 夸克搜索 API useful for? \
夸克搜索是一个通用搜索引擎。 Parameters: [{"name": "search_query", "description": "搜索关键词或短语", \
"required": true, "schema": {"type": "string"}}] Format the arguments as a JSON object.

Use the following format:

Question: the input question you must answer
Thought: you should always think about what to do
Action: the action to take, should be one of [quark_search]
Action Input: the input to the action
Observation: the result of the action
... (this Thought/Action/Action Input/Observation can be repeated zero or more times)
Thought: I now know the final answer
Final Answer: the final answer to the original input question

Begin!

Question: 现在几点了？"""
TWO_TOOLS = """\
Answer the following questions as best you can. You have access to the following tools:

get_weather: Call this tool to interact with the get_weather API. What is the get_weather API useful for? \
Get the current weather in a given city. Parameters: {"type": "object", "properties": {"city": {"type": "string"}, \
"unit": {"type": "string", "enum": ["C", "F"]}}, "required": ["city"]} Format the arguments as a JSON object.

multiply: Call this tool to interact with the multiply API. What is the multiply API useful for? \
Multiply two whole numbers Parameters: {"type": "object", "properties": {"a": {"type": "integer", \
"description": "The first one"}, "b": {"type": "integer", "description": "The second one"}}, "required": ["a", "b"]} \
Format the arguments as a JSON object.

Use the following format:

Question: the input question you must answer
Thought: you should always think about what to do
Action: the action to take, should be one of [get_weather, multiply]
Action Input: the input to the action
Observation: the result of the action
... (this Thought/Action/Action Input/Observation can be repeated zero or more times)
Thought: I now know the final answer
Final Answer: the final answer to the original input question

Begin!

Question: {a} {tools}?"""


def test_one_tool_in_the_older_form():
    assert react_prompt("现在几点了？", [SEARCH]) == OLDER_FORM


def test_two_tools_of_different_forms_and_a_query_with_braces(multiply):
    assert react_prompt("{a} {tools}?", [{"type": "function", "function": WEATHER}, multiply]) == TWO_TOOLS


def test_the_wrapped_schema_is_the_bare_one():
    wrapped = {"type": "function", "function": WEATHER}
    assert as_tools([wrapped]) == as_tools([WEATHER]) == as_tools([Tool(**WEATHER)])


def test_a_schema_without_parameters():
    (tool,) = as_tools([{"name": "now"}]).values()
    assert tool.faults({}) == [] and tool.faults({"a": 1}) != []


def undocumented(a: int):
    return a


async def later():
    """Come later"""


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ([], r"tools=\[\] has no tool"),
        ("get_weather", "tools='get_weather' must be a list"),
        (WEATHER, "must be a list"),
        (5, "tools=5 must be a list"),
        ([WEATHER, WEATHER], "Two tools have the name 'get_weather'"),
        (["get_weather"], "the entry 'get_weather': each must be"),
        ([{"name": "a\nb"}], r"The tool name 'a\\nb' must be"),
        ([{"description": "d"}], "The tool name None must be"),
        ([{"name": "a", "description": 5}], "description=5 of the tool 'a'"),
        ([{"name": "a", "parameters": 5}], "parameters=5 of 'a' is no JSON schema"),
        ([{"name": "a", "parameters": [{"description": "d"}]}], "of 'a' is no JSON schema"),
        ([{"name": "a", "parameters": {"properties": {"b": True}}}], "of 'a' is no JSON schema"),
        ([{"name": "a", "parameters": {"type": "string"}}], "type='string' must be 'object'"),
        ([{"name": "a", "parameters": {"required": "b"}}], "required='b' must be a list"),
        ([{"name": "a", "parameters": {"required": [["b"]]}}], "must hold texts"),
        ([{"name": "a", "parameters": {"properties": {"b": {"minimum": "1"}}}}], "of 'a' is no JSON schema"),
        ([{"name": "a", "parameters": {"properties": {"b": {"pattern": "("}}}}], "of 'a' is no JSON schema"),
        ([{"name": "a", "parameters": {"default": {1, 2}}}], "of 'a' is no JSON schema"),
        ([undocumented], "No schema can be made of .*undocumented.*Give it type hints"),
        ([later], "'later' is async"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_is_no_list_of_tools(tools, message):
    with pytest.raises(ValueError, match=message):
        as_tools(tools)


def test_a_function_that_cannot_be_called():
    with pytest.raises(ValueError, match="function=5 of the tool 'a' can't be called"):
        Tool("a", function=5)
