"""What the commands share: the terminal, exit codes, progress, options that several have.

A command loads what it needs when it runs, so that help needs none of it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from ...programs.failures import is_of_machine, told
from ...programs.printing import end_with_reader
from ...programs.starting import INTERRUPTED, heavy_imports
from ..errors import CheckpointError
from ..writing.progress import Progress

if TYPE_CHECKING:
    import torch

FAILED, WANTING = 1, 3


class _Output(Console):
    """Standard output."""

    def on_broken_pipe(self) -> None:
        """End as other programs do, where rich ends with 1."""
        end_with_reader()


# Texts and paths of users are printed as they are, on one line each, for other programs to read.
out = _Output(emoji=False, highlight=False, markup=False, soft_wrap=True)
err = Console(stderr=True, emoji=False, highlight=False, markup=False, soft_wrap=True)

SourceArgument = Annotated[Path, typer.Argument(metavar="SRC", help="Folder, or the single file of a LLaMA training.")]
TargetArgument = Annotated[Path, typer.Argument(metavar="DST", help="Folder to write; must not exist or be empty.")]
ParamsOption = Annotated[Path | None, typer.Option(help="params.json of a LLaMA checkpoint, if it is elsewhere.")]
ShardOption = Annotated[str, typer.Option(help="Largest size of a safetensors file, like 5GB or 500MB.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


class Dtype(str, Enum):
    """Names of dtypes on the command line."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


def torch_dtype(name: Dtype) -> torch.dtype:
    """The dtype of torch."""
    import torch

    return getattr(torch, name.value)


def optional_dtype(name: Dtype | None) -> torch.dtype | None:
    """The same; None without a name."""
    return None if name is None else torch_dtype(name)


class TerminalProgress(Progress):
    """Two bars, one over tensors and one over bytes."""

    def __init__(self, bars: Bars):
        self._bars = bars
        self._tasks: tuple[TaskID, TaskID] | None = None

    def begin(self, tensors: int, nbytes: int) -> None:
        """Show the bars, empty."""
        self._tasks = (
            self._bars.add_task("tensors", total=tensors, state=""),
            self._bars.add_task("bytes", total=nbytes, state=""),
        )

    def advance(self, name: str, nbytes: int, tensors: int = 1) -> None:
        """Move both on."""
        if self._tasks is None:
            return
        for task, step in zip(self._tasks, (tensors, nbytes), strict=True):
            self._bars.update(task, advance=step)
        counted, weighed = (self._bars.tasks[self._bars.task_ids.index(task)] for task in self._tasks)
        self._bars.update(counted.id, state=f"{counted.completed:.0f} of {counted.total:.0f}")
        self._bars.update(weighed.id, state=f"{decimal(int(weighed.completed))} of {decimal(int(weighed.total or 0))}")

    def note(self, text: str) -> None:
        """Print it above the bars."""
        self._bars.console.print(text)


@contextmanager
def progress_bars() -> Iterator[TerminalProgress]:
    """Show progress on standard error."""
    columns = (TextColumn("{task.description:>8}"), BarColumn(), TextColumn("{task.fields[state]}"))
    with Bars(*columns, TimeRemainingColumn(), console=err) as bars:
        yield TerminalProgress(bars)


@contextmanager
def _silence() -> Iterator[None]:
    """Keep the lines and bars of transformers itself off the terminal."""
    with heavy_imports():
        import torch  # noqa: F401 - which every command imports
        from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def reported(command: Callable[..., None], *, resumes: bool = True) -> Callable[..., None]:
    """Turn the errors that users cause into a line on standard error and an exit code.

    Args:
        resumes: whether the command goes on from what an interrupted run has left; one that only reads leaves nothing.
    """

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            with _silence():
                command(*args, **kwargs)
        except BrokenPipeError:
            end_with_reader()
        except Exception as error:
            if not isinstance(error, (CheckpointError, OSError)) and not is_of_machine(error):
                raise
            err.print(f"qwen1-checkpoint: {told(error)}", style="red")
            raise typer.Exit(FAILED) from error
        except KeyboardInterrupt as error:
            err.print(f"Interrupted.{' The same command takes up what is unfinished.' if resumes else ''}")
            raise typer.Exit(INTERRUPTED) from error

    return run


def print_notes(notes: list[str]) -> None:
    """Notes for the user, on standard error."""
    for note in notes:
        err.print(f"note: {note}", style="yellow")


def print_step(text: str) -> None:
    """What is done next, on standard error."""
    err.print(text)


def print_json(value: Any) -> None:
    """A result for programs."""
    out.print_json(json.dumps(value, ensure_ascii=False))


def check_device(name: str) -> None:
    """Refuse a device on which nothing can be computed.

    Raises:
        CheckpointError: unknown, or torch is built without it.
    """
    import torch

    try:
        torch.zeros(1, device=name).item()  # a number, which "meta" has none of
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"Device {name!r} can't be used ({reason}): use cpu, or one that torch finds.") from error
