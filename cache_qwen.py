"""What a generation keeps between steps: keys and values, as they are or in int8, and the NTK alpha of each sequence.

Shapes: B batch, K key/value heads, T tokens of this call, S tokens in the cache, D head size.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.utils import logging

logger = logging.get_logger(__name__)

INT8_BACKEND = "qwen_int8"
"""Name of the int8 cache: `generate(cache_implementation="quantized", cache_config={"backend": "qwen_int8"})`."""

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

    def claim(self, held: torch.Tensor, length: int) -> bool:
        """Whether so many tokens may be written behind `held`; of several threads only one is told so."""
        try:
            newest = self.newest.pop()  # atomic
        except IndexError:
            return False
        frozen = self.states.is_inference() and not torch.is_inference_mode_enabled()
        if newest is held and held.shape[-2] + length <= self.states.shape[-2] and not frozen:
            return True
        self.newest.append(newest)
        return False


def _append(buffer: _Buffer | None, held: torch.Tensor, chunk: torch.Tensor) -> tuple[_Buffer, torch.Tensor]:
    """Put a chunk, (B, K, T, D), behind what is held, (B, K, S, D) or empty: in place, or in a new buffer.

    Returns:
        the buffer and the view of all that is held now, (B, K, S + T, D).
    """
    start = held.shape[-2] if held.numel() else 0
    end = start + chunk.shape[-2]
    rows, heads, _, size = chunk.shape
    if start and (held.shape[0], held.shape[1], held.shape[3]) != (rows, heads, size):  # else they would be broadcast
        raise ValueError(
            f"The cache holds {tuple(held.shape)} (B, K, S, D), which can't go on with {tuple(chunk.shape)}."
        )
    dtype = torch.promote_types(held.dtype, chunk.dtype)
    if buffer is None or buffer.states.dtype != dtype or not buffer.claim(held, end - start):
        capacity = end + max(_LEAST_ROOM, end // _ROOM_SHARE)
        buffer = _Buffer(chunk.new_empty((rows, heads, capacity, size), dtype=dtype))
        if start:
            buffer.states[..., :start, :] = held
    buffer.states[..., start:end, :] = chunk
    view = buffer.states[..., :end, :]
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


class QWenInt8Layer(DynamicLayer):
    """Keys and values of one layer as uint8 codes, with a scale and a zero point per head and appended chunk.

    The chunk that is being appended is attended in its quantised form too, as in the published code, so a text gives
    the same logits whether it is read from the cache or has just been written.
    """

    _STORED = ("keys", "values", "key_scale", "key_zero", "value_scale", "value_zero")
    keys: torch.Tensor
    values: torch.Tensor
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


class NTKState:
    """The alpha that each sequence of one cache was prefilled with.

    Keys are stored rotated, so alpha is fixed with the first of them and stays until the cache is empty again.

    Args:
        alpha: (B, 1) float32.
        planned: set ahead by `generate`, for first tokens among which there are drafts behind the prompt.

    Attributes:
        given: the tensor that the caller gave, where it did.
    """

    # Beside `vars(state)`, of whose tensors exporters make inputs of a program.
    __slots__ = ("__dict__", "given", "planned")

    def __init__(self, alpha: torch.Tensor, planned: bool = False):
        self.alpha = alpha
        self.given: torch.Tensor | None = None
        self.planned = planned


class NTKRows(Cache):
    """Mixin of caches whose sequences keep their alpha when rows are rearranged, repeated or picked by hand."""

    def _rearrange(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        state: NTKState | None = getattr(self, "qwen_ntk", None)
        if state is not None and state.alpha.shape[0] > 1:
            state.alpha = change(state.alpha)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Rearrange the rows for beam search, (B,) indices."""
        super().reorder_cache(beam_idx)
        self._rearrange(lambda alpha: alpha[beam_idx.to(alpha.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row `repeats` times."""
        super().batch_repeat_interleave(repeats)
        self._rearrange(lambda alpha: alpha.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows that `indices` names."""
        super().batch_select_indices(indices)
        self._rearrange(lambda alpha: alpha[indices.to(alpha.device)])


def _with_room(layer: DynamicLayer) -> QWenGrowingLayer:
    growing = QWenGrowingLayer()
    vars(growing).update(vars(layer))  # it holds tokens already where a cache is made of them
    return growing


class QWenCache(NTKRows, DynamicCache):
    """The growing cache of transformers, in buffers with room for more tokens (at most a sixteenth more than there are,
    or 64); the default of the model and of `generate`. Arguments: those of `DynamicCache`.
    """

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


def set_ntk_alpha(cache: Cache, alpha: torch.Tensor, planned: bool = False) -> NTKState:
    """Fix the alpha of the sequences in a cache, (B, 1); a copy of it is kept. Arguments as those of `NTKState`."""
    state = NTKState(alpha.clone(), planned)
    cache.qwen_ntk = state  # type: ignore[attr-defined]
    if cache.is_compileable and not torch.compiler.is_compiling():
        torch._dynamo.mark_static_address(state.alpha)  # as the keys and values of a static cache are
    return state


def give_ntk_alpha(cache: Cache, given: torch.Tensor, rows: int) -> None:
    """Fix the alpha that the caller chose, (B, 1) or (1, 1), for `rows` sequences.

    The same tensor at each step, as `generate` gives it, is copied once.
    """
    state: NTKState | None = getattr(cache, "qwen_ntk", None)
    if state is None or getattr(state, "given", None) is not given:
        set_ntk_alpha(cache, given.expand(rows, -1)).given = given


def held_ntk_alpha(cache: Cache | None) -> torch.Tensor | None:
    """The alpha that the keys in a cache were rotated with, (B, 1) float32; None where there is none, or none known."""
    state: NTKState | None = getattr(cache, "qwen_ntk", None)
    return None if cache is None or state is None or int(cache.get_seq_length()) == 0 else state.alpha


def resolve_ntk_alpha(
    cache: Cache, rows: int, choose: Callable[[], torch.Tensor], program_alpha: torch.Tensor
) -> torch.Tensor:
    """Alpha of this call for the sequences in `cache`: the one they hold, else a new one, which they hold from now on.

    Args:
        cache: any transformers cache, before the keys of this call are added to it.
        rows: batch size B of this call.
        choose: gives what the tokens of this call alone ask for, (B, 1) or (1, 1); called only where it is needed.
        program_alpha: buffer in which a program keeps it that is exported together with its cache, (1, 1).

    Returns:
        (B, 1) float32.

    Raises:
        ValueError: the batch has other rows than the cache was prefilled with.
    """
    state: NTKState | None = getattr(cache, "qwen_ntk", None)
    length = cache.get_seq_length()
    if is_exporting() and isinstance(length, torch.Tensor) and not _is_program_input(state):
        return _keep_in_program(choose(), length, program_alpha).expand(rows, -1)
    if state is None:
        if is_exporting() and not (isinstance(length, int) and length == 0):
            _warn_of_unknown_alpha()
        return set_ntk_alpha(cache, choose().expand(rows, -1)).alpha
    if getattr(state, "planned", False):
        state.planned = False
    elif isinstance(length, torch.Tensor):
        # A static cache counts on the device. Written in place, so that a captured CUDA graph finds it again.
        chosen = choose()
        state.alpha.copy_(torch.where(length.to(chosen.device) > 0, state.alpha, chosen))
    elif length == 0:
        state.alpha = choose().expand(rows, -1)
    return _match_rows(state.alpha, rows)


def is_exporting() -> bool:
    """Whether a program is being exported, which before torch 2.12 a graph is told that is only compiled.

    There a program of `torch.export.export(strict=True)` counts as compiled, for nothing tells the two apart.
    """
    told_wrong = torch.__version__ < "2.12" and torch.compiler.is_dynamo_compiling()
    return torch.compiler.is_exporting() and not told_wrong


def _is_program_input(state: NTKState | None) -> bool:
    """Whether the program that is being exported gets this alpha, with its cache. One that was left in a cache inside
    the program, by a call before, is a plain tensor, and would be a constant of it."""
    return state is not None and type(state.alpha) is not torch.Tensor


def _keep_in_program(chosen: torch.Tensor, length: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Alpha in a program that holds its static cache, (1, 1): the first tokens choose it, a buffer keeps it."""
    if len(chosen) > 1:  # a buffer doesn't know how many there will be
        _warn_of_unknown_alpha()
        return chosen
    alpha = torch.where(length.to(chosen.device) > 0, kept.to(chosen), chosen)
    kept.copy_(alpha)
    return alpha


@torch.compiler.assume_constant_result  # so that it is run while a program is traced, and is no part of it
def _warn_of_unknown_alpha() -> bool:
    logger.warning(
        "This program continues a cache that doesn't tell the NTK alpha its keys were rotated by, so alpha follows the "
        "positions: wrong for a prompt beyond seq_length, and for a reply that passes it. Export with `ntk_alpha`, "
        "(B, 1), among the inputs, and give each step of a text what `model.transformer.choose_alpha` says of its "
        "prompt."
    )
    return True


def _match_rows(alpha: torch.Tensor, rows: int) -> torch.Tensor:
    held = alpha.shape[0]
    if held == rows:
        return alpha
    if held == 1 or bool((alpha == alpha[0]).all()):  # whichever rows these are, they have the same
        return alpha[:1].expand(rows, -1)
    raise ValueError(
        f"The cache holds the NTK alpha of {held} sequences, the batch has {rows}. Rows of this cache can't be picked "
        "or repeated while use_dynamic_ntk is on: use the model's own (QWenCache), or prefill these sequences again."
    )
