"""A token of each row through all blocks on a GPU: six kernels of `triton_qwen` a block in place of some forty of
torch, recorded once for each cache and started together.

Such a step is reading weights, keys and values, while the processor has to start each kernel: torch's take longer to be
started than to run. What is computed is the same: numbers are rounded where the modules round them, and added up in
float32. Whatever isn't plain (hooks, adapters, other classes, another attention, autocast, training, compiling) goes
through the modules.

Shapes: B batch, E width, I width of the MLP, H heads, K key/value heads, D head size, R rotated channels, P parts of a
text, S keys.
"""

from __future__ import annotations

import math
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import nn
from transformers.cache_utils import StaticCache, StaticLayer

from .cache_qwen import QWenCache, QWenGrowingLayer
from .passes_qwen import GATED, chosen, is_beside
from .plain_qwen import Plain, Unchanged, is_plain_mask, length_held
from .recording_qwen import Recording, is_recorded, record
from .triton_qwen import (
    PARTS,
    attend_parts,
    gate_states,
    merge_parts,
    multiply,
    multiply_gated,
    norm_rows,
    power_of_two,
)

_RECORDED_FROM = 4
"""Steps with a cache, after which they are recorded: a shorter reply would wait for that in vain."""
_MASK_ROOM = 1024
"""Tokens that a mask may grow by until steps are recorded anew."""
_KEYS, _KEY_WARPS = 16, 2
"""Keys that a program reads at once, and its warps."""
_TILES = {"ROWS": 2, "BLOCK": 2048, "num_warps": 8}
"""How a product is cut, as measured: rows of a program, columns that it reads at once, its warps."""


class Shape(NamedTuple):
    """What the memory and the kernels of a step depend on."""

    rows: int
    width: int
    inner: int
    heads: int
    kv_heads: int
    size: int
    rotated: int
    angle_rows: int
    masked: bool
    logn_rows: int


def steps_on_gpu(
    blocks: Any, plain: Plain, states: torch.Tensor, cache: Any, seen: Any, position_embeddings: Any
) -> torch.Tensor | None:
    """What plain blocks make of one token of each row, (B, 1, E) -> (B, 1, E); None, and nothing done, if one isn't.

    Args:
        plain: of the classes of block, attention, MLP and norm.
        cache: a `QWenCache` or `StaticCache`, which gets the token's keys and values, and holds what has been recorded.
        seen: (B, 1, 1, S) bool, which keys are read, or None for all; of all the room of a static cache.
        position_embeddings: cosine and sine, (B or 1, 1, 1, R), LogN factors (B or 1, 1, 1, 1) or None.
    """
    holder = _holder_of(cache)
    if holder is None or is_recorded(states.device):  # a graph of the caller's would outlive this memory
        return None
    steps = getattr(holder, "steps", None)
    if steps is None or not steps.fits(cache, blocks, states, seen, position_embeddings):
        keys = GrowingKeys(len(blocks)) if holder is cache else StaticKeys(len(blocks))
        shape = None
        if keys.serves(cache, states, seen):
            shape = _shape(blocks, plain, states, seen, position_embeddings)
        steps = None if shape is None else Steps(blocks, plain, shape, keys, cache, states)
        holder.steps = steps
    if steps is None or not (steps.keys.claim(cache, seen) or steps.make_room(cache, states, seen)):
        return None
    with chosen(states.device):
        return steps.step(states, seen, position_embeddings)


def warm_steps(block: Any, plain: Plain, states: torch.Tensor, angles: torch.Tensor, grown: bool) -> bool:
    """Start each kernel of a step once, with and without a mask; False where the block isn't plain.

    Args:
        states: (1, 1, E); angles: (1, 1, 1, R); grown: whether LogN makes queries larger.
    """
    token = states.new_zeros((1, block.attn.num_key_value_heads, 1, block.attn.head_dim))
    logn = angles[..., :1] + 1 if grown else None
    for masked in (False, True):
        cache = QWenCache()
        cache.update(token, token, 0)
        seen = states.new_ones((1, 1, 1, 2), dtype=torch.bool) if masked else None
        if steps_on_gpu([block], plain, states, cache, seen, (angles, angles, logn)) is None:
            return False
    return True


def are_plain(blocks: Any, plain: Plain, states: torch.Tensor, rotated: int) -> bool:
    """Whether tokens of such states, (B, 1, E), would go through these blocks so, with a cache of a known kind.

    Args:
        rotated: channels of a head.
    """
    angle = states.new_empty((1, 1, 1, rotated), dtype=torch.float32)
    return _shape(blocks, plain, states, None, (angle, angle, None)) is not None


