"""Conversations on file: JSON that is also a record of training data for `qwen1-finetune`."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .errors import CommandError

_TURN = ("user", "assistant")


def save(path: Path, system: str, turns: Iterable[tuple[str, str]], overwrite: bool = False) -> None:
    """Write `{"messages": [{"role": …, "content": …}, …]}` on one line; the file appears when it is complete.

    Raises:
        CommandError: there is a file already and `overwrite` isn't set, or it can't be written.
    """
    messages = [{"role": "system", "content": system}]
    for turn in turns:
        messages += [{"role": role, "content": content} for role, content in zip(_TURN, turn, strict=True)]
    content = json.dumps({"messages": messages}, ensure_ascii=False) + "\n"
    try:
        exists = path.exists()
        if overwrite or not exists:
            _replace(path.resolve(), content.encode())
    except (OSError, ValueError) as error:
        raise CommandError(f"{path} can't be written: {getattr(error, 'strerror', None) or error}.") from error
    if exists and not overwrite:
        raise CommandError(f"{path} exists: choose another name, or overwrite it with `:save! {path}`.")


def _replace(path: Path, content: bytes) -> None:
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def load(path: Path) -> tuple[str | None, list[tuple[str, str]]]:
    """Read the system message, None if there is none, and the turns.

    Raises:
        CommandError: the file can't be read, or holds something else.
    """
    try:
        record = json.loads(path.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise CommandError(f"{path} can't be read: {error.strerror or error}.") from error
    except (ValueError, RecursionError) as error:  # no UTF-8, no JSON
        raise CommandError(f"{path} is damaged, or no saved conversation: {error}.") from error
    try:
        return _parse(record)
    except ValueError as error:
        raise CommandError(f"{path} is no saved conversation: {error}.") from error


def _parse(record: Any) -> tuple[str | None, list[tuple[str, str]]]:
    messages = record.get("messages") if isinstance(record, dict) else None
    if not isinstance(messages, list):
        raise ValueError('it must be an object with a list under "messages"')
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise ValueError(f'message {number} must have a text under "content", got {message!r:.60}')
        message["content"].encode()  # which refuses halves of characters
    roles = [message.get("role") for message in messages]
    texts = [message["content"] for message in messages]
    first = int(roles[:1] == ["system"])
    for number, role in enumerate(roles[first:]):
        if role != _TURN[number % 2]:
            expected = _TURN[number % 2]
            raise ValueError(f"message {number + first + 1} has the role {role!r:.60}, expected {expected!r}")
    if len(roles) % 2 != first:
        raise ValueError("the last message has no answer")
    return texts[0] if first else None, list(zip(texts[first::2], texts[first + 1 :: 2], strict=True))
