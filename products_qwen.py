"""Products on a CPU, where torch's are slow: by the kernels of `native_qwen`, where there are any; without them, of
many tokens in half precision, in float32, where the processor has no such products. And sums.

Shapes: N tokens, I inputs, O outputs.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
from collections.abc import Sequence

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from .native_qwen import library, wait
from .translating_qwen import SWITCH

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
"""What the kernels compute with, and how they call it."""

FEW = 16
"""Tokens whose products every processor's kernels have, and of a row those that go through all blocks in one call."""

MOST = 64
"""Tokens that go through all blocks in one call, where the processor has kernels for more than a few."""

_PIECE = 2**20
"""Weights that are in float32 at a time: 4 MB, which the caches hold while they are multiplied."""


class Adapter(ctypes.Structure):
    """What is added to a product: `up` times `down` times the states, scaled; `Adapter` in `native_products_qwen`."""


class Matrix(ctypes.Structure):
    """A product's weights, as `Matrix` in `native_products_qwen`. What an adapter adds, `steps_qwen` alone looks at."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("codes", "scales", "zeros", "bias")),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "kind", "group")),
        ("adapter", ctypes.POINTER(Adapter)),
    ]


Adapter._fields_ = [("down", Matrix), ("up", Matrix), ("wide", ctypes.c_int64), ("scale", ctypes.c_double)]


def kernels_for(
    states: torch.Tensor, autocast_to: torch.dtype | None = None, waits: bool = False
) -> ctypes.CDLL | None:
    """The library, where its products may stand for torch's, if nobody differentiates them.

    Args:
        autocast_to: under autocast to this dtype too, for operations whose every part is of it already.
        waits: until a library is there that is being made.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # a program would hold what came out as a constant
        return None
    if type(states) is not torch.Tensor or states.device.type != "cpu":
        return None
    if states.dtype not in DTYPES or is_watched():
        return None
    if torch.is_autocast_enabled("cpu") and autocast_to != torch.get_autocast_dtype("cpu"):
        return None
    return wait() if waits else library()


def is_watched() -> bool:
    """Whether somebody wants to see each operation of torch: a mode, `torch.func`, derivatives in forward mode."""
    return is_in_torch_dispatch_mode() or is_transformed() or forward_ad._current_level >= 0


def is_transformed() -> bool:
    """Whether `torch.func` transforms what is computed, which takes neither checkpoints nor functions of our own."""
    return torch._C._are_functorch_transforms_active()


def kernels_for_steps(states: torch.Tensor) -> ctypes.CDLL | None:
    """As `kernels_for`, for a few tokens of some rows, (B, T, E), while no gradients are asked for."""
    native = None if torch.is_grad_enabled() else kernels_for(states)
    if native is None:  # first: while a program is traced, a question about a length makes a constant of it
        return None
    rows, tokens = states.shape[:2]
    most = MOST if _has_many(native, states.dtype) else FEW
    return native if 1 <= rows * tokens <= most and tokens <= FEW else None


def kernels_for_any(states: torch.Tensor) -> ctypes.CDLL | None:
    """As `kernels_for`, for so many tokens as the processor's kernels multiply, while no gradients are asked for."""
    native = None if torch.is_grad_enabled() else kernels_for(states)
    return native if native is not None and multiplies_all(native, states) else None


def multiplies_all(native: ctypes.CDLL, states: torch.Tensor) -> bool:
    """Whether `product` takes so many tokens, (..., I): any number where there are kernels for more than a few."""
    count = states.shape[:-1].numel()
    return 1 <= count <= FEW or (count > FEW and _has_many(native, states.dtype))


def _has_many(native: ctypes.CDLL, dtype: torch.dtype) -> bool:
    return hasattr(native, f"qwen_many_{DTYPES[dtype]}")


@functools.lru_cache
def multiplies(dtype: torch.dtype) -> bool:
    """Whether torch multiplies matrices of a dtype on this CPU about as fast as in float32.

    On x86-64 without AVX-512, as in most PCs, it multiplies half precision number by number: matrices as `nn.Linear`
    has them at a seventh of the speed of float32, those of a backward pass at a hundredth (`docs/speed.md`).
    """
    supported = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}.get(dtype)
    if supported is None or platform.machine() not in ("x86_64", "AMD64") or not torch.backends.mkldnn.is_available():
        return True
    return bool(getattr(torch.ops.mkldnn, supported)())


