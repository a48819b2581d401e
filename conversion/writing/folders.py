"""Write a checkpoint so that it is there as a whole or not at all.

Everything is planned before the first byte is written: each file of the result is a `PlannedFile`. They are written
into a folder beside the target, `TARGET.partial`, which is renamed when all are there. A process that is killed leaves
that folder behind; the same command run again goes on with the files that are missing. Where the target exists already,
the plan is compared with it instead.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..files.links import resolved
from .files import PlannedFile
from .progress import Progress
from .work_folder import JOB_FILE, LOCK_FILE, remove_work_folder, work_folder, write_files


def describe_files(paths: Sequence[Path]) -> list[list[Any]]:
    """Places, sizes and times of files, by which an interrupted job knows that its sources are still the same."""
    return [[str(path.resolve()), (stat := path.stat()).st_size, stat.st_mtime_ns] for path in paths]


def write_folder(target: Path, files: Sequence[PlannedFile], job: Mapping[str, Any], progress: Progress) -> bool:
    """Write all files into a new folder.

    Args:
        target: folder that doesn't exist, is empty, or holds the result already.
        files: what to write.
        job: all that the result depends on, as JSON; an interrupted job is taken up only if it is equal.

    Returns:
        False if the target held the result already, so that nothing was done.

    Raises:
        CheckpointError: the target holds something else, the disk is too full, or another process writes there.
    """
    target = resolved(target)
    partial = target.with_name(f"{target.name}.partial")
    if target.exists() and any(target.iterdir() if target.is_dir() else [target]):
        _check_equal(target, files)
        _finish(target)
        return False
    if os.path.ismount(target):  # which nothing can be renamed to
        raise CheckpointError(f"{target} is a mount point: name a folder in it.")
    target.parent.mkdir(parents=True, exist_ok=True)
    with work_folder(partial):
        write_files(partial, files, job, progress)
        if target.is_dir():
            target.rmdir()
        partial.replace(target)
    _finish(target)
    return True


def write_single(target: Path, file: PlannedFile, job: Mapping[str, Any], progress: Progress) -> bool:
    """The same for a result that is one file: written in a folder beside the target, and renamed when it is complete.

    Args:
        target: file that doesn't exist, or holds the result already.
        file: what to write, whatever its own name.

    Returns:
        False if the target held the result already, so that nothing was done.

    Raises:
        CheckpointError: the target holds something else, the disk is too full, or another process writes there.
    """
    target = resolved(target)
    partial = target.with_name(f"{target.name}.partial")
    is_there = target.exists()
    if target.is_dir():
        raise CheckpointError(f"{target} is a folder: name a file to write.")
    if is_there and not file.equals(target):
        raise CheckpointError(f"{target} exists and holds something else: remove it or name another file.")
    if is_there and not partial.exists():
        return False
    target.parent.mkdir(parents=True, exist_ok=True)
    with work_folder(partial, file.name):
        if not is_there:
            write_files(partial, [file], job, progress)
            (partial / file.name).replace(target)
        remove_work_folder(partial)
    return not is_there


def _finish(target: Path) -> None:
    """Take away what is left of the job once its folder has been renamed."""
    if (target / JOB_FILE).is_file():
        (target / LOCK_FILE).unlink(missing_ok=True)
        (target / JOB_FILE).unlink()


def _check_equal(target: Path, files: Sequence[PlannedFile]) -> None:
    if not target.is_dir():
        raise CheckpointError(f"{target} is a file: name a folder to write.")
    for file in files:
        path = target / file.name
        if not path.is_file() or not file.equals(path):
            state = "differs" if path.is_file() else "is missing"
            raise CheckpointError(
                f"{target} exists and holds something else ({file.name} {state}): remove it or name another folder."
            )
