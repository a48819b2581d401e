"""Reading a prompt on a CPU: attention of many queries, a block at a time.

Shapes: B batch, H query heads, K key/value heads, T queries, S keys, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache as remembered
from typing import Any

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

_LEAST_QUERIES, _MOST_QUERIES = 64, 256
"""In a block; fewer queries are left to torch's kernel."""
_SCORES = 2**18  # of a block that are computed together: few enough to stay in the processor's cache
_MOST_SCORES = 2**22  # which a block of one key head may take
_MOST_KEYS = {torch.float32: 1024, torch.bfloat16: 2**15, torch.float16: 2**15}
"""dtype -> longest text for which blocks took less time than torch's kernel, and whose keys fit into a piece."""


def reads_by_blocks(query: torch.Tensor) -> bool:
    """Whether blocks are the faster way for so many queries, (B, H, T, D), on the processor at hand."""
    plain = type(query) is torch.Tensor and query.device.type == "cpu" and not torch.jit.is_tracing()
    return plain and query.shape[2] >= _LEAST_QUERIES and query.dtype in _MOST_KEYS and _is_measured(query.dtype)


@remembered
def _is_measured(dtype: torch.dtype) -> bool:
    """Whether this is one of the processors on which blocks were measured; others may have better kernels for it."""
    can: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # older releases of torch can't tell
    if dtype == torch.float32:
        return bool(can.get("avx512_f"))
    return bool(can.get("avx512_bf16")) and not can.get("amx_tile")


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

    A block of queries is multiplied with those keys alone that it may see, where torch's fused kernel on a CPU takes
    longer for half of the numbers. What it computes is what that kernel does: numbers are rounded in the same places.

    Args:
        module, query, key, value: as `attention_qwen.eager_attention_forward`; nothing is differentiated.
        attention_mask: (B or 1, H or 1, T, S), bool or additive. None: each of the T queries sees the keys up to its
            own, the first T of them.
        is_causal: False where queries see keys behind them and there is no mask.
        kwargs: what `sdpa` takes; whatever isn't plain attention is left to it.
    """
    plain = not dropout and all(kwargs.get(name) is None for name in ("position_bias", "softcap"))
    of_these = attention_mask is None or attention_mask.shape[2:] == (query.shape[2], key.shape[2])
    if not plain or not of_these or key.shape[2] > _MOST_KEYS[query.dtype] or kwargs.get("output_attentions"):
        options = dict(kwargs, dropout=dropout, scaling=scaling, is_causal=is_causal)
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    causal = attention_mask is None and (module.is_causal if is_causal is None else is_causal)
    if causal:
        key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    output = query.new_empty((query.shape[0], query.shape[2], query.shape[1], query.shape[3]))
    with torch.autocast("cpu", enabled=False):
        for rows, heads, kv_heads in _pieces(query, key):
            mask = attention_mask
            if mask is not None:
                mask = mask[rows if mask.shape[0] > 1 else slice(None), heads if mask.shape[1] > 1 else slice(None)]
            states = query[rows, heads], key[rows, kv_heads], value[rows, kv_heads]
            _attend(*states, mask, causal, scale, output[rows, :, heads].transpose(1, 2))
    return output, None


def _block_length(query: torch.Tensor, key: torch.Tensor) -> int:
    """Queries of a block: short ones compute less that causality hides, long ones multiply faster."""
    length, groups = key.shape[2], query.shape[1] // key.shape[1]
    wanted = min(max(length // 8, _LEAST_QUERIES), _MOST_QUERIES)
    return max(1, min(wanted, _MOST_SCORES // max(1, groups * length)))


def _pieces(query: torch.Tensor, key: torch.Tensor) -> Iterator[tuple[slice, slice, slice]]:
    """Rows, query heads and key heads that are computed together: some heads of one row, or all of some rows."""
    batch, kv_heads, length = key.shape[:3]
    groups = query.shape[1] // kv_heads
    fitting = max(1, _SCORES // max(1, groups * length * _block_length(query, key)))
    rows, heads = max(1, fitting // kv_heads), min(fitting, kv_heads)
    for row in range(0, batch, rows):
        for head in range(0, kv_heads, heads):
            last = min(head + heads, kv_heads)
            yield slice(row, row + rows), slice(head * groups, last * groups), slice(head, last)


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    causal: bool,
    scale: float,
    output: torch.Tensor,
) -> None:
    """Write the attention of one piece to `output`, which lies as the queries do, (B, H, T, D)."""
    rows, heads, queries, size = query.shape
    keys, block = key.shape[2], _block_length(query, key)
    # A product of half precision would round the scores; that of probabilities and values rounds its result only.
    kept = torch.bfloat16 if value.dtype == torch.bfloat16 else torch.float32
    key = key.float().flatten(0, 1).transpose(1, 2)  # (B * K, D, S)
    value = value.to(kept).flatten(0, 1)
    for start in range(0, queries, block):
        end = min(start + block, queries)
        part = mask[:, :, start:end] if mask is not None else None
        seen = _seen_keys(part, keys, keys - queries + end, causal)
        scaled = (query[:, :, start:end].float() * scale).reshape(key.shape[0], -1, size)
        scores = scaled @ key[:, :, :seen]
        _hide(scores.view(rows, heads, end - start, seen), part, causal)
        probabilities = torch.softmax(scores, -1, out=scores).to(kept)
        output[:, :, start:end] = (probabilities @ value[:, :seen]).view(rows, heads, end - start, size)


def _seen_keys(mask: torch.Tensor | None, keys: int, end: int, causal: bool) -> int:
    """How many keys at least cover what a block sees whose last query is the key before `end`."""
    if mask is None:
        return end if causal else keys
    behind = mask[..., end:]
    if behind.dtype != torch.bool:
        behind = behind > torch.finfo(behind.dtype).min
    return keys if bool(behind.any()) else end


def _hide(scores: torch.Tensor, mask: torch.Tensor | None, causal: bool) -> None:
    """Set the scores of what isn't seen, (B, H, T, S), to the least finite number, so all rows stay finite."""
    least = torch.finfo(scores.dtype).min
    length, seen = scores.shape[2:]
    if mask is None:
        if causal:  # the last keys are those of the queries
            later = torch.ones((length, length), dtype=torch.bool).triu(1)
            scores[..., seen - length :].masked_fill_(later, least)
    elif mask.dtype == torch.bool:
        scores.masked_fill_(~mask[..., :seen], least)
    else:
        scores.add_(mask[..., :seen]).clamp_(min=least)
