"""The command `push`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.filesize import decimal

from .terminal import out, print_notes


def push_command(
    folder: Annotated[Path, typer.Argument(metavar="DST", help="Folder that upgrade, convert or merge-lora wrote.")],
    repo_id: Annotated[str, typer.Argument(metavar="REPO_ID", help="name or organisation/name on the Hub.")],
    private: Annotated[bool, typer.Option("--private", help="For a repository that is new.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to push to; made if it is new.")] = None,
    token: Annotated[
        str | None, typer.Option(envvar="HF_TOKEN", help="Instead of that of `hf auth login`.", show_envvar=True)
    ] = None,
    message: Annotated[str | None, typer.Option(help="Commit message.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list the files and show the model card.")] = False,
) -> None:
    """Publish a checkpoint on the Hub: model card, code, tokenizer and weights. Run it again to resume."""
    from ..publishing.card import model_card, notes_on_card
    from ..publishing.upload import files_to_push, push

    print_notes(notes_on_card(folder, repo_id))
    if dry_run:
        files = files_to_push(folder, repo_id)
        for file in files:
            out.print(f"{decimal(file.size):>12}  {file.path}")
        out.print(f"{decimal(sum(file.size for file in files)):>12}  in {len(files)} files")
        out.print("\n" + model_card(folder, repo_id))
        return
    out.print(push(folder, repo_id, private=private, revision=revision, token=token, message=message))
