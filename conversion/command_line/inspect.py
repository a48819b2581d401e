"""The command `inspect`."""

from __future__ import annotations

from typing import Annotated

import typer

from .terminal import WANTING, JsonOption, ParamsOption, SourceArgument, out, print_json, progress_bars


def inspect_command(
    source: SourceArgument,
    params: ParamsOption = None,
    scan: Annotated[bool, typer.Option("--scan", help="Read every tensor: checksums, NaN and infinity.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Tell what a checkpoint is, what it needs, and what is missing or odd. Ends with 3 if it can't be used."""
    from ..inspecting.inspection import inspect
    from ..inspecting.rendering import render

    report = inspect(source, params)
    if scan:
        with progress_bars() as progress:
            progress.begin(sum(file.tensors or 0 for file in report.files), report.weights_bytes)
            report = inspect(source, params, scan, progress.advance)
    if as_json:
        print_json(report.to_json())
    else:
        out.print(render(report), soft_wrap=False)
    if report.problems:
        raise typer.Exit(WANTING)
