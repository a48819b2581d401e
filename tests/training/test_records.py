"""Forms of records beside the published ones: Alpaca, calls of tools in both spellings, system messages apart."""

import json

import pytest

from qwen1.training.data import parse_conversation, read_conversations, read_items
from qwen1.training.errors import DataError
from qwen1.training.records import ToolConversation, parse_text

WEATHER = {
    "name": "get_weather",
    "description": "Get the weather.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
ALPACA = {"instruction": "Name a colour.", "input": "", "output": "Red."}
USER = {"role": "user", "content": "How is Rome?"}
ANSWER = {"role": "assistant", "content": "Sunny."}
RESULT = {"role": "tool", "tool_call_id": "1", "content": "18 degrees"}
FUNCTION = {"name": "get_weather", "arguments": {"city": "Rome"}}


def call(function=None, content="I look.", **more):
    return {"role": "assistant", "content": content, "tool_calls": [{"function": function or FUNCTION}], **more}


def with_tools(*messages, tools=(WEATHER,)):
    return {"messages": list(messages), "tools": list(tools)}


CALLED = with_tools(USER, call(), RESULT, ANSWER)


# --- Alpaca ---


def said(*contents, system=None):
    roles = ["user", "assistant"] * (len(contents) // 2)
    turns = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
    return turns if system is None else [{"role": "system", "content": system}, *turns]


@pytest.mark.parametrize("more", [{}, {"system": "", "history": []}, {"system": None, "history": None, "input": None}])
def test_alpaca(more):
    assert parse_conversation(ALPACA | more) == said("Name a colour.", "Red.")


def test_alpaca_with_everything():
    record = {"instruction": "And of", "input": "the sky?", "output": "Blue.", "system": "Be brief."}
    record["history"] = [["Hi", "Hello"], ["Name a colour.", "Red."]]
    expected = said("Hi", "Hello", "Name a colour.", "Red.", "And of\nthe sky?", "Blue.", system="Be brief.")
    assert parse_conversation(record) == expected


def test_alpaca_with_the_question_in_its_input():
    assert parse_conversation(ALPACA | {"instruction": "", "input": "What?"}) == said("What?", "Red.")


BAD_ALPACA = {
    "no output": ({"instruction": "a", "outptu": "b"}, "'output' is missing; the record has ['instruction', 'outptu']"),
    "output no text": (ALPACA | {"output": ["Red"]}, "'output' must be a text, got ['Red']"),
    "empty output": (ALPACA | {"output": " "}, "'output' is empty: fill it in, or leave the record out"),
    "no instruction": (ALPACA | {"instruction": None}, "'instruction' must be a text, got None"),
    "empty instruction": (ALPACA | {"instruction": "\n"}, "'instruction' is empty"),
    "input no text": (ALPACA | {"input": 3}, "'input' must be a text, got 3"),
    "system no text": (ALPACA | {"system": {}}, "'system' must be a text, got {}"),
    "NUL": (ALPACA | {"input": "a\0"}, "'input' holds a NUL character"),
    "history no list": (
        ALPACA | {"history": "Hi"},
        "'history' must be a list of pairs of question and answer, got 'Hi'",
    ),
    "history no pair": (ALPACA | {"history": [["a", "b"], ["c"]]}, "'history', pair 2: must be question and answer"),
    "history no text": (ALPACA | {"history": [["a", None]]}, "'history', pair 1: must be question and answer"),
    "history empty": (ALPACA | {"history": [["a", ""]]}, "'history', pair 1: is empty"),
    "history NUL": (ALPACA | {"history": [["\0", "b"]]}, "'history', pair 1 holds a NUL character"),
    "two forms": (ALPACA | {"messages": [USER, ANSWER]}, "found 'messages' and 'instruction'"),
}


@pytest.mark.parametrize("record, reason", BAD_ALPACA.values(), ids=BAD_ALPACA)
def test_bad_alpaca_records(tmp_path, record, reason):
    path = tmp_path / "data.jsonl"
    path.write_text(f"{json.dumps(ALPACA)}\n{json.dumps(record)}\n")
    with pytest.raises(DataError) as error:
        read_conversations(path)
    assert str(error.value).startswith(f"{path}, line 2: ") and reason in str(error.value)


def test_forms_may_be_mixed_in_a_file(tmp_path):
    path = tmp_path / "data.json"
    published = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}
    path.write_text(json.dumps([ALPACA, published, {"messages": [USER, ANSWER]}, CALLED]))
    first, second, third, fourth = read_conversations(path)
    assert (first, second, third) == (said("Name a colour.", "Red."), said("Hi", "Hello"), [USER, ANSWER])
    assert isinstance(fourth, ToolConversation)


# --- system messages apart ---


@pytest.mark.parametrize("key", ["messages", "conversations"])
def test_a_system_message_beside_the_turns(key):
    names = {"messages": ("role", "content"), "conversations": ("from", "value")}[key]
    turns = [dict(zip(names, turn, strict=True)) for turn in (("user", "Hi"), ("assistant", "Hello"))]
    assert parse_conversation({key: turns, "system": "Be brief."}) == said("Hi", "Hello", system="Be brief.")
    assert parse_conversation({key: turns, "system": None}) == said("Hi", "Hello")
    with pytest.raises(DataError, match="'system' is given, and the first turn is a system message too"):
        parse_conversation({key: [dict(zip(names, ("system", "a"), strict=True)), *turns], "system": "b"})


# --- tools ---


def test_calls_of_openai():
    found = parse_conversation(CALLED)
    assert found == ToolConversation(
        [
            USER,
            {"role": "assistant", "content": "I look.", "tool_calls": [{"function": FUNCTION}]},
            {"role": "tool", "content": "18 degrees"},
            ANSWER,
        ],
        [WEATHER],
    )


def test_other_spellings_of_the_same():
    expected = parse_conversation(with_tools(USER, call(content=""), RESULT, ANSWER))
    sharegpt = [
        {"from": "human", "value": "How is Rome?"},
        {"from": "function_call", "value": json.dumps(FUNCTION)},
        {"from": "observation", "value": "18 degrees"},
        {"from": "gpt", "value": "Sunny."},
    ]
    assert parse_conversation({"conversations": sharegpt, "tools": json.dumps([WEATHER])}) == expected
    older = {"role": "assistant", "content": None, "function_call": FUNCTION}
    result = {"role": "function", "name": "get_weather", "content": "18 degrees"}
    assert parse_conversation({"messages": [USER, older, result, ANSWER], "functions": [WEATHER]}) == expected
    bare = {"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": FUNCTION}]}
    nested = [{"type": "function", "function": WEATHER}]
    assert parse_conversation(with_tools(USER, bare, RESULT, ANSWER, tools=nested)).messages == expected.messages


