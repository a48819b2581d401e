"""Tensors of files: what is known before their values are read, and whether those are finite."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
DTYPE_CODES = {dtype: code for code, dtype in DTYPES.items()}
"""torch dtype -> its name in a safetensors header."""


@dataclass(frozen=True)
class TensorInfo:
    """What a file says of one tensor; `same_as` is an earlier name of the file for the same memory."""

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    same_as: str | None = None

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    @property
    def memory(self) -> str:
        """The first name of the same memory."""
        return self.same_as or self.name

    def __str__(self) -> str:
        return f"{self.name!r} in {self.file}"


def meta_tensors(infos: Mapping[str, TensorInfo], names: Iterable[str]) -> list[torch.Tensor]:
    """Tensors without values, of the shapes and dtypes that files announce."""
    return [torch.empty(infos[name].shape, dtype=infos[name].dtype, device="meta") for name in names]


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite; integers never are."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    if tensor.dtype.itemsize == 1:
        tensor = tensor.half()  # torch finds no extremes of float8
    return all(bool(extreme.isfinite()) for extreme in torch.aminmax(tensor))  # which pass NaN on
