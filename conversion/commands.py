"""The command `qwen1-checkpoint`, which is also that of `convert_checkpoint.py`.

Results go to standard output; progress, notes and errors to standard error. Exit codes: 0 done, 1 refused or failed
(also `doctor`, where something is wrong), 2 wrong usage, 3 checked and found wanting (`inspect`, `verify`,
`convert --verify`), 130 interrupted.

Each command imports what it needs when it runs: `--help` takes neither torch nor transformers.
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

from ..programs.options import version_option
from ..programs.shipped import TINY_CHAT
from .errors import CheckpointError

if TYPE_CHECKING:
    import torch

    from .verifying import Comparison
    from .writing import Progress
else:
    Progress = object  # its file imports torch

FAILED, WANTING, INTERRUPTED = 1, 3, 130
TOLERANCE = 1e-3
"""That of `verifying`, which imports torch."""

app = typer.Typer(
    name="qwen1-checkpoint",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Look at checkpoints of QWen, Qwen2 and LLaMA; upgrade, convert, compare, merge and publish them; look for "
    "faults of the environment.",
    epilog="Exit codes: 0 done, 1 refused or failed, 2 wrong usage, 3 checked and found wanting, 130 interrupted.",
)


@app.callback()
def options(version: Annotated[bool, version_option("qwen1-checkpoint")] = False) -> None:
    """What stands before the command."""


# Texts and paths of users are printed as they are, on one line each, for other programs to read.
out = Console(emoji=False, highlight=False, markup=False, soft_wrap=True)
err = Console(stderr=True, emoji=False, highlight=False, markup=False, soft_wrap=True)


class Dtype(str, Enum):
    """Names of dtypes on the command line."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


def _torch_dtype(name: Dtype | None) -> torch.dtype | None:
    import torch

    return None if name is None else getattr(torch, name.value)


class Target(str, Enum):
    """What `convert` can write."""

    qwen2 = "qwen2"
    qwen = "qwen"


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
def _progress() -> Iterator[TerminalProgress]:
    columns = (TextColumn("{task.description:>8}"), BarColumn(), TextColumn("{task.fields[state]}"))
    with Bars(*columns, TimeRemainingColumn(), console=err) as bars:
        yield TerminalProgress(bars)


@contextmanager
def _silence() -> Iterator[None]:
    """Keep the lines and bars of transformers itself off the terminal."""
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


def _reported(command: Callable[..., None]) -> Callable[..., None]:
    """Turn the errors that users cause into a line on standard error and an exit code."""

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            with _silence():
                command(*args, **kwargs)
        except (CheckpointError, OSError) as error:
            err.print(f"qwen1-checkpoint: {error}", style="red")
            raise typer.Exit(FAILED) from error
        except KeyboardInterrupt as error:
            err.print("Interrupted. The same command takes up what is unfinished.")
            raise typer.Exit(INTERRUPTED) from error

    return run


def _example(text: str) -> str:
    return f"Example:  qwen1-checkpoint {text}"


def _print_notes(notes: list[str]) -> None:
    for note in notes:
        err.print(f"note: {note}", style="yellow")


def _print_step(text: str) -> None:
    err.print(text)


def _print_json(value: Any) -> None:
    out.print_json(json.dumps(value, ensure_ascii=False))


