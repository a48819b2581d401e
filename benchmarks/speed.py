"""How fast the model is beside transformers' Qwen2ForCausalLM on the same weights, and beside the hardware's limit.

    python benchmarks/speed.py COMMAND [--rounds N]

Both sides run in one process, in the same dtype and with the same attention implementation, in turn: many short rounds,
of which each gives a ratio. Reported is the median of these ratios, with its quartiles. Memory is measured in processes
of their own. Every command adds what it measured to a JSON file, with machine and versions; `plot` draws the file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import compiling
import generating
import loading
import speculating
import training_step
import typer
from measuring import RESULTS, Results

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)
for command in (
    generating.prefill,
    generating.decode,
    generating.long_decode,
    generating.conversation,
    generating.long_text,
    generating.batch,
    compiling.compiled,
    speculating.speculation,
    speculating.continuous,
    loading.load,
    loading.imports,
    training_step.training,
):
    app.command()(command)

PLOT = RESULTS.with_suffix(".png")


@app.command()
def plot(results: Results = RESULTS, output: Annotated[Path, typer.Option(help="PNG file.")] = PLOT) -> None:
    """Draw the ratios of all that was measured."""
    from matplotlib.figure import Figure

    rows = json.loads(results.read_text())
    names, ratios = list(rows), [row["ratio"] for row in rows.values()]
    spread = [[r - row["quartiles"][i] for r, row in zip(ratios, rows.values(), strict=True)] for i in (0, 1)]
    figure = Figure(figsize=(8, 1 + 0.5 * len(names)), layout="constrained")
    axes = figure.subplots()
    axes.barh(names, ratios, xerr=[spread[0], [-value for value in spread[1]]], color="tab:blue", alpha=0.8)
    axes.axvline(1, color="black", linewidth=1)
    axes.invert_yaxis()
    axes.set(xlabel="time, ours / theirs (median and quartiles)")
    figure.savefig(output, dpi=110)


if __name__ == "__main__":
    app()
