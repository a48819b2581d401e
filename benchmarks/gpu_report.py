"""Lines, tables and a plot of what `speed.py gpu` measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

UNTABLED = ("profile",)
"""Sections whose rows are too many for a table: they are in the file of results."""


def figure(value: float | None, unit: str) -> str:
    """A figure with its unit, to three digits."""
    if value is None:
        return ""
    digits = f"{value:.1e}" if 0 < abs(value) < 1e-3 else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{digits} {unit}".strip()


def ratio_of(row: dict[str, Any]) -> float | None:
    """How much of the other side's time or memory ours takes; below 1 is better, for rates too."""
    if "ours" not in row or not row.get("theirs"):
        return None
    ratio = row["ours"] / row["theirs"]
    return 1 / ratio if row["unit"].endswith("/s") else ratio


def line_of(row: dict[str, Any]) -> str:
    """A row as it is printed while the others are still measured."""
    if "skipped" in row:
        return f"{row['name']}: skipped: {row['skipped']}"
    unit = row.get("unit", "")
    parts = [figure(row.get("ours"), unit)]
    if "theirs" in row:
        parts.append(f"{row.get('other', 'theirs')} {figure(row['theirs'], unit)}")
    if (ratio := ratio_of(row)) is not None:
        parts.append(f"ratio {ratio:.2f}")
    if "share" in row:
        parts.append(f"{row['share']:.2f} of the card" + (f", aim {row['aim']}" if "aim" in row else ""))
    parts.append(row.get("note", ""))
    return f"{row['name']}: {'; '.join(part for part in parts if part)}"


def title_of(machine: dict[str, Any]) -> str:
    """Date, card and versions."""
    card = machine.get("card", f"{machine['machine']}, no GPU")
    cuda = f" (CUDA {machine['cuda']})" if machine.get("cuda") else ""
    shape = ", a tiny shape" if machine["tiny"] else ""
    return f"{machine['date']}, {card}, torch {machine['torch']}{cuda}, transformers {machine['transformers']}{shape}"


def table_of(kept: dict[str, Any]) -> str:
    """The figures as a table in Markdown, and below it what was left out and why."""
    lines = [f"{title_of(kept['machine'])}:", ""]
    lines += ["| | | ours | other | ratio | of the card | aim | |", "|---|---|---|---|---|---|---|---|"]
    left_out = []
    for name, section in kept["sections"].items():
        for row in section["rows"]:
            if "skipped" in row:
                left_out.append(f"- {row['name']}: {row['skipped']}")
            elif name not in UNTABLED:
                lines.append(_cells(name, row))
        if "reason" in section:
            left_out.append(f"- section `{name}`: {section['reason']}")
    return "\n".join([*lines, *(["", "Left out:", "", *left_out] if left_out else [])]) + "\n"


def _cells(section: str, row: dict[str, Any]) -> str:
    unit, ratio = row.get("unit", ""), ratio_of(row)
    theirs = f"{figure(row['theirs'], unit)} ({row.get('other', '')})" if "theirs" in row else ""
    share = f"{row['share']:.2f}" if "share" in row else ""
    shown = [
        section,
        row["name"],
        figure(row.get("ours"), unit),
        theirs,
        f"**{ratio:.2f}**" if ratio is not None else "",
        share,
        f"{row['aim']}" if "aim" in row else "",
        row.get("note", ""),
    ]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in shown) + " |"


def draw(kept: dict[str, Any], output: Path) -> None:
    """Two panels: ours beside the other side, and shares of what the card does; black marks are aims."""
    from matplotlib.figure import Figure

    rows = [row for name, section in kept["sections"].items() if name not in UNTABLED for row in section["rows"]]
    ratios = [(f"{row['name']} / {row.get('other', '')}", ratio, 1.0) for row in rows if (ratio := ratio_of(row))]
    shares = [(row["name"], row["share"], row.get("aim")) for row in rows if "share" in row]
    panels = (("ours / the other side, time or memory; below 1 is better", ratios), ("share of the card", shares))
    drawn = Figure(figsize=(11, 2.5 + 0.3 * (len(ratios) + len(shares))), layout="constrained")
    heights = [max(1, len(bars)) for _, bars in panels]
    for axes, (label, bars) in zip(drawn.subplots(2, 1, height_ratios=heights), panels, strict=True):
        axes.barh(range(len(bars)), [value for _, value, _ in bars], color="tab:blue", alpha=0.7)
        for place, (_, _, aim) in enumerate(bars):
            if aim is not None:
                axes.plot([aim] * 2, [place - 0.4, place + 0.4], color="black", linewidth=2)
        axes.set_yticks(range(len(bars)), [name for name, _, _ in bars], fontsize=8)
        axes.invert_yaxis()
        axes.set_xlabel(label)
    drawn.suptitle(title_of(kept["machine"]), fontsize=10)
    drawn.savefig(output, dpi=110)
