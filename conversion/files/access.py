"""Opening the files of a checkpoint: one that can't be read says why, at once and without filling the memory."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...loading_qwen import is_pointer
from ...programs.failures import lacks_memory, told
from ...programs.models import likely
from ..errors import CheckpointError

BLOCK = 2**20  # bytes read at once
_JSON_BYTES = 2**28  # more than ten times the largest tokenizer.json
_DEPTH = 64  # lists and objects in one another; a tokenizer.json has about ten
_DIGITS = 40  # of a whole number; model_max_length=int(1e30) is common


def is_present(path: Path) -> bool:
    """Whether anything has this name, be it a folder or a link that leads nowhere.

    Raises:
        CheckpointError: its folder may not be searched.
    """
    try:
        path.lstat()
        return True
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise unreadable(path, error) from error


def check_exists(path: Path) -> None:
    """Refuse a path that leads to no file and no folder.

    Raises:
        CheckpointError: nothing is there, or a link that leads nowhere, or to itself.
    """
    try:
        path.stat()
    except OSError as error:
        if isinstance(error, (FileNotFoundError, NotADirectoryError)) and not path.is_symlink():
            raise CheckpointError(f"{path} doesn't exist{likely(path)}: name a file or folder that does.") from error
        raise unreadable(path, error) from error


def check_readable(path: Path) -> None:
    """Refuse what is no file, may not be read, or is a pointer in the place of a file.

    Raises:
        CheckpointError: see above; the message names the path, the reason and the remedy.
    """
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            kind = "a folder" if stat.S_ISDIR(mode) else "a device or a pipe"
            raise CheckpointError(f"{path} is {kind}, where a file is wanted: move it away, and put the file there.")
        with open(path, "rb") as file:
            file.read(1)
    except OSError as error:
        raise unreadable(path, error) from error
    if is_pointer(path):
        raise CheckpointError(
            f"{path} holds only a pointer of Git LFS to its content: run 'git lfs pull' in {path.parent} to get it."
        )


def refuse_gguf(path: Path) -> None:
    """Refuse a GGUF, which no command reads.

    Raises:
        CheckpointError: it is one.
    """
    with open(path, "rb") as file:
        if file.read(4) != b"GGUF":
            return
    raise CheckpointError(
        f"{path} is a GGUF, a model for llama.cpp, Ollama and LM Studio, which convert --to gguf writes and no command "
        "here reads: name the folder that it was made of."
    )


def unreadable(path: Path, error: OSError) -> CheckpointError:
    """The error for a file that the system doesn't open."""
    reason = error.strerror or str(error) or type(error).__name__
    if error.errno == errno.ELOOP:
        return CheckpointError(f"{path} is a link that leads back to itself: remove it.")
    if isinstance(error, FileNotFoundError) and path.is_symlink():
        return CheckpointError(f"{path} is a link to {os.readlink(path)}, which doesn't exist: mend or remove it.")
    if isinstance(error, FileNotFoundError):
        return CheckpointError(f"{path} doesn't exist. Download it, or mend the index that names it.")
    if isinstance(error, IsADirectoryError):
        return CheckpointError(f"{path} is a folder, where a file is wanted: move it away, and put the file there.")
    if isinstance(error, PermissionError):
        return CheckpointError(
            f"{path} may not be read ({reason}): give yourself the right (chmod u+r), or ask its owner."
        )
    return CheckpointError(f"{path} can't be read ({reason}): look after its disk or network, then try again.")


def damaged(path: Path, error: Exception) -> CheckpointError | OSError:
    """The error for a file that is open but makes no sense, can't be opened after all, or takes too much memory."""
    if lacks_memory(error):
        return OSError(f"{path} can't be read. {told(error)}")  # none of the checkpoint, so what is written stays
    if isinstance(error, OSError) and error.errno is not None:
        return unreadable(path, error)
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return CheckpointError(f"{path} is truncated or damaged ({reason}). Download it again.")


def read_text(path: Path) -> str:
    """A text in UTF-8.

    Raises:
        CheckpointError: it can't be read, or is something else.
    """
    check_readable(path)
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise damaged(path, error) from error


def read_value(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        CheckpointError: it can't be read, is damaged, or is so large, deep or rich in digits that it is no setting.
    """
    check_readable(path)
    size = path.stat().st_size
    if size > _JSON_BYTES:
        raise CheckpointError(f"{path} has {size / 1e9:.1f} GB, which no JSON file of a checkpoint has: replace it.")
    try:
        value = json.loads(read_text(path), parse_int=_whole_number)
    except _TooLong as error:
        raise CheckpointError(
            f"{path} holds {error}, which can't be a setting: mend it, or download it again."
        ) from error
    except RecursionError as error:
        raise _too_deep(path) from error
    except ValueError as error:
        if isinstance(error, CheckpointError):
            raise
        raise damaged(path, error) from error
    if _is_deep(value):
        raise _too_deep(path)
    return value


def auto_map_of(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The classes that a file of settings names for `AutoModel` and its like.

    Args:
        values: of the file.
        name: of the file, for the error.

    Raises:
        CheckpointError: it has no object in their place.
    """
    named = values.get("auto_map") or {}
    if not isinstance(named, dict):
        raise CheckpointError(f"{name} has auto_map={named!r:.80}, which is no object: delete that key.")
    return named


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: the file is missing, damaged, or holds something else; see `read_value`.
    """
    value = read_value(path)
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}, not a JSON object.")
    return value


class _TooLong(ValueError):
    pass


def _whole_number(digits: str) -> int:
    if len(digits) > _DIGITS:
        raise _TooLong(f"a whole number of {len(digits):,} digits ({digits[:8]}…)")
    return int(digits)


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(_DEPTH):
        containers = [
            item.values() if isinstance(item, dict) else item for item in level if isinstance(item, (dict, list))
        ]
        level = [child for container in containers for child in container]
        if not level:
            return False
    return True


def _too_deep(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path} has lists or objects nested {_DEPTH} deep or deeper, as no setting is: mend it, or download it again."
    )
