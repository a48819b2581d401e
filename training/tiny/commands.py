"""The command `qwen1-tiny-chat`: make the model that ships with the repository, examine it, look at its data."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ...programs.failures import is_of_machine, told
from ...programs.models import check_model
from ...programs.options import version_option
from ...programs.packages import require
from ...programs.printing import end_with_reader
from ...programs.starting import INTERRUPTED, heavy_imports
from ..errors import DataError, TrainingError
from ..noise import no_monitor_of_bars
from . import PER_KIND

if TYPE_CHECKING:
    from .examination import Result

app = typer.Typer(
    name="qwen1-tiny-chat",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Make qwen-tiny-chat from nothing, examine it, look at its data.",
    epilog="Exit codes: 0 done, 1 refused or failed, 2 wrong usage, 130 interrupted.",
)


@app.callback()
def options(version: Annotated[bool, version_option("qwen1-tiny-chat")] = False) -> None:
    """What stands before the command."""


@contextmanager
def _failures(resumes: bool = True) -> Iterator[None]:
    """Expected failures as one line and exit code 1."""
    try:
        yield
    except BrokenPipeError:
        end_with_reader()
    except Exception as error:
        if not isinstance(error, (DataError, TrainingError, OSError, ValueError)) and not is_of_machine(error):
            raise
        typer.echo(f"qwen1-tiny-chat: {told(error)}", err=True)
        raise typer.Exit(1) from error
    except KeyboardInterrupt as error:
        more = "; the same command goes on from the last checkpoint" if resumes else ""
        typer.echo(f"\nInterrupted{more}.", err=True)
        raise typer.Exit(INTERRUPTED) from error


@app.command()
def make(
    output: Annotated[Path, typer.Argument(help="Folder of the finished model; must not exist.")],
    work: Annotated[Path | None, typer.Option(help="Folder of stages and checkpoints [OUTPUT.work].")] = None,
    seed: Annotated[int, typer.Option(help="Of data, first weights and order.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="A tiny model in a few minutes, to see it work.")] = False,
    per_kind: Annotated[int, typer.Option(min=1, help="Prompts of each kind in the examination.")] = PER_KIND,
) -> None:
    """Texts, vocabulary, pretraining, fine-tuning, examination, export; run again after a kill, it goes on.

    Example: qwen1-tiny-chat make my-tiny-chat --seed 0
    """
    require("matplotlib", "the plot of the losses, which is drawn at the end,")
    with heavy_imports():  # here and below, for --help needs none of them
        from .examination import examine_folder
        from .journey import QUICK, Size, run
        from .report import write_report

    with _failures(), no_monitor_of_bars():
        if output.exists():
            raise FileExistsError(f"{output} exists: name another folder, or move it away.")
        stages = work or output.with_name(f"{output.name}.work")
        model = run(stages, seed, QUICK if quick else Size())
        result = examine_folder(model, per_kind)
        write_report(model, result, _parameters(model))
        partial = output.with_name(f"{output.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(model, partial)
        partial.rename(output)
    _print(result, show=0)
    typer.echo(f"{output} is ready; {stages} can be deleted.", err=True)


@app.command()
def examine(
    folder: Annotated[Path, typer.Argument(help="Folder of a model made by `make`.")],
    per_kind: Annotated[int, typer.Option(min=1, help="Prompts of each kind.")] = PER_KIND,
    seed: Annotated[int, typer.Option(help="Of the prompts.")] = 1,
    show: Annotated[int, typer.Option(min=0, help="Wrong replies to print.")] = 10,
    as_json: Annotated[bool, typer.Option("--json", help="Figures for other programs.")] = False,
) -> None:
    """Ask what training never showed; a reply counts if it is exact.

    Example: qwen1-tiny-chat examine qwen-tiny-chat --per-kind 50
    """
    with heavy_imports():
        from .examination import examine_folder

    with _failures(resumes=False):
        check_model(folder)
        result = examine_folder(folder, per_kind, seed)
    if as_json:
        typer.echo(json.dumps(result.as_json()))
    else:
        _print(result, show)


@app.command()
def dialogues(
    count: Annotated[int, typer.Option(min=1, help="Conversations.")] = 100,
    seed: Annotated[int, typer.Option(help="Of the generator.")] = 0,
) -> None:
    """Print training conversations in the `messages` format, a JSON object a line.

    Example: qwen1-tiny-chat dialogues --count 1000 > data.jsonl
    """
    from .dialogues import training_dialogues

    with _failures(resumes=False):
        for dialogue in training_dialogues(count, seed):
            sys.stdout.write(json.dumps({"messages": dialogue.messages()}, ensure_ascii=False) + "\n")
        sys.stdout.flush()


def _print(result: Result, show: int) -> None:
    for kind, asked in result.asked.items():
        typer.echo(f"{kind:<14} {result.right[kind]:>4} of {asked:<4} {result.right[kind] / asked:.1%}")
    typer.echo(f"{'all':<14} {sum(result.right.values()):>4} of {sum(result.asked.values()):<4} {result.share:.1%}")
    typer.echo(f"perplexity {result.perplexity:.3f}")
    for kind, query, expected, given in result.wrong[:show]:
        typer.echo(f"{kind}: {query!r}: expected {expected!r}, got {given!r}")


def _parameters(folder: Path) -> int:
    """Weights in the model's file."""
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as file:
        shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118  # no mapping
    total = 0
    for shape in shapes:
        size = 1
        for length in shape:
            size *= length
        total += size
    return total


def main() -> None:
    """Run the program; ends the process with its exit status."""
    app()
