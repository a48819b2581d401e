"""How fast the model is beside transformers' Qwen2ForCausalLM on the same weights, and beside the hardware's limit.

    python benchmarks/speed.py COMMAND [--rounds N]

Both sides run in one process, in the same dtype and with the same attention implementation, in turn: many short rounds,
of which each gives a ratio. Reported is the median of these ratios, with its quartiles. Memory is measured in processes
of their own. Every command adds what it measured to a JSON file, with machine and versions; `plot` draws the file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import compiling
import generating
import gpu
import llama_cpp
import loading
import multiplying
import speculating
import tokenizing
import training_step
import typer
from measuring import RESULTS, Results, readable

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)
for command in (
    generating.prefill,
    generating.decode,
    generating.adapter,
    generating.long_decode,
    generating.conversation,
    generating.long_text,
    generating.long_text_decode,
    generating.batch,
    compiling.compiled,
    speculating.speculation,
    speculating.continuous,
    llama_cpp.llama_cpp,
    loading.load,
    loading.imports,
    multiplying.products,
    training_step.training,
    tokenizing.tokenizer,
    gpu.gpu,
    gpu.gpu_table,
):
    app.command()(command)

PLOT = RESULTS.with_suffix(".png")


def table_of(rows: dict[str, Any]) -> str:
    """All that was measured, as a table in Markdown."""
    lines = ["| | ours | the other side | ratio (quartiles) | aim | rounds |", "|---|---|---|---|---|---|"]
    for name, row in rows.items():
        low, high = row["quartiles"]
        sides = " | ".join(readable(row[side], row["unit"]) for side in ("ours", "theirs"))
        limit = f"; {row['ours_to_limit']:.2f} of the limit" if "limit" in row else ""
        ratio = f"**{row['ratio']:.2f}** ({low:.2f} to {high:.2f}){limit}"
        lines.append(f"| {name} | {sides} | {ratio} | {row.get('aim', '')} | {row['rounds']} |")
    return "\n".join(lines) + "\n"


@app.command()
def table(results: Results = RESULTS) -> None:
    """Print all that was measured as a table in Markdown, which docs/speed.md shows."""
    print(table_of(json.loads(results.read_text())), end="")


@app.command()
def plot(results: Results = RESULTS, output: Annotated[Path, typer.Option(help="PNG file.")] = PLOT) -> None:
    """Draw the ratios of all that was measured, and what they should at most be."""
    from matplotlib.figure import Figure

    rows = json.loads(results.read_text())
    figure = Figure(figsize=(10, 1 + 0.32 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for place, row in enumerate(rows.values()):
        spread = [[row["ratio"] - row["quartiles"][0]], [row["quartiles"][1] - row["ratio"]]]
        reached = row["ratio"] <= row.get("aim", float("inf"))
        axes.barh(place, row["ratio"], xerr=spread, color="tab:blue" if reached else "tab:red", alpha=0.7)
        if "aim" in row:
            axes.plot([row["aim"]] * 2, [place - 0.4, place + 0.4], color="black", linewidth=2)
    axes.set_yticks(range(len(rows)), [name.replace(", torch.bfloat16", "") for name in rows], fontsize=8)
    axes.set_ylim(-1, len(rows))
    axes.axvline(1, color="gray", linewidth=1)
    axes.invert_yaxis()
    axes.set(xlabel="ours / the other side: median and quartiles; black marks: aims", xscale="log")
    figure.savefig(output, dpi=110)


if __name__ == "__main__":
    app()
