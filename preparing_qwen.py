"""Which kernels for a GPU a model has use of, and whether they are there; see `warming_qwen`.

Shapes: B batch, T tokens, E width, R rotated channels of a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from .passes_qwen import LEAST_TOKENS, gate_prompt, kind, norm_prompt, turn_prompt
from .recording_qwen import is_recorded
from .warming_qwen import Key, begin, is_ready, may_come


def prepare(blocks: Any, plain: Any, states: torch.Tensor, position_embeddings: Any) -> None:
    """Have the kernels compiled that a model's blocks would have use of, if that hasn't been begun; not while the call
    is being recorded, for compiling waits for the GPU.

    Args:
        blocks: of a model, at least one.
        plain: of their classes, see `plain_qwen`.
        states: (B, T, E), on a GPU that `runs_on` allows.
        position_embeddings: cosine, sine and LogN factors of a call.
    """
    if is_recorded(states.device):
        return
    attention, rotated = blocks[0].attn, position_embeddings[0].shape[-1]
    number, kv_number, size = attention.num_heads, attention.num_key_value_heads, attention.head_dim
    key = _key(blocks, states, rotated, position_embeddings[2] is not None)

    def warm() -> Iterator[Key]:
        from .gpu_steps_qwen import warm_steps

        prompt = states.new_zeros((1, LEAST_TOKENS, states.shape[-1]))
        angles = states.new_zeros((1, LEAST_TOKENS, 1, rotated), dtype=torch.float32)
        norm_prompt(prompt, states.new_ones(states.shape[-1]), 1e-6)
        yield "norm", *kind(states), states.shape[-1]
        gate_prompt(prompt, prompt)
        yield "gate", *kind(states)
        for heads in {number, kv_number, number + kv_number}:
            turn_prompt(states.new_zeros((1, LEAST_TOKENS, 3 * heads, size))[:, :, :heads], angles, angles)
            yield "turn", *kind(states), heads, size, rotated
        if warm_steps(blocks[0], plain, prompt[:, :1], angles[:, :1], position_embeddings[2] is not None):
            yield "steps", *key

    begin(key, states.device, warm)


def steps_ready(blocks: Any, states: torch.Tensor, position_embeddings: Any) -> bool:
    """Whether the kernels for a token through these blocks are there."""
    cosine, _, logn = position_embeddings
    return is_ready("steps", *_key(blocks, states, cosine.shape[-1], logn is not None))


def steps_may_come(blocks: Any, states: torch.Tensor, rotated: int, grown: bool) -> bool:
    """Whether they are there, or may still be: that of channels of a head so many are rotated, and LogN makes queries
    larger.
    """
    key = _key(blocks, states, rotated, grown)
    return may_come(key, "steps", *key)


def _key(blocks: Any, states: torch.Tensor, rotated: int, grown: bool) -> Key:
    attention, mlp = blocks[0].attn, blocks[0].mlp
    heads = attention.num_heads, attention.num_key_value_heads, attention.head_dim
    parts = tuple(_kind_of(part) for part in (*attention.children(), *mlp.children()))
    return (*kind(states), states.shape[-1], *heads, rotated, grown, parts)


def _kind_of(part: Any) -> tuple[Any, ...]:
    """What kernels depend on; and its class, for a block with an adapter has no kernels until that is merged."""
    sizes = (getattr(part, name, None) for name in ("in_features", "out_features"))
    return type(part), *sizes, getattr(part, "bias", None) is not None
