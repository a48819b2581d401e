"""The two kinds of files that weights are in; neither is ever held as a whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..errors import CheckpointError
from .access import check_readable, damaged
from .pickles import PickleFile
from .tensors import DTYPES, TensorInfo


class SafetensorsFile:
    """One safetensors file.

    Raises:
        CheckpointError: the file is truncated or its header is damaged.
    """

    def __init__(self, path: Path):
        self.path = path
        check_readable(path)
        try:
            self._file: Any = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise damaged(path, error) from error

    def infos(self) -> list[TensorInfo]:
        """What the header says of each tensor."""
        infos = []
        for name in self._file.keys():
            entry = self._file.get_slice(name)
            code = entry.get_dtype()
            if code not in DTYPES:
                raise CheckpointError(f"{name!r} in {self.path} has dtype {code}, which nothing here can convert.")
            infos.append(TensorInfo(name, self.path, DTYPES[code], tuple(entry.get_shape())))
        return infos

    def tensor(self, name: str) -> torch.Tensor:
        """Values of one tensor."""
        return self._file.get_tensor(name)

    @staticmethod
    def check(path: Path) -> None:
        """The format has no checksum of its own."""


def container_of(path: Path) -> type[SafetensorsFile] | type[PickleFile]:
    return SafetensorsFile if path.suffix == ".safetensors" else PickleFile
