"""Whether modules are what their published classes say, and a cache a growing one: what kernels may stand for.

Shapes: B batch, K key/value heads, S keys, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .bits_qwen import QWenBitsLinear
from .cache_qwen import QWenCache, QWenGrowingLayer

_COLLECTING = "transformers.utils.output_capturing"


def is_bare(module: nn.Module, cls: type[nn.Module]) -> bool:
    """Whether a module is of this very class, and nothing else sees or changes what goes through it."""
    everywhere = nn.modules.module
    hooks = (
        *(everywhere._global_forward_hooks, everywhere._global_forward_pre_hooks),
        *(everywhere._global_backward_hooks, everywhere._global_backward_pre_hooks),
        *(module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks),
    )
    return type(module) is cls and "forward" not in vars(module) and not any(hooks)


def is_left_alone(module: nn.Module) -> bool:
    """Whether nothing of a module's own sees or changes what goes through it, in eval mode.

    Hooks by which transformers collects states, which stay for ever, do nothing unless a call asks for them.
    """
    if module._forward_pre_hooks or module.training or "forward" in vars(module):
        return False
    return all(getattr(hook, "__module__", None) == _COLLECTING for hook in module._forward_hooks.values())


class Plain:
    """Tells whether modules compute nothing but what their published classes say, and in eval mode.

    Args:
        classes: the published ones, as they are when they have just been defined.
    """

    def __init__(self, *classes: Any):
        self.forwards: dict[type, Callable[..., Any]] = {
            cls: cls.forward for cls in (*classes, nn.Linear, nn.SiLU, QWenBitsLinear)
        }

    def __call__(self, *modules: nn.Module) -> bool:
        everywhere = nn.modules.module
        hooked = everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks
        return not hooked and all(map(self._is_plain, modules))

    def _is_plain(self, module: nn.Module) -> bool:
        cls: Any = type(module)
        return self.forwards.get(cls) is cls.forward and is_left_alone(module)


class Unchanged:
    """Tells whether plain modules, and where their weights lie, are still as they were, quicker than `Plain` does.

    Args:
        modules: plain ones, with all that is in them.
        plain: that said so.
    """

    def __init__(self, modules: Sequence[nn.Module], plain: Plain):
        every = [module for outer in modules for module in outer.modules()]
        members = [(one._modules, name, part) for one in every for name, part in one._modules.items()]
        weights = [(one._parameters, name, part) for one in every for name, part in one._parameters.items()]
        self._forwards: list[tuple[Any, Callable[..., Any]]] = list(plain.forwards.items())
        self._parts = members + weights
        self._weights = [weight for _, _, weight in weights if weight is not None]
        self._places = [weight.data_ptr() for weight in self._weights]
        self._hooks = [hooks for one in every for hooks in (one._forward_hooks, one._forward_pre_hooks)]
        self._hooked = [list(hooks) for hooks in self._hooks]  # by numbers that come once
        self._own = [vars(one) for one in every]
        self._configurations: list[Any] = list(
            {id(one.config): one.config for one in every if hasattr(one, "config")}.values()
        )

    def __call__(self) -> bool:
        everywhere = nn.modules.module
        # Lists, for each of these is asked hundreds of times before each token.
        return not (
            everywhere._global_forward_hooks
            or everywhere._global_forward_pre_hooks
            or [list(hooks) for hooks in self._hooks] != self._hooked
            or any([own["training"] or "forward" in own for own in self._own])
            or any([held.get(name) is not part for held, name, part in self._parts])
            or [weight.data_ptr() for weight in self._weights] != self._places
            or any([cls.forward is not forward for cls, forward in self._forwards])
            or any([config._attn_implementation != "sdpa" for config in self._configurations])
        )


def sdpa_is_torchs() -> bool:
    """Whether "sdpa" stands for what transformers registers, and nobody has put an attention of their own there."""
    return ALL_ATTENTION_FUNCTIONS.get_interface("sdpa", sdpa_attention_forward) is sdpa_attention_forward


def asks_for_sdpa(config: Any) -> bool:
    """Whether a configuration asks for torch's attention."""
    return config._attn_implementation == "sdpa" and sdpa_is_torchs()


def is_plain_mask(seen: Any) -> bool:
    """Whether a mask says of each key whether it is read, and no more: flex attention's are no tensors."""
    return isinstance(seen, torch.Tensor) and seen.dtype == torch.bool and seen.dim() == 4 and seen.stride(-1) == 1


def length_held(cache: Any, blocks: int, states: torch.Tensor, seen: Any) -> int | None:
    """Tokens that a growing cache holds, if all layers hold keys of this kind; None for any other cache or mask."""
    if type(cache) is not QWenCache or len(cache.layers) < blocks or cache.offloading or not blocks:
        return None
    length = cache.get_seq_length()
    for layer in cache.layers[:blocks]:
        if type(layer) is not QWenGrowingLayer or not layer.is_initialized:
            return None
        kinds = {(held.dtype, held.device, held.shape[-2]) for held in (layer.keys, layer.values)}
        if kinds != {(states.dtype, states.device, length)}:
            return None
    rows, tokens = states.shape[:2]
    shape = (rows, 1, tokens, length + tokens)
    plain = seen is None or (is_plain_mask(seen) and seen.shape == shape)
    return length if plain else None
