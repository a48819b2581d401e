"""The command `convert`: open, plan, write, check."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

import typer

from .terminal import (
    Dtype,
    ParamsOption,
    ShardOption,
    SourceArgument,
    TargetArgument,
    optional_dtype,
    out,
    print_notes,
    print_step,
    progress_bars,
)
from .verify import report_comparison


class Target(str, Enum):
    """What `convert` can write."""

    qwen2 = "qwen2"
    qwen = "qwen"


def convert_command(
    source: SourceArgument,
    target: TargetArgument,
    to: Annotated[Target, typer.Option(help="Architecture of the result.")],
    dtype: Annotated[Dtype | None, typer.Option(help="Of the new weights; that of the old ones without it.")] = None,
    max_shard_size: ShardOption = "5GB",
    rope_scaling: Annotated[
        str | None, typer.Option(help="For qwen2: yarn:FACTOR, dynamic or dynamic:FACTOR, for longer texts.")
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
    """Convert QWen to Qwen2, or Qwen2 and LLaMA to QWen, with tokenizer and settings; GPTQ and AWQ keep their bits."""
    from ..checking.logits import compare
    from ..formats.qwen2 import RopeScaling
    from ..opening.sources import open_source
    from ..planning.conversion import plan_conversion
    from ..planning.dequantise import FULL
    from ..writing.plans import write_plan

    scaling = None if rope_scaling is None else RopeScaling.parse(rope_scaling)
    if verify and scaling is not None and scaling.kind == "yarn":
        raise typer.BadParameter("YaRN changes the logits of every text, so --verify could only fail: leave it out.")
    with progress_bars() as progress:
        origin = open_source(source, params)
        rounded = optional_dtype(dtype)
        plan = plan_conversion(origin, to.value, rounded, max_shard_size, scaling, seq_length, dequantize)
        written = write_plan(plan, target, progress)
    print_notes(plan.notes)
    out.print(f"{target}: {len(plan.files)} files written." if written else f"{target} is up to date.")
    if verify:
        comparison = compare(
            source, target, rounded=rounded or (FULL if dequantize else None), params=params, progress=print_step
        )
        report_comparison(comparison, as_json=False)
