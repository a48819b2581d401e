"""Products with weights in 8 and 4 bits by the kernels: those of plain torch, which multiplies in float32."""

import pytest
import torch
from torch.autograd import forward_ad

from qwen1 import products_qwen
from qwen1.bits_qwen import LANES, QWenBitsLinear, fixed
from qwen1.native_qwen import wait
from qwen1.translating_qwen import SWITCH

pytestmark = pytest.mark.skipif(wait() is None, reason="needs g++ or clang++ on Linux")

SHAPES = [(16, 32, 32), (1, 32, 32), (37, 96, 32), (100, 256, 128), (33, 192, 64), (2752, 64, 32)]


@pytest.fixture
def kernel(monkeypatch):
    """The calls of both kernels."""
    calls = []
    for name in ("product", "decoded"):
        run = getattr(products_qwen, name)
        monkeypatch.setattr(
            f"qwen1.bits_qwen.{name}", lambda *args, run=run, name=name: calls.append(name) or run(*args)
        )
    return calls


def layer(outputs, inputs, group_size, bits, bias=True, own_zeros=False, dtype=torch.float32):
    generator = torch.Generator().manual_seed(outputs + bits)
    linear = torch.nn.Linear(inputs, outputs, bias=bias)
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    few = QWenBitsLinear.of(linear.to(dtype), bits, group_size)
    if own_zeros:
        few.zeros = fixed(torch.randint(0, 16, few.scales.shape, generator=generator, dtype=torch.uint8))
    return few


def by_torch(monkeypatch, few, x):
    with monkeypatch.context() as context:
        context.setenv(SWITCH, "0")
        return few(x)


def error(few, x, found, expected):
    """The greatest, as a share of the sizes of what is added up."""
    sizes = x.double().abs() @ few.dequantised().double().abs().T
    return float(((found.double() - expected.double()).abs() / sizes).max())


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 16, 17, 40])
@pytest.mark.parametrize(("outputs", "inputs", "group_size"), SHAPES)
@pytest.mark.parametrize("kind", ["8", "4", "4 with zeros"])
def test_float32(monkeypatch, kernel, kind, outputs, inputs, group_size, rows):
    few = layer(outputs, inputs, group_size, int(kind[0]), own_zeros="zeros" in kind)
    x = torch.randn((rows, inputs), generator=torch.Generator().manual_seed(rows))
    with torch.no_grad():
        expected = by_torch(monkeypatch, few, x)
        assert not kernel
        found = few(x)
    assert kernel == ["product"] or (rows > products_qwen.FEW and not hasattr(wait(), "qwen_many_float32"))
    assert found.shape == expected.shape and found.dtype == x.dtype
    assert error(few, x, found, expected) < 1e-4  # activations have 15 bits for each 32 of them


@pytest.mark.parametrize("bits", [8, 4])
def test_without_kernels_for_many_tokens_codes_become_numbers_for_torch(monkeypatch, kernel, bits):
    monkeypatch.setattr(products_qwen, "_has_many", lambda native, dtype: False)
    few, x = layer(37, 96, 32, bits), torch.randn((40, 96), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found, expected = few(x), by_torch(monkeypatch, few, x)
    assert set(kernel) == {"decoded"} and error(few, x, found, expected) < 1e-5


@pytest.mark.parametrize("rows", [1, 5, 16, 64])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 4e-3), (torch.float16, 5e-4)])
def test_half_precision(monkeypatch, kernel, bits, rows, dtype, bound):
    few = layer(128, 256, 32, bits, dtype=dtype)
    x = torch.randn((rows, 256), generator=torch.Generator().manual_seed(rows)).to(dtype)
    with torch.no_grad():
        assert error(few, x, few(x), by_torch(monkeypatch, few, x)) < bound
    assert kernel


@pytest.mark.parametrize("bits", [8, 4])
def test_decoded_rows_are_exact(bits):
    few = layer(37, 96, 32, bits, bias=False)
    decoded = products_qwen.decoded(wait(), few.matrix(torch.float32), 1, 2, torch.float32)
    assert torch.equal(decoded[: 37 - LANES], few.dequantised()[LANES:])


