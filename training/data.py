"""Files of training data: conversations in several forms, and plain texts.

Every record is checked before anything is trained on; `DataError` names the file, the line and the reason.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from .errors import DataError
from .files import Advanced, records_in, texts_in
from .records import Item, Messages, ToolConversation, parse_conversation, parse_text, unread_keys

__all__ = ["Messages", "parse_conversation", "read_conversations", "read_items", "read_records", "read_texts"]

Record = TypeVar("Record")

_MOST_KEYS = 6  # that are told of; each record may have others


def read_conversations(path: str | os.PathLike) -> list[Messages | ToolConversation]:
    """Read the conversations of a JSON list or of JSON Lines; each record is told apart by its own key.

    | key of the record | what it holds |
    |---|---|
    | `conversations` | `{"from": "system", "user" or "human", "assistant" or "gpt", "value": text}`, as published |
    | `messages` | `{"role": "system", "user" or "assistant", "content": text}` |
    | `instruction` | a text, with `input` behind it; the answer in `output`; `history` of pairs, `system` |

    With `tools` in a record, turns may also be calls (`tool_calls` or `function_call` in an assistant's message, or of
    the role `function_call`, as JSON) and results (of the role `tool`, `function` or `observation`).

    Returns:
        one list of messages for each record: perhaps a system message, then user and assistant in turn, the last of
        which is the assistant. Only a system message may be empty. Of a record with tools, a `ToolConversation`.

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
    return [text for _, text in read_items(path, plain_texts=True)]  # type: ignore[misc]


def read_items(
    path: str | os.PathLike,
    *,
    plain_texts: bool,
    advanced: Advanced = lambda count: None,
    unread: dict[str, int] | None = None,
) -> Iterator[tuple[int, Item]]:
    """(line, item) of a file, a piece of it at a time; a bad record is raised when the file is at its end.

    Args:
        plain_texts: as `read_texts`, else as `read_conversations`.
        advanced: is told how many bytes more have been read.
        unread: gets keys of records that nothing is read from, with the line of the first one.

    Raises:
        DataError, OSError: as these.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if not plain_texts or suffix in (".json", ".jsonl"):
        records = _noted(records_in(path, advanced), plain_texts, {} if unread is None else unread)
        return parsed(path, records, parse_text if plain_texts else parse_conversation)
    if suffix != ".txt":
        raise DataError(
            f"{path} is neither .txt (texts with blank lines between them) nor .jsonl: rename or convert it."
        )
    return texts_in(path, advanced)


def _noted(records: Iterable[tuple[int, Any]], plain_texts: bool, unread: dict[str, int]) -> Iterator[tuple[int, Any]]:
    for line, record in records:
        for key in unread_keys(record, plain_texts):
            if len(unread) < _MOST_KEYS:
                unread.setdefault(key, line)
        yield line, record


def read_records(path: Path, parse: Callable[[Any], Record]) -> list[Record]:
    """What `parse` makes of each record of a JSON list or of JSON Lines.

    Raises:
        DataError: a record that it refuses, by its line, or no JSON.
        OSError: the file can't be read.
    """
    return [record for _, record in parsed(path, records_in(path), parse)]


def parsed(
    path: Path, records: Iterable[tuple[int, Any]], parse: Callable[[Any], Record]
) -> Iterator[tuple[int, Record]]:
    """(line, what `parse` makes of it) for each record, up to the first bad one.

    Raises:
        DataError: at the end, for the first bad record by its line, with the number of those behind it; or no records.
    """
    first, more, good = "", 0, 0
    for line, record in records:
        try:
            item = parse(record)
        except DataError as error:
            more += bool(first)
            first = first or f"{path}, line {line}: {error}"
            continue
        good += 1
        if not first:
            yield line, item
    if first:
        raise DataError(f"{first} (and {more} more bad records)" if more else first)
    if not good:
        raise DataError(f"{path} has no records: give a JSON list, or one JSON object a line.")
