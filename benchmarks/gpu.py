"""All that is to be known of a GPU in one call of at most eight minutes: the sub-commands `gpu` and `gpu-table`.

The sections of `gpu_sections.py` run in a process beside this one, which is ended where a section takes longer than it
may, and begun anew for those behind it. The file of results is written after each figure.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from gpu_report import draw, line_of, table_of
from gpu_sections import SECTIONS
from measuring import machine

RESULTS = Path(__file__).with_name("gpu.json")

GpuResults = Annotated[Path, typer.Option(help="JSON file of the figures; the plot and the log lie beside it.")]


def card() -> dict[str, Any]:
    """What the figures depend on."""
    found = machine()
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "card": properties.name,
            "card_memory_gb": round(properties.total_memory / 1e9, 1),
            "cuda": torch.version.cuda,
        }
    return found


def write(results: Path, kept: dict[str, Any]) -> None:
    """Replace the file of results at once."""
    unfinished = results.with_suffix(".partial")
    unfinished.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    unfinished.replace(results)


def events_of(names: list[str], tiny: bool, log: Path, until: float) -> Iterator[dict[str, Any]]:
    """What a process that runs these sections tells, until it ends, or is ended: by its section's time, or all time.

    A section that didn't come to its end has none among the events but the reason.
    """
    script = Path(__file__).with_name("gpu_sections.py")
    command = [sys.executable, str(script), "tiny" if tiny else "full", *names]
    with log.open("a", encoding="utf-8") as errors:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, encoding="utf-8", start_new_session=True
        )
    lines: queue.Queue[str] = queue.Queue()
    threading.Thread(target=_pass_on, args=(process, lines), daemon=True).start()
    running, begun, deadline = names[0], time.monotonic(), until
    try:
        while line := lines.get(timeout=max(0.1, deadline - time.monotonic())):
            event = json.loads(line)
            if "begins" in event:
                running, begun = event["begins"], time.monotonic()
                deadline = min(until, begun + SECTIONS[running][1])
            elif "ends" in event:
                running, deadline = "", until
            yield event
        reason = f"its process ended with {process.wait()}: see {log.name}"
    except queue.Empty:
        reason = f"ended after {time.monotonic() - begun:.0f} s, all that there was for it"
    finally:
        _end(process)
    if running:
        yield {"ends": running, "seconds": round(time.monotonic() - begun, 1), "reason": reason}


def _pass_on(process: subprocess.Popen[str], lines: queue.Queue[str]) -> None:
    for line in process.stdout or ():
        lines.put(line)
    lines.put("")


def _end(process: subprocess.Popen[str]) -> None:
    """End a process with all that it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def run(names: list[str], tiny: bool, results: Path, limit: float) -> dict[str, Any]:
    """Run sections, print and keep what they give."""
    until = time.monotonic() + limit
    log = results.with_suffix(".log")
    log.write_text("")
    sections: dict[str, Any] = {name: {"rows": []} for name in names}
    kept = {"machine": card() | {"tiny": tiny}, "sections": sections}
    left = list(names)
    while left and time.monotonic() < until:
        name = left[0]
        for event in events_of(list(left), tiny, log, until):
            name = event.get("begins", name)
            if "begins" in event:
                print(f"\n{name}")
            elif "row" in event:
                sections[name]["rows"].append(event["row"])
                print(f"  {line_of(event['row'])}", flush=True)
            else:
                left.remove(event["ends"])
                sections[event["ends"]] |= {key: event[key] for key in ("seconds", "reason") if event[key] is not None}
                print(f"  {event['seconds']} s{'' if not event['reason'] else ': ' + event['reason']}", flush=True)
            write(results, kept)
    for name in left:
        sections[name]["reason"] = f"no time was left of the {limit:g} s"
    write(results, kept)
    return kept


def gpu(
    tiny: Annotated[bool, typer.Option("--tiny", help="A tiny shape, which takes seconds, on a CPU too.")] = False,
    only: Annotated[str, typer.Option(help=f"Sections by name, with commas: {', '.join(SECTIONS)}.")] = "",
    limit: Annotated[float, typer.Option(help="Seconds for all; what isn't begun by then is left out.")] = 450,
    results: GpuResults = RESULTS,
) -> None:
    """The 7B shape with random weights in bf16 on a GPU: speed against Qwen2 and the card's own limits, and tests."""
    names = only.split(",") if only else list(SECTIONS)
    if unknown := [name for name in names if name not in SECTIONS]:
        raise typer.BadParameter(f"There is no section {unknown[0]!r}: choose from {', '.join(SECTIONS)}.")
    if not tiny and not torch.cuda.is_available():
        raise typer.BadParameter("There is no CUDA device here: only --tiny runs on a CPU.")
    kept = run(names, tiny, results, limit)
    draw(kept, results.with_suffix(".png"))
    print(f"\n{table_of(kept)}\n{results}, {results.with_suffix('.png').name}, {results.with_suffix('.log').name}")


def gpu_table(results: GpuResults = RESULTS) -> None:
    """Print what `gpu` measured as tables in Markdown, for docs/speed.md."""
    print(table_of(json.loads(results.read_text(encoding="utf-8"))), end="")
