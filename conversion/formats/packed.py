"""Packed weights under other names, bit for bit: query, key and value cut apart or joined, the settings translated.

GPTQ packs the inputs of a layer into words, so outputs are columns of its words; only its zeros have outputs beside one
another in a word, as all of AWQ has. There a cut must fall between two words.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from ..errors import CheckpointError
from .architecture import Architecture
from .names import layer_rows
from .quantised import Packing
from .qwen import hf_to_qwen, qwen_shapes, qwen_to_hf
from .recipes import Recipe, concatenate, keep

REMEDY = "Use --dequantize, which gives full weights."


@dataclass(frozen=True)
class Piece:
    """Outputs `start` … `stop - 1` of a layer of QWen, which are a layer in transformers' Qwen2 and LLaMA classes.

    Attributes:
        hf, qwen: names of the two layers.
        shape: (outputs, inputs) of the layer of QWen.
    """

    hf: str
    qwen: str
    start: int
    stop: int
    shape: tuple[int, int]

    @property
    def is_whole(self) -> bool:
        """Whether it is the whole layer."""
        return self.stop - self.start == self.shape[0]


def pieces(architecture: Architecture) -> list[Piece]:
    """All layers that may be packed, in the order of computation; the head among them where it isn't tied."""
    found: list[Piece] = []
    ends: dict[str, int] = {}
    shapes = qwen_shapes(architecture)
    for row, layer in layer_rows(architecture):
        name, shape = row.qwen.format(layer), architecture.shape(row.dimensions)
        if len(shape) != 2:
            continue
        start = ends.get(name, 0)
        ends[name] = start + shape[0]
        hf, qwen = (text.format(layer).removesuffix(".weight") for text in (row.hf, row.qwen))
        found.append(Piece(hf, qwen, start, ends[name], (shapes[name][0], shape[1])))
    return found


def packed_qwen_to_hf(architecture: Architecture, packing: Packing) -> list[Recipe]:
    """The way from packed weights under QWen's names to the same under those of Qwen2: c_attn is cut in three.

    Raises:
        CheckpointError: a cut would fall within a word.
    """
    by_name = {f"{piece.hf}.weight": piece for piece in pieces(architecture)}
    recipes: list[Recipe] = []
    for recipe in qwen_to_hf(architecture):
        piece = by_name.get(recipe.name)
        packed = packing.of(piece.qwen) if piece is not None else None
        recipes += [recipe] if piece is None or packed is None else _cut(piece, packed)
    return recipes


def _cut(piece: Piece, packing: Packing) -> Iterator[Recipe]:
    for part in packing.parts(*piece.shape):
        build = keep
        if not piece.is_whole and part != "g_idx":
            bounds = [_columns(piece, end, part, packing) for end in (piece.start, piece.stop)]
            build = partial(take_columns, start=bounds[0], stop=bounds[1])
        yield Recipe(f"{piece.hf}.{part}", (f"{piece.qwen}.{part}",), build)


def _columns(piece: Piece, outputs: int, part: str, packing: Packing) -> int:
    """Columns that so many outputs take.

    Raises:
        CheckpointError: they end within a word.
    """
    if part not in packing.along_outputs:
        return outputs
    width = 8 * packing.word.itemsize
    columns, rest = divmod(outputs * packing.bits, width)
    if rest and outputs != piece.shape[0]:
        raise CheckpointError(
            f"{piece.qwen}.{part} packs {width // packing.bits} outputs into a word, and {piece.hf} ends within one, "
            f"at output {outputs}: its bits can't be kept. {REMEDY}"
        )
    return columns + bool(rest)


def take_columns(tensor: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """Columns `start` … `stop - 1`."""
    return tensor[:, start:stop]


def packed_hf_to_qwen(architecture: Architecture, packing: Packing, dtype: torch.dtype) -> list[Recipe]:
    """The way from packed weights under the names of Qwen2 or LLaMA to the same under QWen's.

    Args:
        dtype: of the biases that the source lacks.

    Raises:
        CheckpointError: query, key and value are packed differently, or one of them ends within a word.
    """
    layers: dict[str, list[Piece]] = {}
    for piece in pieces(architecture):
        layers.setdefault(f"{piece.qwen}.weight", []).append(piece)
    recipes: list[Recipe] = []
    for recipe in hf_to_qwen(architecture, dtype):
        group = layers.get(recipe.name, [])
        ways = [packing.of(piece.hf) for piece in group]
        if not any(ways):
            recipes.append(recipe)
            continue
        first = ways[0]
        if first is None or any(way is None or not _is_alike(way, first) for way in ways):
            raise CheckpointError(
                f"{' and '.join(piece.hf for piece in group)} are packed in different ways, and QWen has them in one "
                f"layer: their bits can't be kept. {REMEDY}"
            )
        recipes += _joined(group, first)
    return recipes


def _is_alike(one: Packing, other: Packing) -> bool:
    return (one.bits, one.group) == (other.bits, other.group)


def _joined(group: Sequence[Piece], packing: Packing) -> Iterator[Recipe]:
    for part in packing.parts(*group[0].shape):
        for piece in group:
            _columns(piece, piece.stop, part, packing)  # refuses what doesn't end with a word
        name, sources = f"{group[0].qwen}.{part}", tuple(f"{piece.hf}.{part}" for piece in group)
        if part == "g_idx":
            yield Recipe(name, sources, partial(_the_same, names=sources))
        else:
            yield Recipe(name, sources, partial(concatenate, dim=1))


def _the_same(*tensors: torch.Tensor, names: Sequence[str]) -> torch.Tensor:
    """The one order of inputs that all have.

    Raises:
        CheckpointError: they have several.
    """
    first = tensors[0]
    for name, other in zip(names, tensors, strict=True):
        if not first.is_meta and not torch.equal(first, other):
            raise CheckpointError(
                f"{name!r} differs from {names[0]!r}, and QWen has both in one layer: their bits can't be kept. "
                f"{REMEDY}"
            )
    return first
