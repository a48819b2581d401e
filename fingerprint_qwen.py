"""What the keys and values of a text depend on beside the text: a digest of a model as it is now.

Versions of tensors don't tell: fused optimizers, `weight.data` and numpy write past them. So every weight is read,
about as much work as one generated token makes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from .products_qwen import checksums

_WORD = 8
"""Bytes that are added up at a time: as int64, the one width for which torch has a fast sum that wraps around."""
_STRANDS = 255
"""In how many parts the words of a tensor lie above one another to be added up: an odd number, so that as many signs
turned at once don't cancel each other, and many, which torch adds up as quickly as it reads."""

_FEW_BITS = "compressed_tensors"
_LIBRARIES = ("transformers", "torch", "accelerate", _FEW_BITS)
"""Whose hooks compute nothing else than the weights say: they collect outputs, move, gather and round weights."""

_OF_A_CALL = frozenset({"idx", "subB", "is_training"})
"""What bitsandbytes leaves of the last call beside the scales of a layer."""

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


@torch.no_grad()
def fingerprint(model: nn.Module) -> bytes | None:
    """A digest that is another one whenever anything has changed that the model computes with.

    That is every value of its weights, buffers and other tensors, wherever they lie; its configuration; the settings
    of its modules, adapters and their scales included; and the code that they run.

    Returns:
        16 bytes, or None where that can't be told: functions of somebody else run inside the model (hooks, a `forward`
        that was replaced), or tensors can't be read here (shards of other processes).
    """
    digest = hashlib.blake2b(digest_size=16)
    pieces: list[torch.Tensor] = []
    modules = list(model.modules())
    configurations = {id(config): config for module in modules if (config := vars(module).get("config"))}
    digest.update(repr([_plain(vars(config)) for config in configurations.values()]).encode())
    if any(map(_runs_foreign_code, modules)):
        return None
    for module in modules:
        own = {name: value for name, value in vars(module).items() if name not in _OF_EVERY_MODULE}
        scales, settings = _beside_weights(module, own)
        digest.update(repr((*_settings(module, own), settings)).encode())
        for name, tensor in (*_tensors(module, own), *scales):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {tensor.device}".encode())
            parts = _octets(_at_hand(module, name, tensor))
            if parts is None:
                return None
            pieces += parts
    for device in dict.fromkeys(piece.device for piece in pieces):
        digest.update(repr(_sums([piece for piece in pieces if piece.device == device])).encode())
    return digest.digest()


def runs_foreign_code(model: nn.Module) -> bool:
    """Whether functions of somebody else run inside a model, which libraries are not: hooks, a `forward` replaced."""
    return any(map(_runs_foreign_code, model.modules()))


def _runs_foreign_code(module: nn.Module) -> bool:
    everywhere, own = nn.modules.module, vars(module)
    watched = everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks
    hooked = watched or own["_forward_hooks"] or own["_forward_pre_hooks"]
    # Asked first because it is quickly answered, and for nearly all of some hundreds of modules the last question.
    touched = hooked or "forward" in own or "_hf_hook" in own
    return touched and not all(map(_is_of_a_library, _functions_inside(module)))


def _functions_inside(module: nn.Module) -> Iterator[Callable[..., Any]]:
    """What runs in a call of a module beside its class's own code."""
    for hooks in (
        nn.modules.module._global_forward_hooks,
        nn.modules.module._global_forward_pre_hooks,
        module._forward_hooks,
        module._forward_pre_hooks,
    ):
        yield from hooks.values()
    # Where accelerate moves the weights of a module, it calls what was there before.
    replaced = vars(module).get("_old_forward" if hasattr(module, "_hf_hook") else "forward")
    original = getattr(replaced, "_torchdynamo_orig_callable", replaced)
    if original is not None and _unwrapped(original) is not type(module).forward:
        yield original


def _unwrapped(method: Any) -> Any:
    """The function of a method, or where compressed-tensors has wrapped it to round or place weights, the one inside,
    whose name its wrapper goes by.
    """
    function = getattr(method, "__func__", None)
    while getattr(function, "__globals__", {}).get("__name__", "").startswith(_FEW_BITS):
        inside = getattr(function, "__wrapped__", None)
        if inside is None:
            break
        function = getattr(inside, "__func__", inside)
    return function


def _is_of_a_library(function: Any) -> bool:
    function = getattr(function, "func", function)  # of functools.partial
    return str(getattr(function, "__module__", "")).partition(".")[0] in _LIBRARIES


def _settings(module: nn.Module, own: Mapping[str, Any]) -> tuple[Any, ...]:
    """The code of a module and what is set on it, but for tensors and other modules."""
    settings = {name: _plain(value) for name, value in own.items() if name != "forward"}
    return type(module), type(module).forward, module.training, settings


