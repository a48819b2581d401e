"""Memory for serving: weights, keys and values, and what a call computes with.

Formulas give the bytes that tensors hold on one device; letters are those of `shape.py`, and c is the number of bytes
of a number that is computed with.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..formats.quantised import Packing
from .shape import Linear, Load, Shape

GROUP = 128
"""Inputs that share a scale in the published Int4 and Int8 checkpoints."""

CACHES = ("growing", "static", "int8")

_LEAST_ROOM, _ROOM_SHARE = 64, 16  # of `QWenCache`: tokens of free room in a buffer


@dataclass(frozen=True)
class Precision:
    """How weights are held, and what is computed with.

    Attributes:
        compute: c.
        packing: of the matrices inside the layers; None for c bytes each.
    """

    name: str
    compute: int
    packing: Packing | None = None

    @property
    def group(self) -> int | None:
        """Inputs that share a scale, where that limits how a matrix may be cut."""
        return self.packing.group if self.packing is not None and self.packing.group > 0 else None

    def nbytes(self, linear: Linear) -> int:
        """Of a matrix and its bias."""
        bias = linear.bias * linear.outputs * self.compute
        if self.packing is None:
            return self.compute * linear.weights + bias
        parts = self.packing.parts(linear.outputs, linear.inputs).values()
        return bias + sum(torch.Size(shape).numel() * (dtype or torch.float16).itemsize for shape, dtype in parts)


def gptq(bits: int, group: int = GROUP) -> Precision:
    """Of a GPTQ checkpoint: embedding, head, norms and biases stay in half precision."""
    return Precision(f"int{bits}", 2, Packing("gptq", bits, group, torch.int32, {}))


PRECISIONS = (Precision("float32", 4), Precision("bfloat16", 2), gptq(8), gptq(4))


@dataclass(frozen=True)
class ServingNeed:
    """Bytes on each of the devices.

    Attributes:
        working: what the largest step of a call takes beside the others.
    """

    weights: int
    cache: int
    working: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.cache + self.working


def weight_bytes(shape: Shape, precision: Precision, devices: int = 1) -> int:
    """Of the weights on one of so many devices that share the model (tensor parallel).

    Matrices, their outputs' biases, embedding and head are cut; norms and the biases of matrices that are cut along
    their inputs are whole everywhere.
    """
    a, c = shape.architecture, precision.compute
    layer = sum(precision.nbytes(linear.share(devices)) for linear in shape.linears) + 2 * a.width * c
    ends = shape.matrices * -(-a.rows // devices) * a.width * c
    return a.layers * layer + ends + a.width * c


def cache_per_token(shape: Shape, precision: Precision, cache: str, devices: int = 1) -> int:
    """Bytes of the keys and values of a token on each of the devices, among which the heads are divided."""
    a = shape.architecture
    heads = a.kv_heads // devices
    # int8: a byte for each number, and two float32 for each head's key and value.
    head = a.head_dim + 8 if cache == "int8" else a.head_dim * precision.compute
    return 2 * a.layers * heads * head


def cache_bytes(shape: Shape, precision: Precision, cache: str, load: Load, devices: int = 1) -> int:
    """Of a whole cache. A growing one has room for more tokens, at most a sixteenth of those that it holds, or 64."""
    room = max(_LEAST_ROOM, load.context // _ROOM_SHARE) if cache == "growing" else 0
    return cache_per_token(shape, precision, cache, devices) * load.batch * (load.context + room)


def working_bytes(shape: Shape, precision: Precision, cache: str, load: Load, chunk: int, devices: int = 1) -> int:
    """What the largest step of a call takes beside weights and cache, while n = batch * chunk tokens are read.

    - In attention: the states before and after the embedding's layers (2E), the normed ones (E), the product that holds
      queries, keys and values (Q + 2K); behind it the rotation in float32, which has its input (a copy, unless c = 4),
      its result and a product of half as many: 10 bytes a channel, 6 for c = 4; first of queries, then of keys while
      the rotated queries (Q) are there too. The cache of the last layer is not there yet where a text is read at once.
    - In the MLP: states (3E: of the embedding, before and behind the attention), the normed ones (E), and gate, up
      projection and their product (3M).
    - A padded batch has a mask, a byte for each query and key; while it is attended, when beside the states (3E) only
      queries and what they find are there (2Q), the mask is there in c bytes too.
    - The int8 cache computes the codes of what is read in float32, three copies of its keys or values (12K), and gives
      all of a layer's back: keys in c bytes, values in float32 twice before they become c bytes ((c + 8)K a token).
    - Logits are those of the last token of each text, V numbers in c bytes, with two copies in float32; drawing a token
      sorts them, which takes 8 for the places, 4 for each of four copies, and 1 for what is left out.
    """
    a, c = shape.architecture, precision.compute
    queries, keys, gate = a.queries // devices, a.keys // devices, a.mlp // devices
    n = load.batch * chunk
    turn = 6 if c == 4 else 10
    rotation = max(turn * queries, c * queries + turn * keys)
    attention = n * (c * (3 * a.width + queries + 2 * keys) + rotation)
    if chunk == load.context and cache != "int8":
        attention -= n * 2 * keys * c
    mlp = n * c * (4 * a.width + 3 * gate)
    codes = 0
    if cache == "int8":
        stored = load.batch * load.context * keys * (c + 8)
        codes = n * c * (3 * a.width + 2 * queries + 3 * keys) + max(12 * n * keys, stored)
    angles = 2 * 4 * n * a.head_dim
    mask = load.batch * chunk * load.context if load.batch > 1 else 0
    logits = load.batch * a.rows * (c + 33)
    masked = n * c * (3 * a.width + 2 * queries) + c * mask
    return max(max(attention, mlp, codes, masked) + angles + mask, logits)


def serving_need(
    shape: Shape, precision: Precision, cache: str, load: Load, chunk: int | None = None, devices: int = 1
) -> ServingNeed:
    """What each of the devices holds at the peak.

    Args:
        chunk: tokens of a text that are read at once; None for all of them.
    """
    chunk = load.context if chunk is None else min(chunk, load.context)
    return ServingNeed(
        weight_bytes(shape, precision, devices),
        cache_bytes(shape, precision, cache, load, devices),
        working_bytes(shape, precision, cache, load, chunk, devices),
    )