def _shape(blocks: Any, plain: Plain, states: torch.Tensor, seen: Any, position_embeddings: Any) -> Shape | None:
    """What all blocks have in common; None if one isn't plain, or lies elsewhere."""
    cosine, sine, logn = position_embeddings
    attention, mlp = blocks[0].attn, blocks[0].mlp
    if not plain(*blocks) or not plain(attention, mlp) or not plain(mlp.w2):
        return None
    shape = Shape(
        *(states.shape[0], states.shape[-1], mlp.w2.out_features),
        *(attention.num_heads, attention.num_key_value_heads, attention.head_dim),
        *(cosine.shape[-1], cosine.shape[0], seen is not None, 0 if logn is None else logn.shape[0]),
    )
    angles = all(angle.dtype == torch.float32 and angle.shape == cosine.shape for angle in (cosine, sine))
    fitting = all(_is_plain(block, shape, plain, states) for block in blocks)
    return shape if fitting and angles and shape.rotated <= shape.size and shape.rotated % 2 == 0 else None


def _is_plain(block: Any, shape: Shape, plain: Plain, states: torch.Tensor) -> bool:
    attention, mlp = block.attn, block.mlp
    norms = block.ln_1, block.ln_2
    if not plain(attention, mlp, *norms, mlp.act_fn) or block.apply_residual_connection_post_layernorm:
        return False
    heads = attention.num_heads, attention.num_key_value_heads, attention.head_dim
    if attention.config._attn_implementation != "sdpa" or heads != (shape.heads, shape.kv_heads, shape.size):
        return False
    attended, both = shape.heads * shape.size, (shape.heads + 2 * shape.kv_heads) * shape.size
    linears = {
        attention.c_attn: (both, shape.width),
        attention.c_proj: (shape.width, attended),
        **{mlp.w1: (shape.inner, shape.width), mlp.w2: (shape.inner, shape.width)},
        mlp.c_proj: (shape.width, shape.inner),
    }
    shapes = {norm.weight: (shape.width,) for norm in norms} | {
        linear.weight: rows for linear, rows in linears.items() if type(linear) is nn.Linear and plain(linear)
    }
    if len(shapes) < len(norms) + len(linears):
        return False
    biases = [linear.bias for linear in linears if linear.bias is not None]
    return all(weight.shape == rows for weight, rows in shapes.items()) and all(
        is_beside(part, states) for part in (*shapes, *biases)
    )


class Keys(ABC):
    """Where the keys and values of a cache lie, and how a token comes behind them.

    Args:
        count: of layers.
    """

    def __init__(self, count: int):
        self.count = count

    @abstractmethod
    def serves(self, cache: Any, states: torch.Tensor, seen: Any) -> bool:
        """Whether cache and mask of a call are of a kind that the kernels know, told without waiting for the GPU."""

    @abstractmethod
    def mask_room(self, cache: Any) -> int:
        """Columns that masks may come to have."""

    @abstractmethod
    def claim(self, cache: Any, seen: Any) -> bool:
        """Whether a token may be written where `make_room` has said; it is asked before each."""

    @abstractmethod
    def make_room(self, cache: Any, states: torch.Tensor, seen: Any, chunk: tuple[int, ...]) -> list[Any] | None:
        """Addresses, and strides of rows and heads, of the keys and of the values of each layer, with room for a chunk,
        (B, K, 1, D); None, and nothing done, where there is none to be had.
        """

    @abstractmethod
    def count_into(self, lengths: torch.Tensor) -> None:
        """Tokens of each layer with the one that comes, (L,) int32."""

    @abstractmethod
    def lengthen(self) -> None:
        """The token has been written."""


