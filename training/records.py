"""What a record of training data says, in any of the forms that are in use.

A conversation becomes a list of messages; one with tools becomes a `ToolConversation`. What fits no form is a
`DataError` that names the turn or the field, and the reader of the file adds its line.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..schemas_qwen import as_tools
from .errors import DataError

Messages = list[dict[str, str]]
"""A conversation: [{"role": "system" | "user" | "assistant", "content": str}, ...]."""


@dataclass
class ToolConversation:
    """A conversation in which tools may be called.

    Attributes:
        messages: as `apply_chat_template` takes them; calls are in `tool_calls`, results have the role `tool`.
        tools: their schemas.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]]


Item = Messages | ToolConversation | str
"""What is learnt from: a conversation, or a text."""

_SYSTEM, _USER, _ASSISTANT, _TOOL = "system", "user", "assistant", "tool"
_CALL = "call"  # an assistant's turn that waits for a result
_ROLES = {
    **dict.fromkeys(["system"], _SYSTEM),
    **dict.fromkeys(["user", "human"], _USER),
    **dict.fromkeys(["assistant", "gpt"], _ASSISTANT),
    **dict.fromkeys(["function_call", "tool_call"], _CALL),
    **dict.fromkeys(["tool", "function", "observation", "tool_response"], _TOOL),
}
_TURNS = {"conversations": ("from", "value"), "messages": ("role", "content")}
_FORMS = (*_TURNS, "instruction")
_READ = {
    **{form: (form, "system", "tools", "functions") for form in _TURNS},
    "instruction": ("instruction", "input", "output", "history", "system"),
    "text": ("text",),
}
_NO_LOSS = {"weight": (None, 1), "loss": (None, True), "train": (None, True)}
"""Keys by which others ask for no loss, or less of it -> the values that don't."""
_FOLLOWS = {_USER: (_ASSISTANT, _CALL), _CALL: (_TOOL,), _TOOL: (_ASSISTANT, _CALL), _ASSISTANT: (_USER,)}
_MUST = {
    _USER: ("user", "user and assistant take turns"),
    _ASSISTANT: ("assistant", "user and assistant take turns"),
    _TOOL: ("tool", "a call is followed by its result"),
}


def parse_conversation(record: Any) -> Messages | ToolConversation:
    """The conversation of one record, whose form is told by its key: `conversations`, `messages` or `instruction`.

    Raises:
        DataError: it is no conversation to train on; the message says why, but not where.
    """
    if not isinstance(record, dict):
        raise DataError(f"a record must be an object, got {shown(record)}")
    keys = [key for key in _FORMS if key in record]
    if len(keys) != 1:
        found = " and ".join(map(repr, keys)) if keys else f"none of them, but {shown(list(record))}"
        raise DataError(f"a record has either 'conversations', 'messages' or 'instruction'; found {found}")
    _refuse_no_loss(record, "the record")
    if keys == ["instruction"]:
        return _parse_alpaca(record)
    turns = record[keys[0]]
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{keys[0]!r} must be a list with a user's and an assistant's turn, got {shown(turns)}")
    parsed = [_parse_turn(turn, number, *_TURNS[keys[0]]) for number, turn in enumerate(turns, start=1)]
    _check_order([kind for kind, _ in parsed])
    messages = [message for _, message in parsed]
    if system := _text_in(record, "system", needed=False):
        if messages[0]["role"] == _SYSTEM:
            raise DataError("'system' is given, and the first turn is a system message too: leave one of them out")
        messages.insert(0, {"role": _SYSTEM, "content": system})
    tools = _parse_tools(record)
    _check_calls(messages, tools)
    return ToolConversation(messages, tools) if tools else messages


def parse_text(record: Any) -> str:
    """The text of a record for continued pretraining.

    Raises:
        DataError: as `parse_conversation`.
    """
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise DataError(f"a record must be an object with a text under 'text', got {shown(record)}")
    _refuse_no_loss(record, "the record")
    if not record["text"].strip():
        raise DataError("the text is empty: leave the record out")
    if "\0" in record["text"]:
        raise DataError("the text holds a NUL character: take it out")
    return record["text"]


