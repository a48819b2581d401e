"""The command `quantize`: open, round, put together, measure."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import CheckpointError
from ..writing.progress import Progress
from .terminal import ShardOption, TargetArgument, check_device, out, print_notes, print_step, progress_bars

if TYPE_CHECKING:
    from ..opening.sources import Source
    from ..quantising.calibration import Calibration
    from ..quantising.library import Settings
    from ..writing.plans import Plan

_WORK, _DONE = "quantising", "rounded.json"
_WRITTEN = "written: "
"""Before the job in that file, once its result is there and the rest goes."""


class Bits(str, Enum):
    """Bits of a weight that were published."""

    four = "4"
    eight = "8"


def quantize_command(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="QWen folder of any release, with its full weights.")],
    target: TargetArgument,
    bits: Annotated[Bits, typer.Option(help="Bits of a weight.")],
    calibration: Annotated[
        Path | None,
        typer.Option(help="Texts to round by, .txt or .jsonl, best of what is to be written; else our own."),
    ] = None,
    group_size: Annotated[int, typer.Option(help="Inputs that share a scale; -1 for all of a layer.")] = 128,
    desc_act: Annotated[bool, typer.Option("--desc-act", help="Round important inputs first: better, slower.")] = False,
    samples: Annotated[int, typer.Option(min=1, help="Most rows of text to round by.")] = 128,
    length: Annotated[int, typer.Option(min=16, help="Tokens of a row, at most the trained length.")] = 2048,
    seed: Annotated[int, typer.Option(help="Of the order of the texts.")] = 0,
    device: Annotated[str, typer.Option(help="To compute on: cpu, cuda.")] = "cpu",
    max_shard_size: ShardOption = "5GB",
) -> None:
    """Round weights to 4 or 8 bits by GPTQ, in the published layout; needs gptqmodel. Prints perplexities."""
    from ..opening.sources import open_source
    from ..planning.quantise import check_quantisable
    from ..quantising.calibration import OWN_TEXTS, make_rows, open_tokenizer, read_calibration
    from ..quantising.library import Settings, check_library

    check_device(device)
    settings = Settings(int(bits.value), group_size, desc_act=desc_act)
    texts = read_calibration(calibration or OWN_TEXTS)
    origin = open_source(source)
    check_quantisable(origin, settings)
    check_library()
    rows = make_rows(texts, open_tokenizer(origin.folder), samples, min(length, origin.architecture.length), seed)
    if calibration is None:
        print_notes(["The texts to round by are our own, and few: --calibration names better ones."])
    with progress_bars() as progress:
        plan = quantise_folder(origin, target, rows, settings, device, max_shard_size, progress)
    print_notes(plan.notes if plan else [])
    out.print(f"{target}: {len(plan.files)} files written." if plan else f"{target}: written by an interrupted run.")
    before, after = (_perplexity(path, rows, device) for path in (source, target))
    count = int(rows.counted[:, 1:].sum())
    out.print(f"Perplexity on {count:,} tokens that were held out: {before:.4g} before, {after:.4g} after.")


def quantise_folder(
    source: Source,
    target: Path,
    rows: Calibration,
    settings: Settings,
    device: str,
    max_shard_size: str,
    progress: Progress,
) -> Plan | None:
    """Write a folder of rounded weights, whole or not at all.

    What the library works on and what it writes are in a folder of its own beside the target, which goes at the end.
    The library begins anew after an interruption; what it had finished is taken up.

    Returns:
        What was written; None where an interrupted run had written it, and nothing but to clear up was left to do.

    Raises:
        CheckpointError, OSError: see `quantise`, `plan_quantised` and `write_folder`.
    """
    from ..files.links import resolved
    from ..planning.upgrade import plan_upgrade
    from ..quantising.library import quantise
    from ..writing.folders import describe_files
    from ..writing.plans import write_plan
    from ..writing.work_folder import empty, replace_text, work_folder

    target = resolved(target)
    work = target.with_name(f"{target.name}.{_WORK}")
    job = json.dumps([settings.published, describe_files(source.weights.files), rows.seen.sum(1).tolist()])
    if target.exists() and any(target.iterdir() if target.is_dir() else [target]):
        return _finish(source, target, work, job, settings, max_shard_size)
    target.parent.mkdir(parents=True, exist_ok=True)
    with work_folder(work, _DONE):
        if _state(work) == job:
            progress.note(f"Going on with what an interrupted run left in {work}.")
        else:
            empty(work)
            write_plan(plan_upgrade(source), work / "source", Progress())
            print_step("Rounding the weights, a layer at a time")
            quantise(work / "source", work / "result", rows.seen, settings, device, work / "aside")
            replace_text(work / _DONE, job)
        plan = _plan(source, work, settings, max_shard_size)
        write_plan(plan, target, progress)
        _remove(work)
    return plan


def _finish(source: Source, target: Path, work: Path, job: str, settings: Settings, max_shard_size: str) -> Plan | None:
    """Clear up behind a run that was killed when it had written the target.

    Raises:
        CheckpointError: no such run wrote the target, as far as can be told from what it left.
    """
    from ..writing.plans import write_plan
    from ..writing.work_folder import LOCK_FILE, work_folder

    state, plan = _state(work) or "", None
    if state == job:
        plan = _plan(source, work, settings, max_shard_size)
        write_plan(plan, target, Progress())  # which compares what is there
    is_of_job = state in (job, _WRITTEN + job)
    is_over = is_of_job or state.startswith(_WRITTEN)  # with other settings too, which aren't those of this target
    if is_over or (work.is_dir() and {path.name for path in work.iterdir()} <= {LOCK_FILE}):
        with work_folder(work, _DONE):
            _remove(work)
    if not is_of_job:
        raise CheckpointError(f"{target} exists: remove it, or name another folder.")
    return plan


def _state(work: Path) -> str | None:
    """The job that the library has done in a work folder, or that its result is written."""
    return (work / _DONE).read_text() if (work / _DONE).is_file() else None


def _plan(source: Source, work: Path, settings: Settings, max_shard_size: str) -> Plan:
    from ..files.weights import open_weights
    from ..planning.quantise import plan_quantised

    return plan_quantised(source, open_weights(work / "result"), settings, max_shard_size)


def _remove(work: Path) -> None:
    """Remove the folder; what says that its result is written goes last, and nothing is read there any more."""
    from ..writing.work_folder import empty, remove_work_folder, replace_text

    job = _state(work) or ""
    if not job.startswith(_WRITTEN):
        replace_text(work / _DONE, _WRITTEN + job)
    empty(work, [_DONE])
    remove_work_folder(work)


def _perplexity(path: Path, rows: Calibration, device: str) -> float:
    import gc

    import torch

    from ..checking.models import load_model
    from ..quantising.perplexity import perplexity

    gc.collect()  # modules and hooks refer to one another, and this model needs the memory of the one before
    print_step(f"Measuring {path}")
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    return perplexity(load_model(path, dtype, device), rows.held_out, rows.counted)
