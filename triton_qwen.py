"""Kernels for a GPU, in Triton, which comes with torch: what torch does in many passes over memory, in one.

Numbers are rounded where torch rounds them, and added up in float32. Nothing needs these kernels: where there is no
Triton, everything runs through torch. This file is read when the first of them is wanted, for Triton takes its time.

Shapes: N rows of activations, I inputs and O outputs of a product, B batch, T tokens, H heads, K key/value heads, D
head size, R rotated channels of a head, P parts into which a text is cut.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

PARTS = 32
"""Into which the keys of a text are cut, so that all of the GPU reads them."""

_COUNTED = ("layer", "count", "seen_row", "logn_row")
"""Arguments for whose values nothing is compiled anew."""


def kernel(function: Callable) -> Any:
    """A function as Triton compiles it; as it is where there is no Triton, in which case nothing calls it."""
    return function if triton is None else triton.jit(function, do_not_specialize=_COUNTED)


def power_of_two(number: int) -> int:
    """The least that is no less than a number."""
    return 1 << (number - 1).bit_length()


@kernel
def norm_rows(states, weight, result, width, eps, BLOCK: tl.constexpr):
    """Root mean square norm of rows, (N, E) -> (N, E), rounded before the weight, as `RMSNorm`; a program a row."""
    row = tl.program_id(0).to(tl.int64) * width
    column = tl.arange(0, BLOCK)
    inside = column < width
    x = tl.load(states + row + column, mask=inside, other=0.0)
    numbers = x.to(tl.float32)
    rounded = (numbers * tl.rsqrt(tl.sum(numbers * numbers, 0) / width + eps)).to(x.dtype)
    scale = tl.load(weight + column, mask=inside, other=0.0)
    tl.store(result + row + column, (rounded.to(tl.float32) * scale.to(tl.float32)).to(x.dtype), mask=inside)


@kernel
def gate_states(gate, up, result, size, BLOCK: tl.constexpr):
    """silu(gate) * up of `size` numbers, the former rounded."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    g, u = tl.load(gate + place, mask=inside, other=0.0), tl.load(up + place, mask=inside, other=0.0)
    tl.store(result + place, _gated(g.to(tl.float32), u.to(tl.float32), g.dtype).to(g.dtype), mask=inside)


@kernel
def _gated(gate, up, dtype: tl.constexpr):
    opened = gate / (1.0 + tl.exp(-gate))
    return opened.to(dtype).to(tl.float32) * up