def test_turns_that_are_not_learnt_anyway_may_say_so():
    record = {"messages": [USER | {"loss": False, "weight": 0}, ANSWER | {"loss": True, "weight": 1}]}
    assert parse_conversation(record) == [USER, ANSWER]


@pytest.mark.parametrize("tools", [[], None, ""])
def test_no_tools_are_no_tools(tools):
    assert parse_conversation({"messages": [USER, ANSWER], "tools": tools}) == [USER, ANSWER]


def test_a_call_may_come_last():
    assert parse_conversation(with_tools(USER, call())).messages[-1]["tool_calls"] == [{"function": FUNCTION}]
    assert parse_conversation(with_tools(USER, call(), RESULT, call())).messages[-1]["role"] == "assistant"


BAD_TOOLS = {
    "not described": (
        {"messages": [USER, call(), RESULT, ANSWER]},
        "'get_weather' is called, but the record has no 'to",
    ),
    "another": (
        with_tools(USER, call({"name": "sum", "arguments": {}}), RESULT, ANSWER),
        "'sum' is called, which is not",
    ),
    "several": (
        with_tools(USER, {**call(), "tool_calls": [{"function": FUNCTION}] * 2}, RESULT, ANSWER),
        "turn 2 has sev",
    ),
    "both spellings": (with_tools(USER, call(function_call=FUNCTION), RESULT, ANSWER), "turn 2 has several calls"),
    "no list": (with_tools(USER, {**call(), "tool_calls": FUNCTION}, RESULT), "turn 2: 'tool_calls' must be a list"),
    "no name": (with_tools(USER, call({"arguments": {}}), RESULT, ANSWER), "turn 2: a call has 'name' and 'arguments'"),
    "no arguments": (
        with_tools(USER, call({"name": "get_weather"}), RESULT),
        "turn 2: a call has 'name' and 'arguments'",
    ),
    "no JSON": (
        with_tools(USER, call({"name": "get_weather", "arguments": "Rome"}), RESULT),
        "'get_weather' are no JSON",
    ),
    "no object": (
        with_tools(USER, call({"name": "get_weather", "arguments": "[]"}), RESULT),
        "must be an object, got []",
    ),
    "no result": (
        with_tools(USER, call(), USER, ANSWER),
        "turn 3 is the user's, expected the tool's: a call is followed",
    ),
    "two results": (
        with_tools(USER, call(), RESULT, RESULT),
        "turn 4 is the tool's, expected the assistant's: a result",
    ),
    "no call": (
        with_tools(USER, RESULT, ANSWER),
        "turn 2 is the tool's, expected the assistant's: a result follows its",
    ),
    "result last": (with_tools(USER, call(), RESULT), "the last turn is the tool's: add the assistant's answer"),
    "user calls": (with_tools({**USER, "function_call": FUNCTION}, ANSWER), "turn 1 is the user's and has a call"),
    "result no text": (with_tools(USER, call(), {"role": "tool", "content": {}}), "turn 3: 'content' must be a text"),
    "call no JSON": (
        {
            "conversations": [{"from": "user", "value": "a"}, {"from": "function_call", "value": "b"}],
            "tools": [WEATHER],
        },
        "turn 2: a call is JSON with 'name' and 'arguments'",
    ),
    "tools no JSON": (
        {"messages": [USER, ANSWER], "tools": "get_weather"},
        "'tools' must be a list of schemas, or JSON",
    ),
    "tools no schema": (with_tools(USER, ANSWER, tools=["get_weather"]), "'tools': tools has the entry 'get_weather'"),
    "same names": (
        with_tools(USER, ANSWER, tools=[WEATHER, WEATHER]),
        "'tools': Two tools have the name 'get_weather'",
    ),
    "NUL": (with_tools(USER, call({"name": "get_weather", "arguments": {"a": "\0"}})), "turn 2 holds a NUL character"),
    "NUL in tools": (
        with_tools(USER, ANSWER, tools=[WEATHER | {"description": "\0"}]),
        "'tools' holds a NUL character",
    ),
    "no loss": ({"messages": [USER, ANSWER | {"weight": 0}]}, "turn 2 asks for no loss ('weight')"),
    "no loss either": ({"messages": [USER, ANSWER | {"loss": False}]}, "turn 2 asks for no loss"),
}