def unread_keys(record: Any, plain_texts: bool) -> list[str]:
    """Keys of a record of which nothing becomes of what is under them; `id` is none."""
    if not isinstance(record, dict):
        return []
    form = "text" if plain_texts else next((key for key in _FORMS if key in record), "")
    return [key for key in record if key not in (*_READ.get(form, record), *_NO_LOSS, "id")]


def shown(value: Any) -> str:
    """A value as an error shows it."""
    return f"{value!r:.80}"


# --- turns ---


def _parse_turn(turn: Any, number: int, role_key: str, content_key: str) -> tuple[str, dict[str, Any]]:
    """(kind of the turn, message)."""
    if not isinstance(turn, dict) or role_key not in turn or not (content_key in turn or _has_call(turn)):
        raise DataError(f"turn {number} must be an object with {role_key!r} and {content_key!r}, got {shown(turn)}")
    role, content = turn[role_key], turn.get(content_key)
    if not isinstance(role, str) or role not in _ROLES:
        raise DataError(f"turn {number} has the unknown role {shown(role)}: use system, user, assistant or tool")
    kind = _ROLES[role]
    learnt = kind in (_ASSISTANT, _CALL)
    if learnt:
        _refuse_no_loss(turn, f"turn {number}")
    if _has_call(turn):
        if kind != _ASSISTANT:
            raise DataError(f"turn {number} is the {kind}'s and has a call: only the assistant calls tools")
        kind, content = _CALL, content or ""
    if not isinstance(content, str):
        raise DataError(f"turn {number}: {content_key!r} must be a text, got {shown(content)}")
    if not content.strip() and kind in (_USER, _ASSISTANT):
        raise DataError(f"turn {number} of the {kind} is empty: fill it in, or leave the conversation out")
    if kind == _CALL:
        thought, call = (content, _one_call(turn, number)) if _has_call(turn) else ("", _decoded(content, number))
        message = {"role": _ASSISTANT, "content": thought, "tool_calls": [{"function": _checked(call, number)}]}
    else:
        message = {"role": kind, "content": content}
    if any("\0" in text for text in _strings(message)):
        raise DataError(f"turn {number} holds a NUL character: take it out")
    return kind, message


def _refuse_no_loss(asking: dict[str, Any], name: str) -> None:
    for key, harmless in _NO_LOSS.items():
        if asking.get(key) not in harmless:
            raise DataError(f"{name} asks for no loss ({key!r}), but every answer is learnt: take it out")


def _check_order(kinds: list[str]) -> None:
    offset = int(kinds[0] == _SYSTEM)
    if not {_ASSISTANT, _CALL} & set(kinds):
        raise DataError("no turn is the assistant's, so there is nothing to learn")
    allowed: tuple[str, ...] = (_USER,)
    for place, kind in enumerate(kinds[offset:], start=1 + offset):
        if kind == _SYSTEM:
            raise DataError(f"turn {place} is a system message: only the first one can be")
        if kind not in allowed:
            expected, reason = _MUST[allowed[0]]
            said = "assistant" if kind == _CALL else kind
            reason = "a result follows its call" if kind == _TOOL else reason
            raise DataError(f"turn {place} is the {said}'s, expected the {expected}'s: {reason}")
        allowed = _FOLLOWS[kind]
    if kinds[-1] not in (_ASSISTANT, _CALL):
        raise DataError(f"the last turn is the {kinds[-1]}'s: add the assistant's answer, or take it away")


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


# --- tools ---


def _has_call(turn: dict[str, Any]) -> bool:
    return bool(turn.get("tool_calls") or turn.get("function_call"))


def _one_call(turn: dict[str, Any], number: int) -> Any:
    calls = turn.get("tool_calls") or [turn["function_call"]]
    if not isinstance(calls, list):
        raise DataError(f"turn {number}: 'tool_calls' must be a list with a call, got {shown(calls)}")
    if len(calls) > 1 or (turn.get("tool_calls") and turn.get("function_call")):
        raise DataError(
            f"turn {number} has several calls, but this model makes one and waits for its result: give each a turn of "
            "its own, with its result behind it"
        )
    return calls[0].get("function", calls[0]) if isinstance(calls[0], dict) else calls[0]


