"""Measuring two sides in turn, and keeping what was found: what the sub-commands of `speed.py` share."""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer

RESULTS = Path(__file__).with_name("speed.json")

Rounds = Annotated[int, typer.Option(min=1, help="Rounds of both sides in turn.")]
Dtype = Annotated[str, typer.Option(help="bfloat16, float32 or float16.")]
Results = Annotated[Path, typer.Option(help="JSON file to add the figures to.")]


@dataclass
class Comparison:
    """What both sides took, round by round.

    Attributes:
        name: what was measured, the key in the file of results.
        ours, theirs: seconds, or bytes.
        unit: "s" or "B".
        limit: seconds in which the hardware could do it at best, where that was measured.
        aim: what the ratio ours / theirs should at most be.
    """

    name: str
    ours: list[float] = field(default_factory=list)
    theirs: list[float] = field(default_factory=list)
    unit: str = "s"
    limit: float | None = None
    aim: float | None = None

    def as_json(self) -> dict[str, Any]:
        """Medians, the median of the ratios, and their quartiles."""
        ratios = [mine / other for mine, other in zip(self.ours, self.theirs, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        row = {"ours": statistics.median(self.ours), "theirs": statistics.median(self.theirs), "unit": self.unit}
        row |= {"ratio": middle, "quartiles": [low, high], "rounds": len(ratios)}
        if self.aim is not None:
            row["aim"] = self.aim
        if self.limit is not None:
            row |= {"limit": self.limit, "ours_to_limit": row["ours"] / self.limit}
        return row


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "date": datetime.date.today().isoformat(),
        "machine": platform.machine(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def seconds_of(run: Callable[[], Any]) -> float:
    """Wall-clock time of one call, in seconds."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def compare(
    name: str,
    ours: Callable[[], Any],
    theirs: Callable[[], Any],
    rounds: int,
    aim: float | None = None,
    measured: bool = False,
) -> Comparison:
    """Time both in turn, each first in every other round, after a round that doesn't count.

    Args:
        measured: both give the seconds themselves.
    """
    found = Comparison(name, aim=aim)
    sides = [(ours, found.ours), (theirs, found.theirs)]
    for number in range(rounds + 1):
        for run, seconds in sides if number % 2 else reversed(sides):
            took = run() if measured else seconds_of(run)
            seconds += [took] if number else []
    return found


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def resident() -> int:
    """Memory that this process holds, in bytes; Linux only, as the two that follow."""
    return _status("VmRSS")


def peak() -> int:
    """The most that it has held since `forget_peak`, in bytes."""
    return _status("VmHWM")


def forget_peak() -> None:
    """Count the peak anew from here."""
    Path("/proc/self/clear_refs").write_text("5")


def alone(script: Path, *arguments: str) -> dict[str, Any]:
    """What a script prints as JSON in its last line, run in a process of its own, where its memory can be measured."""
    done = subprocess.run([sys.executable, str(script), *arguments], capture_output=True, text=True, encoding="utf-8")
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)} failed with {done.returncode}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def readable(value: float, unit: str) -> str:
    """Seconds or bytes with a unit of their size."""
    if unit == "B":
        return f"{value / 1e6:.0f} MB"
    return f"{value * 1e3:.1f} ms" if value < 10 else f"{value:.1f} s"


def report(found: Comparison, results: Path) -> None:
    """Print a comparison, and add it to the JSON file."""
    row = found.as_json()
    ours, theirs = (readable(row[side], found.unit) for side in ("ours", "theirs"))
    low, high = row["quartiles"]
    aim = "" if found.aim is None else f", aim {found.aim}"
    limit = "" if found.limit is None else f", {row['ours_to_limit']:.2f} of the limit"
    print(f"{found.name}: ours {ours}, theirs {theirs}, ratio {row['ratio']:.3f} ({low:.3f} to {high:.3f}){aim}{limit}")
    kept = json.loads(results.read_text()) if results.exists() else {}
    kept[found.name] = row | machine()
    unfinished = results.with_suffix(".partial")
    unfinished.write_text(json.dumps(kept, indent=2) + "\n")
    unfinished.replace(results)
