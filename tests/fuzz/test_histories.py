"""Any history, stored or given: read as it was written, or an error of the command that reads it."""

import json

from hypothesis import example, given
from hypothesis import strategies as st

from qwen1.qwen_generation_utils import ChatHistory, checked_history
from qwen1.terminal.errors import CommandError
from qwen1.terminal.files import load, save
from qwen1.tools_qwen import ToolResult, add_turn, read_messages

from .conftest import damaged, encodable, objects, texts, values

turns = st.lists(st.tuples(texts, texts), max_size=3)
roles = st.sampled_from(["system", "user", "assistant", "tool", "function", "observation"])
calls = st.fixed_dictionaries({"name": texts, "arguments": values})
messages = st.fixed_dictionaries(
    {"role": roles},
    optional={
        "content": texts | values | st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": texts | values})),
        "tool_calls": values | st.lists(calls | st.fixed_dictionaries({"function": calls}), max_size=2),
        "function_call": values | calls,
    },
)
STORED = (
    b'{"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "a"},'
    b' {"role": "assistant", "content": "b"}]}\n'
)


@given(texts, turns)
@example("\ud83d", [])  # half a character: the conversation couldn't be saved
def test_stored_histories(tmp_path_factory, system, given_turns):
    path = tmp_path_factory.getbasetemp() / "conversation.json"
    save(path, system, given_turns, overwrite=True)
    expected = [(encodable(query), encodable(response)) for query, response in given_turns]
    assert load(path) == (encodable(system), expected)


@given(damaged(STORED) | st.binary(max_size=40) | values.map(lambda value: json.dumps(value).encode()))
def test_damaged_files(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "damaged.json"
    path.write_bytes(content)
    try:
        system, found = load(path)
    except CommandError as error:
        assert str(path) in str(error)
    else:
        again = path.with_name("again.json")
        save(again, system or "", found, overwrite=True)
        assert load(again) == (system or "", found)


@given(objects | turns | st.lists(objects, max_size=2))
def test_anything_as_history(value):
    try:
        history = checked_history(value)
    except ValueError as error:
        assert str(error).startswith("history")
    else:
        assert all(isinstance(turn, tuple) and len(turn) == 2 for turn in history)
        assert checked_history(history) == history == [tuple(turn) for turn in value or ()]


@given(st.lists(messages | objects, max_size=4))
def test_anything_as_messages(value):
    try:
        query, history, system = read_messages(value)
    except ValueError as error:
        assert str(error)
        return
    assert isinstance(query, (str, ToolResult)) and isinstance(system, str | None)
    assert all(isinstance(text, str) for turn in history for text in turn)
    assert checked_history(history) == history


@given(turns, texts | texts.map(ToolResult) | st.fixed_dictionaries({"role": roles, "content": texts | values}), texts)
def test_turns_are_added(given_turns, query, reply):
    history = ChatHistory(given_turns)
    try:
        add_turn(history, query, reply)
    except (ValueError, IndexError) as error:
        assert str(error)
    else:
        assert all(isinstance(text, str) for turn in history for text in turn)
        assert history[-1][1].endswith(reply)