@kernel
def turn_heads(
    heads, result, cosine, sine, row, token, head, angle_row, count, number,
    SIZE: tl.constexpr, ROTATED: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rotate the heads of a token, (B, T, H, D) with these strides -> (B, T, H, D) contiguous; a program `HEADS`."""
    batch, time = tl.program_id(1).to(tl.int64), tl.program_id(0).to(tl.int64)
    channel, lane = tl.arange(0, BLOCK)[None, :], tl.program_id(2) * HEADS + tl.arange(0, HEADS)[:, None]
    inside = (channel < SIZE) & (lane < number)
    source = heads + batch * row + time * token + lane * head
    angles = batch * angle_row + time * ROTATED
    x = tl.load(source + channel, mask=inside, other=0.0)
    turned = _turned(x, source, cosine + angles, sine + angles, channel, inside, ROTATED)
    tl.store(result + ((batch * count + time) * number + lane) * SIZE + channel, turned, mask=inside)


@kernel
def _turned(x, source, cosine, sine, channel, inside, ROTATED: tl.constexpr):
    """The heads `x`, which were read from `source`, turned by the angles of their token."""
    first, moving = channel < ROTATED // 2, inside & (channel < ROTATED)
    other = tl.load(source + tl.where(first, channel + ROTATED // 2, channel - ROTATED // 2), mask=moving, other=0.0)
    cos = tl.load(cosine + channel, mask=channel < ROTATED, other=1.0)
    sin = tl.load(sine + channel, mask=channel < ROTATED, other=0.0)
    return (x.to(tl.float32) * cos + other.to(tl.float32) * tl.where(first, -sin, sin)).to(x.dtype)


@kernel
def multiply(
    states, weight, bias, norm, residual, result, outputs, eps, INPUTS: tl.constexpr,
    NORMED: tl.constexpr, BIASED: tl.constexpr, ADDED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A matrix, (O, I), times one row, (I,) -> (O,): of its norm, with a bias, added to a residual, as is asked."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    scale = _inverse_root(states, eps, INPUTS, BLOCK) if NORMED else 1.0
    for start in range(0, INPUTS, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < INPUTS
        place = row.to(tl.int64)[:, None] * INPUTS + column[None, :]
        codes = tl.load(weight + place, mask=(row < outputs)[:, None] & inside[None, :], other=0.0)
        x = _normed(states, norm, scale, column, inside, NORMED)
        total += codes.to(tl.float32) * x[None, :]
    _finish(tl.sum(total, 1), row, row < outputs, bias, residual, result, BIASED, ADDED)


@kernel
def multiply_gated(
    states, gate, up, norm, result, outputs, eps, INPUTS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """silu(gate x) * (up x) for the norm x of one row, (I,) -> (O,); both products are rounded."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    opened, raised = tl.zeros((ROWS, BLOCK), tl.float32), tl.zeros((ROWS, BLOCK), tl.float32)
    scale = _inverse_root(states, eps, INPUTS, BLOCK)
    for start in range(0, INPUTS, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < INPUTS
        place = row.to(tl.int64)[:, None] * INPUTS + column[None, :]
        held = (row < outputs)[:, None] & inside[None, :]
        g, u = tl.load(gate + place, mask=held, other=0.0), tl.load(up + place, mask=held, other=0.0)
        x = _normed(states, norm, scale, column, inside, True)
        opened += g.to(tl.float32) * x[None, :]
        raised += u.to(tl.float32) * x[None, :]
    dtype: tl.constexpr = states.dtype.element_ty
    g, u = tl.sum(opened, 1).to(dtype).to(tl.float32), tl.sum(raised, 1).to(dtype).to(tl.float32)
    tl.store(result + row, _gated(g, u, dtype).to(dtype), mask=row < outputs)


@kernel
def _inverse_root(states, eps, INPUTS: tl.constexpr, BLOCK: tl.constexpr):
    """1 / root mean square of a row."""
    squares = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, INPUTS, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(states + column, mask=column < INPUTS, other=0.0).to(tl.float32)
        squares += x * x
    return tl.rsqrt(tl.sum(squares, 0) / INPUTS + eps)


@kernel
def _normed(states, norm, scale, column, inside, NORMED: tl.constexpr):
    x = tl.load(states + column, mask=inside, other=0.0)
    if NORMED:
        weight = tl.load(norm + column, mask=inside, other=0.0).to(tl.float32)
        x = ((x.to(tl.float32) * scale).to(x.dtype).to(tl.float32) * weight).to(x.dtype)
    return x.to(tl.float32)


@kernel
def _finish(total, row, inside, bias, residual, result, BIASED: tl.constexpr, ADDED: tl.constexpr):
    if BIASED:
        total += tl.load(bias + row, mask=inside, other=0.0).to(tl.float32)
    if ADDED:
        before = tl.load(residual + row, mask=inside, other=0.0)
        total = before.to(tl.float32) + total.to(before.dtype).to(tl.float32)
    tl.store(result + row, total.to(result.dtype.element_ty), mask=inside)


@kernel
def attend_parts(
    product, places, layer, lengths, seen, cosine, sine, logn, sums, best, weights, heads, groups, angle_row, logn_row,
    seen_row, scale, SIZE: tl.constexpr, ROTATED: tl.constexpr, WIDTH: tl.constexpr, KEYS: tl.constexpr,
    PARTS: tl.constexpr, ALIGNED: tl.constexpr, MASKED: tl.constexpr, GROWN: tl.constexpr,
):  # fmt: skip
    """Attention of one new token, which is added to the cache, to a part of its text; `merge_parts` does the rest.

    A program for each query head, part and row.

    Args:
        product: (B, (H + 2 K) D), the new token's query, key and value, not yet rotated.
        places: (L, 2, 3) int64, for keys and values, (B, K, S, D), of a layer: address, and strides of rows and heads.
        lengths: (L,) int32, tokens of a layer with the new one.
        seen: (B, S) bool, which keys are read; cosine, sine: (B or 1, R); logn: (B or 1,) factors of queries.
        sums, best, weights: (B, H, P, D), (B, H, P), (B, H, P) float32: weighted values of a part, the highest score,
            the sum of the weights.
    """
    head, part, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    dtype: tl.constexpr = product.dtype.element_ty
    channel, kv_heads = tl.arange(0, WIDTH), heads // groups
    source = product + batch * (heads + 2 * kv_heads) * SIZE
    cosine, sine, seen = cosine + batch * angle_row, sine + batch * angle_row, seen + batch * seen_row
    query = _turned_head(source + head * SIZE, cosine, sine, channel, SIZE, ROTATED)
    if GROWN:
        query = (query.to(tl.float32) * tl.load(logn + batch * logn_row).to(dtype).to(tl.float32)).to(dtype)
    query = query.to(tl.float32) * scale
    keys = _head_of_cache(places + layer * 6, batch, head // groups, dtype, ALIGNED)
    values = _head_of_cache(places + layer * 6 + 3, batch, head // groups, dtype, ALIGNED)
    end = tl.load(lengths + layer) - 1
    share = tl.cdiv(tl.cdiv(end + 1, PARTS), KEYS) * KEYS
    first, last = part * share, tl.minimum(part * share + share, end)
    high, total, summed = _older_keys(query, keys, values, seen, first, last, channel, SIZE, WIDTH, KEYS, MASKED)
    if (first <= end) & (end < first + share):
        new = source + (heads + head // groups) * SIZE
        key = _turned_head(new, cosine, sine, channel, SIZE, ROTATED)
        value = tl.load(new + kv_heads * SIZE + channel, mask=channel < SIZE, other=0.0)
        if head % groups == 0:
            tl.store(keys + end.to(tl.int64) * SIZE + channel, key, mask=channel < SIZE)
            tl.store(values + end.to(tl.int64) * SIZE + channel, value, mask=channel < SIZE)
        score = tl.sum(key.to(tl.float32) * query, 0)
        if MASKED:
            score = tl.where(tl.load(seen + end) != 0, score, -float("inf"))
        higher, faded, weight = _weigh(high, score, score)
        summed = summed * faded + weight * value.to(tl.float32)
        high, total = higher, total * faded + weight
    place = (batch * heads + head) * PARTS + part
    tl.store(sums + place * SIZE + channel, summed, mask=channel < SIZE)
    tl.store(best + place, high)
    tl.store(weights + place, total)


@kernel
def _head_of_cache(place, batch, head, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    """Pointer to the keys or values of a row's head."""
    numbers = batch * tl.load(place + 1) + head * tl.load(place + 2)
    return tl.multiple_of(tl.load(place).to(tl.pointer_type(dtype)) + numbers, ALIGNED)


@kernel
def _turned_head(source, cosine, sine, channel, SIZE: tl.constexpr, ROTATED: tl.constexpr):
    x = tl.load(source + channel, mask=channel < SIZE, other=0.0)
    return _turned(x, source, cosine, sine, channel, channel < SIZE, ROTATED)


@kernel
def _weigh(high, best, score):
    """The highest score with those of more keys, by what the sums so far fade, and the weights of these keys."""
    higher = tl.maximum(high, best)
    floor = tl.where(higher == -float("inf"), 0.0, higher)  # no key is seen yet
    return higher, tl.exp(high - floor), tl.exp(score - floor)


@kernel
def _older_keys(
    query, keys, values, seen, first, last, channel,
    SIZE: tl.constexpr, WIDTH: tl.constexpr, KEYS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Attention to the keys from `first` to before `last`: the highest score, the sum of the weights, the values'."""
    high = -float("inf")  # not both in one line, of which Triton 3.3, that of torch 2.7, can make no tensors
    total = 0.0
    summed = tl.zeros((WIDTH,), tl.float32)
    for start in range(first, last, KEYS):
        time = start + tl.arange(0, KEYS)
        read = time < last
        held = read[:, None] & (channel < SIZE)[None, :]
        if MASKED:
            read = read & (tl.load(seen + time, mask=read, other=0) != 0)
        place = time.to(tl.int64)[:, None] * SIZE + channel[None, :]
        key = tl.load(keys + place, mask=held, other=0.0).to(tl.float32)
        score = tl.where(read, tl.sum(key * query[None, :], 1), -float("inf"))
        higher, faded, weight = _weigh(high, tl.max(score, 0), score)
        value = tl.load(values + place, mask=held, other=0.0).to(tl.float32)
        summed = summed * faded + tl.sum(weight[:, None] * value, 0)
        high, total = higher, total * faded + tl.sum(weight, 0)
    return high, total, summed


@kernel
def merge_parts(sums, best, weights, result, SIZE: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr):
    """Attention of the new token to all parts, (B, H, P, D) -> (B, H, D); a program a head."""
    place = tl.program_id(0).to(tl.int64)
    channel, part = tl.arange(0, WIDTH), tl.arange(0, PARTS)
    inside = channel < SIZE
    high = tl.load(best + place * PARTS + part)
    highest = tl.max(high, 0)
    share = tl.exp(high - tl.where(highest == -float("inf"), 0.0, highest))
    total = tl.sum(share * tl.load(weights + place * PARTS + part), 0)
    places = (place * PARTS + part)[:, None] * SIZE + channel[None, :]
    parts = tl.load(sums + places, mask=inside[None, :], other=0.0)
    merged = tl.sum(parts * share[:, None], 0) / tl.where(total == 0.0, 1.0, total)  # 0 where no key is seen
    tl.store(result + place * SIZE + channel, merged.to(result.dtype.element_ty), mask=inside)
