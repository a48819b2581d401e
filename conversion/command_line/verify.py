"""The command `verify`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..checking.comparison import TOLERANCE, Comparison
from .terminal import (
    WANTING,
    Dtype,
    JsonOption,
    ParamsOption,
    check_device,
    optional_dtype,
    out,
    print_json,
    print_step,
    torch_dtype,
)


def verify_command(
    first: Annotated[Path, typer.Argument(metavar="A", help="Checkpoint.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="Checkpoint to compare with it.")],
    ids: Annotated[str | None, typer.Option(help="Token ids, 1,2,3, or a JSON file of them; else random ones.")] = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="Number of random tokens in a row.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the random tokens; else 0.")] = None,
    tolerance: Annotated[float, typer.Option(min=0, help="Largest difference of a logit that passes.")] = TOLERANCE,
    dtype: Annotated[Dtype, typer.Option(help="To compute in.")] = Dtype.float32,
    round_to: Annotated[Dtype | None, typer.Option(help="Round A's weights to this first.")] = None,
    device: Annotated[str, typer.Option(help="To compute on.")] = "cpu",
    params: ParamsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compare the logits of two checkpoints, each loaded by its own class. Ends with 3 if they differ."""
    from ..checking.logits import compare
    from ..checking.token_ids import parse_ids

    if ids is not None:
        for name, value in {"--tokens": tokens, "--seed": seed}.items():
            if value is not None:
                raise typer.BadParameter(f"{name} is for random tokens, and --ids names them: leave one out.")
    check_device(device)
    comparison = compare(
        first,
        second,
        ids=None if ids is None else parse_ids(ids),
        tokens=tokens,
        seed=seed or 0,
        tolerance=tolerance,
        dtype=torch_dtype(dtype),
        device=device,
        rounded=optional_dtype(round_to),
        params=params,
        progress=print_step,
    )
    report_comparison(comparison, as_json)


def report_comparison(comparison: Comparison, as_json: bool) -> None:
    """Print a comparison; ends with 3 if it failed."""
    if as_json:
        print_json(comparison.to_json())
    else:
        out.print(str(comparison))
    if not comparison.passed:
        raise typer.Exit(WANTING)
