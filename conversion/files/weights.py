"""Weights on disk: their names, shapes and dtypes at a glance, their values one tensor at a time."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from ..errors import CheckpointError
from .access import damaged, is_present, read_json
from .checksums import check_file
from .containers import SafetensorsFile, container_of
from .pickles import PickleFile, bare_name
from .tensors import TensorInfo

SAFETENSORS = "model.safetensors"
PICKLE = "pytorch_model.bin"
MODEL_PARALLEL = re.compile(r"consolidated\.(\d\d)\.pth")
ADAPTER_CONFIG = "adapter_config.json"
ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")

# Mapped pages count as resident memory until their files are let go, which is done before more bytes than these are.
_HELD_BYTES = 128 * 2**20


class Weights:
    """The tensors of a checkpoint, over all its files.

    Attributes:
        infos: name -> what is known of the tensor. In LLaMA's original format each model-parallel file holds a part of
            most tensors; there a name begins with the number of the file, "00/norm.weight".
        files: where they are.
        extras: plain values stored beside the tensors of a training checkpoint.
        disguises: file -> what hides its tensors from transformers, see `PickleFile`.
    """

    def __init__(self, files: Iterable[Path], numbered: bool = False):
        self.files = list(files)
        self.infos: dict[str, TensorInfo] = {}
        self.extras: dict[str, Any] = {}
        self.disguises: dict[Path, str] = {}
        self._stored: dict[str, str] = {}
        self._checked: set[Path] = set()
        self._open: dict[Path, SafetensorsFile | PickleFile] = {}
        self._held = 0
        for number, path in enumerate(self.files):
            container = container_of(path)(path)
            prefix = f"{number:02d}/" if numbered else ""
            for info in container.infos():
                self._add(prefix, info)
            if isinstance(container, PickleFile):
                self.extras |= container.extras
                if container.disguise is not None:
                    self.disguises[path] = container.disguise

    def _add(self, prefix: str, info: TensorInfo) -> None:
        name = prefix + info.name
        if name in self.infos:
            raise CheckpointError(f"{info} is in {self.infos[name].file.name} as well: delete the file that is stale.")
        self._stored[name] = info.name
        same_as = None if info.same_as is None else prefix + info.same_as
        self.infos[name] = replace(info, name=name, same_as=same_as)

    def read(self, name: str) -> torch.Tensor:
        """Values of one tensor, mapped from its file, whose checksums are compared before the first tensor is read.

        Raises:
            CheckpointError: the file is damaged.
        """
        info = self.infos[name]
        if info.file not in self._checked:
            check_file(info.file)
            self._checked.add(info.file)
        if self._held + info.nbytes > _HELD_BYTES:
            self.close()
        if info.file not in self._open:
            self._open[info.file] = container_of(info.file)(info.file)
        self._held += info.nbytes
        try:
            return self._open[info.file].tensor(self._stored[name])
        except (SafetensorError, OSError, RuntimeError, KeyError) as error:
            raise damaged(info.file, error) from error

    def close(self) -> None:
        """Let go of all files."""
        self._open, self._held = {}, 0

    @property
    def nbytes(self) -> int:
        """Size of all tensors in bytes, each memory counted once."""
        return sum(info.nbytes for info in self.infos.values() if info.same_as is None)

    @property
    def dtypes(self) -> dict[torch.dtype, int]:
        """dtype -> number of parameters, most first."""
        counts: dict[torch.dtype, int] = {}
        for info in self.infos.values():
            if info.same_as is None:
                counts[info.dtype] = counts.get(info.dtype, 0) + torch.Size(info.shape).numel()
        return dict(sorted(counts.items(), key=lambda item: -item[1]))


def read_index(index: Path) -> tuple[dict[str, str], Any]:
    """The map of an index from tensors to file names, and what it says of their size in bytes.

    Names are those that files are read with: bare for pickles.

    Raises:
        CheckpointError: no map, or a name that is not that of a file in the same folder.
    """
    content = read_json(index)
    listed = content.get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise CheckpointError(f"{index} has no 'weight_map'. Download it again.")
    for tensor, name in listed.items():
        if not isinstance(name, str) or not re.fullmatch(r"(?!\.)[^/\\:\0\ud800-\udfff]+", name):
            raise CheckpointError(f"{index} places {tensor!r} in {name!r}, which is not a file of the same folder.")
    if index.name.startswith(PICKLE):
        listed = {bare_name(tensor): name for tensor, name in listed.items()}
    metadata = content.get("metadata")
    return listed, metadata.get("total_size") if isinstance(metadata, dict) else None


def _open_indexed(index: Path) -> Weights:
    listed = read_index(index)[0]
    files = [index.parent / name for name in sorted(set(listed.values()))]
    for path in files:
        if not is_present(path):
            raise CheckpointError(f"{path} doesn't exist, but {index.name} names it. Download it.")
    weights = Weights(files)
    for name, file in listed.items():
        if name not in weights.infos:
            raise CheckpointError(f"{name!r} is missing: {index} places it in {file}, which doesn't have it.")
    for name, info in weights.infos.items():
        if listed.get(name) != info.file.name:
            raise CheckpointError(f"{info} isn't there according to {index.name}: delete the file that is stale.")
    return weights


def _model_parallel_files(folder: Path) -> list[Path]:
    numbers = sorted(match[1] for file in folder.iterdir() if (match := MODEL_PARALLEL.fullmatch(file.name)))
    for expected, number in enumerate(numbers):
        if int(number) != expected:
            raise CheckpointError(f"consolidated.{expected:02d}.pth is missing in {folder}. Download it.")
    return [folder / f"consolidated.{number}.pth" for number in numbers]


def open_weights(path: Path) -> Weights:
    """Find the weights of a folder, or open a single file; safetensors come before pickles, as in transformers.

    Raises:
        CheckpointError: none are there, or they contradict their index; see also the containers.
    """
    if not path.is_dir():
        weights = Weights([path])
        return Weights([path], numbered=True) if "tok_embeddings.weight" in weights.infos else weights
    for name in (SAFETENSORS, PICKLE):
        index = path / f"{name}.index.json"
        if is_present(index):
            weights = _open_indexed(index)
            if (path / name).is_file() and path / name not in weights.files:
                raise CheckpointError(
                    f"{name} and {index.name} in {path} are two versions of the weights: delete the one that is stale."
                )
            return weights
        if is_present(path / name):
            return Weights([path / name])
    if parts := _model_parallel_files(path):
        return Weights(parts, numbered=True)
    raise CheckpointError(
        f"No weights in {path}: looked for {SAFETENSORS}, {PICKLE} (or their .index.json) and consolidated.00.pth."
    )
