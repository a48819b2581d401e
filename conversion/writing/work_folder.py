"""The folder for what is under way: held against other processes, taken up after an interruption."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ...programs.failures import naming
from ..errors import CheckpointError
from .files import PlannedFile
from .progress import Progress
from .space import check_space

JOB_FILE, LOCK_FILE = ".qwen1.job.json", ".qwen1.lock"


@contextmanager
def work_folder(folder: Path, *kept: str) -> Iterator[None]:
    """Make a folder for what is under way, or take up that of an interrupted run, and hold it against other processes.

    After an error it is removed, unless the checkpoint is fine and a later run can go on with weights that are
    complete, or with another file that the patterns `kept` match.

    Raises:
        CheckpointError: another process holds it, or nothing of this program made it.
    """
    with _locked(folder):
        try:
            yield
        except BaseException as error:
            useful = any(path for pattern in ("*.safetensors", *kept) for path in folder.glob(pattern))
            if isinstance(error, CheckpointError) or not useful:
                remove_work_folder(folder)
            raise


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    is_link = folder.is_symlink()  # to a folder that is to be emptied
    is_ours = not is_link and folder.is_dir() and ((folder / LOCK_FILE).exists() or not any(folder.iterdir()))
    if (is_link or folder.exists()) and not is_ours:
        raise CheckpointError(f"{folder} is in the way, and no interrupted job of this program left it: remove it.")
    folder.mkdir(exist_ok=True)
    lock = FileLock(folder / LOCK_FILE, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise CheckpointError(f"Another process is writing {folder}: wait for it, or end it.") from error
    try:
        yield
    finally:
        lock.release()
        if folder.is_dir():
            (folder / LOCK_FILE).touch()  # which some releases of filelock remove


def remove_work_folder(folder: Path) -> None:
    """Remove it; the lock goes last, so that one of which a part is left is still known as ours."""
    empty(folder)
    (folder / LOCK_FILE).unlink(missing_ok=True)
    folder.rmdir()


def empty(folder: Path, kept: Collection[str] = ()) -> None:
    for path in folder.iterdir():
        if path.name not in (LOCK_FILE, *kept):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def write_files(folder: Path, files: Sequence[PlannedFile], job: Mapping[str, Any], progress: Progress) -> None:
    """Write files into a work folder, but not the weights that an equal job has left there; all else goes.

    Raises:
        CheckpointError: a value that is not finite, or a damaged source.
        OSError: the disk is too full.
    """
    text = json.dumps(job, indent=2, sort_keys=True)
    record = folder / JOB_FILE
    if record.is_file() and record.read_bytes() == text.encode():
        progress.note(f"Going on with what an interrupted run left in {folder}.")
        empty(folder, [JOB_FILE, *(file.name for file in files if file.tensors)])
    else:
        empty(folder)
        replace_text(record, text)
    _write_missing(folder, files, progress)


def replace_text(path: Path, text: str) -> None:
    """Write a small file at once, under its name only when complete."""
    temporary = path.with_name(f"{path.name}.tmp")
    with naming(path):
        temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _write_missing(folder: Path, files: Sequence[PlannedFile], progress: Progress) -> None:
    missing = [file for file in files if not (file.tensors and _is_complete(folder / file.name, file))]
    check_space(folder, sum(file.disk_bytes(folder) for file in missing))
    weights = [file for file in files if file.tensors]
    progress.begin(sum(file.tensors for file in weights), sum(file.nbytes for file in weights))
    for file in weights:
        if file not in missing:
            progress.advance(file.name, file.nbytes, file.tensors)
    for file in missing:
        path = folder / file.name
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.tmp")
        try:
            with naming(path):
                file.write(temporary, progress)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        temporary.replace(path)


def _is_complete(path: Path, file: PlannedFile) -> bool:
    """Whether a renamed file has its whole size, as after a loss of power it may not."""
    return path.is_file() and path.stat().st_size == file.file_size
