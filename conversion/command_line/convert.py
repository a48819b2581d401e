"""The command `convert`: open, plan, write, check."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.filesize import decimal

from .terminal import (
    Dtype,
    ParamsOption,
    ShardOption,
    SourceArgument,
    optional_dtype,
    out,
    print_notes,
    print_step,
    progress_bars,
)
from .verify import report_comparison

if TYPE_CHECKING:
    import torch

    from ..formats.qwen2 import RopeScaling

_SHARD = "5GB"


class Target(str, Enum):
    """What `convert` can write."""

    qwen2 = "qwen2"
    qwen = "qwen"
    gguf = "gguf"


class Outtype(str, Enum):
    """How a GGUF can hold weights."""

    f32 = "f32"
    f16 = "f16"
    bf16 = "bf16"
    q8_0 = "q8_0"


def convert_command(
    source: SourceArgument,
    target: Annotated[
        Path, typer.Argument(metavar="DST", help="Folder to write; must not exist or be empty. For gguf, the file.")
    ],
    to: Annotated[Target, typer.Option(help="Architecture of the result; gguf: one file for llama.cpp and Ollama.")],
    dtype: Annotated[Dtype | None, typer.Option(help="Of the new weights; that of the old ones without it.")] = None,
    outtype: Annotated[
        Outtype | None, typer.Option(help="For gguf: of the new weights; that of the old ones without it.")
    ] = None,
    max_shard_size: ShardOption = _SHARD,
    rope_scaling: Annotated[
        str | None,
        typer.Option(help="For qwen2: yarn:FACTOR, dynamic or dynamic:FACTOR, for longer texts; for gguf yarn:FACTOR."),
    ] = None,
    seq_length: Annotated[
        int | None, typer.Option(min=2, help="For qwen: trained length in tokens, if SRC doesn't tell.")
    ] = None,
    dequantize: Annotated[
        bool, typer.Option("--dequantize", help="Make full weights of packed ones, bfloat16 without --dtype.")
    ] = False,
    params: ParamsOption = None,
    verify: Annotated[bool, typer.Option("--verify", help="Compare the logits afterwards; 3 if they differ.")] = False,
) -> None:
    """Convert QWen to Qwen2 or GGUF, or Qwen2 and LLaMA to QWen, with tokenizer and settings; GPTQ and AWQ stay so."""
    from ..formats.qwen2 import RopeScaling

    scaling = None if rope_scaling is None else RopeScaling.parse(rope_scaling)
    if to is Target.gguf:
        given = {"--dtype": dtype, "--seq-length": seq_length, "--params": params, "--verify": verify or None}
        given |= {"--dequantize": dequantize or None}
        _refuse_others(given | {"--max-shard-size": None if max_shard_size == _SHARD else max_shard_size})
        return _convert_to_gguf(source, target, outtype, scaling)
    if outtype is not None:
        raise typer.BadParameter("--outtype is for --to gguf only: use --dtype.")
    if verify and scaling is not None and scaling.kind == "yarn":
        raise typer.BadParameter("YaRN changes the logits of every text, so --verify could only fail: leave it out.")
    _convert_to_folder(
        source, target, to, optional_dtype(dtype), max_shard_size, scaling, seq_length, dequantize, params
    )
    if verify:
        _verify(source, target, optional_dtype(dtype), dequantize, params)


def _convert_to_folder(
    source: Path,
    target: Path,
    to: Target,
    dtype: torch.dtype | None,
    max_shard_size: str,
    scaling: RopeScaling | None,
    seq_length: int | None,
    dequantize: bool,
    params: Path | None,
) -> None:
    from ..opening.sources import open_source
    from ..planning.conversion import plan_conversion
    from ..writing.plans import write_plan

    with progress_bars() as progress:
        origin = open_source(source, params)
        plan = plan_conversion(origin, to.value, dtype, max_shard_size, scaling, seq_length, dequantize)
        written = write_plan(plan, target, progress)
    print_notes(plan.notes)
    out.print(f"{target}: {len(plan.files)} files written." if written else f"{target} is up to date.")


def _verify(source: Path, target: Path, dtype: torch.dtype | None, dequantize: bool, params: Path | None) -> None:
    """Compare the logits of both, where the weights were rounded, with the source rounded too."""
    from ..checking.logits import compare
    from ..planning.dequantise import FULL

    rounded = dtype or (FULL if dequantize else None)
    comparison = compare(source, target, rounded=rounded, params=params, progress=print_step)
    report_comparison(comparison, as_json=False)


def _convert_to_gguf(source: Path, target: Path, outtype: Outtype | None, scaling: RopeScaling | None) -> None:
    """Write one file: the target, or one in it, if its name is not that of a GGUF."""
    from ..formats.gguf import Encoding
    from ..opening.sources import open_source
    from ..planning.to_gguf import plan_gguf
    from ..writing.plans import write_plan

    with progress_bars() as progress:
        plan = plan_gguf(open_source(source), None if outtype is None else Encoding(outtype.value), scaling)
        path = target if target.suffix.lower() == ".gguf" else target / plan.files[0].name
        written = write_plan(plan, path, progress)
    print_notes(plan.notes)
    out.print(f"{path}: {decimal(plan.files[0].file_size)} written." if written else f"{path} is up to date.")


def _refuse_others(options: Mapping[str, object]) -> None:
    """Refuse what is for folders, by the name of the option."""
    remedies = {
        "--dtype": "use --outtype",
        "--dequantize": "dequantise to a folder first (--to qwen2 --dequantize), and make a GGUF of that",
        "--verify": "a GGUF is run by other programs (docs/gguf.md compares their logits)",
    }
    for name in (name for name, value in options.items() if value is not None):
        raise typer.BadParameter(f"{name} is not for --to gguf: {remedies.get(name, 'leave it out')}.")