def test_shapes_strides_and_offsets(monkeypatch, kernel):
    few = layer(48, 64, 32, 8)
    whole = torch.randn((6, 3, 128), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for x in (whole[..., 1::2], whole[1, 2, 64:], whole.transpose(0, 1)[..., 3:67], whole[2:3, :, :64]):
            kernel.clear()
            found, expected = few(x), by_torch(monkeypatch, few, x)
            assert kernel and found.shape == (*x.shape[:-1], 48)
            assert error(few, x, found, expected) < 1e-4
        assert few(whole[:0, :, :64]).shape == (0, 3, 48)


def test_scales_at_the_edges(monkeypatch):
    """float16 below its normal numbers and negative; activations that are all zero, huge and tiny."""
    few = layer(16, 64, 32, 4, bias=False)
    scales = torch.tensor([6e-8, -6e-5, 3e-4, 60000.0, 1e-5, -0.5, 1.0, -2.0] * 4, dtype=torch.float16)
    few.scales = fixed(scales.view(1, 2, 16).view(torch.int16).contiguous())
    x = torch.stack((torch.zeros(64), torch.full((64,), 1e30), torch.full((64,), 1e-30), torch.linspace(-1, 1, 64)))
    with torch.no_grad():
        found, expected = few(x), by_torch(monkeypatch, few, x)
    assert error(few, x[1:], found[1:], expected[1:]) < 1e-4
    assert (found[0] == 0).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("bits", [8, 4])
def test_what_is_no_number_stays_none(bits, value):
    few = layer(16, 64, 32, bits)
    x = torch.ones((2, 64))
    x[1, 40] = value
    with torch.no_grad():
        found = few(x)
    assert found[0].isfinite().all() and not found[1].isfinite().any()


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_threads(monkeypatch, threads):
    few, x = layer(100, 64, 32, 4), torch.ones((3, 64))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.no_grad():
            assert error(few, x, few(x), by_torch(monkeypatch, few, x)) < 1e-4
    finally:
        torch.set_num_threads(before)


def test_gradients_go_through_it(kernel):
    few = layer(48, 64, 32, 8)
    x = torch.randn((3, 64), generator=torch.Generator().manual_seed(1), requires_grad=True)
    few(x).sum().backward()
    assert kernel == ["product"]
    torch.testing.assert_close(x.grad, few.dequantised().sum(0).expand(3, -1), rtol=1e-4, atol=1e-4)


def test_other_dtypes_and_modes_go_by_torch(kernel):
    few = layer(48, 64, 32, 8)
    with torch.no_grad():
        few(torch.ones((1, 64), dtype=torch.float16))
        few.double()(torch.ones((1, 64), dtype=torch.float64))
        layer(48, 64, 32, 8, dtype=torch.bfloat16)(torch.ones(1, 64))  # its bias is of another dtype
        compiled = torch.compile(few.float(), backend="eager", fullgraph=True)
        compiled(torch.ones((1, 64)))
    assert not kernel


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 4095, 4096, 4097, 100_003])
@pytest.mark.parametrize("threads", [1, 3])
def test_checksums_are_of_every_byte_at_its_place(length, threads):
    octets = torch.randint(0, 256, (length + 3,), generator=torch.Generator().manual_seed(1)).to(torch.uint8)[3:]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        one, both = products_qwen.checksums([octets]), products_qwen.checksums([octets, octets.flip(0), octets])
    finally:
        torch.set_num_threads(before)
    text, expected = bytes(octets.tolist()), 0
    for number in range(-(-length // 8)):
        part = text[8 * number : 8 * number + 8]
        word = int.from_bytes(part, "little", signed=len(part) == 8)
        if len(part) == 8:
            word ^= word >> 29
        expected += word * (2 * number + 1)
    assert one == [expected % 2**64] and both[::2] == one * 2


def test_what_watches_each_operation_sees_those_of_torch(kernel):
    """A kernel under `torch.func` would give derivatives of nothing, without a word."""
    few = layer(48, 64, 32, 8, bias=False)
    x = torch.ones((5, 64))
    with torch.no_grad():
        expected = few(x)
        kernel.clear()
        torch.testing.assert_close(torch.func.vmap(few._product)(x), expected, rtol=1e-4, atol=1e-3)
        _, tangent = torch.func.jvp(few._product, (x,), (x,))
        torch.testing.assert_close(tangent, expected, rtol=1e-4, atol=1e-3)
        with forward_ad.dual_level():
            dual = few._product(forward_ad.make_dual(x, x))
            torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, expected, rtol=1e-4, atol=1e-3)
    assert not kernel


@pytest.mark.parametrize("shape", [(1, 32), (1, 128), (40, 32), (63,), (2, 3, 96)])
def test_an_input_of_another_width_is_an_error(shape):
    """Which the kernel would read beyond the end of, or in part."""
    with torch.no_grad(), pytest.raises(ValueError, match=r"doesn't fit 64 columns"):
        layer(48, 64, 32, 8)(torch.ones(shape))
