"""Programs run in forks of this process, which has imported everything, and what `interruptions.py` does to them."""

from __future__ import annotations

import ctypes
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from collections import namedtuple
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.truncate", "os.symlink"}
"""Audit events that come before a change of the file system."""
ANOTHER = 65534
"""The user whom other files belong to."""
CAPABILITIES_VERSION = 0x20080522  # _LINUX_CAPABILITY_VERSION_3, whose sets have 64 bits
Usage = namedtuple("Usage", "total used free")


@dataclass(frozen=True)
class Ended:
    """How a program ended.

    Attributes:
        status: its exit status; negative for the signal that killed it.
        said: what it wrote to standard error.
        seconds: how long it ran.
        changes: how often it changed the file system.
    """

    status: int
    said: str
    seconds: float
    changes: int = 0


class Changes:
    """Counts changes of the file system through Python, and kills this process before one of them."""

    def __init__(self, last: int | None):
        self.count, self._last = 0, last
        sys.addaudithook(self._audit)

    def _audit(self, event: str, arguments: tuple) -> None:
        if event == "open":
            path, _, flags = arguments
            writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if not writes or str(path).endswith(".pyc") or str(path).startswith("/dev/"):
                return
        elif event not in CHANGES:
            return
        self.count += 1
        if self._last is not None and self.count > self._last:
            os.kill(os.getpid(), signal.SIGKILL)


def fork(
    program: Callable[[], object],
    *,
    kill_after: float | None = None,
    kill_at: int | None = None,
    prepare: Callable[[], object] = lambda: None,
) -> Ended:
    """Run a program in a fork, which has this process's modules and nothing of its threads.

    Args:
        program: ends with SystemExit as a command does, or returns.
        kill_after: seconds until SIGKILL.
        kill_at: SIGKILL before the change of the file system that comes after so many.
        prepare: called in the fork first.
    """
    with tempfile.TemporaryFile() as errors, tempfile.TemporaryFile() as count:
        began = time.monotonic()
        child = os.fork()
        if not child:
            _be_program(program, errors.fileno(), count.fileno(), kill_at, prepare)
        status = _wait(child, None if kill_after is None else began + kill_after)
        seconds = time.monotonic() - began
        errors.seek(0)
        count.seek(0)
        said, changes = errors.read().decode(errors="replace"), int(count.read() or 0)
    return Ended(status, said, seconds, changes)


def _wait(child: int, end: float | None) -> int:
    while end is not None and time.monotonic() < end:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(min(0.002, max(0.0, end - time.monotonic())))
    if end is not None:
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _be_program(
    program: Callable[[], object], errors: int, count: int, kill_at: int | None, prepare: Callable[[], object]
) -> None:
    status = 70  # what a program never ends with
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(errors, 2)
        changes = Changes(kill_at)
        prepare()
        try:
            program()
            status = 0
        except SystemExit as end:
            if isinstance(end.code, str):
                print(end.code, file=sys.stderr)
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
        os.write(count, str(changes.count).encode())
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        os.write(2, traceback.format_exc().encode())
    finally:
        os._exit(status)


def command(door: str, *words: object) -> Callable[[], None]:
    """A program of ours with a command line."""

    def run() -> None:
        import qwen1_commands

        sys.argv = [door, *map(str, words)]
        getattr(qwen1_commands, door)()

    return run


# --- what goes wrong ---


def small_files(nbytes: int) -> Callable[[], None]:
    """No file may become longer, as where a quota ends; but what the program says is a file here too."""
    nbytes = max(nbytes, 2**16)

    def prepare() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    return prepare


def little_memory(nbytes: int) -> Callable[[], None]:
    """So much beyond what the process has already."""

    def prepare() -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + nbytes
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))

    return prepare


@contextmanager
def own_disk(folder: Path) -> Iterator[None]:
    """A disk of its own in the place of a folder; needs root."""
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


def little_disk(folder: Path, nbytes: int, is_told: bool = True) -> Callable[[], None]:
    """So much beyond what is on the disk of a folder already.

    Args:
        is_told: whether the system says so; else it seems to have room, as where another program fills it meanwhile.
    """

    def prepare() -> None:
        used = shutil.disk_usage(folder).used
        subprocess.run(["mount", "-o", f"remount,size={max(4096, used + nbytes)}", folder], check=True)
        if not is_told:
            shutil.disk_usage = lambda path: Usage(2**50, 0, 2**50)  # type: ignore[assignment]

    return prepare


@contextmanager
def unreadable(folder: Path) -> Iterator[None]:
    """Files of another user, who lets nobody else read them."""
    modes = {path: path.stat().st_mode for path in folder.rglob("*") if path.is_file()}
    for path in modes:
        path.chmod(0o600)
        os.chown(path, ANOTHER, ANOTHER)
    try:
        yield
    finally:
        for path, mode in modes.items():
            os.chown(path, os.geteuid(), os.getegid())
            path.chmod(mode)


def without_rights(folder: Path | None = None) -> Callable[[], None]:
    """What is another user's is out of reach even for root, who keeps what is root's: this program's own files.

    Args:
        folder: it and all in it become another user's first.
    """

    def prepare() -> None:
        for path in [folder, *folder.rglob("*")] if folder else []:
            os.chown(path, ANOTHER, ANOTHER, follow_symlinks=False)
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.capset(struct.pack("Ii", CAPABILITIES_VERSION, 0), bytes(24)):
            raise OSError(ctypes.get_errno(), "capset: root's capabilities can't be given up")

    return prepare


def is_one_sentence(ended: Ended) -> bool:
    """Whether a program that failed said why in its last line, and showed no traceback."""
    lines = [line for line in ended.said.replace("\r", "\n").splitlines() if line.strip()]
    return (
        ended.status in (1, 2)
        and "Traceback" not in ended.said
        and bool(lines)
        and lines[-1].startswith("qwen1-")
        and "[Errno" not in lines[-1]
    )
