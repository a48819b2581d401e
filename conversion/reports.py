"""What `inspect` reports: its fields, the memory that a model needs, and how all of it looks to people."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..programs.printing import printable
from .errors import CheckpointError
from .names import TABLE, Architecture, hf_shapes, qwen_shapes

T = TypeVar("T")

_NF4_BLOCK = 64  # weights that share a scale
NAMED = 3  # of many tensors or files
_LISTED = 12  # files in a table


@dataclass(frozen=True)
class FileReport:
    """One file of weights; `bytes` is None if it is missing, `tensors` if it can't be read."""

    name: str
    bytes: int | None
    tensors: int | None


@dataclass(frozen=True)
class Memory:
    """Bytes for inference: weights, keys and values of one token, and both for one text of the trained length."""

    weights: int
    cache_per_token: int
    total: int


@dataclass(frozen=True)
class Report:
    """What `inspect` found; plain numbers and texts, in the order in which they are printed.

    Attributes:
        path: what was inspected.
        kind: a name that stays: "qwen-2023-08", "qwen-2023-12", "qwen", "qwen2", "llama", "llama-original", "adapter",
            or None where it isn't any of these.
        description: the same for people.
        architecture: the attributes of `names.Architecture` without `settings`, and `ntk` and `logn`; None where it
            can't be read.
        quantization: method of quantised weights, as "gptq".
        parameters: "total" and "without_embeddings" (embedding and head). Those that the configuration asks for; where
            there is none, those that are stored, and None.
        dtypes: dtype -> stored parameters, most first; without tables, repeated slices and a tied head's second copy.
        files: those that make up the weights, also the missing ones.
        weights_bytes: size of all tensors in these files, each memory counted once.
        memory: precision -> bytes, see `memory_needs`; empty where the architecture isn't known.
        int8_cache_per_token: bytes of one token in `QWenInt8Cache`; None for other models.
        tokenizer: tokenizer files that are there.
        problems: what is missing or damaged, so that the checkpoint can't be used as it is.
        remarks: what is odd, although the checkpoint can be used.
        scanned: whether values were read.
    """

    path: str
    kind: str | None
    description: str
    architecture: dict[str, Any] | None
    quantization: str | None
    parameters: dict[str, int | None]
    dtypes: dict[str, int]
    files: list[FileReport]
    weights_bytes: int
    memory: dict[str, Memory]
    int8_cache_per_token: int | None
    tokenizer: list[str]
    problems: list[str]
    remarks: list[str]
    scanned: bool

    def to_json(self) -> dict[str, Any]:
        """The same as dictionaries, lists, texts and numbers."""
        return asdict(self)


@dataclass
class Findings:
    """Problems and remarks while they are collected."""

    problems: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    def attempt(self, read: Callable[..., T], *arguments: Any) -> T | None:
        """What a step gives, or None and a problem more."""
        try:
            return read(*arguments)
        except CheckpointError as error:
            self.problems.append(str(error))
        except Exception as error:  # there is no end to what damage can break, and the rest is still to be looked at
            self.problems.append(f"Something can't be read: {' '.join(str(error).split())} ({type(error).__name__}).")
        return None


# --- memory ---


