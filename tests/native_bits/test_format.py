"""The form of weights in few bits, against loops that follow its description word for word."""

import pytest
import torch
from torch import nn

from qwen1.bits_qwen import QWenBitsEmbedding, QWenBitsLinear, pack, pack_groups, quantised, unpack, unpack_groups
from qwen1.translating_qwen import SWITCH


@pytest.fixture(autouse=True)
def by_torch(monkeypatch):
    """Without kernels, which are compared with this in `tests/native/test_products.py`."""
    monkeypatch.setenv(SWITCH, "0")


SHAPES = [(1, 32), (16, 32), (17, 64), (33, 96), (48, 128)]


def byte_of(codes, bits, row, column):
    """The code of a weight, by the description of the blocks."""
    block, lane = divmod(row, 16)
    if bits == 8:
        return int(codes[block, column // 4, lane, column % 4])
    group, rest = divmod(column, 32)
    half, rest = divmod(rest, 16)
    return int(codes[block, group, rest // 4, lane, rest % 4]) >> (4 * half) & 15


def weight_of(module, row, column):
    scale = module.scales.view(torch.float16)[row // 16, column // module.group_size, row % 16].item()
    zero = 2 ** (module.bits - 1)
    if module.zeros is not None:
        zero = int(module.zeros[row // 16, column // module.group_size, row % 16])
    return scale * (byte_of(module.codes, module.bits, row, column) - zero)


def slow(module, rows, width):
    return torch.tensor([[weight_of(module, row, column) for column in range(width)] for row in range(rows)])


def some_linear(rows, width, bits, group_size=32, own_zeros=False, bias=False):
    """Random codes, scales and zeros."""
    module = QWenBitsLinear(width, rows, bits, group_size, bias=bias, own_zeros=own_zeros)
    module.codes.data = pack(torch.randint(0, 2**bits, (rows, width), dtype=torch.uint8), bits)
    scales = (torch.randn(rows, width // group_size) / 8).half()
    module.scales.data = pack_groups(scales).view(torch.int16)
    if own_zeros:
        module.zeros.data = pack_groups(torch.randint(0, 17, (rows, width // group_size), dtype=torch.uint8), 8)
    if bias:
        module.bias.data = torch.randn(rows)
    return module


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("rows", "width"), SHAPES)
def test_a_code_is_where_the_description_says(rows, width, bits):
    q = torch.randint(0, 2**bits, (rows, width), dtype=torch.uint8)
    codes = pack(q, bits)

    blocks = -(-rows // 16)
    assert codes.shape == ((blocks, width // 4, 16, 4) if bits == 8 else (blocks, width // 32, 4, 16, 4))
    assert codes.is_contiguous() and codes.dtype == torch.uint8
    assert [[byte_of(codes, bits, row, column) for column in range(width)] for row in range(rows)] == q.tolist()
    back = unpack(codes, bits)
    assert torch.equal(back[:rows], q)
    assert (back[rows:] == 2 ** (bits - 1)).all()


def test_groups_of_rows_that_fill_up_have_scales_of_zero():
    values = torch.randn(17, 3)
    blocks = pack_groups(values)
    assert blocks.shape == (2, 3, 16)
    assert blocks[1, 2, 0] == values[16, 2]
    assert torch.equal(unpack_groups(blocks)[:17], values)
    assert not blocks[1, :, 1:].any()


@pytest.mark.parametrize("own_zeros", [False, True])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("rows", "width", "group_size"), [(1, 32, 32), (17, 128, 64), (33, 96, 96)])
def test_product_and_numbers_are_those_of_a_plain_loop(rows, width, group_size, bits, own_zeros):
    if own_zeros and bits == 8:
        pytest.skip("8 bits have one zero point")
    module = some_linear(rows, width, bits, group_size, own_zeros, bias=True)
    weight = slow(module, rows, width)

    assert torch.equal(module.dequantised(), weight)
    x = torch.randn(2, 3, width)
    torch.testing.assert_close(module(x), nn.functional.linear(x, weight, module.bias))
    assert module(x[:0]).shape == (0, 3, rows)


@pytest.mark.parametrize("bits", [8, 4])
def test_rows_of_an_embedding_are_those_of_a_plain_loop(bits):
    linear = some_linear(37, 64, bits)
    module = QWenBitsEmbedding(37, 64, bits)
    module.codes, module.scales = linear.codes, linear.scales
    ids = torch.tensor([[0, 36, 16], [15, 15, 3]])

    assert torch.equal(module(ids), slow(module, 37, 64)[ids])
    assert module(ids[:0]).shape == (0, 3, 64)
    assert module.to(torch.bfloat16)(ids).dtype == torch.bfloat16
    assert module.scales.dtype == torch.int16


@pytest.mark.parametrize("bits", [8, 4])
def test_pieces_give_what_the_whole_gives(bits, monkeypatch):
    module = some_linear(85, 64, bits, bias=True)
    x, ids = torch.randn(3, 64), module.dequantised()
    whole = module(x)
    monkeypatch.setattr("qwen1.bits_qwen._PIECE", 64 * 16)
    torch.testing.assert_close(module(x), whole)
    assert torch.equal(module.dequantised(), ids)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [8, 4])
def test_output_is_the_sum_in_float32_rounded_once(bits, dtype):
    module = some_linear(40, 256, bits, bias=True).to(dtype)
    x = torch.randn(5, 256).to(dtype)
    exact = nn.functional.linear(x.double(), module.dequantised().double(), module.bias.double())
    out = module(x)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-3)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_8_bits_are_rounded_to_half_a_scale_and_4_to_the_best_of_some(bits, dtype):
    weight = torch.randn(50, 128).to(dtype)
    codes, scales = quantised(weight, bits, 32)
    module = QWenBitsLinear(128, 50, bits, bias=False)
    module.codes.data, module.scales.data = codes, scales
    scale = unpack_groups(scales.view(torch.float16))[:50].float()[..., None]
    error = (module.dequantised() - weight.float()).view(50, 4, 32)
    if bits == 8:
        assert (error.abs() <= scale / 2 * 1.001).all()
        assert unpack(codes, 8).min() >= 1
        return
    groups = weight.float().view(50, 4, 32)
    theirs, ours = error_of_q4_0(groups), error.square().sum(-1)
    assert (ours <= theirs * 1.002).all() and ours.sum() < theirs.sum() * 0.97


def error_of_q4_0(groups):
    """The squared error of llama.cpp's Q4_0: the largest weight becomes -8; of two as large, the better one."""
    errors = []
    for extreme in (groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)):
        scale = (extreme / -8).half().float()
        error = ((groups / scale).round().clamp(-8, 7) * scale - groups).square().sum(-1)
        errors.append(error.where(extreme[..., 0].abs() == groups.abs().amax(-1), torch.inf))
    return torch.minimum(*errors)


def test_of_two_weights_that_are_as_large_the_better_one_becomes_minus_8():
    weight = torch.randn(2000, 32)
    weight[:, 0], weight[:, 1] = 3.5, -3.5
    codes, scales = quantised(weight, 4, 32)
    module = QWenBitsLinear(32, 2000, 4, bias=False)
    module.codes.data, module.scales.data = codes, scales
    assert ((module.dequantised() - weight).square().sum(-1) <= error_of_q4_0(weight) * 1.002).all()


def test_zeros_and_ties_are_rounded_to_numbers():
    weight = torch.zeros(16, 64)
    weight[1, 3] = 1e-9  # less than a scale can be
    weight[2, :32] = -2.0
    for bits in (8, 4):
        codes, scales = quantised(weight, bits)
        module = QWenBitsLinear(64, 16, bits, bias=False)
        module.codes.data, module.scales.data = codes, scales
        torch.testing.assert_close(module.dequantised(), weight, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("wrong", [torch.inf, torch.nan, 1e9])
@pytest.mark.parametrize("bits", [8, 4])
def test_what_is_no_number_is_refused(wrong, bits):
    weight = torch.randn(16, 64)
    weight[3, 40] = wrong
    with pytest.raises(ValueError, match="infinite"):
        quantised(weight, bits)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (dict(bits=3), "bits=3: weights have 8 or 4"),
        (dict(bits=True), "bits=True"),
        (dict(group_size=48), "group_size=48: .* multiple of 32"),
        (dict(group_size=0), "group_size=0"),
        (dict(group_size="32"), "group_size='32'"),
        (dict(group_size=64), "width of 96 isn't a multiple of group_size=64"),
        (dict(bits=8, own_zeros=True), "bits=8: only groups of 4 bits"),
    ],
)
def test_forms_that_there_are_not_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        QWenBitsLinear(96, 16, **arguments)


@pytest.mark.parametrize("bits", [8, 4])
def test_gradients_are_those_of_the_plain_product(bits):
    module = some_linear(21, 64, bits, bias=True)
    x = torch.randn(2, 3, 64, requires_grad=True)
    other = x.detach().clone().requires_grad_()
    bias = module.bias.detach().clone().requires_grad_()
    factor = torch.randn(2, 3, 21)

    (module(x) * factor).sum().backward()
    (nn.functional.linear(other, module.dequantised(), bias) * factor).sum().backward()
    torch.testing.assert_close(x.grad, other.grad)
    torch.testing.assert_close(module.bias.grad, bias.grad)
    assert module.codes.grad is None


def test_autocast_gives_its_dtype_and_sums_in_float32():
    module = some_linear(21, 512, 8, bias=True)
    x = torch.randn(3, 512)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = module(x)
    assert out.dtype == torch.bfloat16
    exact = nn.functional.linear(x.bfloat16().double(), module.dequantised().double(), module.bias.double())
    torch.testing.assert_close(out.double(), exact, rtol=2**-7, atol=1e-3)


@pytest.mark.parametrize("bits", [8, 4])
def test_casts_of_the_model_leave_codes_and_scales_alone(bits):
    module = some_linear(21, 64, bits, bias=True)
    before = module.dequantised()
    for cast in (module.to(torch.bfloat16), module.half(), module.float()):
        assert torch.equal(cast.dequantised(), before)


@pytest.mark.parametrize("bits", [8, 4])
def test_compiled_and_exported_it_is_the_same(bits):
    module = some_linear(21, 64, bits, bias=True).eval()
    x = torch.randn(5, 64)
    length = torch.export.Dim("length", min=2, max=64)
    program = torch.export.export(module, (x,), dynamic_shapes=((length, torch.export.Dim.STATIC),)).module()
    torch.testing.assert_close(program(x[:3]), module(x[:3]))
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), module(x))


def test_compiled_gradients_are_the_same():
    module = some_linear(21, 64, 4, bias=True)
    x = torch.randn(5, 64, requires_grad=True)
    module(x).square().sum().backward()
    plain, x.grad = x.grad, None
    torch.compile(module, backend="aot_eager")(x).square().sum().backward()
    torch.testing.assert_close(x.grad, plain)
