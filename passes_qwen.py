"""Norms, gates and rotations on a GPU, each in one pass over memory by a kernel of `triton_qwen`.

Torch takes four, two and seven, which come to a third of the time of a long prompt. A short one takes the time in which
the processor starts kernels: there, four and seven of torch's cost more than one of ours, and two of them less.

Shapes: B batch, T tokens, H heads, D head size, R rotated channels of a head, E width, I width of the MLP.
"""

from __future__ import annotations

import functools
import os
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec

import torch
from torch import nn

from .products_qwen import is_watched
from .translating_qwen import SWITCH
from .warming_qwen import is_ready

DEVICE = "cuda"
"""Type of the devices that the kernels compute on; tests have Triton interpret them on a CPU."""

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LEAST_TOKENS = 1024
"""Below which two of torch's kernels for the gates are started sooner than one of these is."""
_LEAST_CAPABILITY = (8, 0)
_HEADS = 32
"""Heads of a program at most."""
GATED = 2048
"""Numbers of a program for the gates."""


def runs_on(states: torch.Tensor) -> bool:
    """Whether kernels for a GPU may stand for torch's operations on a tensor: nobody differentiates or watches them.

    `QWEN_NATIVE=0` in the environment turns them off.
    """
    if states.device.type != DEVICE or type(states) is not torch.Tensor:
        return False
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing() or is_watched():
        return False
    if states.dtype not in _DTYPES or torch.is_autocast_enabled(DEVICE) or os.environ.get(SWITCH) == "0":
        return False
    return _is_capable(states.device)


@functools.lru_cache
def _is_capable(device: torch.device) -> bool:
    """Whether there is a Triton, and a GPU that the kernels were written for: NVIDIA's, from Ampere on."""
    if find_spec("triton") is None or device.type == "cpu":
        return device.type == "cpu"
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= _LEAST_CAPABILITY


def chosen(device: torch.device) -> AbstractContextManager[object]:
    """Triton starts kernels on the current GPU, which needn't be the one that the tensors are on."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def pays(states: torch.Tensor) -> bool:
    """Whether states, (..., E), are those of a prompt whose gates a kernel for a GPU had better compute."""
    # Last: while a program is traced, a question about a length makes a constant of it.
    return runs_on(states) and states.is_contiguous() and states.shape[:-1].numel() >= LEAST_TOKENS


def is_beside(tensor: torch.Tensor, states: torch.Tensor) -> bool:
    """Whether another tensor lies plainly, of the same kind, on the same device."""
    same = (tensor.device, tensor.dtype) == (states.device, states.dtype)
    return type(tensor) in (torch.Tensor, nn.Parameter) and same and tensor.is_contiguous()


def normed(states: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor | None:
    """Root mean square norm, (..., E), as `RMSNorm`; None where torch has to do it."""
    if not runs_on(states) or not states.is_contiguous() or not states.numel():
        return None
    if not is_beside(weight, states) or weight.shape != states.shape[-1:]:
        return None
    return norm_prompt(states, weight, eps) if is_ready("norm", *kind(states), states.shape[-1]) else None


def gated(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor | None:
    """silu(gate) * up of a prompt, both (..., I); None where torch has to do it."""
    if not pays(gate) or not is_beside(up, gate) or gate.shape != up.shape:
        return None
    return gate_prompt(gate, up) if is_ready("gate", *kind(gate)) else None


def turned(heads: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor | None:
    """Rotated heads, (B, T, H, D) by angles (B or 1, T, 1, R) float32; None where torch has to do it."""
    if not runs_on(heads) or heads.dim() != 4 or not heads.numel() or heads.stride(-1) != 1:
        return None
    return _turned(heads, cosine, sine)


def both_turned(
    query: torch.Tensor, key: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor
) -> tuple[torch.Tensor, ...] | None:
    """Rotated queries and keys, (B, T, H | K, D), which lie side by side, by one kernel; None where that can't be."""
    if not runs_on(query) or query.dim() != 4 or not query.numel() or query.stride(-1) != 1:
        return None
    batch, count, number, size = query.shape
    behind = query.data_ptr() + number * query.stride(2) * query.itemsize
    if key.data_ptr() != behind or key.stride() != query.stride() or key.dtype != query.dtype:
        return None
    numbers = number, key.shape[2]
    result = _turned(query.as_strided((batch, count, sum(numbers), size), query.stride()), cosine, sine)
    return None if result is None else result.split(numbers, dim=2)


def _turned(heads: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor | None:
    batch, count, number, size = heads.shape
    rotated = cosine.shape[-1]
    if any((angle.dtype, angle.device) != (torch.float32, heads.device) for angle in (cosine, sine)):
        return None
    if cosine.shape not in ((batch, count, 1, rotated), (1, count, 1, rotated)) or cosine.shape != sine.shape:
        return None
    if rotated > size or rotated % 2 or not is_ready("turn", *kind(heads), number, size, rotated):
        return None
    return turn_prompt(heads, cosine, sine)


def kind(states: torch.Tensor) -> tuple[torch.device, torch.dtype]:
    """What every kernel is compiled for."""
    return states.device, states.dtype


# --- the kernels' calls ---


def norm_prompt(states: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """As `normed`."""
    from .triton_qwen import norm_rows, power_of_two

    result, width = torch.empty_like(states), states.shape[-1]
    with chosen(states.device):
        norm_rows[(states.numel() // width,)](states, weight, result, width, eps, BLOCK=power_of_two(width))
    return result


def gate_prompt(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """As `gated`."""
    from .triton_qwen import gate_states

    result, size = torch.empty_like(gate), gate.numel()
    with chosen(gate.device):
        gate_states[(-(-size // GATED),)](gate, up, result, size, BLOCK=GATED)
    return result


def turn_prompt(heads: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """As `turned`."""
    from .triton_qwen import power_of_two, turn_heads

    batch, count, number, size = heads.shape
    rotated = cosine.shape[-1]
    cosine, sine = cosine.contiguous(), sine.contiguous()
    result = heads.new_empty(heads.shape)
    with chosen(heads.device):
        turn_heads[(count, batch, -(-number // _HEADS))](
            *(heads, result, cosine, sine, *heads.stride()[:3], 0 if cosine.shape[0] == 1 else count * rotated),
            *(count, number),
            SIZE=size,
            ROTATED=rotated,
            HEADS=min(_HEADS, power_of_two(number)),
            BLOCK=power_of_two(size),
        )
    return result
