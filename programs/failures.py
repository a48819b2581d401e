"""What the machine refuses, be it space, rights or memory, and weights that are damaged: a sentence with what helps."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

MORE_MEMORY = "end other programs, or take a smaller model or a machine with more"

_NO_MEMORY = re.compile(
    r"cannot allocate|can't allocate|out of memory|not enough memory|bad_alloc|can't start new thread"
    r"|failed to map segment|os error 12\b|memory allocation of",
    re.IGNORECASE,
)
_BYTES = re.compile(r"(?:allocate|mmap|allocation of) (\d+) bytes")
_NUMBER = re.compile(r"\(os error (\d+)\)")
"""How safetensors, which is no Python, tells what the system said."""
TORCH_WRITING = re.compile(r"inline_container|StreamWriter|iostream", re.IGNORECASE)
_READING = re.compile(r"PytorchStreamReader|deserializing")
"""In what torch and safetensors say of a file that makes no sense."""

_RIGHT = "may not be used ({reason}): give yourself the right (chmod u+rw, of its folder too), or name another"
_SENTENCES = {
    errno.ENOSPC: "can't be written, for no space is left on its disk: free some, or write to another disk",
    errno.EDQUOT: "can't be written, for your quota of its disk is used up: free some, or write elsewhere",
    errno.EFBIG: "can't be written, for the system lets no file become so long: raise the limit (ulimit -f)",
    errno.EACCES: _RIGHT,
    errno.EPERM: _RIGHT,
    errno.EROFS: "can't be written, for its disk is read-only: write elsewhere",
    errno.EMFILE: "can't be opened beside so many files: raise their number (ulimit -n)",
    errno.ENFILE: "can't be opened beside so many files of other programs: end some",
    errno.EIO: "can't be read or written ({reason}): look after its disk, then try again",
    errno.ENOENT: "doesn't exist: name one that does",
}


def told(error: BaseException, memory: str = MORE_MEMORY, file: str = "A file of the weights") -> str:
    """What an error says, in one line: with what helps where the machine has refused something, else as it is.

    Args:
        memory: what helps where there isn't enough.
        file: that is read, which errors about damaged weights don't name.
    """
    if lacks_memory(error):
        found = _BYTES.search(str(error))
        return f"There isn't enough memory{f' for another {_size(int(found[1]))}' if found else ''}: {memory}."
    number, text = _number(error), " ".join(str(error).split()) or type(error).__name__
    if number is None and is_damaged(error):
        return f"{file} is truncated or damaged ({text}). Download it again."
    if number is None:
        return text
    reason = os.strerror(number)
    sentence = _SENTENCES.get(number, "can't be used ({reason}): name another, or look after its disk")
    return f"{_file(error)} {sentence.format(reason=reason)}."


def lacks_memory(error: BaseException) -> bool:
    """Whether there wasn't enough memory, for this or for what it followed from."""
    seen: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in seen:
        is_told = isinstance(cause, (OSError, RuntimeError, ImportError)) or _is_of_safetensors(cause)
        if isinstance(cause, MemoryError) or is_told and _NO_MEMORY.search(str(cause)):
            return True
        seen.append(cause)
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    return False


def is_of_machine(error: BaseException) -> bool:
    """Whether the machine has refused something, or a file of weights makes no sense, which no traceback explains."""
    return lacks_memory(error) or _number(error) is not None or is_damaged(error)


def is_damaged(error: BaseException) -> bool:
    """Whether a file of weights that was read is cut short, or isn't what its name says."""
    if lacks_memory(error) or _number(error) is not None:
        return False
    return (isinstance(error, RuntimeError) or _is_of_safetensors(error)) and _READING.search(str(error)) is not None


def _is_of_safetensors(error: BaseException) -> bool:
    return type(error).__name__ == "SafetensorError"  # by name, for this file imports nothing heavy


def _number(error: BaseException) -> int | None:
    if isinstance(error, OSError):  # of others, such as those of the network, the number says less than the text
        is_of_file = error.errno in _SENTENCES or (error.errno or 0) > 0 and error.filename is not None
        return error.errno if is_of_file else None
    found = _NUMBER.search(str(error)) if _is_of_safetensors(error) else None
    if found is None and isinstance(error, RuntimeError) and TORCH_WRITING.search(str(error)):
        return errno.ENOSPC  # torch doesn't tell why it couldn't go on
    return int(found[1]) if found else None


def _file(error: BaseException) -> str:
    """The file that the system refused; of two, that which was to be written."""
    names = [getattr(error, name, None) for name in ("filename2", "filename")]
    return next(
        (os.fsdecode(name) for name in names if isinstance(name, (str, bytes, os.PathLike))),
        "A file or standard output",
    )


def _size(nbytes: int) -> str:
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if nbytes >= unit:
            return f"{nbytes / unit:.1f} {name}"
    return f"{nbytes / 1e3:.1f} kB"


@contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Give errors of writing, which don't know what was written, the name of the file.

    Raises:
        OSError: the system refused it.
    """
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = os.fspath(path)
        raise
    except Exception as error:
        number = _number(error)
        if number is None or lacks_memory(error):
            raise
        raise OSError(number, os.strerror(number), os.fspath(path)) from error
