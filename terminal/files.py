"""Conversations on file: JSON that is also a record of training data for `qwen1-finetune`."""

from __future__ import annotations

import json
import os
import stat
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..pieces_qwen import repair_surrogates
from .errors import CommandError

_TURN = ("user", "assistant")


LARGEST = 64 * 2**20
"""Bytes of a conversation on file: a thousand times what a model reads."""


def save(path: Path, system: str, turns: Iterable[tuple[str, str]], overwrite: bool = False) -> None:
    """Write `{"messages": [{"role": …, "content": …}, …]}` on one line; the file appears when it is complete.

    A new file is for its owner alone; one that is there keeps its permissions, and a link stays one. Halves of
    characters, which can't be written, become U+FFFD, as the model reads them.

    Raises:
        CommandError: there is a file already and `overwrite` isn't set, or it can't be written.
    """
    messages = [{"role": "system", "content": system}]
    for turn in turns:
        messages += [{"role": role, "content": content} for role, content in zip(_TURN, turn, strict=True)]
    content = repair_surrogates(json.dumps({"messages": messages}, ensure_ascii=False)) + "\n"
    try:
        found = _stat_of_file(path) if path.exists() else None
        if overwrite or found is None:
            _replace(_target(path), content.encode(), found)
    except (OSError, ValueError, RuntimeError) as error:  # the last one for links in a circle
        raise CommandError(f"{path} can't be written: {getattr(error, 'strerror', None) or error}.") from error
    if found is not None and not overwrite:
        raise CommandError(f"{path} exists: choose another name, or overwrite it with `:save! {path}`.")


def _stat_of_file(path: Path) -> os.stat_result:
    """Raises OSError for what is there but no file; opening a pipe would wait, reading a device never end."""
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        kind = "a directory" if stat.S_ISDIR(found.st_mode) else "a device, a pipe or a socket"
        raise OSError(f"it is {kind}, not a file")
    return found


def _target(path: Path) -> Path:
    """Where a link leads to, so that it stays one."""
    target = path.resolve()
    if target.is_symlink():
        raise OSError("it is a link in a circle")
    return target


def _replace(path: Path, content: bytes, found: os.stat_result | None) -> None:
    """Put a file with this content in the place of what was found there, with the permissions of that."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(descriptor, "wb") as file:
            if found is not None:
                os.chmod(name, stat.S_IMODE(found.st_mode))
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def is_readable(path: Path) -> bool:
    """Whether this is a file of a size that conversations and what was typed in them have."""
    try:
        return _stat_of_file(path).st_size <= LARGEST
    except OSError:
        return False


def load(path: Path) -> tuple[str | None, list[tuple[str, str]]]:
    """Read the system message, None if there is none, and the turns.

    Raises:
        CommandError: the file can't be read, is too large, or holds something else.
    """
    try:
        record = json.loads(_read(path).decode("utf-8-sig"))
    except OSError as error:
        raise CommandError(f"{path} can't be read: {error.strerror or error}.") from error
    except (ValueError, RecursionError) as error:  # no UTF-8, no JSON
        raise CommandError(f"{path} is damaged, or no saved conversation: {error}.") from error
    try:
        return _parse(record)
    except ValueError as error:
        raise CommandError(f"{path} is no saved conversation: {error}.") from error


def _read(path: Path) -> bytes:
    size = _stat_of_file(path).st_size
    with open(path, "rb") as file:
        content = file.read(LARGEST + 1) if size <= LARGEST else b""
    if max(size, len(content)) > LARGEST:  # files that the system makes up say that they are empty
        raise OSError(f"it has {max(size, len(content)):,} bytes, and {LARGEST:,} at most are read")
    return content


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
