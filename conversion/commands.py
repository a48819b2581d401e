"""The command `qwen1-checkpoint`, which is also that of `convert_checkpoint.py`: the list of its commands.

Results go to standard output; progress, notes and errors to standard error. Exit codes: 0 done, 1 refused or failed
(also `doctor`, where something is wrong), 2 wrong usage, 3 checked and found wanting (`inspect`, `verify`,
`convert --verify`), 130 interrupted.

Each command is a file in `command_line/` and imports what it needs when it runs: `--help` takes neither torch nor
transformers.
"""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ..programs.options import version_option
from .command_line.convert import convert_command
from .command_line.doctor import doctor_command
from .command_line.inspect import inspect_command
from .command_line.merge_lora import merge_lora_command
from .command_line.push import push_command
from .command_line.quantize import quantize_command
from .command_line.terminal import reported
from .command_line.upgrade import upgrade_command
from .command_line.verify import verify_command


class _Commands(TyperGroup):
    """The commands, none of which takes an empty word: as a path it would be the current folder."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As in click.

        Raises:
            BadParameter: a word is empty.
        """
        if "" in args:
            raise typer.BadParameter("an empty word, as of a variable that isn't set: name a folder, or leave it out.")
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_Commands,
    name="qwen1-checkpoint",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Look at checkpoints of QWen, Qwen2 and LLaMA; upgrade, convert, compare, merge, quantise and publish them; "
    "look for faults of the environment.",
    epilog="Exit codes: 0 done, 1 refused or failed, 2 wrong usage, 3 checked and found wanting, 130 interrupted.",
)

_ONLY_READ = ("inspect", "verify", "doctor")


@app.callback()
def options(version: Annotated[bool, version_option("qwen1-checkpoint")] = False) -> None:
    """What stands before the command."""


for name, command, example in (
    ("inspect", inspect_command, "./Qwen-7B-Chat"),
    ("upgrade", upgrade_command, "./Qwen-7B-Chat ./Qwen-7B-Chat-upgraded"),
    ("convert", convert_command, "./Qwen-7B-Chat ./Qwen-7B-Chat-qwen2 --to qwen2 --verify"),
    ("verify", verify_command, "./Qwen-7B-Chat ./Qwen-7B-Chat-qwen2"),
    ("merge-lora", merge_lora_command, "./Qwen-7B-Chat ./adapter ./Qwen-7B-Chat-merged"),
    (
        "quantize",
        quantize_command,
        "./Qwen-7B-Chat ./Qwen-7B-Chat-Int4 --bits 4 --calibration texts.jsonl --device cuda",
    ),
    ("push", push_command, "./Qwen-7B-Chat-upgraded my-name/Qwen-7B-Chat --private"),
    ("doctor", doctor_command, "./Qwen-7B-Chat-today --json"),
):
    shown = reported(command, resumes=name not in _ONLY_READ)
    app.command(name, epilog=f"Example:  qwen1-checkpoint {name} {example}")(shown)


def main() -> None:
    """Run the program."""
    app()
