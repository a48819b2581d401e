"""Reading a prompt on a CPU: attention of many queries by a kernel of `native_qwen`, where there is one.

Shapes: B batch, H query heads, K key/value heads, T queries, S keys, D head size.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from .products_qwen import DTYPES, kernels_for

_LEAST_QUERIES = 16
"""Fewer are left to torch's kernel."""


class Prompt(ctypes.Structure):
    """What the kernel is told, as `Prompt` in `native_prompt_qwen`."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("queries", "keys", "values", "result", "seen")),
        *((name, ctypes.c_int64) for name in ("batch", "heads", "kv_heads", "count", "length", "size", "causal")),
        *(
            (f"{name}_{part}", ctypes.c_int64)
            for name in ("query", "key", "value")
            for part in ("row", "head", "token")
        ),
        *((name, ctypes.c_int64) for name in ("result_row", "result_head", "result_token")),
        *((name, ctypes.c_int64) for name in ("seen_row", "seen_head", "seen_query", "threads")),
        ("scale", ctypes.c_double),
    ]


def kernel_reads(query: torch.Tensor) -> bool:
    """Whether there is a kernel for so many queries, (B, H, T, D), which need no gradients."""
    return not torch.jit.is_tracing() and kernels_for(query) is not None and query.shape[2] >= _LEAST_QUERIES


def prompt_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of many tokens, (B, H, T, D) -> (B, T, H, D), with scores and softmax in float32.

    A block of queries is multiplied with those keys alone that it may see. torch's fused kernel on a CPU takes several
    times as long; what it computes is the same, and numbers are rounded in the same places.

    Args:
        module, query, key, value: as `attention_qwen.eager_attention_forward`; nothing is differentiated.
        attention_mask: (B or 1, H or 1, T, S), bool; any other is left to `sdpa`. None: each of the T queries sees
            the keys up to its own, the first T of them.
        is_causal: False where queries see keys behind them and there is no mask.
        kwargs: what `sdpa` takes; whatever isn't plain attention is left to it.
    """
    plain = not dropout and all(kwargs.get(name) is None for name in ("position_bias", "softcap"))
    native = kernels_for(query) if plain and _fit(query, key, value, attention_mask) else None
    if native is None or kwargs.get("output_attentions"):
        options = dict(kwargs, dropout=dropout, scaling=scaling, is_causal=is_causal)
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    causal = attention_mask is None and (module.is_causal if is_causal is None else is_causal)
    if causal:
        key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    return _attend(native, query, key, value, attention_mask, causal, scale), None


def _fit(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, seen: torch.Tensor | None) -> bool:
    """Whether shapes, dtypes and devices are what the kernel takes for granted; where not, torch says what is wrong."""
    batch, heads, count, size = query.shape
    kv_heads, length = key.shape[1:3]
    if key.shape != (batch, kv_heads, length, size) or value.shape != key.shape or not kv_heads or heads % kv_heads:
        return False
    if not length or any((part.dtype, part.device) != (query.dtype, query.device) for part in (key, value)):
        return False
    if seen is None:
        return True
    broadcast = seen.dim() == 4 and seen.shape[0] in (1, batch) and seen.shape[1] in (1, heads)
    return broadcast and seen.shape[2:] == (count, length) and (seen.dtype, seen.device) == (torch.bool, query.device)


def _attend(
    native: ctypes.CDLL,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    seen: torch.Tensor | None,
    causal: bool,
    scale: float,
) -> torch.Tensor:
    """(B, T, H, D), by the kernel."""
    batch, heads, count, size = query.shape
    query, key, value = (part if part.stride(-1) == 1 else part.contiguous() for part in (query, key, value))
    result = query.new_empty((batch, count, heads, size))
    strides = [0, 0, 0]
    if seen is not None:
        seen = seen if seen.stride(-1) == 1 else seen.contiguous()
        strides = [
            0 if length == 1 else stride for length, stride in zip(seen.shape[:3], seen.stride()[:3], strict=True)
        ]
    call = Prompt(
        *(None if part is None else part.data_ptr() for part in (query, key, value, result, seen)),
        *(batch, heads, key.shape[1], count, key.shape[2], size, int(causal)),
        *(*query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *result.transpose(1, 2).stride()[:3]),
        *(*strides, torch.get_num_threads(), scale),
    )
    if getattr(native, f"qwen_prompt_{DTYPES[query.dtype]}")(ctypes.byref(call)):
        raise MemoryError(f"No room for the scores of {key.shape[2]} keys: take a shorter text.")
    return result
