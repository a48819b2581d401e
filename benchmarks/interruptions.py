"""Commands that are killed at any moment, or run out of disk, rights or memory: what they leave, and what they say.

    python benchmarks/interruptions.py kill [--kills 100] [--only upgrade]
    python benchmarks/interruptions.py fail [--only upgrade]

`kill` sends SIGKILL, one half at a random time, the other before a random change of the file system; some runs are
killed again while they go on. Then nothing that a loader would open may be there unless it is whole, and the same
command run again must give what an undisturbed run gives, byte for byte. `fail` takes disk, rights and memory away:
each command must end well, or fail with one sentence, and leave what was there before.

Linux only; `fail` as root, who mounts small disks and gives up rights. Ends with 1 where something was found.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: forks have no other threads
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import typer  # noqa: E402
from interrupting import (  # noqa: E402
    Ended,
    fork,
    is_one_sentence,
    little_disk,
    little_memory,
    own_disk,
    small_files,
    unreadable,
    without_rights,
)
from interruption_cases import CASES, Case, contents, import_all, make_sources  # noqa: E402
from measuring import machine  # noqa: E402

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)
AGAIN = 0.3
"""Of the runs that follow a kill so many are killed as well."""

LONGEST = 120.0
"""Seconds after which a command that has too little of something hangs, and is killed, which counts as wrong."""

Only = Annotated[list[str] | None, typer.Option(help="Names of commands; repeat it.", show_default="all")]


def chosen(only: list[str] | None) -> list[Case]:
    """The cases of these names.

    Raises:
        typer.BadParameter: there is none of a name.
    """
    if unknown := set(only or ()) - CASES.keys():
        raise typer.BadParameter(f"{', '.join(sorted(unknown))}: choose from {', '.join(CASES)}.")
    return [CASES[name] for name in only or CASES]


def killed_once(case: Case, work: Path, whole: Ended, draw: random.Random, moment: str) -> tuple[bool, str | None]:
    """Run until a random moment: (whether it was killed, what was wrong behind that)."""
    if moment == "time":
        ended = fork(case.program(work), kill_after=draw.uniform(0, whole.seconds))
    else:
        ended = fork(case.program(work), kill_at=draw.randrange(whole.changes))
    if ended.status not in (0, -9) and not is_there(ended):
        return False, f"ended with {ended.status}: {ended.said[-500:]}"
    return ended.status == -9, case.half_written(work)


def is_there(ended: Ended) -> bool:
    """Whether a command refused to run because its result was there, as after a kill behind its last step."""
    return ended.status == 1 and "exists: " in ended.said


def interrupted(case: Case, work: Path, whole: Ended, draw: random.Random, number: int) -> tuple[int, str | None]:
    """Kill a command, some again and again, then let it finish: (kills, what was wrong)."""
    case.begin(work)
    kills, wrong = 0, None
    while wrong is None and (not kills or draw.random() < AGAIN):
        moment = ("time", "change")[(number + kills) % 2]
        was_killed, wrong = killed_once(case, work, whole, draw, moment)
        kills += was_killed
        if not was_killed:
            break
    if wrong is None:
        ended = fork(case.program(work))
        is_done = ended.status == 0 or is_there(ended)
        wrong = case.difference(work) if is_done else f"the rerun ended with {ended.status}: {ended.said}"
    return kills, wrong


@app.command()
def kill(
    kills: Annotated[int, typer.Option(min=1, help="Of each command.")] = 100,
    seed: Annotated[int, typer.Option(help="Of the moments.")] = 0,
    only: Only = None,
) -> None:
    """Kill each command at random moments, and run it again."""
    print(json.dumps(machine(), ensure_ascii=False))
    failures = 0
    for case in [case for case in chosen(only) if case.killed]:
        with tempfile.TemporaryDirectory(prefix="interruptions-") as folder:
            failures += _kill_all(case, Path(folder), kills, random.Random(f"{case.name} {seed}"))
    raise typer.Exit(int(failures > 0))


def undisturbed(case: Case, folder: Path) -> Ended | None:
    """Make the sources, run a command that nobody disturbs, and keep what it gives; None where it can't run here."""
    work = folder / "work"
    case.sources = folder / "sources"
    made = fork(lambda: make_sources(case.sources))
    if made.status:
        sys.exit(made.said)
    case.begin(work)
    whole = fork(case.program(work))
    if whole.status:
        if not is_one_sentence(whole):
            sys.exit(f"{case.name} fails undisturbed: {whole.said.strip()}")
        print(f"{case.name}: left out: {whole.said.strip()}", flush=True)
        return None
    case.keep(work)
    return whole


