"""Tensors to write: computed one at a time, straight into a safetensors file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch

from ..errors import CheckpointError
from ..files.tensors import DTYPE_CODES, is_finite
from ..files.weights import Weights
from ..formats.recipes import Recipe
from .progress import Progress

_PIECE = 2**16  # bytes; with larger writes Linux asks for larger runs of free memory, which can take its time


@dataclass(frozen=True)
class Output:
    """A tensor to write: its recipe, and what will come out of it."""

    recipe: Recipe
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def produce(self, weights: Weights) -> torch.Tensor:
        """Compute the tensor.

        Raises:
            CheckpointError: a damaged file, or a value that is not a finite number.
        """
        sources = [weights.read(name) for name in self.recipe.sources]
        tensor = self.recipe.build(*sources)
        result = tensor.to(self.dtype).contiguous()
        if not is_finite(result):
            cause = f"{self.dtype} is too narrow for its values: choose another --dtype, or --outtype of a GGUF"
            if not is_finite(tensor):
                cause = (
                    f"it is NaN or infinite in {', '.join(str(weights.infos[name]) for name in self.recipe.sources)}"
                )
            raise CheckpointError(f"{self.recipe.name!r} would not be finite: {cause}.")
        return result


def _ordered(outputs: Sequence[Output]) -> list[Output]:
    """Tensors of wide dtypes first, as the format demands for alignment."""
    return sorted(outputs, key=lambda output: -output.dtype.itemsize)


def safetensors_header(outputs: Sequence[Output]) -> bytes:
    """What a safetensors file of these tensors begins with."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for output in _ordered(outputs):
        end = position + output.nbytes
        code = DTYPE_CODES[output.dtype]
        header[output.recipe.name] = {"dtype": code, "shape": list(output.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_safetensors(file: BinaryIO, outputs: Sequence[Output], weights: Weights, progress: Progress) -> None:
    """Write a safetensors file a tensor at a time, so that only one is ever held; the library writes from memory only.

    Raises:
        CheckpointError: a damaged file, or a value that is not a finite number.
    """
    file.write(safetensors_header(outputs))
    for output in _ordered(outputs):
        write_tensor(file, output.produce(weights))  # which no name here keeps alive while the next is read
        progress.advance(output.recipe.name, output.nbytes)
    weights.close()


def write_tensor(file: BinaryIO, tensor: torch.Tensor) -> None:
    """Write the bytes of a contiguous tensor."""
    data = tensor.reshape(-1).view(torch.uint8).numpy().data
    for start in range(0, len(data), _PIECE):
        file.write(data[start : start + _PIECE])
