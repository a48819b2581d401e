"""Files of a folder replaced in place, from a list that is kept until all are moved."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..files.access import read_value
from ..opening.sources import MOVES_FILE, WORK_FOLDER
from .files import PlannedFile
from .plans import Plan
from .progress import Progress
from .work_folder import replace_text, write_files


def is_current(file: PlannedFile, folder: Path) -> bool:
    """Whether a folder holds just this file already."""
    path = folder / file.name
    return path.is_file() and file.equals(path)


def replace_files(
    plan: Plan, folder: Path, changed: Sequence[PlannedFile], retired: Sequence[str], progress: Progress
) -> list[str]:
    """Write what changes and put it into its place; what it replaces, and what is retired, stays as `NAME.bak`.

    Returns:
        Names of the files that were replaced, added or set aside.
    """
    write_files(folder / WORK_FOLDER, changed, plan.job(changed), progress)
    plan.source.weights.close()
    moves = []
    for name in (*(file.name for file in changed), *retired):
        moves.append([name, _backup_name(folder, name) if (folder / name).is_file() else None])
    replace_text(folder / WORK_FOLDER / MOVES_FILE, json.dumps(moves))
    return carry_out_moves(folder)


def _backup_name(folder: Path, name: str) -> str:
    backups = (f"{name}.bak{number}" for number in ("", *range(2, 1000)))
    return next(backup for backup in backups if not (folder / backup).exists())


def _read_moves(record: Path) -> list[tuple[str, str | None]]:
    """What is to be moved: only names in the folder itself, as whoever made the folder may have written the list.

    Raises:
        CheckpointError: anything else.
    """
    moves = read_value(record)
    if not isinstance(moves, list) or not all(_is_move(move) for move in moves):
        raise CheckpointError(f"{record} was not written by this program: remove the folder {record.parent}.")
    return [(name, backup) for name, backup in moves]


def _is_move(value: Any) -> bool:
    if not isinstance(value, list) or len(value) != 2:
        return False
    name, backup = value
    return _is_inside(name) and (backup is None or _is_inside(backup))


def _is_inside(name: Any) -> bool:
    return isinstance(name, str) and not Path(name).is_absolute() and ".." not in Path(name).parts


def carry_out_moves(folder: Path) -> list[str]:
    """Do what is left of the recorded moves; each step can be seen to have been done before."""
    record = folder / WORK_FOLDER / MOVES_FILE
    if not record.is_file():
        return []
    moves = _read_moves(record)
    for name, backup in moves:
        new, current = folder / WORK_FOLDER / name, folder / name
        if backup is not None and not (folder / backup).exists():
            current.rename(folder / backup)
        if new.is_file():
            current.parent.mkdir(parents=True, exist_ok=True)
            new.replace(current)
    record.unlink()
    return [name for name, _ in moves]
