"""What is to be stored of a model: names, shapes and dtypes, compared with what is there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch

from ..errors import CheckpointError
from ..files.tensors import DTYPE_CODES, TensorInfo
from .names import IGNORED


@dataclass(frozen=True)
class Expected:
    """What is to be stored.

    Attributes:
        required: name -> shape.
        optional: the same for what may be left out.
        words: names that hold packed whole numbers, or places of groups, and their dtype; all others are floating.
    """

    required: Mapping[str, tuple[int, ...]]
    optional: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    words: Mapping[str, torch.dtype] = field(default_factory=dict)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all that may be stored."""
        return {**self.required, **self.optional}

    def has_dtype(self, name: str, dtype: torch.dtype) -> bool:
        """Whether a tensor may be of this dtype."""
        word = self.words.get(name)
        return dtype.is_floating_point if word is None else dtype == word


NOT_GATHERED = (
    "ZeRO-3 of DeepSpeed keeps a slice of each tensor in each process, and saved what one of them had. Set "
    "stage3_gather_16bit_weights_on_model_save to true and save again, or join the slices of the training checkpoint "
    "with its zero_to_fp32.py."
)
"""Cause and remedy of empty tensors."""


def is_left_empty(shape: Sequence[int]) -> bool:
    """Whether a tensor is what ZeRO-3 leaves in the place of one whose values are in other processes."""
    return tuple(shape) == (0,)


def check_stored(infos: Mapping[str, TensorInfo], expected: Expected) -> None:
    """Compare names, shapes and dtypes of stored tensors with what is expected.

    Raises:
        CheckpointError: the first difference.
    """
    check_names(infos, expected.required, expected.optional)
    for name in expected.shapes:
        dtype = infos[name].dtype if name in infos else None
        if dtype is not None and not (expected.has_dtype(name, dtype) and dtype in DTYPE_CODES):
            word = expected.words.get(name)
            reason = "which no weight of this architecture can be" if word is None else f"not of {word}"
            raise CheckpointError(f"{infos[name]} is of {dtype}, {reason}.")


def check_names(
    found: Mapping[str, Any],
    expected: Mapping[str, tuple[int, ...]],
    optional: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
) -> None:
    """Compare the tensors of a checkpoint (`TensorInfo` by name) with those that its configuration asks for.

    Args:
        optional: name -> shape of tensors that may be missing.

    Raises:
        CheckpointError: an unknown name, a missing tensor or a wrong shape; all of the kind are counted, one is named.
    """
    missing = [name for name in expected if name not in found]
    known = {**expected, **optional}
    unknown = [name for name in found if name not in known and not IGNORED.fullmatch(name)]
    if unknown:
        raise CheckpointError(
            f"{found[unknown[0]]} is not a weight of this architecture ({len(unknown)} such tensors, "
            f"{len(missing)} missing{f', first {missing[0]!r}' if missing else ''})."
        )
    if missing:
        raise CheckpointError(
            f"{missing[0]!r} is missing ({len(missing)} of {len(expected)} tensors are). Download the checkpoint "
            "again, or mend its config.json (number of layers, tie_word_embeddings, biases)."
        )
    for name, shape in known.items():
        if name in found and is_left_empty(found[name].shape):
            raise CheckpointError(f"{found[name]} is empty: {NOT_GATHERED}")
        if name in found and tuple(found[name].shape) != shape:
            raise CheckpointError(
                f"{found[name]} has shape {tuple(found[name].shape)}, but the configuration asks for {shape}. "
                "Mend the configuration, or download the file again."
            )
