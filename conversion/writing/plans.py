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
from .folders import describe_files, write_folder
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
    """

    command: str
    source: Source
    files: list[PlannedFile] = field(default_factory=list)
    retired: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)

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
    """Write the folder that was planned beside its source.

    Returns:
        False if the target was there already, equal in every file.

    Raises:
        CheckpointError, OSError: see `write_folder`.
    """
    if plan.command == "upgrade" and resolved(plan.source.folder) == resolved(target):
        raise CheckpointError(f"{target} is the source itself: use --in-place.")
    _refuse_inside(plan.source, target)
    return write_folder(target, plan.files, plan.job(plan.files), progress)


def _refuse_inside(source: Source, target: Path) -> None:
    """Refuse a target inside the source, of which the next run would take it for a part."""
    if source.path.is_dir() and resolved(target).is_relative_to(resolved(source.path)):
        raise CheckpointError(f"{target} is inside the source: name a folder beside it.")
