"""`upgrade --in-place`: what an earlier run left undone comes first; then open, plan, write."""

from __future__ import annotations

from pathlib import Path

from .errors import CheckpointError
from .files.access import check_exists
from .files.links import check_links
from .opening.sources import MOVES_FILE, WORK_FOLDER, open_source
from .planning.upgrade import plan_upgrade
from .writing.moves import carry_out_moves, is_current, replace_files
from .writing.plans import Plan
from .writing.progress import Progress
from .writing.work_folder import remove_work_folder, work_folder


def upgrade_in_place(folder: Path, max_shard_size: str, progress: Progress) -> tuple[Plan, list[str]]:
    """Replace the files of a folder that change; the old ones stay beside them as `NAME.bak`.

    New files are written into a folder of their own first. A list of what is to be moved where is kept until all is
    moved, so that a run that was killed is finished by the next.

    Returns:
        The plan, and the names of the files that were replaced, added or set aside: none if all was up to date.

    Raises:
        CheckpointError, OSError: see `plan_upgrade` and `write_folder`.
    """
    check_exists(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder.")
    check_links(folder)
    with work_folder(folder / WORK_FOLDER, MOVES_FILE):
        moved = carry_out_moves(folder)
        plan = plan_upgrade(open_source(folder), max_shard_size)
        changed = [file for file in plan.files if not is_current(file, folder)]
        retired = [name for name in plan.retired if (folder / name).is_file()]
        if changed or retired:
            moved += replace_files(plan, folder, changed, retired, progress)
        remove_work_folder(folder / WORK_FOLDER)
    return plan, moved
