"""The memory that a model needs for inference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..formats.architecture import Architecture
from ..formats.names import TABLE, hf_shapes
from ..formats.qwen import qwen_shapes

_NF4_BLOCK = 64  # weights that share a scale


@dataclass(frozen=True)
class Memory:
    """Bytes for inference: weights, keys and values of one token, and both for one text of the trained length."""

    weights: int
    cache_per_token: int
    total: int


def memory_needs(architecture: Architecture, fused: bool) -> dict[str, Memory]:
    """Memory that inference takes in each precision, in bytes.

    Not counted are activations, and what libraries take for themselves (CUDA: some hundred MB).

    - float32, bfloat16, float16: 4 or 2 bytes for each parameter; keys and values in the same precision.
    - int8 (bitsandbytes' LLM.int8): the linear layers inside the blocks take 1 byte for each weight and a float32 scale
      for each row; embedding, head, norms and biases stay in half precision, and so do keys and values.
    - int4 (bitsandbytes' nf4 without double quantisation): as int8, but half a byte for each weight and a float32 scale
      for each 64 of them.

    Keys and values of one token are 2 * layers * kv_heads * head_dim numbers.

    Args:
        fused: query, key and value are one linear layer, as in QWen.
    """
    shapes = qwen_shapes(architecture) if fused else hf_shapes(architecture)
    outside = {name for row in (TABLE[0], TABLE[-1]) for name in (row.hf, row.qwen)}
    linear = [shape for name, shape in shapes.items() if len(shape) == 2 and name not in outside]
    in_linear = sum(numel(shape) for shape in linear)
    total = sum(numel(shape) for shape in shapes.values())
    others = 2 * (total - in_linear)
    weights = {
        "float32": 4 * total,
        "bfloat16": 2 * total,
        "float16": 2 * total,
        "int8": others + sum(numel(shape) + 4 * shape[0] for shape in linear),
        "int4": others + sum(-(-numel(shape) // 2) + 4 * -(-numel(shape) // _NF4_BLOCK) for shape in linear),
    }
    numbers = 2 * architecture.layers * architecture.keys
    needs = {}
    for precision, nbytes in weights.items():
        token = numbers * (4 if precision == "float32" else 2)
        needs[precision] = Memory(nbytes, token, nbytes + architecture.length * token)
    return needs


def int8_cache_per_token(architecture: Architecture) -> int:
    """Bytes of one token in `QWenInt8Cache`: a byte for each number, and two float32 for each head's key and value."""
    return 2 * architecture.layers * architecture.kv_heads * (architecture.head_dim + 2 * 4)


def numel(shape: Sequence[int]) -> int:
    """Number of values in a tensor of this shape."""
    return torch.Size(shape).numel()