def _kill_all(case: Case, folder: Path, kills: int, draw: random.Random) -> int:
    whole = undisturbed(case, folder)
    if whole is None:
        return 0
    work = folder / "work"
    done = number = failures = 0
    while done < kills:
        count, wrong = interrupted(case, work, whole, draw, number)
        done, number = done + count, number + 1
        if wrong is not None:
            failures += 1
            print(f"{case.name}, run {number}: {wrong}")
        if number > 20 * kills:
            print(f"{case.name}: hardly any run could be killed")
            return failures + 1
    print(
        f"{case.name}: {done} kills in {number} runs of {whole.seconds:.1f} s and {whole.changes} changes of the file "
        f"system, {number - failures} finished as if undisturbed",
        flush=True,
    )
    return failures


# --- disk, rights and memory ---


@app.command()
def fail(
    steps: Annotated[int, typer.Option(min=1, help="Sizes of the disk, of files and of memory that are tried.")] = 12,
    only: Only = None,
) -> None:
    """Take disk, rights and memory away from each command."""
    print(json.dumps(machine(), ensure_ascii=False))
    failures = 0
    for case in chosen(only):
        with tempfile.TemporaryDirectory(prefix="interruptions-") as folder:
            failures += _fail_all(case, Path(folder), steps)
    raise typer.Exit(int(failures > 0))


@dataclass(frozen=True)
class Trouble:
    """What a command has too little of: its name, what is around the run, and what is done inside of it first."""

    name: str
    around: AbstractContextManager[None]
    inside: Callable[[], None]


def troubles(work: Path, size: int, steps: int) -> Iterator[Trouble]:
    """All that is tried with a result of so many bytes."""
    for step in range(steps):
        part = size * step // steps
        yield Trouble(f"{part} bytes of disk", own_disk(work), little_disk(work, part))
        yield Trouble(f"a disk full after {part} bytes", own_disk(work), little_disk(work, part, is_told=False))
        yield Trouble(f"files of at most {part} bytes", nullcontext(), small_files(part))
        yield Trouble(f"{2**step / 4:g} MB of memory", nullcontext(), little_memory(2 ** (18 + step)))
    yield Trouble("no right to write", nullcontext(), without_rights(work))
    yield Trouble("no right to read", unreadable(work.parent / "sources"), without_rights())


def _fail_all(case: Case, folder: Path, steps: int) -> int:
    if undisturbed(case, folder) is None:
        return 0
    work, sources = folder / "work", contents(case.sources)
    size = sum(path.stat().st_size for path in work.rglob("*") if path.is_file()) or 2**20
    ends = Counter[str]()
    for trouble in troubles(work, size, steps):
        shutil.rmtree(work)
        with trouble.around:
            case.begin(work)
            ended = fork(case.program(work), prepare=trouble.inside, kill_after=LONGEST)
            wrong = _wrong(case, work, ended)
            if contents(case.sources) != sources:
                wrong = "the sources have changed"
        ends["done" if wrong is None and not ended.status else "refused" if wrong is None else "wrong"] += 1
        if wrong is not None or ended.status:
            print(f"{case.name}, {trouble.name}: {wrong or ended.said.strip().splitlines()[-1]}", flush=True)
    print(f"{case.name}: {', '.join(f'{count} {end}' for end, count in ends.items())}", flush=True)
    return ends["wrong"]


def _wrong(case: Case, work: Path, ended: Ended) -> str | None:
    """What shouldn't be after a command that had too little of something."""
    if ended.status == 0:
        return case.difference(work)
    if not is_one_sentence(ended):
        return f"ended with {ended.status} and no sentence: {ended.said.strip()[-1500:]}"
    if case.old and not case.is_old(work):
        return f"what was there has changed, after {ended.said.strip().splitlines()[-1]!r}"
    return case.half_written(work)


if __name__ == "__main__":
    import_all()
    app()
