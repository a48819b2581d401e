"""The weights of a folder, as much of them as can be found and read: for `inspect`, which stops at no fault."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..files.access import is_pointer, is_present
from ..files.tensors import TensorInfo
from ..files.weights import ADAPTER_CONFIG, ADAPTERS, MODEL_PARALLEL, PICKLE, SAFETENSORS, Weights, read_index
from .report import FileReport, Findings
from .words import are, first_of, plural

_CONTAINERS = (SAFETENSORS, PICKLE)
_SHARD = re.compile(r"(model|pytorch_model)-\d{5}-of-(\d{5})\.(safetensors|bin)")
_WEIGHT_FILE = re.compile(rf"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)|{MODEL_PARALLEL.pattern}")


@dataclass
class Part:
    """One file that should hold weights; `weights` is None where it is missing or can't be read."""

    path: Path
    weights: Weights | None


class StoredWeights:
    """What the files of a checkpoint hold.

    Args:
        path: folder, single file of weights, or a configuration.
        optional: that there are none is no problem.

    Attributes:
        parts: the files, also the missing ones.
        places: tensor -> file, as the index says; None without an index.
        total_size: bytes, as the index says.
        infos: name -> tensor. As in `Weights`, the names of LLaMA's original format begin with the number of the file.
    """

    def __init__(self, path: Path, findings: Findings, optional: bool = False):
        self.folder = path if path.is_dir() else path.parent
        self.places: dict[str, str] | None = None
        self.total_size: Any = None
        self.infos: dict[str, TensorInfo] = {}
        self._findings, self._optional = findings, optional
        single = [] if path.suffix == ".json" else [path.name]
        names = sorted(entry.name for entry in self.folder.iterdir()) if path.is_dir() else single
        pointers = [name for name in names if is_pointer(self.folder / name)]
        used = self._find_names(names) if path.is_dir() else names
        self.parts = [self._open(self.folder / name) for name in used]
        if pointers:
            findings.problems.append(
                f"{plural(len(pointers), 'file')} of Git LFS hold{'s' if len(pointers) == 1 else ''} only a pointer to "
                f"the content: run 'git lfs pull' in {self.folder} ({first_of(pointers)})."
            )
        self._report_missing()
        self._report_unused([name for name in names if _WEIGHT_FILE.fullmatch(name) and name not in used])
        for number, part in enumerate(self.parts):
            for info in part.weights.infos.values() if part.weights else ():
                self._add(self.prefix(number), info)

    def _find_names(self, names: Sequence[str]) -> list[str]:
        for container in _CONTAINERS:
            index = f"{container}.index.json"
            found = self._findings.attempt(read_index, self.folder / index) if index in names else None
            if found is not None:
                self.places, self.total_size = found
                return sorted(set(self.places.values()))
            if container in names:
                return [container]
            if shards := _shard_names(names, container):
                if index not in names:
                    self._findings.problems.append(
                        f"{index} is missing, which says what is in which file. Download it."
                    )
                return shards
        if numbers := [int(match[1]) for name in names if (match := MODEL_PARALLEL.fullmatch(name))]:
            return [f"consolidated.{number:02d}.pth" for number in range(max(numbers) + 1)]
        if ADAPTER_CONFIG in names and (adapters := [name for name in ADAPTERS if name in names]):
            return adapters[:1]
        if not self._optional:
            self._findings.problems.append(
                f"No weights are in {self.folder}: no {SAFETENSORS}, no {PICKLE}, no consolidated.00.pth. "
                "Download them."
            )
        return []

    def _open(self, path: Path) -> Part:
        readable = is_present(path) and not is_pointer(path)
        return Part(path, self._findings.attempt(Weights, [path]) if readable else None)

    def _report_missing(self) -> None:
        missing = [part.path.name for part in self.parts if not is_present(part.path)]
        if missing:
            self._findings.problems.append(
                f"{len(missing):,} of {plural(len(self.parts), 'file')} with weights {are(missing)} missing: "
                f"{first_of(missing)}. Download {'it' if len(missing) == 1 else 'them'}."
            )

    def _report_unused(self, unused: Sequence[str]) -> None:
        """Weights that nobody reads, or only some programs."""
        suffix = self.parts[0].path.suffix if self.parts else ""
        other = [name for name in unused if not name.endswith(suffix)]
        stale = [name for name in unused if name not in other]
        if self.places and (single := next((name for name in stale if name in _CONTAINERS), None)):
            stale.remove(single)
            self._findings.problems.append(
                f"{single} and {single}.index.json are two versions of the weights: transformers reads the first, "
                "other programs the second. Delete the one that is stale."
            )
        if other:
            self._findings.remarks.append(
                f"The weights are there twice: {first_of(other)} {are(other)} not read, because there are *{suffix} "
                "files. Delete what you don't need."
            )
        if stale:
            self._findings.remarks.append(
                f"{first_of(stale)} {are(stale)} not part of the checkpoint, says its index. Delete what is stale."
            )

    def _add(self, prefix: str, info: TensorInfo) -> None:
        name = prefix + info.name
        if name in self.infos:
            self._findings.problems.append(
                f"{info} is in {self.infos[name].file.name} as well: delete the file that is stale."
            )
            return
        same_as = None if info.same_as is None else prefix + info.same_as
        self.infos[name] = replace(info, name=name, same_as=same_as)

    @property
    def is_llama_original(self) -> bool:
        """Whether the names are LLaMA's own; then each file holds a slice of most tensors."""
        return any(
            MODEL_PARALLEL.fullmatch(part.path.name) or (part.weights and "tok_embeddings.weight" in part.weights.infos)
            for part in self.parts
        )

    def prefix(self, number: int) -> str:
        """What the names of tensors in a file begin with."""
        return f"{number:02d}/" if self.is_llama_original else ""

    @property
    def first(self) -> Weights | None:
        """The first file that can be read."""
        return next((part.weights for part in self.parts if part.weights), None)

    @property
    def unreadable(self) -> set[str]:
        """Names of files that are missing or damaged."""
        return {part.path.name for part in self.parts if part.weights is None}

    @property
    def disguises(self) -> dict[str, str]:
        """Name of a file -> what hides its tensors from transformers."""
        opened = [part.weights for part in self.parts if part.weights]
        return {path.name: text for weights in opened for path, text in weights.disguises.items()}

    @property
    def nbytes(self) -> int:
        """Size of all tensors in bytes, each memory counted once."""
        return sum(part.weights.nbytes for part in self.parts if part.weights)

    def expect(self, count: int) -> None:
        """Count files as missing that the others tell of."""
        for number in range(len(self.parts), count):
            self.parts.append(Part(self.folder / f"consolidated.{number:02d}.pth", None))

    def file_reports(self) -> list[FileReport]:
        """Size and number of tensors of each file."""
        return [
            FileReport(
                part.path.name,
                part.path.stat().st_size if part.path.is_file() else None,
                len(part.weights.infos) if part.weights else None,
            )
            for part in self.parts
        ]

    def equal(self, first: str, second: str) -> bool | None:
        """Whether two tensors, which needn't be in one file, are equal; None where that can't be found out."""
        tensors = []
        for name in (first, second):
            info = self.infos[name]
            weights = next((part.weights for part in self.parts if part.path == info.file), None)
            tensors.append(self._findings.attempt(weights.read, info.name) if weights else None)
        if tensors[0] is None or tensors[1] is None:
            return None
        return torch.equal(tensors[0], tensors[1])


def _shard_names(names: Iterable[str], container: str) -> list[str]:
    """All names of a set of shards of which some are there."""
    stem, suffix = container.split(".")
    for name in names:
        if (match := _SHARD.fullmatch(name)) and (match[1], match[3]) == (stem, suffix):
            return [f"{stem}-{number:05d}-of-{match[2]}.{suffix}" for number in range(1, int(match[2]) + 1)]
    return []
