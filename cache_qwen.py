"""What a generation keeps between steps: keys and values, as they are or in int8, and the NTK alpha of each sequence.

Shapes: B batch, K key/value heads, T tokens of this call, S tokens in the cache, D head size.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, QuantizedCache, QuantizedLayer

from .arguments_qwen import CACHE_NAME
from .ntk_qwen import NTKRows, set_ntk_alpha
from .positions_qwen import real_tokens

INT8_BACKEND, GROUPED_BACKEND = "qwen_int8", "qwen_int8_grouped"
"""Names of the int8 caches, the published and the accurate one:
`generate(cache_implementation="quantized", cache_config={"backend": "qwen_int8"})`."""

_GROUPED = "grouped"
"""Value of `use_cache_quantization` that asks for the accurate one."""
_GROUP_SIZE = 32
_GROUPED_MAX = 127

_QMIN, _QMAX = 0, 255
_LEAST_ROOM, _ROOM_SHARE = 64, 16
"""Tokens of free room in a buffer: at least the first, or as many as the S-th part of what it holds."""


@dataclass
class _Buffer:
    """Memory for more tokens than there are.

    Attributes:
        states: (B, K, capacity, D).
        newest: the newest view of its front, (B, K, S, D), or nothing while somebody writes. Only who holds this very
            view may write behind it. Copies of a layer share the buffer: of two that go on separately, the second finds
            another view, or none, and gets memory of its own.
    """

    states: torch.Tensor
    newest: list[torch.Tensor] = field(default_factory=list)

    def take(self) -> torch.Tensor | None:
        """The newest view, for who alone may now write behind it; None where somebody has taken it."""
        try:
            return self.newest.pop()  # atomic
        except IndexError:
            return None

    def claim(self, held: torch.Tensor, length: int) -> bool:
        """Whether so many tokens may be written behind `held`; of several threads only one is told so."""
        newest = self.take()
        if newest is None:
            return False
        frozen = self.states.is_inference() and not torch.is_inference_mode_enabled()
        if newest is held and held.shape[-2] + length <= self.states.shape[-2] and not frozen:
            return True
        self.newest.append(newest)
        return False


def _append(buffer: _Buffer | None, held: torch.Tensor, chunk: torch.Tensor) -> tuple[_Buffer, torch.Tensor]:
    """Put a chunk, (B, K, T, D), behind what is held, as `_make_room`."""
    buffer, view = _make_room(buffer, held, chunk, chunk.shape)
    view[..., view.shape[-2] - chunk.shape[-2] :, :] = chunk
    return buffer, view


def _make_room(
    buffer: _Buffer | None, held: torch.Tensor, like: torch.Tensor, shape: tuple[int, ...]
) -> tuple[_Buffer, torch.Tensor]:
    """Make room for a chunk of this shape, (B, K, T, D), behind what is held, (B, K, S, D) or empty: in place, or in a
    new buffer, of the dtype that holds both what is held and `like`, where `like` is.

    Returns:
        the buffer and the view of all that is held now, (B, K, S + T, D), the end of which is to be written.
    """
    start = held.shape[-2] if held.numel() else 0
    rows, heads, length, size = shape
    end = start + length
    if start and (held.shape[0], held.shape[1], held.shape[3]) != (rows, heads, size):  # else they would be broadcast
        raise ValueError(f"The cache holds {tuple(held.shape)} (B, K, S, D), which can't go on with {tuple(shape)}.")
    dtype = torch.promote_types(held.dtype, like.dtype)
    if buffer is None or buffer.states.dtype != dtype or not buffer.claim(held, length):
        capacity = end + max(_LEAST_ROOM, end // _ROOM_SHARE)
        buffer = _Buffer(like.new_empty((rows, heads, capacity, size), dtype=dtype))
        if start:
            buffer.states[..., :start, :] = held
    view = buffer.states.narrow(-2, 0, end)
    buffer.newest.append(view)
    return buffer, view


class QWenGrowingLayer(DynamicLayer):
    """Keys and values of one layer in buffers with room for more, so that a token is written without copying the rest.

    `keys` and `values` are views of the front of the buffers. A view that somebody holds never changes: cropping only
    shortens it, and what comes next then goes to new memory.
    """

    # Slots and not attributes: exporters make an input of a program of each tensor that they find in `vars(layer)`.
    __slots__ = ("_key_buffer", "_value_buffer")
    keys: torch.Tensor
    values: torch.Tensor
    _key_buffer: _Buffer | None
    _value_buffer: _Buffer | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._key_buffer = self._value_buffer = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append one chunk, (B, K, T, D) each, and return all keys and values, (B, K, S + T, D)."""
        differentiated = torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad)
        if differentiated or torch.compiler.is_compiling():  # neither may be written over
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        # One that a program has given back was made without its constructor, and has no buffers.
        self._key_buffer, self.keys = _append(getattr(self, "_key_buffer", None), self.keys, key_states)
        self._value_buffer, self.values = _append(getattr(self, "_value_buffer", None), self.values, value_states)
        return self.keys, self.values

    def make_room(self, like: torch.Tensor, shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        """Lengthen a layer that has been initialised by a chunk of this shape, (B, K, T, D), that the caller writes.

        Args:
            like: of their dtype and device.

        Returns:
            all keys and values, (B, K, S + T, D) each, of which the last T aren't written yet.
        """
        key_buffer, value_buffer = getattr(self, "_key_buffer", None), getattr(self, "_value_buffer", None)
        self._key_buffer, self.keys = _make_room(key_buffer, self.keys, like, shape)
        self._value_buffer, self.values = _make_room(value_buffer, self.values, like, shape)
        return self.keys, self.values

    def buffers(self) -> tuple[_Buffer, _Buffer]:
        """Of keys and of values, once there has been a chunk."""
        return cast(_Buffer, self._key_buffer), cast(_Buffer, self._value_buffer)

    def lengthen(self, length: int) -> None:
        """Hold so many tokens, by who has taken the newest views of both buffers and written behind them."""
        for name, buffer in zip(("keys", "values"), self.buffers(), strict=True):
            view = buffer.states.narrow(-2, 0, length)
            buffer.newest.append(view)
            setattr(self, name, view)

    def forget_last(self) -> None:
        """Give up the last token, in whose place the next one is written: nobody else may hold a view of it."""
        views = self.keys, self.values
        if getattr(self, "_key_buffer", None) is None:
            return self.crop(-1)
        taken = [buffer.take() for buffer in self.buffers()]
        if all(newest is view for newest, view in zip(taken, views, strict=True)):
            return self.lengthen(self.keys.shape[-2] - 1)
        for buffer, newest in zip(self.buffers(), taken, strict=True):
            buffer.newest += [] if newest is None else [newest]
        self.crop(-1)

    def __deepcopy__(self, memo: dict[int, Any]) -> QWenGrowingLayer:
        """Another layer with what is held, laid end to end: exporters look at how the tensors of their copies lie."""
        other = copy.copy(self)
        memo[id(self)] = other
        other._key_buffer = other._value_buffer = None
        if self.is_initialized:
            other.keys, other.values = (
                held.detach().clone(memory_format=torch.contiguous_format) for held in (self.keys, self.values)
            )
        return other

    def offload(self) -> None:
        """Move what is stored to the CPU, and free the buffers."""
        super().offload()
        self._key_buffer = self._value_buffer = None

    def reset(self) -> None:
        """Forget every token and the shape of the batch, which transformers 5.4 would fill with zeros instead."""
        self.keys = self.values = self._key_buffer = self._value_buffer = None  # type: ignore[assignment]
        self.is_initialized = False


def quantize_chunk(states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantise the keys or values of one appended chunk with one scale and one zero point per head.

    Args:
        states: (B, K, T, D), floating point.

    Returns:
        codes (B, K, T, D) uint8; scale and zero point, (B, K, T, 1) float32 each, constant along T.

    Source: the published int8 cache (2023-12); `golden/model/dec_cache_int8`.
    """
    states = states.float()
    low, high = states.amin(dim=(-2, -1), keepdim=True), states.amax(dim=(-2, -1), keepdim=True)
    # A constant chunk has no range: any positive scale gives its value back through the zero point.
    scale = ((high - low) / (_QMAX - _QMIN)).clamp(min=torch.finfo(torch.float32).tiny)
    scale = torch.where(high > low, scale, torch.ones_like(scale))
    zero = _QMIN - low / scale
    # Truncated, not rounded: that is what the published checkpoints were served with.
    codes = (states / scale + zero).clamp(_QMIN, _QMAX).to(torch.uint8)
    length = states.shape[-2]
    return codes, scale.expand(-1, -1, length, -1), zero.expand(-1, -1, length, -1)


def cover_padding(states: torch.Tensor, real_tokens: torch.Tensor) -> torch.Tensor:
    """Put a real token of the same row, where it has one, in the place of each padding token, which nobody attends to.

    So padding has no part in the range of a chunk, and a row gets the codes that it would get alone.

    Args:
        states: (B, K, T, D); real_tokens: (B, T) bool.
    """
    index = real_tokens.long().argmax(-1)[:, None, None, None].expand(-1, states.shape[1], 1, states.shape[3])
    return torch.where(real_tokens[:, None, :, None], states, states.gather(2, index))


def dequantize(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Inverse of `quantize_chunk` up to its rounding: scale * (codes - zero), (B, K, S, D) in `dtype`."""
    return (scale * (codes - zero)).to(dtype)


class _CodesLayer(DynamicLayer):
    """What a layer does that holds its keys and values as codes with scales: several tensors, (B, K, S, ...) each."""

    _STORED: tuple[str, ...]
    keys: torch.Tensor
    values: torch.Tensor

    def _replace_each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if self.is_initialized:
            for name in self._STORED:
                setattr(self, name, change(getattr(self, name)))

    def offload(self) -> None:
        """Move the stored tensors to the CPU."""
        self._replace_each(lambda stored: stored.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Move the stored tensors back to the layer's device."""
        self._replace_each(lambda stored: stored.to(self.device, non_blocking=True))

    def reset(self) -> None:
        """Forget every token and the shape of the batch."""
        for name in self._STORED:
            setattr(self, name, None)
        self.is_initialized = False

    def get_seq_length(self) -> int:
        """Number of tokens stored."""
        return self.keys.shape[-2] if self.is_initialized else 0

    def crop(self, *args: int) -> None:
        """Drop the last tokens, counted as `DynamicLayer.crop` counts them in the transformers installed."""
        if self.is_initialized:
            super().crop(*args)  # of keys and values
            kept = self.keys.shape[-2]
            self._replace_each(lambda stored: stored[..., :kept, :])

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Rearrange the rows for beam search, (B,) indices."""
        self._replace_each(lambda stored: stored.index_select(0, beam_idx.to(stored.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row `repeats` times."""
        self._replace_each(lambda stored: stored.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows that `indices` names."""
        self._replace_each(lambda stored: stored[indices, ...])


class QWenInt8Layer(_CodesLayer):
    """Keys and values of one layer as uint8 codes, with a scale and a zero point per head and appended chunk.

    The chunk that is being appended is attended in its quantised form too, as in the published code, so a text gives
    the same logits whether it is read from the cache or has just been written.
    """

    _STORED = ("keys", "values", "key_scale", "key_zero", "value_scale", "value_zero")
    key_scale: torch.Tensor
    key_zero: torch.Tensor
    value_scale: torch.Tensor
    value_zero: torch.Tensor

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Empty storage on the device of the first chunk; attention gets its dtype back."""
        self.dtype, self.device = key_states.dtype, key_states.device
        for states, data, scale, zero in (
            (key_states, "keys", "key_scale", "key_zero"),
            (value_states, "values", "value_scale", "value_zero"),
        ):
            rows, heads, _, size = states.shape
            setattr(self, data, torch.empty((rows, heads, 0, size), dtype=torch.uint8, device=self.device))
            for name in (scale, zero):
                setattr(self, name, torch.empty((rows, heads, 0, 1), dtype=torch.float32, device=self.device))
        self.is_initialized = True

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        *args,
        real_tokens: torch.Tensor | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append one chunk, (B, K, T, D) each, and return all keys and values, (B, K, S + T, D), dequantised.

        Args:
            real_tokens: (B, T) bool, which tokens of the chunk are no padding; None for all.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if real_tokens is not None:
            key_states, value_states = (cover_padding(states, real_tokens) for states in (key_states, value_states))
        chunk = (*quantize_chunk(key_states), *quantize_chunk(value_states))
        for name, part in zip(
            ("keys", "key_scale", "key_zero", "values", "value_scale", "value_zero"), chunk, strict=True
        ):
            setattr(self, name, torch.cat([getattr(self, name), part], dim=-2))
        return (
            dequantize(self.keys, self.key_scale, self.key_zero, self.dtype),
            dequantize(self.values, self.value_scale, self.value_zero, self.dtype),
        )


def group_size_for(head_dim: int, wanted: int = _GROUP_SIZE) -> int:
    """Values of a head that share a scale: the most that divide it evenly, up to `wanted`."""
    return next(size for size in range(min(wanted, head_dim), 0, -1) if head_dim % size == 0)


def round_groups(states: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise keys or values with one scale for each token, head and group of values, rounding to the nearest code.

    The error is at most half the scale, and a token has the same codes whatever else is in its chunk or batch.

    Args:
        states: (B, K, T, D), floating point.
        group_size: divides D.

    Returns:
        codes (B, K, T, D) int8, -127 to 127; scales (B, K, T, D / group_size) bfloat16, which has the range of float32.
    """
    groups = states.float().unflatten(-1, (-1, group_size))
    largest = groups.abs().amax(-1)
    # Codes are made with the scale that is stored, so its own rounding, at most 2^-9, costs no accuracy: the largest
    # value may come to 127.25 of it, which is still nearest to 127.
    scale = (largest / _GROUPED_MAX).clamp(min=torch.finfo(torch.bfloat16).tiny).bfloat16()
    codes = (groups / scale.float()[..., None]).round().clamp(-_GROUPED_MAX, _GROUPED_MAX).to(torch.int8)
    return codes.flatten(-2), scale


def restore_groups(codes: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Inverse of `round_groups` up to its rounding and that to `dtype`: (B, K, S, D)."""
    # Codes and scales are exact in every dtype, so that the product is rounded once.
    groups = codes.unflatten(-1, (scale.shape[-1], -1))
    return (groups.to(dtype) * scale.to(dtype)[..., None]).flatten(-2)


class QWenGroupedInt8Layer(_CodesLayer):
    """Keys and values of one layer as int8 codes, with a scale for each token, head and group of values.

    The chunk that is being appended is attended in its quantised form too. As no token's codes depend on others, a text
    gives the same logits however it is cut into chunks.

    Args:
        group_size: values of a head that share a scale; fewer, where it doesn't divide the head.
    """

    _STORED = ("keys", "values", "key_scale", "value_scale")
    key_scale: torch.Tensor
    value_scale: torch.Tensor

    def __init__(self, group_size: int = _GROUP_SIZE) -> None:
        super().__init__()
        self.group_size = group_size
        self._buffers: dict[str, _Buffer] = {}

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Empty storage on the device of the first chunk."""
        self.dtype, self.device = key_states.dtype, key_states.device
        for name in self._STORED:
            dtype = torch.bfloat16 if "scale" in name else torch.int8
            setattr(self, name, torch.empty(0, dtype=dtype, device=self.device))
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append one chunk, (B, K, T, D) each, and return all keys and values, (B, K, S + T, D), dequantised."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        chunk: dict[str, torch.Tensor] = {}
        for states, data, scale in ((key_states, "keys", "key_scale"), (value_states, "values", "value_scale")):
            chunk[data], chunk[scale] = round_groups(states.detach(), group_size_for(states.shape[-1], self.group_size))
        grown = {name: _append(self._buffers.get(name), getattr(self, name), part) for name, part in chunk.items()}
        self._buffers = {name: buffer for name, (buffer, _) in grown.items()}  # not those of a copy
        for name, (_, view) in grown.items():
            setattr(self, name, view)
        return (
            restore_groups(self.keys, self.key_scale, key_states.dtype),
            restore_groups(self.values, self.value_scale, value_states.dtype),
        )

    def offload(self) -> None:
        """Move the stored tensors to the CPU, and free the buffers."""
        super().offload()
        self._buffers = {}

    def reset(self) -> None:
        """Forget every token and the shape of the batch."""
        super().reset()
        self._buffers = {}


def _with_room(layer: DynamicLayer) -> QWenGrowingLayer:
    growing = QWenGrowingLayer()
    vars(growing).update(vars(layer))  # it holds tokens already where a cache is made of them
    return growing


class QWenCache(NTKRows, DynamicCache):
    """The growing cache of transformers, in buffers with room for more tokens (at most a sixteenth more than there are,
    or 64); the default of the model and of `generate`. Arguments: those of `DynamicCache`.
    """

    __slots__ = ("steps",)  # what `gpu_steps_qwen` has recorded for it; no entry of `vars`, as above
    steps: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.layers = [_with_room(layer) if type(layer) is DynamicLayer else layer for layer in self.layers]
        if self.layer_class_to_replicate is DynamicLayer:
            self.layer_class_to_replicate = QWenGrowingLayer


class QWenInt8Cache(NTKRows, Cache):
    """Key/value cache in int8, about half the size of a half-precision one; the default of a model whose
    configuration has `use_cache_quantization=True`, and usable with any model by name.

    Args:
        config: configuration of the model, for its number of layers; without one, layers are added as they come.

    Attributes:
        real_tokens: (B, T) bool, which tokens of the chunk that comes next are no padding, None for all: the model says
            so before each call.
    """

    def __init__(self, config: PreTrainedConfig | None = None) -> None:
        if config is None:
            super().__init__(layer_class_to_replicate=QWenInt8Layer)
        else:
            super().__init__(layers=[QWenInt8Layer() for _ in range(config.num_hidden_layers)])
        self.real_tokens: torch.Tensor | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append the chunk of one layer, (B, K, T, D) each; returns all, (B, K, S + T, D), dequantised."""
        real = getattr(self, "real_tokens", None)
        return super().update(key_states, value_states, layer_idx, *args, real_tokens=real, **kwargs)


class QWenGroupedInt8Cache(NTKRows, Cache):
    """Accurate key/value cache in int8, about half the size of a half-precision one: rounded, with a scale for each
    token, head and group of values; the default of a model whose configuration has `use_cache_quantization="grouped"`,
    and usable with any model by name.

    Args:
        config: configuration of the model, for its number of layers; without one, layers are added as they come.
        group_size: values of a head that share a scale.

    Raises:
        ValueError: a group size that is no positive integer.
    """

    def __init__(self, config: PreTrainedConfig | None = None, group_size: int = _GROUP_SIZE) -> None:
        if not isinstance(group_size, int) or isinstance(group_size, bool) or group_size < 1:
            raise ValueError(f"group_size={group_size!r} must be a positive integer: values that share a scale.")
        self.group_size = group_size
        if config is None:
            replicated: Any = partial(QWenGroupedInt8Layer, group_size)  # called as a class is
            super().__init__(layer_class_to_replicate=replicated)
        else:
            super().__init__(layers=[QWenGroupedInt8Layer(group_size) for _ in range(config.num_hidden_layers)])


def new_cache(model: Any) -> Cache:
    """Empty cache of the kind that a configuration asks for: int8, except in training, or a growing one."""
    wanted = model.config.use_cache_quantization and not model.training  # codes carry no gradient
    if not wanted:
        return QWenCache(config=model.config)
    return (QWenGroupedInt8Cache if model.config.use_cache_quantization == _GROUPED else QWenInt8Cache)(model.config)


def named_cache(config: PreTrainedConfig, settings: Mapping[str, Any] | None) -> Cache | None:
    """Empty cache of ours that a `cache_config` of `generate` names as its `backend`; None where it names another.

    Raises:
        ValueError: it sets what that cache doesn't know.
    """
    values = dict(settings or {})
    backend = values.pop("backend", None)
    if backend not in (INT8_BACKEND, GROUPED_BACKEND):
        return None
    group_size = values.pop("q_group_size", _GROUP_SIZE) if backend == GROUPED_BACKEND else None
    if values:
        raise ValueError(
            f"The cache {backend!r} has no {', '.join(values)}: leave that out of cache_config. It holds 8 bits; "
            f"q_group_size is known to {GROUPED_BACKEND!r}."
        )
    return QWenInt8Cache(config) if group_size is None else QWenGroupedInt8Cache(config, group_size)


def refuse_quantized(config: PreTrainedConfig, given: Any, settings: Mapping[str, Any], searched: bool) -> None:
    """Refuse what transformers' own quantised caches get wrong, or fail at with an error that names nothing.

    Args:
        given: a cache, or None where `settings`, a `cache_config` of `generate`, describe one.
        searched: whether beams rearrange its rows, or drafts are cut off again.

    Raises:
        ValueError: beams or drafts on a release (5.4) whose layers know neither; groups that hqq can't pack.
    """
    of_release = QuantizedLayer.reorder_cache is DynamicLayer.reorder_cache
    if searched and of_release and (given is None or isinstance(given, QuantizedCache)):
        raise ValueError(
            "The quantised caches of this release of transformers follow neither beams nor drafts: leave out "
            f"num_beams, prompt_lookup_num_tokens and assistants, update transformers, or use {GROUPED_BACKEND!r}."
        )
    if given is not None or settings.get("backend") != "hqq":
        return
    bits, size = settings.get("nbits") or 4, settings.get("q_group_size") or 64
    values = config.num_key_value_heads * config.head_dim
    in_rows = 1 in (settings.get("axis_key"), settings.get("axis_value"))
    packed = 8 // bits if in_rows and bits in (1, 2, 4) else 1  # groups of 3 bits it fills up itself
    if values % (size * packed):
        raise ValueError(
            f"hqq can't pack the {values} values of a token in groups of q_group_size={size} with nbits={bits}: "
            f"q_group_size times {packed} must divide {values}."
        )


def continues(kept: Any, wanted: Cache) -> bool:
    """Whether what a cache holds is held as in another one: by the same class, in groups of the same size."""
    return type(kept) is type(wanted) and getattr(kept, "group_size", None) == getattr(wanted, "group_size", None)


def cache_of_call(
    model: Any, cache: Any, use_cache: bool | None, alpha: torch.Tensor | None, attention_mask: Any, length: int
) -> Any:
    """The cache of a call: the one given, else a new one where it is wanted, else None.

    A new one holds the alpha. A cache that asks for it is told which of the tokens of the call are no padding.

    Args:
        model: a `QWenModel`.
        alpha: that the keys of this call are rotated by, (B, 1 or T), or None.
        attention_mask: of the call, and `length` its number of tokens.
    """
    if use_cache and cache is None:
        cache = new_cache(model)
        if alpha is not None:
            set_ntk_alpha(cache, alpha.amax(-1, keepdim=True))
    if hasattr(cache, "real_tokens"):
        cache.real_tokens = real_tokens(attention_mask, length)
    return cache


def extend_cache(
    cache: Any, key: torch.Tensor, value: torch.Tensor, layer_idx: int, arguments: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add keys and values of a call, (B, K, T, D), to the cache of one layer; returns all, (B, K, S, D).

    Args:
        cache: transformers' own, an engine's (continuous batching), or None.
        arguments: what the engine hands down; gets the cache where the attention implementation adds to it.
    """
    if cache is None:
        return key, value
    if isinstance(cache, Cache):
        return cache.update(key, value, layer_idx)
    if CACHE_NAME != "cache":
        arguments["cache"] = cache
        return key, value
    extended: tuple[torch.Tensor, torch.Tensor] = cache.update(key, value, layer_idx, kwargs=arguments)
    return extended
