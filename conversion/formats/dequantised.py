"""The values of packed weights, in plain torch: what engines compute with, without their kernels.

Of the whole number q that is stored of a weight, the zero z and the scale of its group, the weight is (q - z) * scale.
Numbers of 8 bits and scales of 11 make products that float32 holds exactly.

Source: `QuantLinear` of AutoGPTQ and of gptqmodel, whose first layout stores z - 1, `WQLinear_GEMM` of AutoAWQ, which
stores the columns of a word in an order of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from math import gcd

import torch

from ..errors import CheckpointError
from .quantised import Packing, layout_of
from .recipes import Recipe, keep

_BITS = {"gptq": (2, 3, 4, 8), "awq": (4,)}
"""Bits that a method stores one number after the other; for others, gptqmodel has layouts that are its own."""

_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where in a word AutoAWQ puts each of eight columns."""

_BLOCK = 1024
"""Inputs of a layer that are computed at once, so that float32 takes little memory."""


def unpack(words: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    """Numbers of a few bits, which lie one after the other from the lowest bit of the first word on.

    Args:
        words: whole numbers, W bits each, N of them along `dim`.
        dim: along which they are packed.

    Returns:
        uint8, N * W / bits of them along `dim`.
    """
    width, mask = 8 * words.element_size(), 2**bits - 1
    rows = words.movedim(dim, 0)
    rows = rows.int() if width < 32 else rows
    period = bits // gcd(bits, width)  # words after which a number begins where a word does
    blocks = rows[: rows.shape[0] // period * period].unflatten(0, (-1, period))
    numbers = []
    for place in range(0, period * width, bits):
        word, shift = divmod(place, width)
        value = blocks[:, word] >> shift
        here = width - shift  # bits that this word has of the number
        if here < bits:
            value = (value & (2**here - 1)) | (blocks[:, word + 1] << here)
        numbers.append((value & mask).to(torch.uint8))
    return torch.stack(numbers, dim=1).flatten(0, 1).movedim(0, dim)


def dequantising(shapes: Mapping[str, tuple[int, ...]], packing: Packing, dtype: torch.dtype) -> list[Recipe]:
    """The way from packed weights to full ones of the same names, all else as it is.

    Args:
        shapes: name -> shape of every full weight.
        dtype: of the full weights; float32 holds them exactly.

    Raises:
        CheckpointError: numbers of so many bits are packed in a way that is unknown here.
    """
    recipes = []
    for name, shape in shapes.items():
        packed = packing.of_weight(name, shape)
        if packed is None:
            recipes.append(Recipe(name, (name,), keep))
            continue
        if packed.bits not in _BITS[packed.method]:
            raise CheckpointError(
                f"{name!r} has {packed.bits} bits, of which the layout is unknown here: {packed.method} of "
                f"{', '.join(map(str, _BITS[packed.method]))} bits can be dequantised."
            )
        module = name.removesuffix(".weight")
        build = partial(dequantise, packing=packed, shape=shape, dtype=dtype)
        recipes.append(Recipe(name, tuple(f"{module}.{part}" for part in packed.parts(*shape)), build))
    return recipes


def dequantise(*parts: torch.Tensor, packing: Packing, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """The weight of a layer, (outputs, inputs).

    Args:
        parts: qweight, qzeros, scales and, of GPTQ, g_idx: the group of each input.
        shape: (outputs, inputs).
    """
    outputs, inputs = shape
    if packing.method == "gptq":
        qweight, qzeros, scales, groups = parts
        codes, zeros = unpack(qweight, packing.bits, 0)[:inputs], unpack(qzeros, packing.bits, 1)[:, :outputs]
        if layout_of(packing.settings) == "gptq":
            zeros = (zeros + 1) & (2**packing.bits - 1)  # a zero of 0 was stored as -1
    else:
        qweight, qzeros, scales = parts
        codes, zeros = (_in_order(unpack(words, packing.bits, 1))[:, :outputs] for words in (qweight, qzeros))
        size = inputs if packing.group == -1 else packing.group
        groups = torch.arange(inputs, device=qweight.device) // size
    result = torch.empty(shape, dtype=dtype, device=qweight.device)
    for start in range(0, inputs, _BLOCK):
        stop = min(start + _BLOCK, inputs)
        group = groups[start:stop].long()
        values = (codes[start:stop].float() - zeros[group].float()) * scales[group].float()
        result[:, start:stop] = values.T
    return result


def _in_order(numbers: torch.Tensor) -> torch.Tensor:
    """Columns in their order, (rows, columns), of those that AutoAWQ has packed."""
    return numbers.unflatten(1, (-1, len(_AWQ_PLACES)))[:, :, list(_AWQ_PLACES)].flatten(1)
