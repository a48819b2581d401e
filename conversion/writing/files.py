"""The files that a plan consists of: each knows its size, writes itself, and knows itself in an existing file."""

from __future__ import annotations

import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ..files.access import check_readable
from ..files.checksums import check_file, same_bytes
from ..files.weights import Weights
from .progress import Progress
from .space import check_space
from .tensors import Output, safetensors_header, write_safetensors


class _Different(Exception):
    pass


class _Comparison:
    """A file to write to that only compares with what another holds already."""

    def __init__(self, file: BinaryIO):
        self._file = file

    def write(self, data: Any) -> None:
        view = memoryview(data)
        if self._file.read(len(view)) != view:
            raise _Different


def holds(path: Path, write: Callable[[BinaryIO], None]) -> bool:
    """Whether a file consists of just what a function writes, of which no more than a piece is ever held."""
    try:
        with open(path, "rb") as file:
            comparison: Any = _Comparison(file)
            write(comparison)
            return not file.read(1)
    except _Different:
        return False


@dataclass(frozen=True)
class PlannedFile(ABC):
    """One file of the result; `name` is relative to its folder."""

    name: str

    @property
    def tensors(self) -> int:
        """Steps of progress that it takes. A file with any is worth keeping from an interrupted run; others are not."""
        return 0

    @property
    def kind(self) -> list[Any]:
        """What a later run must want as well to take over this file, as JSON; the source is known by other means."""
        return [self.nbytes]

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Its size in bytes."""

    @property
    def file_size(self) -> int:
        """The same with whatever the container adds."""
        return self.nbytes

    def disk_bytes(self, folder: Path) -> int:
        """Disk space that it will take in a folder."""
        return self.file_size

    @abstractmethod
    def write(self, path: Path, progress: Progress) -> None:
        """Write it under another name, which is then renamed."""

    @abstractmethod
    def equals(self, path: Path) -> bool:
        """Whether a file holds just what would be written."""


@dataclass(frozen=True)
class TextFile(PlannedFile):
    """Text, in UTF-8."""

    text: str

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return len(self.text.encode())

    def write(self, path: Path, progress: Progress) -> None:
        """Write it."""
        path.write_bytes(self.text.encode())

    def equals(self, path: Path) -> bool:
        """Whether a file holds this text."""
        return path.read_bytes() == self.text.encode()


@dataclass(frozen=True)
class CopiedFile(PlannedFile):
    """A file taken over as it is.

    Attributes:
        link: give the same data a second name, where the file system has such.
        weights: number of tensors in it; the checksums that are known of such a file are compared.

    Raises:
        CheckpointError: the file can't be read, or is a pointer of Git LFS.
    """

    source: Path
    link: bool = False
    weights: int = 0

    def __post_init__(self) -> None:
        check_readable(self.source)

    @property
    def tensors(self) -> int:
        """Their number."""
        return self.weights

    @property
    def kind(self) -> list[Any]:
        """Its size, and whether it is a link."""
        return [*super().kind, self.link]

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return self.source.stat().st_size

    def disk_bytes(self, folder: Path) -> int:
        """None if it can be linked."""
        linked = self.link and self.source.stat().st_dev == folder.stat().st_dev
        return 0 if linked else self.nbytes

    def write(self, path: Path, progress: Progress) -> None:
        """Link it, or copy it where that is impossible.

        Raises:
            CheckpointError: weights that a known checksum shows to be damaged.
        """
        if self.weights:
            check_file(self.source)
        if not (self.link and self._linked(path)):
            shutil.copyfile(self.source, path)
        if self.weights:
            progress.advance(self.name, self.nbytes, self.weights)

    def _linked(self, path: Path) -> bool:
        try:
            os.link(self.source.resolve(), path)
            return True
        except OSError:  # another file system, or one without links, where nobody reckoned with a copy
            check_space(path.parent, self.nbytes)
            return False

    def equals(self, path: Path) -> bool:
        """Whether a file holds the same."""
        return same_bytes(self.source, path)


@dataclass(frozen=True)
class ShardFile(PlannedFile):
    """Tensors, converted on the way into a safetensors file."""

    outputs: tuple[Output, ...]
    weights: Weights

    @property
    def tensors(self) -> int:
        """Their number."""
        return len(self.outputs)

    @property
    def kind(self) -> list[Any]:
        """Name, dtype and shape of each tensor."""
        return [[output.recipe.name, str(output.dtype), list(output.shape)] for output in self.outputs]

    @property
    def nbytes(self) -> int:
        """Size of its tensors in bytes."""
        return sum(output.nbytes for output in self.outputs)

    @property
    def file_size(self) -> int:
        """The same with the header."""
        return len(safetensors_header(self.outputs)) + self.nbytes

    def write(self, path: Path, progress: Progress) -> None:
        """Convert and write tensor by tensor."""
        with open(path, "wb") as file:
            write_safetensors(file, self.outputs, self.weights, progress)

    def equals(self, path: Path) -> bool:
        """Whether a file holds just these tensors."""
        return holds(path, lambda file: write_safetensors(file, self.outputs, self.weights, Progress()))
