"""How a report looks to people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ...programs.printing import printable
from .memory import Memory
from .report import FileReport, Report
from .sizing import sizing_blocks
from .tables import new_table
from .words import plural, short_count, size_text

_LISTED = 12  # files in a table


def render(report: Report) -> RenderableType:
    """A report for rich's console: facts, memory, files, remarks and, last and in red, problems."""
    blocks: list[RenderableType] = [Text(printable(report.path), style="bold"), _facts(report)]
    if report.memory and report.architecture is not None and report.sizing is None:
        blocks.append(_memory_table(report, report.architecture["length"]))
    if report.sizing is not None:
        blocks += sizing_blocks(report.sizing)
    if len(report.files) > 1:
        blocks.append(_file_table(report.files))
    if report.remarks:
        blocks.append(_sentences("Remarks", report.remarks, "yellow"))
    if report.problems:
        blocks.append(_sentences("Problems", report.problems, "red"))
    else:
        depth = "every value was read" if report.scanned else "headers only; --scan reads every value"
        depth = depth if report.files else "no weights"
        blocks.append(Text(f"No problems ({depth}).", style="green"))
    return Group(*(part for block in blocks[:-1] for part in (block, "")), blocks[-1])


def _facts(report: Report) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    facts = {"Format": report.description, **_architecture_facts(report.architecture)}
    total, inner = report.parameters["total"], report.parameters["without_embeddings"]
    if total:
        without = f"; {short_count(inner)} without embeddings" if inner is not None else ""
        facts["Parameters"] = f"{total:,}{f' ({short_count(total)})' if total >= 10**6 else ''}{without}"
    if report.dtypes:
        only = len(report.dtypes) == 1
        facts["Stored as"] = ", ".join(name if only else f"{name} {n:,}" for name, n in report.dtypes.items())
    if report.quantization is not None:
        facts["Quantised"] = report.quantization
    in_files = f"{size_text(report.weights_bytes)} in {plural(len(report.files), 'file')}"
    facts["Weights"] = in_files if report.files else "none here"
    facts["Tokenizer"] = ", ".join(report.tokenizer) or "none"
    for name, value in facts.items():
        table.add_row(name, Text(printable(value)))
    return table


def _architecture_facts(values: dict[str, Any] | None) -> dict[str, str]:
    if values is None:
        return {}
    grouped = f" ({values['kv_heads']} for keys and values)" if values["kv_heads"] != values["heads"] else ""
    stretch = [name for name, on in (("NTK", values["ntk"]), ("LogN", values["logn"])) if on]
    if values["rope"]:
        stretch.append(f"{values['rope']['rope_type']} scaling by {values['rope']['factor']:g}")
    beyond = f"; beyond, {' and '.join(stretch)}" if stretch else ""
    return {
        "Layers": f"{values['layers']} of width {values['width']:,}",
        "Attention": f"{values['heads']} heads of size {values['head_dim']}{grouped}",
        "MLP": f"{values['mlp']:,} wide",
        "Vocabulary": f"{values['rows']:,} rows, {'shared with the' if values['tied'] else 'not shared with the'} head",
        "Length": f"{values['length']:,} tokens, rotary base {values['rope_theta']:,.0f}{beyond}",
    }


def _memory_table(report: Report, length: int) -> Table:
    table = new_table("Memory for inference, without activations")
    table.add_column("precision", style="cyan")
    for heading in ("weights", "cache per token", f"with {plural(length, 'token')}"):
        table.add_column(heading, justify="right")
    precisions: dict[Memory, list[str]] = {}
    for precision, need in report.memory.items():
        precisions.setdefault(need, []).append(precision)
    for need, names in precisions.items():
        table.add_row(", ".join(names), *(size_text(n) for n in (need.weights, need.cache_per_token, need.total)))
    if report.int8_cache_per_token is not None:
        table.caption = f"with use_cache_quantization {size_text(report.int8_cache_per_token)} of cache per token"
    return table


def _file_table(files: Sequence[FileReport]) -> Table:
    table = new_table("Files with weights")
    table.add_column("name", overflow="fold")
    table.add_column("size", justify="right")
    table.add_column("tensors", justify="right")
    whole = [file for file in files if file.tensors is not None]
    shown = [file for file in files if file.tensors is None or file in whole[:_LISTED]]
    for file in shown:
        size = "missing" if file.bytes is None else size_text(file.bytes)
        tensors = "–" if file.tensors is None else f"{file.tensors:,}"
        table.add_row(Text(printable(file.name)), size, tensors, style="red" if file.tensors is None else "")
    if len(shown) < len(files):
        table.caption = f"and {plural(len(files) - len(shown), 'file')} more"
    return table


def _sentences(title: str, sentences: Sequence[str], style: str) -> Table:
    table = Table.grid(padding=(0, 1))
    table.add_row(Text(title, style=f"bold {style}"))
    inner = Table.grid(padding=(0, 1))
    inner.add_column(no_wrap=True)
    inner.add_column(overflow="fold")
    for sentence in sentences:
        inner.add_row(Text("•", style=style), Text(printable(sentence), style=style))
    table.add_row(inner)
    return table
