"""What the attention of a prompt passes back on a CPU, by a kernel of `native_gradients_qwen`.

Shapes: B batch, H query heads, K key/value heads, T queries, S keys, D head size.
"""

from __future__ import annotations

import ctypes

import torch

from .products_qwen import DTYPES

_PLACES = ("queries", "keys", "values", "result", "given", "to_queries", "to_keys", "to_values")
_STRIDES = 3 * len(_PLACES)


class Gradients(ctypes.Structure):
    """What the kernel is told, as `Gradients` in `native_gradients_qwen`."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in (*_PLACES, "logsums", "seen")),
        *((name, ctypes.c_int64) for name in ("batch", "heads", "kv_heads", "count", "length", "size", "causal")),
        ("strides", ctypes.c_int64 * _STRIDES),
        *((name, ctypes.c_int64) for name in ("seen_row", "seen_head", "seen_query", "threads")),
        ("scale", ctypes.c_double),
    ]


def passed_back(
    native: ctypes.CDLL,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    result: torch.Tensor,
    logsums: torch.Tensor,
    given: torch.Tensor,
    seen: torch.Tensor | None,
    seen_strides: list[int],
    causal: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, (B, H, T, D), key and value, (B, K, S, D), whose channels lie side by side.

    Args:
        result, given: (B, T, H, D), the attention's result and its gradient.
        logsums: (B, H, T) float32, the logarithm of the sum of exponentials of each query's scores.
        seen: bool, with the strides of its rows, heads and queries; or None.
        causal: each query sees the keys up to its own.

    Raises:
        MemoryError: there is no room for a head in float32.
    """
    batch, heads, count, size = query.shape
    given = given if given.stride(-1) == 1 else given.contiguous()
    back = [part.transpose(1, 2).new_empty(part.transpose(1, 2).shape).transpose(1, 2) for part in (query, key, value)]
    parts = (query, key, value, result.transpose(1, 2), given.transpose(1, 2), *back)
    strides = [stride for part in parts for stride in part.stride()[:3]]
    call = Gradients(
        *(part.data_ptr() for part in (*parts, logsums)),
        None if seen is None else seen.data_ptr(),
        *(batch, heads, key.shape[1], count, key.shape[2], size, int(causal)),
        (ctypes.c_int64 * _STRIDES)(*strides),
        *(*seen_strides, torch.get_num_threads(), scale),
    )
    if getattr(native, f"qwen_gradients_{DTYPES[query.dtype]}")(ctypes.byref(call)):
        raise MemoryError(f"No room for the gradients of {key.shape[2]} keys: take shorter texts.")
    return back[0], back[1], back[2]
