"""What peft's LoRA adds to products on a CPU, for the kernels.

Shapes: I inputs and O outputs of a layer, R rank.
"""

from __future__ import annotations

import ctypes
import sys
from typing import Any

import torch
from torch import nn

from .plain_qwen import is_bare, is_left_alone
from .products_qwen import Adapter, Matrix, multiplies_all, numbers_matrix, product

_LORA, _SAVED = "peft.tuners.lora.layer", "peft.utils.other"
"""Modules of peft."""


def is_lora(module: nn.Module) -> bool:
    """Whether a module is a linear layer with adapters beside it, of the class that peft has for it."""
    return type(module) is _class_of_peft(_LORA, "Linear")


def _class_of_peft(module: str, name: str) -> Any:
    """None where nobody has imported it, so that nothing is of it; or where another thread is about to."""
    return getattr(sys.modules.get(module), name, None)


def used_of(module: Any) -> nn.Module:
    """The module that an adapter has trained in the place of another, as the head of a base model is; else this one."""
    if type(module) is not _class_of_peft(_SAVED, "ModulesToSaveWrapper") or not is_left_alone(module):
        return module
    if type(module).forward.__module__ != _SAVED or len(module.active_adapters) > 1:
        return module
    names = [] if module.disable_adapters else module.active_adapters
    return module.modules_to_save[names[0]] if names and names[0] in module.modules_to_save else module.original_module


def adapter_of(lora: Any, dtype: torch.dtype) -> Adapter | None:
    """What is added to the base's product of states of a dtype: an adapter of rank 0 for nothing.

    Returns:
        None where that is another thing than the products of two plain matrices, (R, I) and (O, R), of this dtype or
        in float32: several adapters at once, another variant than LoRA's own, a hook, a merge to be undone.
    """
    if type(lora).forward.__module__ != _LORA or not is_left_alone(lora):
        return None
    if lora.merged and lora.disable_adapters:  # peft takes it out of the weights then
        return None
    unused = lora.merged or lora.disable_adapters
    names = [] if unused else [name for name in lora.active_adapters if name in lora.lora_A]
    if not names:
        return Adapter()
    name = names[0]
    down, up, dropout = lora.lora_A[name], lora.lora_B[name], lora.lora_dropout[name]
    if len(names) > 1 or name in lora.lora_variant or not all(is_bare(linear, nn.Linear) for linear in (down, up)):
        return None
    if type(dropout) not in (nn.Identity, nn.Dropout) or not is_left_alone(dropout) or down.bias is not None:
        return None
    held = down.weight.dtype
    if held != dtype and not (held == torch.float32 and lora.cast_input_dtype_enabled):
        return None
    matrices = [numbers_matrix(linear.weight, linear.bias, held) for linear in (down, up)]
    if None in matrices:
        return None
    return Adapter(*matrices, held == torch.float32, lora.scaling[name])


def with_adapter(matrix: Matrix, adapter: Adapter) -> Matrix | None:
    """A product with what is added to it; None where the two don't fit."""
    if not adapter.down.rows:
        return matrix
    wanted = matrix.rows, adapter.down.rows, matrix.columns
    if (adapter.up.rows, adapter.up.columns, adapter.down.columns) != wanted:
        return None
    matrix.adapter = ctypes.pointer(adapter)
    return matrix


def adapted_product(native: ctypes.CDLL, matrix: Matrix, states: torch.Tensor) -> torch.Tensor | None:
    """As `product`, with what the adapter adds, rounded where peft's layers round it; None for too many tokens."""
    adapter = matrix.adapter.contents
    given = states.float() if adapter.wide else states
    if not multiplies_all(native, given):
        return None
    added = product(native, adapter.up, product(native, adapter.down, given)).mul_(adapter.scale)
    return torch.add(product(native, matrix, states), added, out=added).to(states.dtype)