def memory_needs(architecture: Architecture, fused: bool) -> dict[str, Memory]:
    """Memory that inference takes in each precision, in bytes.

    Not counted are activations, and what libraries take for themselves (CUDA: some hundred MB).

    - float32, bfloat16, float16: 4 or 2 bytes for each parameter; keys and values in the same precision.
    - int8 (bitsandbytes' LLM.int8): the linear layers inside the blocks take 1 byte for each weight and a float32 scale
      for each row; embedding, head, norms and biases stay in half precision, and so do keys and values.
    - int4 (bitsandbytes' nf4 without double quantisation): as int8, but half a byte for each weight and a float32 scale
      for each 64 of them.

    Keys and values of one token are 2 * layers * kv_heads * head_dim numbers.

    Args:
        fused: query, key and value are one linear layer, as in QWen.
    """
    shapes = qwen_shapes(architecture) if fused else hf_shapes(architecture)
    outside = {name for row in (TABLE[0], TABLE[-1]) for name in (row.hf, row.qwen)}
    linear = [shape for name, shape in shapes.items() if len(shape) == 2 and name not in outside]
    in_linear = sum(numel(shape) for shape in linear)
    total = sum(numel(shape) for shape in shapes.values())
    others = 2 * (total - in_linear)
    weights = {
        "float32": 4 * total,
        "bfloat16": 2 * total,
        "float16": 2 * total,
        "int8": others + sum(numel(shape) + 4 * shape[0] for shape in linear),
        "int4": others + sum(-(-numel(shape) // 2) + 4 * -(-numel(shape) // _NF4_BLOCK) for shape in linear),
    }
    numbers = 2 * architecture.layers * architecture.keys
    needs = {}
    for precision, nbytes in weights.items():
        token = numbers * (4 if precision == "float32" else 2)
        needs[precision] = Memory(nbytes, token, nbytes + architecture.length * token)
    return needs


def int8_cache_per_token(architecture: Architecture) -> int:
    """Bytes of one token in `QWenInt8Cache`: a byte for each number, and two float32 for each head's key and value."""
    return 2 * architecture.layers * architecture.kv_heads * (architecture.head_dim + 2 * 4)


def numel(shape: Sequence[int]) -> int:
    """Number of values in a tensor of this shape."""
    return torch.Size(shape).numel()


# --- words ---


def first_of(names: Sequence[str], separator: str = ", ") -> str:
    """The first few of many names, and how many more there are."""
    more = len(names) - NAMED
    return separator.join(names[:NAMED]) + (f" and {more:,} more" if more > 0 else "")


def quoted(names: Iterable[str]) -> str:
    """The same with quotation marks, for names that come out of files."""
    return first_of([repr(name) for name in names])


def plural(count: int, noun: str) -> str:
    """ "1 file", "2 files"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def are(items: Sequence[str]) -> str:
    """The verb for so many items."""
    return "is" if len(items) == 1 else "are"


def size_text(nbytes: int) -> str:
    """A size for people, in powers of 1000 with three digits: "15.4 GB"."""
    value, unit = float(nbytes), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 999.5:
            break
        value, unit = value / 1000, larger
    digits = 0 if unit == "B" or value >= 99.95 else 1 if value >= 9.995 else 2
    return f"{value:.{digits}f} {unit}"


def _short_count(count: int) -> str:
    for size, word in ((10**9, "billion"), (10**6, "million")):
        if count >= size:
            return f"{count / size:.3g} {word}"
    return f"{count:,}"


# --- for people ---


def render(report: Report) -> RenderableType:
    """A report for rich's console: facts, memory, files, remarks and, last and in red, problems."""
    blocks: list[RenderableType] = [Text(printable(report.path), style="bold"), _facts(report)]
    if report.memory and report.architecture is not None:
        blocks.append(_memory_table(report, report.architecture["length"]))
    if len(report.files) > 1:
        blocks.append(_file_table(report.files))
    if report.remarks:
        blocks.append(_sentences("Remarks", report.remarks, "yellow"))
    if report.problems:
        blocks.append(_sentences("Problems", report.problems, "red"))
    else:
        depth = "every value was read" if report.scanned else "headers only; --scan reads every value"
        blocks.append(Text(f"No problems ({depth}).", style="green"))
    return Group(*(part for block in blocks[:-1] for part in (block, "")), blocks[-1])


def _facts(report: Report) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    facts = {"Format": report.description, **_architecture_facts(report.architecture)}
    total, inner = report.parameters["total"], report.parameters["without_embeddings"]
    if total:
        without = f"; {_short_count(inner)} without embeddings" if inner is not None else ""
        facts["Parameters"] = f"{total:,}{f' ({_short_count(total)})' if total >= 10**6 else ''}{without}"
    if report.dtypes:
        only = len(report.dtypes) == 1
        facts["Stored as"] = ", ".join(name if only else f"{name} {n:,}" for name, n in report.dtypes.items())
    if report.quantization is not None:
        facts["Quantised"] = report.quantization
    facts["Weights"] = f"{size_text(report.weights_bytes)} in {plural(len(report.files), 'file')}"
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
    table = _table("Memory for inference, without activations")
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
    table = _table("Files with weights")
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


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", title_style="bold", caption_justify="left", box=SIMPLE_HEAD)


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
