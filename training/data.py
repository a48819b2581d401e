"""Files of training data: conversations in the published form and as messages, and plain texts.

Every record is checked before anything is trained on; `DataError` names the file, the line and the reason.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from .errors import DataError

Messages = list[dict[str, str]]
"""A conversation: [{"role": "system" | "user" | "assistant", "content": str}, ...]."""

Record = TypeVar("Record")

_ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
_FORMS = {"conversations": ("from", "value"), "messages": ("role", "content")}
_BLANKS = re.compile(r"[ \t\r\n]*")  # what JSON takes for white space
_PARAGRAPH = re.compile(r"\n(?:[ \t]*\n)+")
_DECODER = json.JSONDecoder()


def read_conversations(path: str | os.PathLike) -> list[Messages]:
    """Read the conversations of a JSON list or of JSON Lines; each record is told apart by its own key.

    | key of the record | its items |
    |---|---|
    | `conversations` | `{"from": "system", "user" or "human", "assistant" or "gpt", "value": text}`, as published |
    | `messages` | `{"role": "system", "user" or "assistant", "content": text}` |

    Returns:
        one list of messages for each record: perhaps a system message, then user and assistant in turn, the last of
        which is the assistant. Only a system message may be empty.

    Raises:
        DataError: anything else; the first bad record by its line, and how many more there are.
        OSError: the file can't be read.
    """
    return read_records(Path(path), parse_conversation)


def read_texts(path: str | os.PathLike) -> list[str]:
    """Read texts for continued pretraining: `.txt` with blank lines between them, or records `{"text": text}`.

    Raises:
        DataError: a file without texts, or a bad record, by its line.
        OSError: the file can't be read.
    """
    path = Path(path)
    if path.suffix.lower() in (".json", ".jsonl"):
        return read_records(path, _parse_text)
    if path.suffix.lower() != ".txt":
        raise DataError(
            f"{path} is neither .txt (texts with blank lines between them) nor .jsonl: rename or convert it."
        )
    content = _read_file(path).replace("\r\n", "\n")
    _refuse_nul(path, content)
    return [text.strip("\n") for text in _PARAGRAPH.split(content) if text.strip()]


def parse_conversation(record: Any) -> Messages:
    """The messages of one record.

    Raises:
        DataError: it is no conversation to train on; the message says why, but not where.
    """
    if not isinstance(record, dict):
        raise DataError(f"a record must be an object, got {_shown(record)}")
    keys = [key for key in _FORMS if key in record]
    if len(keys) != 1:
        found = "both" if keys else f"neither, but {_shown(list(record))}"
        raise DataError(f"a record has either 'conversations' or 'messages'; found {found}")
    turns = record[keys[0]]
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{keys[0]!r} must be a list with a user's and an assistant's turn, got {_shown(turns)}")
    messages = [_parse_turn(turn, number, *_FORMS[keys[0]]) for number, turn in enumerate(turns, start=1)]
    _check_order(messages)
    return messages


def _parse_turn(turn: Any, number: int, role_key: str, content_key: str) -> dict[str, str]:
    if not isinstance(turn, dict) or role_key not in turn or content_key not in turn:
        raise DataError(f"turn {number} must be an object with {role_key!r} and {content_key!r}, got {_shown(turn)}")
    role, content = turn[role_key], turn[content_key]
    if not isinstance(role, str) or role not in _ROLES:
        raise DataError(f"turn {number} has the unknown role {_shown(role)}: use system, user or assistant")
    if not isinstance(content, str):
        raise DataError(f"turn {number}: {content_key!r} must be a text, got {_shown(content)}")
    if not content.strip() and role != "system":
        raise DataError(f"turn {number} of the {_ROLES[role]} is empty: fill it in, or leave the conversation out")
    if "\0" in content:
        raise DataError(f"turn {number} holds a NUL character: take it out")
    return {"role": _ROLES[role], "content": content}


def _check_order(messages: Messages) -> None:
    roles = [message["role"] for message in messages]
    offset = int(roles[0] == "system")
    if "assistant" not in roles:
        raise DataError("no turn is the assistant's, so there is nothing to learn")
    for number, role in enumerate(roles[offset:], start=1):
        place, expected = number + offset, "user" if number % 2 else "assistant"
        if role == "system":
            raise DataError(f"turn {place} is a system message: only the first one can be")
        if role != expected:
            raise DataError(f"turn {place} is the {role}'s, expected the {expected}'s: user and assistant take turns")
    if roles[-1] != "assistant":
        raise DataError("the last turn is the user's: add the assistant's answer, or take it away")


def _parse_text(record: Any) -> str:
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise DataError(f"a record must be an object with a text under 'text', got {_shown(record)}")
    if not record["text"].strip():
        raise DataError("the text is empty: leave the record out")
    if "\0" in record["text"]:
        raise DataError("the text holds a NUL character: take it out")
    return record["text"]


# --- records and their lines ---


def read_records(path: Path, parse: Callable[[Any], Record]) -> list[Record]:
    """What `parse` makes of each record of a JSON list or of JSON Lines.

    Raises:
        DataError: a record that it refuses, by its line, or no JSON.
        OSError: the file can't be read.
    """
    content = _read_file(path)
    listed = content.lstrip(" \t\r\n").startswith("[")
    parsed: list[Record] = []
    first, more = "", 0
    for line, record in (_list_records if listed else _line_records)(path, content):
        try:
            parsed.append(parse(record))
        except DataError as error:
            if first:
                more += 1
            first = first or f"{path}, line {line}: {error}"
    if first:
        raise DataError(f"{first} (and {more} more bad records)" if more else first)
    if not parsed:
        raise DataError(f"{path} has no records: give a JSON list, or one JSON object a line.")
    return parsed


def _line_records(path: Path, content: str) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(content.split("\n"), start=1):
        if line.strip(" \t\r"):
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{path}, line {number}: invalid JSON ({error.msg} at column {error.colno}); expected a JSON list, "
                    "or one JSON object a line."
                ) from error
            except (RecursionError, ValueError) as error:  # nested too deep, or a number of too many digits
                raise DataError(f"{path}, line {number}: invalid JSON ({error})") from error


def _list_records(path: Path, content: str) -> Iterator[tuple[int, Any]]:
    """The records of a JSON list, decoded one by one so that each has its line."""
    position = _skip(content, _skip(content, 0) + 1)
    line, counted = 1, 0
    closed = content.startswith("]", position)
    while not closed:
        line, counted = line + content.count("\n", counted, position), position
        try:
            record, position = _DECODER.raw_decode(content, position)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{path}, line {error.lineno}: invalid JSON ({error.msg} at column {error.colno})"
            ) from error
        except (RecursionError, ValueError) as error:
            raise DataError(f"{path}, line {line}: invalid JSON ({error})") from error
        yield line, record
        position = _skip(content, position)
        closed = content.startswith("]", position)
        if not closed and not content.startswith(",", position):
            number = 1 + content.count("\n", 0, position)
            raise DataError(f"{path}, line {number}: invalid JSON (expected ',' or ']' after a record)")
        position = position if closed else _skip(content, position + 1)
    end = _skip(content, position + 1)
    if end < len(content):
        raise DataError(f"{path}, line {1 + content.count(chr(10), 0, end)}: there is more behind the JSON list")


def _skip(content: str, position: int) -> int:
    blanks = _BLANKS.match(content, position)
    return position if blanks is None else blanks.end()


def _read_file(path: Path) -> str:
    raw = path.read_bytes()
    try:
        content = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = 1 + raw.count(b"\n", 0, error.start)
        raise DataError(f"{path}, line {line}: not UTF-8 ({error.reason}); convert the file.") from error
    if not content.strip():
        raise DataError(f"{path} is empty.")
    return content


def _refuse_nul(path: Path, content: str) -> None:
    if (position := content.find("\0")) >= 0:
        line = 1 + content.count("\n", 0, position)
        raise DataError(f"{path}, line {line}: a NUL character; is this a text file?")


def _shown(value: Any) -> str:
    return f"{value!r:.80}"
