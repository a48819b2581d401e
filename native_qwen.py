"""The library of kernels for a CPU: translated once by the machine's own compiler, kept, and loaded.

Nothing needs it. Where there is no compiler, or anything else is in the way, the library is None and everything runs
through torch; so it does while a compiler is at work, which happens in the background. `QWEN_NATIVE=0` in the
environment turns it off.
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

from transformers.utils import logging

from .native_gradients_qwen import GRADIENTS
from .native_many_qwen import MANY
from .native_products_qwen import PRODUCTS
from .native_prompt_qwen import PROMPT
from .native_steps_qwen import STEPS
from .native_vectors_qwen import VECTORS

logger = logging.get_logger(__name__)

SWITCH = "QWEN_NATIVE"
_SOURCE = VECTORS + PRODUCTS + MANY + STEPS + PROMPT + GRADIENTS
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fopenmp", "-shared", "-fPIC")
_COMPILERS = ("g++", "clang++")
_SCRIPT = """
nice -n 19 "$@" -o "$FOLDER/made" 2> "$FOLDER/said" && mv "$FOLDER/made" "$FILE" || mv "$FOLDER/said" "$FAILED"
rm -rf "$FOLDER"
"""


class _Translation:
    """Finds the library, or has it made in the background; `library` is None until it is there, or for ever."""

    def __init__(self) -> None:
        self.library: ctypes.CDLL | None = None
        self._thread = threading.Thread(target=self._load, name="qwen1-native", daemon=True)

    def begin(self) -> None:
        """Load what was made before at once, so that all of a process computes alike; make what wasn't meanwhile."""
        try:
            made = _library_file().exists()
        except OSError as error:
            logger.info(f"No kernels for the CPU, which torch does without: {error}")
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
            file = _library_file()
            if not file.exists():
                _translate(file)
            self.library = ctypes.CDLL(str(file))
        except (OSError, subprocess.SubprocessError) as error:
            logger.info(f"No kernels for the CPU, which torch does without: {error}")


def library() -> ctypes.CDLL | None:
    """The library, or None where there is none or none yet. The first call begins to make it."""
    return _translation().library if os.environ.get(SWITCH) != "0" else None


def wait() -> ctypes.CDLL | None:
    """As `library`, once it is known whether there is one."""
    if os.environ.get(SWITCH) != "0":
        _translation().join()
    return library()


@functools.lru_cache(maxsize=1)
def _translation() -> _Translation:
    translation = _Translation()
    translation.begin()
    return translation


def _compiler() -> str:
    """Path of the compiler.

    Raises:
        FileNotFoundError: there is none.
    """
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", ""), *_COMPILERS))), None)
    if sys.platform != "linux" or compiler is None:
        raise FileNotFoundError(f"no {' or '.join(_COMPILERS)} on a Linux: this is {sys.platform}")
    return compiler


def _library_file() -> Path:
    """Where the library is, or is to be, in the user's cache.

    Raises:
        OSError: there is no compiler, or the cache can't be used.
    """
    compiler = _compiler()  # first: without one nothing is made, no folder either
    return cache_folder() / f"native-{_key(compiler)}.so"


def cache_folder() -> Path:
    """The user's own folder for the library, which nobody else may write to, for what lies in it is run."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qwen1"
    folder.mkdir(parents=True, exist_ok=True)
    status = folder.stat()
    if status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(f"{str(folder)!r} can be written by others than its user: chmod 700 it")
    return folder


def _key(compiler: str) -> str:
    """What the library depends on: its text, the compiler, and the processor, for homes are shared between machines."""
    status = Path(compiler).resolve().stat()
    processor = [line for line in _processor().splitlines() if line.startswith(("model name", "flags", "Features"))]
    parts = [
        _SOURCE,
        repr(_FLAGS),
        platform.machine(),
        compiler,
        status.st_size,
        status.st_mtime_ns,
        *sorted(set(processor)),
    ]
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:32]


def _processor() -> str:
    return Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")


def _translate(file: Path) -> None:
    """Have the library written beside its place and renamed, so that nobody finds half of it.

    A shell does it that outlives this process: one that gives a short reply and ends would never see the end of it.

    Raises:
        OSError: the compiler fails, or has failed before.
    """
    compiler, failure = _compiler(), file.with_suffix(".failed")  # which tells why, so that it isn't tried again
    if not failure.exists():
        logger.warning(
            f"Translating QWen's kernels for this CPU, once, with {compiler}, in the background ({SWITCH}=0 in the "
            f"environment does without). They are kept in {str(file.parent)!r}."
        )
        folder = tempfile.mkdtemp(dir=file.parent)
        source = Path(folder, "native.cpp")
        source.write_text(_SOURCE, encoding="utf-8")
        names = {"FOLDER": folder, "FILE": str(file), "FAILED": str(failure)}
        command = ["sh", "-c", _SCRIPT, "sh", compiler, *_FLAGS, str(source)]
        subprocess.run(command, env=os.environ | names, start_new_session=True, stdin=subprocess.DEVNULL, check=True)
    if not file.exists():
        said = failure.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        raise OSError(f"{compiler} failed ({said[0] if said else 'and said nothing'}); {str(failure)!r} tells it")
