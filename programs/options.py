"""Options that the programs made with Typer share."""

from __future__ import annotations

from typing import Any

import typer

from .version import version


def version_option(program: str) -> Any:
    """`--version`, which prints `PROGRAM VERSION` and ends."""

    def show(wanted: bool) -> None:
        if wanted:
            typer.echo(f"{program} {version()}")
            raise typer.Exit()

    return typer.Option("--version", callback=show, is_eager=True, help="Print the version and end.")
