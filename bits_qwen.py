"""Weights in 8 and 4 bits: how they lie in memory, how they are rounded, and the modules that compute with them.

A weight is `scale * (q - zero)`. Groups of one row's columns share a scale, which is a float16 number kept as int16, so
that no cast of the model touches it. Codes lie in blocks of 16 rows, a lane for each, the four bytes that a processor
multiplies at once side by side:

- 8 bits, (R, I / 4, 16, 4): byte [r, i, lane, j] is q of row 16 * r + lane and column 4 * i + j.
- 4 bits, (R, I / 32, 4, 16, 4): byte [r, g, k, lane, j] is q of row 16 * r + lane, in its low half that of column
  32 * g + 4 * k + j, in its high half that of the column 16 behind it.

Rows that fill up the last block have scales of zero. What is rounded here has no q of 0 in 8 bits, which weights of
others (GPTQ) may have. Products are written in plain torch, in whose place a kernel comes where there is one.

Shapes: O outputs, I inputs, R blocks of 16 rows, G groups of a row, N tokens, V rows of an embedding.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .products_qwen import Matrix, decoded, kernels_for, multiplies, multiplies_all, product

LANES = 16
"""Rows of a block."""

COLUMNS = 32
"""Columns that are packed together: widths and groups are multiples of it."""

BITS = (8, 4)

_LOW = 0x0F0F0F0F

_PIECE = 2**18  # weights that are unpacked at once: what fits a cache
_KERNEL_PIECE = 2**22  # by a kernel, for a product by torch
_ROUNDED = 2**17  # weights that are rounded at once
_STEPS = (8.0, 7.5, 8.5, 7.0, 8.9)  # what the largest weight of a group of 4 bits may become, before it is rounded


def zero_point(bits: int) -> int:
    """The code of a weight of zero, where a group has no zero of its own."""
    return 2 ** (bits - 1)


def check_format(bits: Any, group_size: Any) -> None:
    """Refuse a form that there isn't.

    Raises:
        ValueError: names the value and what it may be.
    """
    if isinstance(bits, bool) or bits not in BITS:
        raise ValueError(f"bits={bits!r}: weights have 8 or 4 bits here.")
    if isinstance(group_size, bool) or not isinstance(group_size, int) or group_size < 1 or group_size % COLUMNS:
        raise ValueError(f"group_size={group_size!r}: as many weights share a scale; give a multiple of {COLUMNS}.")


def pack(q: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes in rows, (O, I) uint8, to blocks; those of rows that fill up the last block are the zero point."""
    rows, width = q.shape
    missing = -rows % LANES
    if missing:
        q = torch.cat((q, q.new_full((missing, width), zero_point(bits))))
    fours = q.contiguous().view(torch.int32)  # four bytes stay together, and are moved at once
    if bits == 8:
        blocks = fours.view(-1, LANES, width // 4).transpose(1, 2)
    else:
        low, high = fours.view(-1, LANES, width // COLUMNS, 2, 4).unbind(3)
        blocks = (low | (high << 4)).permute(0, 2, 3, 1)  # (R, I / 32, 4, 16)
    return blocks.contiguous()[..., None].view(torch.uint8)


def unpack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Blocks of codes to codes in rows, (16 * R, I) uint8."""
    fours = codes.view(torch.int32)[..., 0]
    if bits == 8:
        rows = fours.transpose(1, 2)
    else:
        fours = fours.permute(0, 3, 1, 2)  # (R, 16, I / 32, 4)
        rows = torch.stack((fours & _LOW, (fours >> 4) & _LOW), dim=3)
    return rows.reshape(codes.shape[0] * LANES, -1).contiguous().view(torch.uint8)


def pack_groups(values: torch.Tensor, fill: int = 0) -> torch.Tensor:
    """What rows have for each group, (O, G), to blocks, (R, G, 16)."""
    missing = -values.shape[0] % LANES
    if missing:
        values = torch.cat((values, values.new_full((missing, values.shape[1]), fill)))
    return values.view(-1, LANES, values.shape[1]).transpose(1, 2).contiguous()


def unpack_groups(blocks: torch.Tensor) -> torch.Tensor:
    """(R, G, 16) to (16 * R, G)."""
    return blocks.transpose(1, 2).reshape(-1, blocks.shape[1])


def quantised(weight: torch.Tensor, bits: int, group_size: int = COLUMNS) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix rounded to few bits.

    8 bits: the largest weight of a group becomes 127 or -127. 4 bits: of some scales the one with the least squared
    error, for codes from -8 to 7; the largest weight may be -8, so that a scale can be negative (llama.cpp's Q4_0).
    A code belongs to the scale as it is stored.

    Args:
        weight: (O, I), of any floating dtype.

    Returns:
        Blocks of codes, and scales (R, G, 16): the bits of float16 numbers as int16.

    Raises:
        ValueError: bits, group size or width that there isn't; weights that are no numbers.
    """
    check_format(bits, group_size)
    width = weight.shape[1]
    if width % group_size:
        raise ValueError(f"A width of {width} isn't a multiple of group_size={group_size}: give one that divides it.")
    rows = max(LANES, _ROUNDED // width // LANES * LANES)
    round_groups = _round_8 if bits == 8 else _round_4
    codes, scales = [], []
    for piece in weight.detach().split(rows):
        groups = piece.float().reshape(-1, group_size)
        scale = round_groups(groups)
        q = _codes(groups, scale.float(), -zero_point(bits) + (bits == 8), zero_point(bits) - 1)
        codes.append(pack(q.add_(zero_point(bits)).to(torch.uint8).view(piece.shape), bits))
        scales.append(pack_groups(scale.view(len(piece), -1)))
    whole = torch.cat(scales)
    if not whole.isfinite().all():
        raise ValueError("Weights that are infinite, no numbers, or too large for float16 scales can't be quantised.")
    return torch.cat(codes), whole.view(torch.int16)


def _codes(groups: torch.Tensor, scale: torch.Tensor, least: int, most: int) -> torch.Tensor:
    """Codes as float32, like the groups, (n, group_size), for a scale each, (n, 1); zero where the scale is."""
    return (groups * torch.where(scale == 0, 0.0, 1 / scale)).round_().clamp_(least, most)


def _round_8(groups: torch.Tensor) -> torch.Tensor:
    return (groups.abs().amax(1, keepdim=True) / 127).half()


def _round_4(groups: torch.Tensor) -> torch.Tensor:
    """The scales, float16, of the least squared error among those that `_STEPS` leads to, (n, group_size) -> (n, 1)."""
    largest, smallest = groups.amax(1, keepdim=True), groups.amin(1, keepdim=True)
    extreme = torch.where(largest > -smallest, largest, smallest)
    best, gain = _best_scales(groups, extreme)
    tied = (largest == -smallest)[:, 0].nonzero()[:, 0]  # often so in bfloat16: either may become -8
    other, gained = _best_scales(groups[tied], largest[tied])
    best[tied] = torch.where(gained > gain[tied], other, best[tied])
    return torch.where(extreme.isfinite(), best, extreme).half()


def _best_scales(groups: torch.Tensor, extreme: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The best scales, (n, 1), if that weight of a group comes to its `_STEPS`, and how much smaller the squared error
    then is than that of zeros.
    """
    best, gain = torch.zeros_like(extreme), torch.full_like(extreme, -1.0)
    for step in _STEPS:
        q = _codes(groups, extreme / -step, -8, 7)
        along = (q * groups).sum(1, keepdim=True)
        square = q.mul_(q).sum(1, keepdim=True)
        scale = torch.where(square == 0, 0.0, along / square)  # the best for these codes
        gained = along * scale
        better = gained > gain
        best, gain = torch.where(better, scale, best), torch.where(better, gained, gain)
    return best, gain


class _Few(nn.Module):
    """What both modules have: codes, scales, zeros, and how they become numbers."""

    bits: int
    group_size: int
    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None

    def _hold(self, rows: int, width: int, bits: int, group_size: int, own_zeros: bool, device: Any) -> None:
        """Room for a matrix, (rows, width)."""
        check_format(bits, group_size)
        if width % group_size:
            raise ValueError(
                f"A width of {width} isn't a multiple of group_size={group_size}: give one that divides it."
            )
        if own_zeros and bits != 4:
            raise ValueError(f"bits={bits}: only groups of 4 bits have zeros of their own.")
        self.bits, self.group_size = bits, group_size
        blocks, groups = -(-rows // LANES), width // group_size
        shape = (blocks, width // 4, LANES, 4) if bits == 8 else (blocks, width // COLUMNS, 4, LANES, 4)
        # Parameters, which nothing trains: what is tied has to be one for transformers.
        self.codes = fixed(torch.full(shape, 128 if bits == 8 else 0x88, dtype=torch.uint8, device=device))
        self.scales = fixed(torch.zeros((blocks, groups, LANES), dtype=torch.int16, device=device))
        zeros = torch.full((blocks, groups, LANES), 8, dtype=torch.uint8, device=device) if own_zeros else None
        self.register_parameter("zeros", None if zeros is None else fixed(zeros))

    def _pieces(self) -> Iterator[tuple[int, torch.Tensor]]:
        """Number of the first row, and so many rows as are unpacked at once, (rows, I) float32, filled up to 16."""
        width = self.scales.shape[1] * self.group_size
        blocks = max(1, _PIECE // (width * LANES))
        for first in range(0, len(self.codes), blocks):
            some = slice(first, first + blocks)
            q = unpack(self.codes[some], self.bits)
            zeros = None if self.zeros is None else unpack_groups(self.zeros[some])
            yield first * LANES, self._numbers(q, unpack_groups(self.scales[some]), zeros)

    def _numbers(self, q: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None) -> torch.Tensor:
        """Codes (N, I), scales and zeros (N, G) of any rows -> (N, I) float32."""
        values = q.view(*scales.shape, self.group_size).float()
        values = values - (zero_point(self.bits) if zeros is None else zeros[..., None].float())
        return (values * scales.view(torch.float16).float()[..., None]).view(q.shape)

    def _dequantised(self, rows: int, dtype: torch.dtype) -> torch.Tensor:
        """The whole matrix, (rows, I)."""
        width = self.scales.shape[1] * self.group_size
        whole = torch.empty((rows, width), dtype=dtype, device=self.codes.device)
        for first, piece in self._pieces():
            whole[first : first + len(piece)] = piece[: rows - first]
        return whole


def fixed(tensor: torch.Tensor) -> nn.Parameter:
    """A parameter that nothing trains."""
    return nn.Parameter(tensor, requires_grad=False)


class QWenBitsLinear(_Few, nn.Linear):
    """A linear layer whose weight has 8 or 4 bits.

    It is a `nn.Linear` for those who look for layers to put an adapter around. The output has the dtype of the input,
    under autocast that of autocast; sums are in float32.

    Args:
        in_features, out_features: I, a multiple of `group_size`, and O.
        bits: 8 or 4.
        group_size: columns that share a scale, a multiple of 32.
        bias: whether there is one.
        own_zeros: whether each group has a zero of its own (4 bits); else it is 128 or 8.
        device, dtype: of the parameters; the dtype is that of the bias.

    Raises:
        ValueError: names the value and what it may be.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bits: int = 8,
        group_size: int = COLUMNS,
        bias: bool = True,
        own_zeros: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self._hold(out_features, in_features, bits, group_size, own_zeros, device)
        numbers = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        self.register_parameter("bias", numbers)

    @classmethod
    def of(cls, linear: nn.Linear, bits: int, group_size: int = COLUMNS) -> QWenBitsLinear:
        """Of a linear layer of numbers, which it shares the bias with."""
        few = cls(linear.in_features, linear.out_features, bits, group_size, bias=False, device="meta")
        few.codes, few.scales = (fixed(part) for part in quantised(linear.weight, bits, group_size))
        few.bias = linear.bias
        return few

    def dequantised(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight as numbers, (O, I)."""
        return self._dequantised(self.out_features, dtype)

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """The codes, for those who ask where a weight is and of which dtype, as peft does."""
        return self.codes

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., I) -> (..., O); gradients flow to the input and the bias.

        Raises:
            ValueError: an input of another width.
        """
        if x.shape[-1] != self.in_features:
            raise ValueError(f"An input of shape {tuple(x.shape)} doesn't fit {self.in_features} columns of weights.")
        device = x.device.type
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        trained = self.bias is not None and self.bias.requires_grad
        with torch.autocast(device, enabled=False):
            if torch.is_grad_enabled() and (x.requires_grad or trained):
                return _Differentiated.apply(x, self.bias, self)
            return self._product(x)

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        """(..., I) -> (..., O) in the dtype of x, with the bias and without gradients."""
        native = kernels_for(x)
        matrix = None if native is None else self.matrix(x.dtype)
        if matrix is not None:
            return self._product_by_kernel(native, matrix, x)
        flat = x.reshape(-1, self.in_features).float()
        out = x.new_empty((flat.shape[0], self.out_features))
        for first, piece in self._pieces():
            piece = piece[: self.out_features - first]
            some = slice(first, first + len(piece))
            bias = None if self.bias is None else self.bias[some].float()
            out[:, some] = nn.functional.linear(flat, piece, bias).to(x.dtype)
        return out.view(*x.shape[:-1], self.out_features)

    def matrix(self, dtype: torch.dtype) -> Matrix | None:
        """The weights for the kernels and inputs of this dtype, or None where they lie otherwise."""
        held = (self.codes, self.scales, self.zeros, self.bias)
        if any(part is not None and (part.device.type != "cpu" or not part.is_contiguous()) for part in held):
            return None
        if self.bias is not None and self.bias.dtype != dtype:
            return None
        places = (None if part is None else part.data_ptr() for part in held)
        return Matrix(*places, self.out_features, self.in_features, self.bits, self.group_size)

    def _product_by_kernel(self, native: Any, matrix: Matrix, x: torch.Tensor) -> torch.Tensor:
        """Few tokens are multiplied with the codes; for more these become numbers in pieces, in the kernel or, where it
        has no such products, for torch: in the dtype of x if the processor multiplies it.
        """
        if multiplies_all(native, x):
            return product(native, matrix, x)
        dtype = x.dtype if multiplies(x.dtype) else torch.float32
        flat, bias = x.reshape(-1, self.in_features).to(dtype), None if self.bias is None else self.bias.to(dtype)
        out = x.new_empty((flat.shape[0], self.out_features))
        some = max(1, _KERNEL_PIECE // (self.in_features * LANES))
        for first in range(0, len(self.codes), some):
            blocks = min(some, len(self.codes) - first)
            rows = slice(first * LANES, min((first + blocks) * LANES, self.out_features))
            numbers = decoded(native, matrix, first, blocks, dtype)[: rows.stop - rows.start]
            out[:, rows] = nn.functional.linear(flat, numbers, None if bias is None else bias[rows])
        return out.view(*x.shape[:-1], self.out_features)

    def _product_back(self, gradient: torch.Tensor) -> torch.Tensor:
        """(..., O) -> (..., I): gradient of the input, in the dtype of that of the output."""
        flat = gradient.reshape(-1, self.out_features).float()
        total = flat.new_zeros((flat.shape[0], self.in_features))
        for first, piece in self._pieces():
            piece = piece[: self.out_features - first]
            total.addmm_(flat[:, first : first + len(piece)], piece)
        return total.to(gradient.dtype).view(*gradient.shape[:-1], self.in_features)

    def extra_repr(self) -> str:
        """Sizes and form, for `print(model)`."""
        zeros = ", own zeros" if self.zeros is not None else ""
        return f"{super().extra_repr()}, bits={self.bits}, group_size={self.group_size}{zeros}"


class _Differentiated(torch.autograd.Function):
    """The product with gradients: unpacked again for the backward pass, nothing is kept for it."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, bias: torch.Tensor | None, layer: QWenBitsLinear) -> torch.Tensor:
        """As `_product`."""
        ctx.layer = layer
        return layer._product(x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of the input and of the bias."""
        (gradient,) = grad_outputs
        of_input, of_bias = ctx.needs_input_grad[:2]
        layer = ctx.layer
        back = layer._product_back(gradient) if of_input else None
        total = gradient.float().flatten(0, -2).sum(0).to(layer.bias.dtype) if of_bias else None
        return back, total, None


class QWenBitsEmbedding(_Few):
    """An embedding whose rows have 8 or 4 bits; those that are looked up become numbers, in `dtype`.

    Args:
        num_embeddings, embedding_dim: V, and I, a multiple of `group_size`.
        bits, group_size: as in `QWenBitsLinear`.
        dtype: of what comes out; None for torch's default. A cast of the model changes it.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        bits: int = 8,
        group_size: int = COLUMNS,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self._hold(num_embeddings, embedding_dim, bits, group_size, False, device)
        self.register_buffer("like", torch.empty(0, device=device, dtype=dtype), persistent=False)
        self.like: torch.Tensor

    @classmethod
    def of(cls, embedding: nn.Embedding, bits: int, group_size: int = COLUMNS) -> QWenBitsEmbedding:
        """Of an embedding of numbers."""
        weight = embedding.weight
        few = cls(embedding.num_embeddings, embedding.embedding_dim, bits, group_size, weight.device, weight.dtype)
        few.codes, few.scales = (fixed(part) for part in quantised(weight, bits, group_size))
        return few

    def dequantised(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """All rows as numbers, (V, I)."""
        return self._dequantised(self.num_embeddings, dtype)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """(...) -> (..., I)."""
        flat = ids.flatten()
        blocks, lanes = flat // LANES, flat % LANES
        if self.bits == 8:
            q = self.codes[blocks, :, lanes].flatten(1)  # (N, I / 4, 4)
        else:
            bytes_of_rows = self.codes[blocks, :, :, lanes]  # (N, I / 32, 4, 4)
            q = torch.stack((bytes_of_rows & 15, bytes_of_rows >> 4), dim=2).flatten(1)
        numbers = self._numbers(q, self.scales[blocks, :, lanes], None).to(self.like.dtype)
        return numbers.view(*ids.shape, self.embedding_dim)

    def extra_repr(self) -> str:
        """Sizes and form, for `print(model)`."""
        return f"{self.num_embeddings}, {self.embedding_dim}, bits={self.bits}, group_size={self.group_size}"