def _decoded(content: str, number: int) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(f"turn {number}: a call is JSON with 'name' and 'arguments' ({error})") from error


def _checked(call: Any, number: int) -> dict[str, Any]:
    """A call as the chat template takes it, whose arguments the model could be held to."""
    if not isinstance(call, dict) or not isinstance(call.get("name"), str) or "arguments" not in call:
        raise DataError(f"turn {number}: a call has 'name' and 'arguments', got {shown(call)}")
    arguments = call["arguments"]
    try:
        meant = json.loads(arguments) if isinstance(arguments, str) else arguments
    except (ValueError, RecursionError) as error:
        raise DataError(f"turn {number}: 'arguments' of {call['name']!r:.80} are no JSON ({error})") from error
    if not isinstance(meant, dict):
        raise DataError(f"turn {number}: 'arguments' of {call['name']!r:.80} must be an object, got {shown(meant)}")
    return {"name": call["name"], "arguments": arguments}


def _parse_tools(record: dict[str, Any]) -> list[dict[str, Any]]:
    tools = record.get("tools") or record.get("functions")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError) as error:
            raise DataError(f"'tools' must be a list of schemas, or JSON of one ({error})") from error
    if not tools:
        return []
    try:
        as_tools(tools)
    except ValueError as error:
        raise DataError(f"'tools': {error}") from error
    if any("\0" in text for text in _strings(tools)):
        raise DataError("'tools' holds a NUL character: take it out")
    return tools


def _check_calls(messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> None:
    names = list(as_tools(tools)) if tools else []
    for message in messages:
        for call in message.get("tool_calls", ()):
            name = call["function"]["name"]
            if not tools:
                raise DataError(f"{name!r:.80} is called, but the record has no 'tools': describe there what can be")
            if name not in names:
                raise DataError(f"{name!r:.80} is called, which is not among the tools of the record, {names}")


# --- Alpaca ---


def _parse_alpaca(record: dict[str, Any]) -> Messages:
    """`instruction`, `input` behind it, `output`; `history` of earlier pairs, and `system`."""
    asked = [_text_in(record, "instruction"), _text_in(record, "input", needed=False)]
    query = "\n".join(text for text in asked if text.strip())
    if not query:
        raise DataError("'instruction' is empty: fill it in, or leave the record out")
    pairs = [*_history(record), (query, _filled(_text_in(record, "output"), "'output'"))]
    system = _text_in(record, "system", needed=False)  # empty where a table has the column and no value
    messages = [{"role": _SYSTEM, "content": system}] if system else []
    for question, answer in pairs:
        messages += [{"role": _USER, "content": question}, {"role": _ASSISTANT, "content": answer}]
    return messages


def _history(record: dict[str, Any]) -> list[tuple[str, str]]:
    history = record.get("history") or []
    if not isinstance(history, list):
        raise DataError(f"'history' must be a list of pairs of question and answer, got {shown(history)}")
    for number, pair in enumerate(history, start=1):
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise DataError(f"'history', pair {number}: must be question and answer, got {shown(pair)}")
        for text in pair:
            _filled(_no_nul(text, f"'history', pair {number}"), f"'history', pair {number}:")
    return [(question, answer) for question, answer in history]


def _text_in(record: dict[str, Any], key: str, *, needed: bool = True) -> str:
    value = record.get(key)
    if value is None and not needed:
        return ""
    if key not in record:
        raise DataError(f"{key!r} is missing; the record has {shown(list(record))}")
    if not isinstance(value, str):
        raise DataError(f"{key!r} must be a text, got {shown(value)}")
    return _no_nul(value, repr(key))


def _no_nul(text: str, place: str) -> str:
    if "\0" in text:
        raise DataError(f"{place} holds a NUL character: take it out")
    return text


def _filled(text: str, place: str) -> str:
    if not text.strip():
        raise DataError(f"{place} is empty: fill it in, or leave the record out")
    return text
