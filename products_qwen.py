"""What the kernels of `native_qwen` compute, where there are any: products of a matrix and a few tokens, sums.

Shapes: N tokens, I inputs, O outputs.
"""

from __future__ import annotations

import ctypes

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from .native_qwen import library

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
"""What the kernels compute with, and how they call it."""

MOST_ROWS = 16
"""Tokens, beyond which torch's product of two matrices is the faster one."""


class Matrix(ctypes.Structure):
    """A product's weights, as `Matrix` in `native_products_qwen`."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("codes", "scales", "zeros", "bias")),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "kind", "group")),
    ]


def kernels_for(states: torch.Tensor) -> ctypes.CDLL | None:
    """The library, where its products may stand for torch's, if nobody differentiates them."""
    if torch.compiler.is_compiling() or type(states) is not torch.Tensor or states.device.type != "cpu":
        return None
    if states.dtype not in DTYPES or torch.is_autocast_enabled("cpu") or _is_watched():
        return None
    return library()


def _is_watched() -> bool:
    """Whether somebody wants to see each operation of torch: a mode, `torch.func`, derivatives in forward mode."""
    return is_in_torch_dispatch_mode() or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def kernels_for_few(states: torch.Tensor) -> ctypes.CDLL | None:
    """As `kernels_for`, for 1 to 16 tokens, (..., I), while no gradients are asked for."""
    native = None if torch.is_grad_enabled() else kernels_for(states)
    # Last: while a program is traced, a question about a length makes a constant of it.
    return native if native is not None and 1 <= states.shape[:-1].numel() <= MOST_ROWS else None


def place(weight: torch.Tensor, dtype: torch.dtype) -> int | None:
    """Where a weight lies, if it lies as it is written, in this dtype, on the CPU."""
    if type(weight) not in (nn.Parameter, torch.Tensor) or weight.dtype != dtype or weight.device.type != "cpu":
        return None
    return weight.data_ptr() if weight.is_contiguous() else None


def product(native: ctypes.CDLL, matrix: Matrix, states: torch.Tensor) -> torch.Tensor:
    """(..., I) of a few tokens -> (..., O)."""
    states = states.contiguous()
    result = states.new_empty((*states.shape[:-1], matrix.rows))
    places = ctypes.byref(matrix), ctypes.c_void_p(states.data_ptr()), ctypes.c_void_p(result.data_ptr())
    numbers = ctypes.c_int64(states.shape[:-1].numel()), ctypes.c_int64(torch.get_num_threads())
    if getattr(native, f"qwen_linear_{DTYPES[states.dtype]}")(*places, *numbers):
        raise MemoryError(f"No room for {tuple(states.shape)} activations: take a smaller batch.")
    return result


def decoded(native: ctypes.CDLL, matrix: Matrix, first: int, blocks: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows of a matrix of few bits as numbers, (16 * blocks, I), from block `first`."""
    numbers = torch.empty((16 * blocks, matrix.columns), dtype=dtype)
    places = ctypes.byref(matrix), ctypes.c_void_p(numbers.data_ptr())
    counts = map(ctypes.c_int64, (first, blocks, torch.get_num_threads()))
    getattr(native, f"qwen_decode_{DTYPES[dtype]}")(*places, *counts)
    return numbers


def column_sums(words: torch.Tensor) -> torch.Tensor:
    """Sums of the columns of whole numbers, (R, C) int64 -> (C,) int64, which wrap around."""
    native = library() if words.device.type == "cpu" and words.is_contiguous() else None
    if native is None or type(words) is not torch.Tensor or _is_watched():
        return words.sum(0)
    sums = words.new_empty(words.shape[1])
    places, shape = (words.data_ptr(), sums.data_ptr()), map(ctypes.c_int64, words.shape)
    threads = ctypes.c_int64(torch.get_num_threads())
    failed = native.qwen_column_sums(ctypes.c_void_p(places[0]), *shape, ctypes.c_void_p(places[1]), threads)
    return words.sum(0) if failed else sums