def is_widened(states: torch.Tensor) -> bool:
    """Whether many tokens, (..., I), are to be multiplied by `wide_product`: nobody differentiates or watches it, and
    torch takes several times as long. `QWEN_NATIVE=0` leaves it to torch.
    """
    if torch.compiler.is_compiling() or states.device.type != "cpu" or multiplies(states.dtype):
        return False
    if torch.is_grad_enabled() or type(states) is not torch.Tensor or os.environ.get(SWITCH) == "0":
        return False
    if torch.jit.is_tracing() or torch.is_autocast_enabled("cpu") or is_watched():
        return False
    return states.shape[:-1].numel() > FEW


def wide_product(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor | None:
    """(..., I) of many tokens, weights (O, I), bias (O,) -> (..., O): in float32, rounded once at the end, as by torch.

    So many weights are in float32 at a time as the caches hold. None where weights are of another kind than the states,
    for torch to say what is wrong.
    """
    parts = [weight] if bias is None else [weight, bias]
    if any(place(part, states.dtype) is None for part in parts) or weight.shape[1:] != states.shape[-1:]:
        return None
    flat = states.reshape(-1, states.shape[-1]).float()
    result = states.new_empty((len(flat), len(weight)))
    some = max(1, _PIECE // max(1, weight.shape[1]))
    for first in range(0, len(weight), some):
        rows = slice(first, first + some)
        result[:, rows] = nn.functional.linear(flat, weight[rows].float(), None if bias is None else bias[rows].float())
    return result.view(*states.shape[:-1], len(weight))


def place(weight: torch.Tensor, dtype: torch.dtype) -> int | None:
    """Where a weight lies, if it lies as it is written, in this dtype, on the CPU."""
    if type(weight) not in (nn.Parameter, torch.Tensor) or weight.dtype != dtype or weight.device.type != "cpu":
        return None
    return weight.data_ptr() if weight.is_contiguous() else None


def numbers_matrix(weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype) -> Matrix | None:
    """A product's weights, (O, I) and (O,), as the kernels take them, or None where they lie otherwise."""
    places = place(weight, dtype), None if bias is None else place(bias, dtype)
    if places[0] is None or not weight.numel():
        return None
    if bias is not None and (places[1] is None or bias.numel() != weight.shape[0]):
        return None
    return Matrix(places[0], None, None, places[1], *weight.shape, 0, 1)


def product(native: ctypes.CDLL, matrix: Matrix, states: torch.Tensor) -> torch.Tensor:
    """(..., I) -> (..., O), of so many tokens as `multiplies_all` says."""
    states = states.contiguous()
    result = states.new_empty((*states.shape[:-1], matrix.rows))
    places = ctypes.byref(matrix), ctypes.c_void_p(states.data_ptr()), ctypes.c_void_p(result.data_ptr())
    count = states.shape[:-1].numel()
    numbers = ctypes.c_int64(count), ctypes.c_int64(torch.get_num_threads())
    kernel = "linear" if count <= FEW else "many"
    if getattr(native, f"qwen_{kernel}_{DTYPES[states.dtype]}")(*places, *numbers):
        raise MemoryError(f"No room for {tuple(states.shape)} activations: take a smaller batch.")
    return result


def decoded(native: ctypes.CDLL, matrix: Matrix, first: int, blocks: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows of a matrix of few bits as numbers, (16 * blocks, I), from block `first`."""
    numbers = torch.empty((16 * blocks, matrix.columns), dtype=dtype)
    places = ctypes.byref(matrix), ctypes.c_void_p(numbers.data_ptr())
    counts = map(ctypes.c_int64, (first, blocks, torch.get_num_threads()))
    getattr(native, f"qwen_decode_{DTYPES[dtype]}")(*places, *counts)
    return numbers


def checksums(pieces: Sequence[torch.Tensor]) -> list[int] | None:
    """A sum over the bytes of each of some tensors, (N,) uint8 on the CPU, of 64 bits; None without a kernel.

    Each word of 8 bytes is multiplied by an odd number of its own, so that their order tells.
    """
    native = library()
    plain = all(type(piece) is torch.Tensor and piece.is_contiguous() for piece in pieces)
    if native is None or not plain or is_watched():
        return None
    count = len(pieces)
    places = (ctypes.c_void_p * count)(*(piece.data_ptr() for piece in pieces))
    lengths, sums = (ctypes.c_int64 * count)(*map(len, pieces)), (ctypes.c_uint64 * count)()
    native.qwen_checksums(places, lengths, ctypes.c_int64(count), sums, ctypes.c_int64(torch.get_num_threads()))
    return list(sums)
