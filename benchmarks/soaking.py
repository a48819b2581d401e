"""What the parts of `soak.py` share: questions, what a process holds, and what was found in the end."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import typer
from measuring import machine

NAMES = ("Lina", "Omar", "Tavolin", "王小明", "李雷")
COUNTRIES = ("France", "Japan", "Egypt", "Peru", "China", "Kenya")
LENGTH = 48
"""New tokens of a reply at most."""
STARTS_WITHIN, SETTLES_WITHIN = 180, 15
"""Seconds, on a machine with other work."""
MEMORY, THREADS, DESCRIPTORS = 16 * 2**20, 0, 0
"""By how much a process may have grown since it was warm: what the allocator keeps moves by some MB."""


def conversation(number: int) -> list[str]:
    """Two questions of one visitor, others for each number."""
    draw = random.Random(number)
    name, country = draw.choice(NAMES), draw.choice(COUNTRIES)
    first, second = draw.randrange(1, 99), draw.randrange(1, 99)
    return draw.choice(
        (
            [f"My name is {name}.", "What is my name?"],
            [f"{first}+{second}=?", f"{second}+{first}=?"],
            [f"What is the capital of {country}?", f"What is {first} plus {second}?"],
            ["你好", f"{first}-{second}=?"],
        )
    )


@dataclass(frozen=True)
class Held:
    """What a process holds: bytes of memory, threads, descriptors."""

    memory: int
    threads: int
    descriptors: int

    @classmethod
    def by(cls, process: int) -> Held:
        """That of a process now; Linux only."""
        folder = Path("/proc", str(process))
        lines = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
        memory, threads = int(lines["VmRSS"].split()[0]) * 1024, int(lines["Threads"])
        return cls(memory, threads, len(os.listdir(folder / "fd")))

    def __str__(self) -> str:
        return f"{self.memory / 1e6:.0f} MB, {self.threads} threads, {self.descriptors} descriptors"


@dataclass
class Findings:
    """What a part has found.

    Attributes:
        name: what was done.
        replies: number of them that were compared with their twins.
        abandoned: streams that were left before their end; what had come was compared too.
        wrong: (what was asked, the twin, what came) wherever they differ.
        held: what the process held after each round; the first of them are its warming up.
        warm: number of rounds that count as warming up.
    """

    name: str
    replies: int = 0
    abandoned: int = 0
    wrong: list[tuple[str, str, str]] = field(default_factory=list)
    held: list[Held] = field(default_factory=list)
    warm: int = 1

    def compare(self, asked: str, expected: Sequence[str], given: Sequence[str]) -> None:
        """Count replies, and keep those that aren't as expected."""
        self.replies += len(given)
        pairs = [*zip(expected, given, strict=False)]
        self.wrong += [(asked, wanted, came) for wanted, came in pairs if wanted != came]
        if len(expected) != len(given):
            self.wrong.append((asked, f"{len(expected)} replies", f"{len(given)} replies"))

    @property
    def growth(self) -> Held:
        """From the last round of the warming up to the last of all; of memory, whichever end of the rest is lower."""
        before, *after = self.held[self.warm - 1 :]
        last = after[-1] if after else before
        return Held(last.memory - before.memory, last.threads - before.threads, last.descriptors - before.descriptors)

    @property
    def passed(self) -> bool:
        """Whether all replies were right and nothing has grown."""
        grown = self.growth
        limits = (MEMORY, THREADS, DESCRIPTORS)
        return not self.wrong and all(
            value <= limit
            for value, limit in zip((grown.memory, grown.threads, grown.descriptors), limits, strict=True)
        )


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def running(command: Sequence[str], address: str, environment: Mapping[str, str]) -> Iterator[int]:
    """Run a server while a block runs, from when it answers at an address; its process.

    Raises:
        RuntimeError: it ended, or didn't answer; with the end of what it said.
    """
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=dict(environment))
        try:
            if not _answers(address, process):
                log.seek(0)
                raise RuntimeError(f"the server doesn't answer:\n{log.read().decode()[-4000:]}")
            yield process.pid
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _answers(address: str, process: subprocess.Popen[bytes]) -> bool:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    end = time.monotonic() + STARTS_WITHIN
    while process.poll() is None and time.monotonic() < end:
        try:
            opener.open(address, timeout=5).close()
            return True
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.2)
    return False


def settled(process: int) -> Held:
    """What a server holds once it has noticed that its clients have gone, which takes it some seconds."""
    held, end = Held.by(process), time.monotonic() + SETTLES_WITHIN
    while time.monotonic() < end:
        time.sleep(1)
        before, held = held, Held.by(process)
        if (held.threads, held.descriptors) == (before.threads, before.descriptors):
            break
    return held


def report(found: Findings) -> None:
    """Print machine and figures; ends the process with 1 where something was found.

    Raises:
        typer.Exit: a reply differs from its twin, or the process has grown.
    """
    print(json.dumps(machine(), ensure_ascii=False))
    equal = found.replies - len(found.wrong)
    print(f"{found.name}: {equal} of {found.replies} replies equal to their twins, {found.abandoned} streams abandoned")
    for number, held in enumerate(found.held, start=1):
        print(f"  after round {number}{' (warm)' if number == found.warm else ''}: {held}")
    print(f"  growth since then: {found.growth}")
    for asked, expected, given in found.wrong[:20]:
        print(f"  {asked!r}: expected {expected!r}, got {given!r}")
    if not found.passed:
        raise typer.Exit(1)
