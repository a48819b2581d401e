"""The command `inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .terminal import WANTING, JsonOption, ParamsOption, out, print_json, progress_bars

SourceArgument = Annotated[
    Path, typer.Argument(metavar="SRC", help="Folder, a config.json alone, or the single file of a LLaMA training.")
]


def inspect_command(
    source: SourceArgument,
    params: ParamsOption = None,
    scan: Annotated[bool, typer.Option("--scan", help="Read every tensor: checksums, NaN and infinity.")] = False,
    as_json: JsonOption = False,
    device_memory: Annotated[
        str | None, typer.Option(help="How many devices of this memory it needs, like 24GB or 80GiB.")
    ] = None,
    context: Annotated[int | None, typer.Option(help="Tokens of a text there; else the trained length.")] = None,
    batch: Annotated[int | None, typer.Option(help="Texts at once, on all devices together; else 1.")] = None,
    cache: Annotated[str | None, typer.Option(help="Keys and values: growing, static or int8; else growing.")] = None,
    prefill_chunk: Annotated[int | None, typer.Option(help="Tokens of a prompt read at once; else all.")] = None,
    lora_rank: Annotated[int | None, typer.Option(help="Rank of LoRA and QLoRA; else 64.")] = None,
    reserve: Annotated[str | None, typer.Option(help="Memory of each device to keep free, like 1GB.")] = None,
) -> None:
    """Tell what a checkpoint is, what it needs, and what is missing or odd. Ends with 3 if it can't be used.

    With --device-memory, --context or --batch: how many devices serving and each way of training need, for which
    config.json is enough, as in: inspect config.json --device-memory 24GB --context 8192 --batch 4
    """
    from ..inspecting.inspection import inspect
    from ..inspecting.rendering import render
    from ..sizing.question import ask

    question = ask(device_memory, context, batch, cache, prefill_chunk, lora_rank, reserve)
    report = inspect(source, params, question=question)
    if scan:
        with progress_bars() as progress:
            progress.begin(sum(file.tensors or 0 for file in report.files), report.weights_bytes)
            report = inspect(source, params, scan, progress.advance, question)
    if as_json:
        print_json(report.to_json())
    else:
        out.print(render(report), soft_wrap=False)
    if report.problems:
        raise typer.Exit(WANTING)