class GrowingKeys(Keys):
    """Those of a `QWenCache`, in buffers that copies of it share."""

    def __init__(self, count: int):
        super().__init__(count)
        self.held = self.room = 0  # tokens in the cache, and for which there is room
        self.frozen = False
        self.layers: list[tuple[QWenGrowingLayer, Any, Any]] = []
        self.claimed: list[QWenGrowingLayer] = []

    def serves(self, cache: Any, states: torch.Tensor, seen: Any) -> bool:
        return length_held(cache, self.count, states, seen) is not None

    def mask_room(self, cache: Any) -> int:
        return int(cache.get_seq_length()) + _MASK_ROOM

    def claim(self, cache: Any, seen: Any) -> bool:
        self.claimed = []
        if self.held >= self.room or self.frozen != torch.is_inference_mode_enabled():
            return False
        if cache.get_seq_length() != self.held or (seen is not None and seen.shape[-1] != self.held + 1):
            return False
        taken = []
        for layer, (known, *buffers) in zip(cast(list[Any], cache.layers), self.layers, strict=False):
            for buffer, view in zip(buffers, (layer.keys, layer.values), strict=True):
                newest = buffer.take()
                taken.append((buffer, newest))
                if layer is not known or newest is not view:
                    for other, view in taken:
                        other.newest += [] if view is None else [view]
                    return False
        self.claimed = [layer for layer, *_ in self.layers]
        return True

    def make_room(self, cache: Any, states: torch.Tensor, seen: Any, chunk: tuple[int, ...]) -> list[Any] | None:
        length = length_held(cache, self.count, states, seen)
        if length is None:
            return None
        self.held, self.layers, places = length, [], []
        for layer in cast(list[QWenGrowingLayer], cache.layers[: self.count]):
            keys, values = layer.make_room(states, chunk)
            places.append([(held.data_ptr(), *held.stride()[:2]) for held in (keys, values)])
            self.layers.append((layer, *layer.buffers()))
        rooms = [buffer.states.shape[-2] for _, *buffers in self.layers for buffer in buffers]
        self.room, self.frozen = min(rooms), self.layers[0][1].states.is_inference()
        return places

    def count_into(self, lengths: torch.Tensor) -> None:
        self.held += 1
        lengths.fill_(self.held)

    def lengthen(self) -> None:
        for layer in self.claimed:
            layer.lengthen(self.held)


class StaticKeys(Keys):
    """Those of transformers' `StaticCache`, whose room is there from the first.

    Its layers count on the device, and nobody asks them what: others may write to the counters, in a graph too.
    """

    def __init__(self, count: int):
        super().__init__(count)
        self.room = 0
        self.places: list[Any] = []
        self.counters: list[Callable[[], Any]] = []  # weak: the steps, and so these keys, hang on the first of them

    def serves(self, cache: Any, states: torch.Tensor, seen: Any) -> bool:
        layers, rows = cache.layers[: self.count], states.shape[0]
        if len(layers) < self.count or cache.offloading:
            return False
        if any(type(layer) is not StaticLayer or not layer.is_initialized for layer in layers):
            return False
        room = layers[0].max_cache_len
        held = [held for layer in layers for held in (layer.keys, layer.values)]
        if not all(is_beside(one, states) and one.shape[::2] == (rows, room) for one in held):
            return False
        # Without a mask, the room behind the tokens would be read as well.
        return is_plain_mask(seen) and seen.shape == (rows, 1, 1, room)

    def mask_room(self, cache: Any) -> int:
        return int(cache.layers[0].max_cache_len)

    def claim(self, cache: Any, seen: Any) -> bool:
        layers = cache.layers[: self.count]
        counted = all(layer.cumulative_length is one() for layer, one in zip(layers, self.counters, strict=False))
        return counted and seen.shape[-1] == self.room and self._places_of(layers) == self.places

    def make_room(self, cache: Any, states: torch.Tensor, seen: Any, chunk: tuple[int, ...]) -> list[Any] | None:
        layers = cache.layers[: self.count]
        held = [held for layer in layers for held in (layer.keys, layer.values)]
        counters = [layer.cumulative_length for layer in layers]
        shape = *chunk[:2], layers[0].max_cache_len, chunk[3]
        if not self.serves(cache, states, seen) or any(one.shape != shape or one.data_ptr() % 16 for one in held):
            return None
        if any(one.is_inference() for one in (*held, *counters)) and not torch.is_inference_mode_enabled():
            return None  # where nothing may write to them, which torch says
        self.room, self.counters, self.places = shape[2], list(map(weakref.ref, counters)), self._places_of(layers)
        addresses = [(one.data_ptr(), *one.stride()[:2]) for one in held]
        return [list(both) for both in zip(addresses[::2], addresses[1::2], strict=True)]

    def count_into(self, lengths: torch.Tensor) -> None:
        counts = torch.stack([counter().view(()) for counter in self.counters])
        fitting = (counts >= 0) & (counts < self.room)
        torch._assert_async(fitting.all(), f"The static cache is full: max_cache_len={self.room}. Make a larger one.")
        lengths.copy_(counts.clamp(0, self.room - 1) + 1)

    def lengthen(self) -> None:
        torch._foreach_add_([counter() for counter in self.counters], 1)

    @staticmethod
    def _places_of(layers: Any) -> list[Any]:
        return [
            (held.data_ptr(), held.shape, held.stride(), held.dtype)
            for layer in layers
            for held in (layer.keys, layer.values)
        ]


