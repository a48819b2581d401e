"""The model once more, in plain float32 torch, from its formulas and weights: what its logits are compared with.

Nothing of transformers takes part, no cache, no mask function and no attention kernel, so that a fault of theirs can't
be on both sides. Shapes: T tokens, H heads, K key/value heads, D head size, R rotated channels, E width, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn


def plain_alpha(length: int, seq_length: int) -> float:
    """Stretch of the rotary base for a prompt of so many tokens.

    Source: the published `get_ntk_alpha`, max(2 ** (ceil(log2(length / seq_length)) + 1) - 1, 1).
    """
    alpha = 1
    while length > seq_length:
        alpha, seq_length = 2 * alpha + 1, 2 * seq_length
    return float(alpha)


@torch.inference_mode()
def plain_logits(model: Any, ids: torch.Tensor, prompt: int | None = None) -> torch.Tensor:
    """Logits of one text, (T,) int64 -> (T, V) float32, with weights of any floating dtype.

    Args:
        model: a `QWenLMHeadModel`, of which only configuration and weights are read.
        prompt: tokens of the text that were its prompt, which choose the NTK alpha; None for all.
    """
    config = model.config
    alpha = plain_alpha(prompt or len(ids), config.seq_length) if config.use_dynamic_ntk else 1.0
    rotation = _rotation(config, len(ids), alpha, ids.device)
    states = model.transformer.wte.weight[ids].float()
    for block in model.transformer.h:
        states = _block(config, block, states, rotation)
    return _norm(model.transformer.ln_f, states) @ model.lm_head.weight.float().T


def _rotation(config: Any, length: int, alpha: float, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of each position, (T, R) each."""
    channels = config.rotary_dim
    base = config.rotary_emb_base * alpha ** (channels / (channels - 2))
    frequencies = 1.0 / base ** (torch.arange(0, channels, 2, device=device).float() / channels)
    angles = torch.arange(length, device=device).float()[:, None] * frequencies
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def _block(config: Any, block: Any, states: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """(T, E) -> (T, E)."""
    after_norm = config.apply_residual_connection_post_layernorm
    normed = _norm(block.ln_1, states)
    states = (normed if after_norm else states) + _attention(config, block.attn, normed, rotation)
    normed = _norm(block.ln_2, states)
    gate, up = _linear(block.mlp.w2, normed), _linear(block.mlp.w1, normed)
    return (normed if after_norm else states) + _linear(block.mlp.c_proj, nn.functional.silu(gate) * up)


def _attention(
    config: Any, layer: Any, normed: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor]
) -> torch.Tensor:
    """(T, E) -> (T, E)."""
    length, size = len(normed), config.kv_channels
    heads, groups = config.num_attention_heads, config.num_attention_heads // config.num_key_value_heads
    parts = _linear(layer.c_attn, normed).view(length, -1, size).transpose(0, 1)  # (H + 2 K, T, D)
    query, key, value = parts.split((heads, heads // groups, heads // groups))
    query, key = _rotate(query, *rotation), _rotate(key, *rotation)
    if config.use_logn_attn:
        counted = torch.arange(1, length + 1, device=normed.device).clamp(min=config.seq_length).float()
        query = query * (counted.log() / math.log(config.seq_length))[:, None]
    key, value = key.repeat_interleave(groups, dim=0), value.repeat_interleave(groups, dim=0)
    scores = query @ key.transpose(1, 2) * (size**-0.5 if config.scale_attn_weights else 1.0)  # (H, T, T)
    future = torch.ones(length, length, dtype=torch.bool, device=normed.device).triu(1)
    mixed = scores.masked_fill(future, -math.inf).softmax(-1) @ value
    return _linear(layer.c_proj, mixed.transpose(0, 1).reshape(length, -1))


def _rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """(…, T, D) -> the same, its first R channels rotated."""
    rotated, rest = states.split((cos.shape[-1], states.shape[-1] - cos.shape[-1]), dim=-1)
    first, second = rotated.chunk(2, dim=-1)
    return torch.cat((rotated * cos + torch.cat((-second, first), dim=-1) * sin, rest), dim=-1)


def _norm(norm: Any, states: torch.Tensor) -> torch.Tensor:
    scale = (states.square().mean(-1, keepdim=True) + norm.eps).rsqrt()
    return states * scale * norm.weight.float()


def _linear(layer: Any, states: torch.Tensor) -> torch.Tensor:
    return nn.functional.linear(states, layer.weight.float(), None if layer.bias is None else layer.bias.float())
