"""The command `doctor`, whose parts are in a folder of that name beside this package."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ...programs.shipped import TINY_CHAT
from ..errors import CheckpointError
from .terminal import FAILED, JsonOption, check_device, err, out, print_json


def doctor_command(
    folder: Annotated[
        Path, typer.Argument(metavar="[FOLDER]", help="QWen folder.", show_default="the qwen-tiny-chat that ships")
    ] = TINY_CHAT,
    device: Annotated[
        str | None, typer.Option(help="To compute on.", show_default="cuda if there is one, else cpu")
    ] = None,
    slow: Annotated[bool, typer.Option("--slow", help="Also try what has to be compiled: half a minute.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Tell whether the models run right here: versions, replies, logits, tokenizers, back ends. Ends with 1 if not."""
    from ...doctor.examination import examine
    from ...doctor.report import render as render_diagnosis

    if device is not None:
        check_device(device)
    with err.status("") as status:
        diagnosis = examine(folder, device, slow, status.update)
    if as_json:
        print_json(diagnosis.to_json())
    else:
        out.print(render_diagnosis(diagnosis), soft_wrap=False)
    if diagnosis.refusal is not None:
        raise CheckpointError(diagnosis.refusal)
    if not diagnosis.passed:
        raise typer.Exit(FAILED)
