"""The command `upgrade`: beside the folder, or in place."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import CheckpointError
from ..writing.progress import Progress
from .terminal import ShardOption, out, print_notes, progress_bars

if TYPE_CHECKING:
    from ..writing.plans import Plan


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
    from ..opening.sources import open_source
    from ..planning.upgrade import plan_upgrade
    from ..writing.plans import write_plan

    if in_place == (target is not None):
        raise typer.BadParameter("Name DST, or use --in-place.")
    if in_place and copy:
        raise typer.BadParameter("--copy is for a new folder, and --in-place writes none: leave one out.")
    with progress_bars() as progress:
        if target is None:
            plan, changed = upgrade_in_place(source, max_shard_size, progress)
        else:
            origin = open_source(source)
            plan = plan_upgrade(origin, max_shard_size, link=not copy)
            changed = [file.name for file in plan.files] if write_plan(plan, target, progress) else []
    print_notes(plan.notes)
    where = target or source
    out.print(f"{where}: {len(changed)} files written or moved." if changed else f"{where} is up to date.")


def upgrade_in_place(folder: Path, max_shard_size: str, progress: Progress) -> tuple[Plan, list[str]]:
    """Replace the files of a folder that change; the old ones stay beside them as `NAME.bak`.

    New files are written into a folder of their own first. A list of what is to be moved where is kept until all is
    moved, so that a run that was killed is finished by the next.

    Returns:
        The plan, and the names of the files that were replaced, added or set aside: none if all was up to date.

    Raises:
        CheckpointError, OSError: see `plan_upgrade` and `write_folder`.
    """
    from ..files.access import check_exists
    from ..files.links import check_links
    from ..opening.sources import MOVES_FILE, WORK_FOLDER, open_source
    from ..planning.upgrade import plan_upgrade
    from ..writing.moves import carry_out_moves, is_current, replace_files
    from ..writing.work_folder import remove_work_folder, work_folder

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
