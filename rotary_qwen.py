"""The rotary embedding, whose base NTK stretches, and the factor that LogN gives to queries of long texts.

Shapes: B batch, T query length, H heads, D head size, R rotated channels of a head.

Source: `qwen-7b.md` for names, signatures and arithmetic; `golden/model` for the numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

from .ntk_qwen import stretched_base
from .passes_qwen import both_turned as both_turned_on_gpu
from .passes_qwen import turned as turned_on_gpu
from .positions_qwen import text_lengths
from .scaling_qwen import RotaryScaling, dynamic_alpha, scaled_frequencies
from .turning_qwen import turned


def logn_scale(position_ids: torch.Tensor, seq_length: int) -> torch.Tensor:
    """LogN factor of queries, (B, T) -> (B, T, 1, 1) float32: max(1, log(position + 1) / log(seq_length))."""
    counted = (position_ids + 1).clamp(min=seq_length).float()
    return (counted.log() / math.log(seq_length))[..., None, None]


class RotaryEmbedding(nn.Module):
    """Rotary angles; stateless, so that requests in flight at once never see each other.

    Args:
        dim: number of rotated channels R, even.
        base: base of the frequencies.
        scaling: how they are changed for long texts, None for not at all.
    """

    def __init__(self, dim: int, base: float = 10000, scaling: RotaryScaling | None = None):
        super().__init__()
        self.dim, self.base = dim, base
        self.scaling = scaling or RotaryScaling("default", 1.0, 0)

    def forward(
        self, max_seq_len: int, offset: int = 0, ntk_alpha: float = 1.0, device: torch.device | None = None
    ) -> torch.Tensor:
        """Angles of the positions `offset` … `offset + max_seq_len - 1`, (1, max_seq_len, 1, R) float32."""
        positions = torch.arange(offset, offset + max_seq_len, device=device)[None]
        return self.angles(positions, torch.full((1, 1), float(ntk_alpha), device=device))

    def angles(self, position_ids: torch.Tensor, alpha: torch.Tensor | None = None) -> torch.Tensor:
        """Angles at any positions, (B, T) with alpha (B, T), (B, 1) or None for 1 -> (B, T, 1, R) float32.

        "dynamic" scaling chooses alpha itself, for the length that each text has at the end of this call; keys that
        are in a cache keep theirs, as in transformers.
        """
        if self.scaling.kind == "dynamic":
            alpha = dynamic_alpha(text_lengths(position_ids), self.scaling)
        exponents = torch.arange(0, self.dim, 2, device=position_ids.device).float() / self.dim
        base = self.base if alpha is None else stretched_base(self.base, alpha, self.dim)[..., None]
        frequencies = scaled_frequencies(base**exponents, self.base, self.scaling)
        freqs = position_ids[..., None].float() * frequencies  # (B, T, R / 2)
        return torch.cat((freqs, freqs), dim=-1)[:, :, None, :]

    def cos_sin(
        self, position_ids: torch.Tensor, alpha: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine of `angles`, which YaRN makes larger."""
        angles, factor = self.angles(position_ids, alpha), self.scaling.attention_factor
        return (angles.cos(), angles.sin()) if factor == 1.0 else (angles.cos() * factor, angles.sin() * factor)


def _rotate_half(x: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def _turned(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """states * cos + _rotate_half(states) * sin, (B, T, H, R) with angles (B or 1, T, 1, R), all float32."""
    result = states * cos
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    if traced or states.requires_grad and torch.is_grad_enabled():
        return result + _rotate_half(states) * sin
    half = states.shape[-1] // 2  # added in place, the halves needn't be copied; each number is rounded as above
    result[..., :half] -= states[..., half:] * sin[..., :half]
    result[..., half:] += states[..., :half] * sin[..., half:]
    return result


def apply_rotary_pos_emb(t: torch.Tensor, freqs: torch.Tensor | tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Rotate the first R channels of each head in float32 and round back.

    Args:
        t: queries or keys, (B, T, H, D).
        freqs: angles, (B or 1, T, 1, R), or their cosine and sine.
    """
    cos, sin = (freqs.cos(), freqs.sin()) if isinstance(freqs, torch.Tensor) else freqs
    result = turned_on_gpu(t, cos, sin)
    result = turned(t, cos, sin) if result is None else result
    if result is not None:
        return result
    channels = cos.shape[-1]
    rotated = _turned(t[..., :channels].float(), cos, sin).type_as(t)
    return rotated if channels == t.shape[-1] else torch.cat((rotated, t[..., channels:]), dim=-1)


def both_turned(
    query: torch.Tensor,
    key: torch.Tensor,
    angles: tuple[torch.Tensor, torch.Tensor],
    turn: Callable[..., torch.Tensor] = apply_rotary_pos_emb,
) -> tuple[torch.Tensor, ...]:
    """Queries and keys of a product, (B, T, H | K, D), each as by `turn`; on a GPU by one kernel, unless somebody has
    put a function of their own in the place of `apply_rotary_pos_emb`.
    """
    result = both_turned_on_gpu(query, key, *angles) if turn is apply_rotary_pos_emb else None
    return (turn(query, angles), turn(key, angles)) if result is None else result