SourceArgument = Annotated[Path, typer.Argument(metavar="SRC", help="Folder, or the single file of a LLaMA training.")]
TargetArgument = Annotated[Path, typer.Argument(metavar="DST", help="Folder to write; must not exist or be empty.")]
ParamsOption = Annotated[Path | None, typer.Option(help="params.json of a LLaMA checkpoint, if it is elsewhere.")]
ShardOption = Annotated[str, typer.Option(help="Largest size of a safetensors file, like 5GB or 500MB.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


@app.command("inspect", epilog=_example("inspect ./Qwen-7B-Chat"))
@_reported
def inspect_command(
    source: SourceArgument,
    params: ParamsOption = None,
    scan: Annotated[bool, typer.Option("--scan", help="Read every tensor: checksums, NaN and infinity.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Tell what a checkpoint is, what it needs, and what is missing or odd. Ends with 3 if it can't be used."""
    from .inspecting import inspect, render

    report = inspect(source, params)
    if scan:
        with _progress() as progress:
            progress.begin(sum(file.tensors or 0 for file in report.files), report.weights_bytes)
            report = inspect(source, params, scan, progress.advance)
    if as_json:
        _print_json(report.to_json())
    else:
        out.print(render(report), soft_wrap=False)
    if report.problems:
        raise typer.Exit(WANTING)


@app.command("upgrade", epilog=_example("upgrade ./Qwen-7B-Chat ./Qwen-7B-Chat-upgraded"))
@_reported
def upgrade_command(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="QWen folder of any release.")],
    target: Annotated[
        Path | None, typer.Argument(metavar="DST", help="Folder to write; must not exist or be empty.")
    ] = None,
    in_place: Annotated[
        bool, typer.Option("--in-place", help="Change SRC itself; replaced files stay as NAME.bak.")
    ] = False,
    copy: Annotated[
        bool, typer.Option("--copy", help="Copy safetensors instead of giving the same data a second name.")
    ] = False,
    max_shard_size: ShardOption = "5GB",
) -> None:
    """Bring a QWen folder of 2023 up to date: our code and settings, safetensors for pickles, the same weights."""
    if in_place == (target is not None):
        raise typer.BadParameter("Name DST, or use --in-place.")
    from .sources import open_source
    from .upgrading import plan_upgrade, upgrade, upgrade_in_place

    with _progress() as progress:
        if target is None:
            plan, changed = upgrade_in_place(source, max_shard_size, progress)
        else:
            origin = open_source(source)
            plan = plan_upgrade(origin, max_shard_size, link=not copy)
            changed = [file.name for file in plan.files] if upgrade(origin, target, plan, progress) else []
    _print_notes(plan.notes)
    where = target or source
    out.print(f"{where}: {len(changed)} files written or moved." if changed else f"{where} is up to date.")


@app.command("convert", epilog=_example("convert ./Qwen-7B-Chat ./Qwen-7B-Chat-qwen2 --to qwen2 --verify"))
@_reported
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
    params: ParamsOption = None,
    verify: Annotated[bool, typer.Option("--verify", help="Compare the logits afterwards; 3 if they differ.")] = False,
) -> None:
    """Convert QWen to Qwen2, or Qwen2 and LLaMA to QWen, with tokenizer and settings."""
    from .configurations import RopeScaling
    from .converting import convert, plan_conversion
    from .sources import open_source
    from .verifying import compare

    scaling = None if rope_scaling is None else RopeScaling.parse(rope_scaling)
    if verify and scaling is not None and scaling.kind == "yarn":
        raise typer.BadParameter("YaRN changes the logits of every text, so --verify could only fail: leave it out.")
    with _progress() as progress:
        origin = open_source(source, params)
        plan = plan_conversion(origin, to.value, _torch_dtype(dtype), max_shard_size, scaling, seq_length)
        written = convert(origin, target, plan, progress)
    _print_notes(plan.notes)
    out.print(f"{target}: {len(plan.files)} files written." if written else f"{target} is up to date.")
    if verify:
        rounded = _torch_dtype(dtype)
        comparison = compare(source, target, rounded=rounded, params=params, progress=_print_step)
        _report_comparison(comparison, as_json=False)


@app.command("verify", epilog=_example("verify ./Qwen-7B-Chat ./Qwen-7B-Chat-qwen2"))
@_reported
def verify_command(
    first: Annotated[Path, typer.Argument(metavar="A", help="Checkpoint.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="Checkpoint to compare with it.")],
    ids: Annotated[str | None, typer.Option(help="Token ids, 1,2,3, or a JSON file of them; else random ones.")] = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="Number of random tokens in a row.")] = None,
    seed: Annotated[int, typer.Option(help="Of the random tokens.")] = 0,
    tolerance: Annotated[float, typer.Option(min=0, help="Largest difference of a logit that passes.")] = TOLERANCE,
    dtype: Annotated[Dtype, typer.Option(help="To compute in.")] = Dtype.float32,
    round_to: Annotated[Dtype | None, typer.Option(help="Round A's weights to this first.")] = None,
    device: Annotated[str, typer.Option(help="To compute on.")] = "cpu",
    params: ParamsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compare the logits of two checkpoints, each loaded by its own class. Ends with 3 if they differ."""
    import torch

    from .verifying import compare, parse_ids

    _check_device(device)
    comparison = compare(
        first,
        second,
        ids=None if ids is None else parse_ids(ids),
        tokens=tokens,
        seed=seed,
        tolerance=tolerance,
        dtype=getattr(torch, dtype.value),
        device=device,
        rounded=_torch_dtype(round_to),
        params=params,
        progress=_print_step,
    )
    _report_comparison(comparison, as_json)


def _check_device(name: str) -> None:
    import torch

    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:  # unknown, or torch is built without it
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"Device {name!r} can't be used ({reason}): use cpu, or one that torch finds.") from error


def _report_comparison(comparison: Comparison, as_json: bool) -> None:
    if as_json:
        _print_json(comparison.to_json())
    else:
        out.print(str(comparison))
    if not comparison.passed:
        raise typer.Exit(WANTING)


@app.command("merge-lora", epilog=_example("merge-lora ./Qwen-7B-Chat ./adapter ./Qwen-7B-Chat-merged"))
@_reported
def merge_lora_command(
    base: Annotated[Path, typer.Argument(metavar="BASE", help="QWen folder of any release.")],
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="Folder written by peft.")],
    target: TargetArgument,
    dtype: Annotated[Dtype | None, typer.Option(help="Of the new weights; that of BASE without it.")] = None,
    max_shard_size: ShardOption = "5GB",
) -> None:
    """Add a LoRA adapter to the weights of its base; tokenizer and code go along."""
    from .merging import merge_lora

    with _progress() as progress:
        written = merge_lora(
            base, adapter, target, dtype=_torch_dtype(dtype), max_shard_size=max_shard_size, progress=progress
        )
    out.print(f"{target}: merged." if written else f"{target} is up to date.")


@app.command("push", epilog=_example("push ./Qwen-7B-Chat-upgraded my-name/Qwen-7B-Chat --private"))
@_reported
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
    from .pushing import files_to_push, model_card, push

    if dry_run:
        files = files_to_push(folder, repo_id)
        for file in files:
            out.print(f"{decimal(file.size):>12}  {file.path}")
        out.print(f"{decimal(sum(file.size for file in files)):>12}  in {len(files)} files")
        out.print("\n" + model_card(folder, repo_id))
        return
    out.print(push(folder, repo_id, private=private, revision=revision, token=token, message=message))


@app.command("doctor", epilog=_example("doctor ./Qwen-7B-Chat-today --json"))
@_reported
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
    from ..doctor.examination import examine
    from ..doctor.report import render as render_diagnosis

    if device is not None:
        _check_device(device)
    with err.status("") as status:
        diagnosis = examine(folder, device, slow, status.update)
    if as_json:
        _print_json(diagnosis.to_json())
    else:
        out.print(render_diagnosis(diagnosis), soft_wrap=False)
    if diagnosis.refusal is not None:
        raise CheckpointError(diagnosis.refusal)
    if not diagnosis.passed:
        raise typer.Exit(FAILED)


def main() -> None:
    """Run the program; ends the process with its exit status."""
    app()
