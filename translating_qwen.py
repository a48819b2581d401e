"""Libraries of C++ text: translated once by the machine's own compiler, kept, and loaded.

Nothing needs one. Where there is no compiler, or anything else is in the way, a library is None and what it would do is
done without it; so it is while a compiler is at work, which happens in the background. `QWEN_NATIVE=0` in the
environment turns all of them off.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import NamedTuple

from transformers.utils import logging

logger = logging.get_logger(__name__)

SWITCH = "QWEN_NATIVE"
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-shared", "-fPIC")
_LAST = ("-lstdc++",)  # behind the text: libraries may have named a compiler of C in CXX, which leaves it out
_COMPILERS = ("g++", "clang++")
_SCRIPT = """
nice -n 19 "$@" -o "$FOLDER/made" 2> "$FOLDER/said" && mv "$FOLDER/made" "$FILE" || mv "$FOLDER/said" "$FAILED"
rm -rf "$FOLDER"
"""


class Source(NamedTuple):
    """What a library is made of.

    Attributes:
        name: how its file begins.
        what: it is for, as the user is told.
        text: in C++17.
        flags: of the compiler, beside those of all.
    """

    name: str
    what: str
    text: str
    flags: tuple[str, ...] = ()


class _Translation:
    """Finds the library, or has it made in the background; `library` is None until it is there, or for ever."""

    def __init__(self, source: Source) -> None:
        self.library: ctypes.CDLL | None = None
        self._source = source
        self._thread = threading.Thread(target=self._load, name=f"qwen1-{source.name}", daemon=True)

    def begin(self) -> None:
        """Load what was made before at once, so that all of a process computes alike; make what wasn't meanwhile."""
        try:
            made = _library_file(self._source).exists()
        except OSError as error:
            self._do_without(error)
            return
        if made:
            self._load()
        else:
            self._thread.start()

    def join(self) -> None:
        """Wait until it is known whether there is a library."""
        if self._thread.ident is not None:
            self._thread.join()

    def _load(self) -> None:
        try:
            file = _library_file(self._source)
            if not file.exists():
                _translate(self._source, file)
            self.library = ctypes.CDLL(str(file))
        except (OSError, subprocess.SubprocessError) as error:
            self._do_without(error)

    def _do_without(self, error: Exception) -> None:
        logger.info(f"No {self._source.what} for this CPU, which goes on without: {error}")


def library_of(source: Source) -> ctypes.CDLL | None:
    """The library, or None where there is none or none yet. The first call begins to make it."""
    return translation(source).library if os.environ.get(SWITCH) != "0" else None


def wait_for(source: Source) -> ctypes.CDLL | None:
    """As `library_of`, once it is known whether there is one."""
    if os.environ.get(SWITCH) != "0":
        translation(source).join()
    return library_of(source)


@functools.cache
def translation(source: Source) -> _Translation:
    """That of a source, begun by the first call in a process."""
    begun = _Translation(source)
    begun.begin()
    return begun


def _compiler() -> str:
    """Path of the compiler.

    Raises:
        FileNotFoundError: there is none.
    """
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", ""), *_COMPILERS))), None)
    if sys.platform != "linux" or compiler is None:
        raise FileNotFoundError(f"no {' or '.join(_COMPILERS)} on a Linux: this is {sys.platform}")
    return compiler


def _library_file(source: Source) -> Path:
    """Where the library is, or is to be, in the user's cache.

    Raises:
        OSError: there is no compiler, or the cache can't be used.
    """
    compiler = _compiler()  # first: without one nothing is made, no folder either
    return cache_folder() / f"{source.name}-{_key(source, compiler)}.so"


def cache_folder() -> Path:
    """The user's own folder for the library, which nobody else may write to, for what lies in it is run."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qwen1"
    folder.mkdir(parents=True, exist_ok=True)
    status = folder.stat()
    if status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(f"{str(folder)!r} can be written by others than its user: chmod 700 it")
    return folder


def _key(source: Source, compiler: str) -> str:
    """What the library depends on: its text, the compiler, and the processor, for homes are shared between machines."""
    status = Path(compiler).resolve().stat()
    processor = [line for line in _processor().splitlines() if line.startswith(("model name", "flags", "Features"))]
    parts = [
        source.text,
        repr((*_FLAGS, *source.flags, *_LAST)),
        platform.machine(),
        compiler,
        status.st_size,
        status.st_mtime_ns,
        *sorted(set(processor)),
    ]
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:32]


def _processor() -> str:
    return Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")


def _translate(source: Source, file: Path) -> None:
    """Have the library written beside its place and renamed, so that nobody finds half of it.

    A shell does it that outlives this process: one that gives a short reply and ends would never see the end of it.

    Raises:
        OSError: the compiler fails, or has failed before.
    """
    compiler, failure = _compiler(), file.with_suffix(".failed")  # which tells why, so that it isn't tried again
    if not failure.exists():
        logger.warning(
            f"Translating {source.what} for this CPU, once, with {compiler}, in the background ({SWITCH}=0 in the "
            f"environment does without). The library is kept in {str(file.parent)!r}."
        )
        folder = tempfile.mkdtemp(dir=file.parent)
        text = Path(folder, "library.cpp")
        text.write_text(source.text, encoding="utf-8")
        names = {"FOLDER": folder, "FILE": str(file), "FAILED": str(failure)}
        command = ["sh", "-c", _SCRIPT, "sh", compiler, *_FLAGS, *source.flags, str(text), *_LAST]
        subprocess.run(command, env=os.environ | names, start_new_session=True, stdin=subprocess.DEVNULL, check=True)
    if not file.exists():
        said = failure.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        raise OSError(f"{compiler} failed ({said[0] if said else 'and said nothing'}); {str(failure)!r} tells it")