@pytest.mark.parametrize("record, reason", BAD_TOOLS.values(), ids=BAD_TOOLS)
def test_bad_records_with_tools(record, reason):
    with pytest.raises(DataError) as error:
        parse_conversation(record)
    assert reason in str(error.value)


# --- keys that aren't read ---


@pytest.mark.parametrize("key, value", [("weight", 0), ("weight", 0.5), ("loss", False), ("train", False)])
@pytest.mark.parametrize("of", ["a turn", "the record", "alpaca", "a text"])
def test_no_loss_is_refused(of, key, value):
    records = {
        "a turn": {"messages": [USER, ANSWER | {key: value}]},
        "the record": {"messages": [USER, ANSWER], key: value},
        "alpaca": ALPACA | {key: value},
        "a text": {"text": "Once.", key: value},
    }
    parse = parse_text if of == "a text" else parse_conversation
    with pytest.raises(DataError, match=f"asks for no loss \\('{key}'\\), but every answer is learnt"):
        parse(records[of])


def test_keys_that_are_not_read_are_told(tmp_path):
    path, turns = tmp_path / "data.jsonl", [USER, ANSWER]
    records = [
        {"id": "a", "messages": turns, "system": "Be brief.", "weight": 1, "loss": True},
        {"messages": turns, "sytem": "Be bad."},
        {"instruction": "Hi", "output": "Ho", "prompt": "x", "sytem": ""},
    ]
    path.write_text("\n".join(map(json.dumps, records)))
    unread = {}
    assert len(list(read_items(path, plain_texts=False, unread=unread))) == 3
    assert unread == {"sytem": 2, "prompt": 3}
    path.write_text(json.dumps({"text": "Once.", **{f"key{n}": n for n in range(9)}}))
    unread = {}
    list(read_items(path, plain_texts=True, unread=unread))
    assert unread == {f"key{n}": 1 for n in range(6)}
