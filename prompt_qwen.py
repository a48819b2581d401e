"""Attention of many queries on a CPU, of a prompt or in training, by a kernel of `native_qwen`, where there is one.

Shapes: B batch, H query heads, K key/value heads, T queries, S keys, D head size.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from .gradients_qwen import passed_back
from .products_qwen import DTYPES, kernels_for

_LEAST_QUERIES = 16
"""Fewer are left to torch's kernel."""


class Prompt(ctypes.Structure):
    """What the kernel is told, as `Prompt` in `native_prompt_qwen`."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("queries", "keys", "values", "result", "seen", "logsums")),
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
    """Whether there is a kernel for so many queries, (B, H, T, D)."""
    return _kernel_for(query) is not None and query.shape[2] >= _LEAST_QUERIES


def _kernel_for(query: torch.Tensor) -> ctypes.CDLL | None:
    # A training doesn't change to the kernel on its way: its result would depend on how long that took to be made, and
    # a block that is computed again for its gradients would find those of another attention.
    return kernels_for(query, autocast_to=query.dtype, waits=torch.is_grad_enabled() and query.requires_grad)


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
    times as long; what it computes is the same, and numbers are rounded in the same places. So it is where gradients
    are asked for, which may be differentiated no further, as torch's.

    Args:
        module, query, key, value: as `attention_qwen.eager_attention_forward`.
        attention_mask: (B or 1, H or 1, T, S), bool; any other is left to `sdpa`. None: each of the T queries sees
            the keys up to its own, the first T of them.
        is_causal: False where queries see keys behind them and there is no mask.
        kwargs: what `sdpa` takes; whatever isn't plain attention is left to it.
    """
    plain = not dropout and all(kwargs.get(name) is None for name in ("position_bias", "softcap"))
    native = _kernel_for(query) if plain and _fit(query, key, value, attention_mask) else None
    if native is None or kwargs.get("output_attentions"):
        options = dict(kwargs, dropout=dropout, scaling=scaling, is_causal=is_causal)
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    causal = attention_mask is None and (module.is_causal if is_causal is None else is_causal)
    if causal:
        key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    if torch.is_grad_enabled() and any(part.requires_grad for part in (query, key, value)):
        return _Differentiated.apply(native, query, key, value, attention_mask, causal, scale), None
    return _attend(native, query, key, value, attention_mask, causal, scale), None


class _Differentiated(torch.autograd.Function):
    """Attention by the kernel, and what it passes back by another."""

    @staticmethod
    def forward(
        ctx: Any,
        native: ctypes.CDLL,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        seen: torch.Tensor | None,
        causal: bool,
        scale: float,
    ) -> torch.Tensor:
        """(B, T, H, D), of arguments as `_attend`."""
        query, key, value = map(_side_by_side, (query, key, value))
        logsums = query.new_empty(query.shape[:3], dtype=torch.float32)
        result = _attend(native, query, key, value, seen, causal, scale, logsums)
        ctx.save_for_backward(query, key, value, result, logsums, seen)
        ctx.native, ctx.causal, ctx.scale = native, causal, scale
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, given: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of query, key and value."""
        query, key, value, result, logsums, seen = ctx.saved_tensors
        seen, strides = _strides_of(seen)
        back = passed_back(
            *(ctx.native, query, key, value, result, logsums, given, seen, strides, ctx.causal, ctx.scale)
        )
        return (None, *back, None, None, None)


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
    logsums: torch.Tensor | None = None,
) -> torch.Tensor:
    """(B, T, H, D), by the kernel; `logsums`, (B, H, T) float32, become the logarithms of the sums of each query."""
    batch, heads, count, size = query.shape
    query, key, value = map(_side_by_side, (query, key, value))
    result = query.new_empty((batch, count, heads, size))
    seen, strides = _strides_of(seen)
    call = Prompt(
        *(None if part is None else part.data_ptr() for part in (query, key, value, result, seen, logsums)),
        *(batch, heads, key.shape[1], count, key.shape[2], size, int(causal)),
        *(*query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *result.transpose(1, 2).stride()[:3]),
        *(*strides, torch.get_num_threads(), scale),
    )
    if getattr(native, f"qwen_prompt_{DTYPES[query.dtype]}")(ctypes.byref(call)):
        raise MemoryError(f"No room for the scores of {key.shape[2]} keys: take a shorter text.")
    return result


def _side_by_side(states: torch.Tensor) -> torch.Tensor:
    return states if states.stride(-1) == 1 else states.contiguous()


def _strides_of(seen: torch.Tensor | None) -> tuple[torch.Tensor | None, list[int]]:
    """A mask whose keys lie side by side, and the strides of its rows, heads and queries."""
    if seen is None:
        return None, [0, 0, 0]
    seen = _side_by_side(seen)
    lengths = zip(seen.shape[:3], seen.stride()[:3], strict=True)
    return seen, [0 if length == 1 else stride for length, stride in lengths]