def _plain(value: Any, depth: int = 3) -> Any:
    """Numbers, switches, names and collections of them; None for other objects, which are looked at elsewhere."""
    if isinstance(value, (bool, int, float, complex, str, torch.dtype)):
        return value
    if depth and isinstance(value, Mapping):
        return {str(key): _plain(item, depth - 1) for key, item in value.items()}
    if depth and isinstance(value, (list, tuple, set, frozenset)):
        items = [_plain(item, depth - 1) for item in value]
        return sorted(items, key=repr) if isinstance(value, (set, frozenset)) else items
    return None


def _tensors(module: nn.Module, own: Mapping[str, Any]) -> list[tuple[str, torch.Tensor]]:
    """Those of a module itself: weights, buffers, and what else lies on it, as scales of few-bit layers."""
    held = (*module._parameters.items(), *module._buffers.items(), *own.items())
    return [(name, tensor) for name, tensor in held if isinstance(tensor, torch.Tensor)]


def _beside_weights(
    module: nn.Module, own: Mapping[str, Any]
) -> tuple[list[tuple[str, torch.Tensor]], list[tuple[str, Any]]]:
    """Tensors and settings that lie on the weights of a module, or in objects of the library that its class is from:
    few-bit layers keep scales there, and move them between both places.
    """
    library = _library_of(module)
    weights = [weight for weight in module._parameters.values() if weight is not None]
    weights = [w for w in weights if type(w) is not nn.Parameter and not hasattr(w, "__tensor_flatten__")]
    held = [value for name, value in own.items() if name != "config"]  # read once, for all that have it
    objects = [value for value in held if _library_of(value) in (library, _FEW_BITS)]
    found = [leaf for holder in (*weights, *objects) for leaf in _leaves(holder)]
    known = {weight.data_ptr() for weight in weights}
    scales = [(name, value) for name, value in found if isinstance(value, torch.Tensor)]
    return (
        [(name, tensor) for name, tensor in scales if tensor.data_ptr() not in known],
        [(name, _plain(value)) for name, value in found if not isinstance(value, torch.Tensor)],
    )


def _library_of(value: Any) -> str:
    return type(value).__module__.partition(".")[0]


def _leaves(holder: Any, depth: int = 3) -> Iterator[tuple[str, Any]]:
    """Tensors, numbers and names in an object and in those that it holds."""
    for name, value in getattr(holder, "__dict__", {}).items():
        if name.startswith("_") or name in _OF_A_CALL or value is None:
            continue
        if isinstance(value, (torch.Tensor, bool, int, float, str, torch.dtype)):
            yield name, value
        elif depth and not isinstance(value, nn.Module) and not callable(value):
            yield from _leaves(value, depth - 1)


def _at_hand(module: nn.Module, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor, or where accelerate has offloaded it, what its hook would load."""
    offloaded = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
    return tensor if tensor.device.type != "meta" or offloaded is None else offloaded[name]


def _octets(tensor: torch.Tensor) -> list[torch.Tensor] | None:
    """All bytes of a tensor as some of (N,) uint8 on its device; None where they can't be read."""
    if hasattr(tensor, "__tensor_flatten__"):  # made of other tensors
        held = (getattr(tensor, name) for name in tensor.__tensor_flatten__()[0])
        inner = [_octets(value) for value in held if isinstance(value, torch.Tensor)]  # no mesh of processes
        return None if None in inner else [part for parts in inner if parts for part in parts]
    if tensor.device.type == "meta" or tensor.layout != torch.strided:
        return None
    return [tensor.detach().contiguous().reshape(-1).view(torch.uint8)]


def _sums(pieces: list[torch.Tensor]) -> list[int]:
    """Sums over all bytes of tensors of one device."""
    # Weights are of a class of their own, which a view of theirs is too.
    sums = checksums([piece.as_subclass(torch.Tensor) for piece in pieces]) if pieces[0].device.type == "cpu" else None
    if sums is None:
        return torch.stack([part for piece in pieces for part in _sums_by_torch(piece)]).tolist()
    return sums


def _sums_by_torch(octets: torch.Tensor) -> list[torch.Tensor]:
    """Sums over all bytes of a tensor, () int64 each, on its device."""
    if octets.storage_offset() % _WORD:
        octets = octets.clone()
    end = octets.numel() // _WORD * _WORD
    words = octets[:end].view(torch.int64)
    strands = words[: len(words) // _STRANDS * _STRANDS].view(_STRANDS, -1).sum(0)
    return [_weighted(part) for part in (strands, words[len(strands) * _STRANDS :], octets[end:].long())]


def _weighted(words: torch.Tensor) -> torch.Tensor:
    """Sum of words, (N,) int64, each times an odd number of its own, so that their order tells; the highest bits, which
    a product pushes out, are first brought down.
    """
    mixed = words ^ (words >> 29)
    return (mixed * (2 * torch.arange(len(words), device=words.device) + 1)).sum()
