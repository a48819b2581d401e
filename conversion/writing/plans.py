"""What a command is going to do, and the doing of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ... import __version__
from ..errors import CheckpointError
from ..files.links import resolved
from ..opening.sources import Source
from .files import PlannedFile
from .folders import describe_files, write_folder, write_single
from .progress import Progress


@dataclass
class Plan:
    """What a command is going to do.

    Attributes:
        command: its name.
        source: what it reads from.
        files: what there will be.
        retired: files of the source that have no place in the result.
        notes: sentences for the user.
        details: what the tensors of the result depend on beside the source, as JSON.
        is_file: the result is the only one of these files, and no folder.
    """

    command: str
    source: Source
    files: list[PlannedFile] = field(default_factory=list)
    retired: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)
    is_file: bool = False

    def job(self, files: Sequence[PlannedFile]) -> dict[str, Any]:
        """All that the tensors of these files depend on, as JSON: a run takes up an equal job that was cut off."""
        return {
            "command": self.command,
            "config": self.source.config,
            "files": [[file.name, file.kind] for file in files if file.tensors],
            "source": describe_files(self.source.weights.files),
            "version": __version__,
            **self.details,
        }


def write_plan(plan: Plan, target: Path, progress: Progress) -> bool:
    """Write what was planned beside its source: a folder, or the one file that the plan says there is.

    Returns:
        False if the target was there already, equal in every file.

    Raises:
        CheckpointError, OSError: see `write_folder` and `write_single`.
    """
    if plan.command == "upgrade" and resolved(plan.source.folder) == resolved(target):
        raise CheckpointError(f"{target} is the source itself: use --in-place.")
    _refuse_inside(plan.source, target)
    if plan.is_file:
        return write_single(target, plan.files[0], plan.job(plan.files), progress)
    return write_folder(target, plan.files, plan.job(plan.files), progress)


def _refuse_inside(source: Source, target: Path) -> None:
    """Refuse a target inside the source, of which the next run would take it for a part."""
    if source.path.is_dir() and resolved(target).is_relative_to(resolved(source.path)):
        raise CheckpointError(f"{target} is inside the source: name a place beside it.")
