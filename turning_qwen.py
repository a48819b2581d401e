"""The rotation of a prompt's queries and keys on a CPU, in one pass, where there is a kernel of `native_qwen`.

Torch takes seven, and numbers come out the same to the last bit.

Shapes: B batch, T tokens, H heads, D head size, R rotated channels of a head.
"""

from __future__ import annotations

import ctypes

import torch

from .products_qwen import DTYPES, kernels_for


class Turn(ctypes.Structure):
    """Heads and their angles, as `Turn` in `native_prompt_qwen`."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("heads", "result", "cosine", "sine")),
        *((name, ctypes.c_int64) for name in ("batch", "count", "number", "size", "rotated", "row", "token", "head")),
        *((name, ctypes.c_int64) for name in ("angle_row", "threads")),
    ]


def turned(heads: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor | None:
    """Rotated heads, (B, T, H, D) by angles (B or 1, T, 1, R) float32, or None, where torch has to do it."""
    native = None if torch.is_grad_enabled() else kernels_for(heads)
    if native is None or heads.dim() != 4 or heads.stride(-1) != 1 or not heads.numel():
        return None
    batch, count, number, size = heads.shape
    rotated = cosine.shape[-1]
    angles = {(batch, count, 1, rotated), (1, count, 1, rotated)}
    for angle in (cosine, sine):
        plain = type(angle) is torch.Tensor and (angle.dtype, angle.device) == (torch.float32, heads.device)
        if not plain or angle.shape not in angles or angle.shape != cosine.shape:
            return None
    if rotated > size or rotated % 2:
        return None
    cosine, sine = cosine.contiguous(), sine.contiguous()
    result = heads.new_empty(heads.shape)
    angle_row = 0 if cosine.shape[0] == 1 else cosine.stride(0)
    call = Turn(
        *(part.data_ptr() for part in (heads, result, cosine, sine)),
        *(batch, count, number, size, rotated, *heads.stride()[:3], angle_row, torch.get_num_threads()),
    )
    getattr(native, f"qwen_turn_{DTYPES[heads.dtype]}")(ctypes.byref(call))
    return result