def _holder_of(cache: Any) -> Any:
    """What the steps of a cache are kept on, None for a cache of a kind that the kernels don't know.

    That of a `StaticCache` is a counter: what is an attribute of the cache, its exporters take for a part of it.
    """
    if type(cache) is QWenCache:
        return cache
    if type(cache) is not StaticCache or not cache.layers or type(cache.layers[0]) is not StaticLayer:
        return None
    return cache.layers[0].cumulative_length


class Steps:
    """The steps of one cache: the memory that they use, and their recording.

    Args:
        blocks: plain ones, of this shape.
        keys: of the cache.
        cache: that they go on with.
        states: (B, 1, E), for its dtype and device.
    """

    def __init__(self, blocks: Any, plain: Plain, shape: Shape, keys: Keys, cache: Any, states: torch.Tensor):
        self.blocks, self.shape, self.device, self.dtype = list(blocks), shape, states.device, states.dtype
        self.owner, self.known = weakref.ref(cache), list(map(id, blocks))
        self.unchanged = Unchanged(self.blocks, plain)
        self.taken, self.keys = 0, keys
        self.recording: Recording | None = None
        with torch.inference_mode(False):  # else it could be written to in that mode alone
            self._make_memory(cache, states)

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """Copies of a cache record their own."""

    def __reduce__(self) -> Any:
        """Likewise what is loaded again."""
        return type(None), ()

    def _make_memory(self, cache: Any, states: torch.Tensor) -> None:
        shape, of = self.shape, states.new_empty
        numbers: dict[str, Any] = {"dtype": torch.float32}
        self.mask_room = self.keys.mask_room(cache)
        self.read, self.states = of((shape.rows, shape.width)), of((shape.rows, shape.width))
        self.normed = of((shape.rows, shape.width))
        self.product = of((shape.rows, (shape.heads + 2 * shape.kv_heads) * shape.size))
        self.attended = of((shape.rows, shape.heads * shape.size))
        self.inner, self.opened, self.raised = (of((shape.rows, shape.inner)) for _ in range(3))
        parts = shape.rows, shape.heads, PARTS
        self.sums = of((*parts, shape.size), **numbers)
        self.best, self.weights = of(parts, **numbers), of(parts, **numbers)
        self.cosine, self.sine = (of((shape.angle_rows, shape.rotated), **numbers) for _ in range(2))
        self.logn = of((max(1, shape.logn_rows),), **numbers)
        self.seen = of((shape.rows, self.mask_room if shape.masked else 1), dtype=torch.bool)
        self.lengths = of((len(self.blocks),), dtype=torch.int32)
        self.places = of((len(self.blocks), 2, 3), dtype=torch.int64)

    # --- whether they may go on ---

    def fits(self, cache: Any, blocks: Any, states: torch.Tensor, seen: Any, position_embeddings: Any) -> bool:
        """Whether these steps are those of this cache and call, and nothing of the model has changed."""
        cosine, _, logn = position_embeddings
        shape = self.shape
        given = (states.shape[0], cosine.shape[0], seen is not None, 0 if logn is None else logn.shape[0])
        wanted = (shape.rows, shape.angle_rows, shape.masked, shape.logn_rows)
        masks = seen is None or (is_plain_mask(seen) and seen.shape[:3] == (shape.rows, 1, 1))
        return (
            self.owner() is cache
            and given == wanted
            and (states.device, states.dtype) == (self.device, self.dtype)
            and masks
            and (seen is None or seen.shape[-1] <= self.mask_room)
            and list(map(id, blocks)) == self.known
            and self.unchanged()
        )

    # --- a step ---

    def step(self, states: torch.Tensor, seen: Any, position_embeddings: Any) -> torch.Tensor:
        """One token of each row, (B, 1, E) -> (B, 1, E), in memory that the next step writes over; room for its keys
        and values has just been claimed or made.
        """
        cosine, sine, logn = position_embeddings
        self.keys.count_into(self.lengths)
        self.read.copy_(states[:, 0])
        self.cosine.copy_(cosine[:, 0, 0])
        self.sine.copy_(sine[:, 0, 0])
        if logn is not None:
            self.logn.copy_(logn[:, 0, 0, 0])
        if seen is not None:
            self.seen[:, : seen.shape[-1]].copy_(seen[:, 0, 0])
        if self.recording is None:
            self.run()
        else:
            self.recording.replay()
        self.keys.lengthen()  # while the GPU is at work
        self.taken += 1
        if self.taken == _RECORDED_FROM:
            self.recording = record(self.run, self.device)
        return self.states[:, None]

    def make_room(self, cache: Any, states: torch.Tensor, seen: Any) -> bool:
        """See to room for one more token, and note where it is; False, and nothing done, where there is none, or this
        cache doesn't hold so many tokens as the call says.
        """
        chunk = self.shape.rows, self.shape.kv_heads, 1, self.shape.size
        places = self.keys.make_room(cache, states, seen, chunk)
        if places is None:
            return False
        self.places.copy_(torch.tensor(places))
        return True

    # --- what is recorded ---

    def run(self) -> None:
        """Start all kernels of a step, which touch nothing but weights, the cache, and the memory of these steps."""
        self.states.copy_(self.read)
        for number, block in enumerate(self.blocks):
            self._product(block.attn.c_attn, block.ln_1, self.product)
            self._attend(number, block.attn.scaling)
            self._add(block.attn.c_proj, self.attended)
            self._gated(block.ln_2, block.mlp)
            self._add(block.mlp.c_proj, self.inner)

    def _attend(self, number: int, scale: float) -> None:
        shape = self.shape
        parts = {"SIZE": shape.size, "WIDTH": power_of_two(shape.size), "PARTS": PARTS}
        attend_parts[(shape.heads, PARTS, shape.rows)](
            *(self.product, self.places, number, self.lengths, self.seen, self.cosine, self.sine, self.logn),
            *(self.sums, self.best, self.weights, shape.heads, shape.heads // shape.kv_heads),
            *(shape.rotated if shape.angle_rows > 1 else 0, int(shape.logn_rows > 1), self.seen.stride(0), scale),
            ROTATED=shape.rotated,
            KEYS=_KEYS,
            ALIGNED=math.gcd(16, shape.size * self.dtype.itemsize),
            MASKED=shape.masked,
            GROWN=shape.logn_rows > 0,
            num_warps=_KEY_WARPS,
            **parts,
        )
        merge_parts[(shape.rows * shape.heads,)](self.sums, self.best, self.weights, self.attended, **parts)

    def _product(self, linear: Any, norm: Any, result: torch.Tensor) -> None:
        """Product of the norm of the residual stream, (B, E) -> (B, O)."""
        if self.shape.rows == 1:
            self._multiply(linear, self.states, norm, None, result)
        else:
            self._norm(norm)
            _linear(linear, self.normed, result)

    def _add(self, linear: Any, states: torch.Tensor) -> None:
        """Add a product, (B, I) -> (B, E), to the residual stream."""
        if self.shape.rows == 1:
            self._multiply(linear, states, None, self.states, self.states)
        else:
            _linear(linear, states, self.normed)
            self.states.add_(self.normed)

    def _multiply(self, linear: Any, states: torch.Tensor, norm: Any, residual: Any, result: torch.Tensor) -> None:
        weight, bias, outputs = linear.weight, linear.bias, linear.out_features
        multiply[(-(-outputs // _TILES["ROWS"]),)](
            *(states, weight, weight if bias is None else bias, weight if norm is None else norm.weight),
            *(weight if residual is None else residual, result, outputs, 0.0 if norm is None else norm.eps),
            INPUTS=linear.in_features,
            NORMED=norm is not None,
            BIASED=bias is not None,
            ADDED=residual is not None,
            **_TILES,
        )

    def _gated(self, norm: Any, mlp: Any) -> None:
        """What the MLP's last product reads, (B, I)."""
        gate, up, shape = mlp.w2, mlp.w1, self.shape
        if shape.rows == 1 and gate.bias is None and up.bias is None:
            multiply_gated[(-(-shape.inner // _TILES["ROWS"]),)](
                *(self.states, gate.weight, up.weight, norm.weight, self.inner, shape.inner, norm.eps),
                INPUTS=shape.width,
                **_TILES,
            )
            return
        self._norm(norm)
        _linear(gate, self.normed, self.opened)
        _linear(up, self.normed, self.raised)
        count = self.inner.numel()
        gate_states[(-(-count // GATED),)](self.opened, self.raised, self.inner, count, BLOCK=GATED)

    def _norm(self, norm: Any) -> None:
        width = self.shape.width
        norm_rows[(self.shape.rows,)](self.states, norm.weight, self.normed, width, norm.eps, BLOCK=power_of_two(width))


def _linear(linear: Any, states: torch.Tensor, result: torch.Tensor) -> None:
    """A product into memory that is there."""
    if linear.bias is None:
        torch.mm(states, linear.weight.t(), out=result)
    else:
        torch.addmm(linear.bias, states, linear.weight.t(), out=result)
