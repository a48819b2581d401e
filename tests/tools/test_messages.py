"""Messages in OpenAI's form: there, and back."""

import json

import pytest

from qwen1 import ToolResult, parse_reply, read_messages

USER = {"role": "user", "content": "6 times 7?"}
CALL = {"role": "assistant", "content": "I multiply.", "tool_calls": [
    {"id": "1", "type": "function", "function": {"name": "multiply", "arguments": '{"a": 6, "b": 7}'}},
]}  # fmt: skip
OLD_CALL = {"role": "assistant", "content": None, "function_call": {"name": "multiply", "arguments": {"a": 6}}}
WRITTEN = 'Thought: I multiply.\nAction: multiply\nAction Input: {"a": 6, "b": 7}'


def test_a_question_alone():
    assert read_messages([USER]) == ("6 times 7?", [], None)
    parts = [{"type": "text", "text": "6 times "}, {"type": "text", "text": "7?"}]
    system = {"role": "system", "content": "Be brief."}
    assert read_messages([system, {"role": "user", "content": parts}]) == ("6 times 7?", [], "Be brief.")


def test_a_result_continues_the_turn_of_its_call():
    for role in ("tool", "function"):
        query, history, _ = read_messages([USER, CALL, {"role": role, "content": "42"}])
        assert query == ToolResult("42") and history == [("6 times 7?", WRITTEN)]


def test_a_whole_conversation():
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello"},
        USER,
        CALL,
        {"role": "tool", "content": "42"},
        OLD_CALL,
        {"role": "tool", "content": "Error"},
        {"role": "assistant", "content": "It is 42."},
        {"role": "user", "content": "thanks"},
    ]
    again = 'Thought:\nAction: multiply\nAction Input: {"a": 6}'
    final = "Thought: I now know the final answer.\nFinal Answer: It is 42."
    turn = f"{WRITTEN}\nObservation: 42\n{again}\nObservation: Error\n{final}"
    assert read_messages(messages) == ("thanks", [("hi", "hello"), ("6 times 7?", turn)], None)


def test_there_and_back():
    reply = parse_reply(WRITTEN, [{"name": "multiply", "parameters": {}}])
    assert reply.problem, "no parameters are no arguments"
    reply = parse_reply(WRITTEN, [{"name": "multiply", "parameters": {"additionalProperties": True}}])
    message = reply.message()
    assert reply.finish_reason == "tool_calls" and message["content"] == "I multiply."
    (call,) = message["tool_calls"]
    assert (
        json.loads(call["function"]["arguments"]) == {"a": 6, "b": 7}
        and call["id"] != reply.message()["tool_calls"][0]["id"]
    )
    assert read_messages([USER, message, {"role": "tool", "content": "42"}])[1] == [("6 times 7?", WRITTEN)]


@pytest.mark.parametrize(
    ("text", "content"), [("Thought: t\nFinal Answer: 42", "42"), ("Action: divide", "Action: divide"), ("hi", "hi")]
)
def test_what_is_no_call_is_text(text, content):
    reply = parse_reply(text, [{"name": "multiply"}])
    assert reply.finish_reason == "stop" and reply.message() == {"role": "assistant", "content": content}


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "there is nothing to answer"),
        ([USER, CALL], "there is nothing to answer"),
        ([{"role": "system", "content": "s"}], "there is nothing to answer"),
        ([CALL], r"messages\[0\]=.*must be of the role system or user here"),
        ([USER, USER], r"messages\[1\]=.*must be of the role assistant here"),
        ([USER, {"role": "tool", "content": "42"}], r"messages\[1\]=.*must be of the role assistant"),
        ([USER, CALL, USER], r"messages\[2\]=.*must be of the role tool or function"),
        ([USER, {"role": "system", "content": "s"}], r"messages\[1\]=.*must be of the role assistant"),
        (["hi"], r"messages\[0\]='hi' must be of the role"),
        ([{"role": ["user"]}], r"messages\[0\]=.*must be of the role"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "reads text only"),
        ([{"role": "user", "content": 5}], r"messages\[0\]=.*can't be read"),
        ([{"role": "user"}], r"messages\[0\]=.*can't be read.*no content: give it a text"),
        ([{"role": "user", "content": None}], r"messages\[0\]=.*can't be read.*no content: give it a text"),
        ([USER, {"role": "assistant", "content": None}], r"messages\[1\]=.*can't be read.*no content: give it a text"),
        ([USER, CALL, {"role": "tool"}], r"messages\[2\]=.*can't be read.*no content: give it a text"),
        ([USER, {**CALL, "tool_calls": CALL["tool_calls"] * 2}], "several calls at once"),
        ([USER, {**CALL, "tool_calls": [{"function": {"name": "f"}}]}], r"messages\[1\]=.*can't be read"),
    ],
)
def test_other_forms_and_orders(messages, message):
    with pytest.raises(ValueError, match=message):
        read_messages(messages)
