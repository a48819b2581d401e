"""Products of many tokens by the kernels: those of plain torch, or nearer to what is exact."""

import ctypes

import pytest
import torch
from torch import nn

from qwen1 import products_qwen
from qwen1.bits_qwen import QWenBitsLinear
from qwen1.native_qwen import wait
from qwen1.products_qwen import multiplies_all, place
from qwen1.steps_qwen import projected

HALVES = [torch.bfloat16, torch.float16]
DTYPES = [torch.float32, *HALVES]

pytestmark = [
    pytest.mark.skipif(wait() is None, reason="needs g++ or clang++ on Linux"),
    pytest.mark.skipif(wait() is not None and not hasattr(wait(), "qwen_many_float32"), reason="needs AVX2"),
]

SHAPES = [
    (17, 1, 1),
    (18, 63, 5),
    (19, 64, 33),
    (33, 96, 31),
    (40, 1025, 70),  # columns of more than one panel, in float32
    (25, 2049, 16),  # and in bfloat16
    (31, 4100, 40),
    (200, 129, 97),
    (1100, 2048, 9),  # more tokens than a panel is made for at once
]


@pytest.fixture(autouse=True)
def counted(monkeypatch):
    """Calls of the kernels for many tokens."""
    calls, kernels = [], wait()
    for dtype, name in products_qwen.DTYPES.items():
        kernel = getattr(kernels, f"qwen_many_{name}", None)
        if kernel is not None:
            monkeypatch.setattr(
                kernels,
                f"qwen_many_{name}",
                lambda *args, kernel=kernel, dtype=dtype: calls.append(dtype) or kernel(*args),
            )
    return calls


def skip_without(dtype):
    if not multiplies_all(wait(), torch.empty((17, 1), dtype=dtype)):
        pytest.skip("torch has products of its own, with AMX")


def layer(inputs, outputs, dtype, bias=True):
    torch.manual_seed(inputs + outputs)
    return nn.Linear(inputs, outputs, bias=bias).to(dtype).requires_grad_(False).eval()


def exact(linear, states):
    """In float64."""
    bias = None if linear.bias is None else linear.bias.double()
    return nn.functional.linear(states.double(), linear.weight.double(), bias)


@pytest.mark.parametrize(("tokens", "inputs", "outputs"), SHAPES)
@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_float32_errs_no_more_than_torch(counted, bias, tokens, inputs, outputs):
    linear, states = layer(inputs, outputs, torch.float32, bias), torch.randn(tokens, inputs)
    found, expected = projected(linear, states), exact(linear, states)
    assert counted == [torch.float32] and found.dtype == torch.float32 and found.is_contiguous()
    errors = [float((result.double() - expected).norm() / expected.norm()) for result in (found, linear(states))]
    assert errors[0] < max(1.2 * errors[1], 2**-22)


@pytest.mark.parametrize(("tokens", "inputs", "outputs"), SHAPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", HALVES)
@torch.no_grad()
def test_half_precision_is_rounded_once(counted, bias, tokens, inputs, outputs, dtype):
    skip_without(dtype)
    linear, states = layer(inputs, outputs, dtype, bias), torch.randn(tokens, inputs).to(dtype)
    found, expected = projected(linear, states), exact(linear, states)
    assert counted == [dtype] and found.dtype == dtype
    # Half of the last place where the sum in float32 lies between two numbers.
    assert ((found.double() - expected).abs() <= expected.abs() * torch.finfo(dtype).eps + 1e-4).all()
    assert (found == expected.to(dtype)).float().mean() > 0.98


@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_strides_and_offsets(counted, dtype):
    skip_without(dtype)
    linear, whole = layer(64, 48, dtype), torch.randn(30, 3, 128).to(dtype)
    for states in (whole[..., 1::2], whole[:, 2, 64:], whole.transpose(0, 1)[..., 3:67], whole[2:9, :, :64]):
        counted.clear()
        found = projected(linear, states)
        assert counted and torch.equal(found, projected(linear, states.contiguous()))
        torch.testing.assert_close(
            found, linear(states), atol={torch.bfloat16: 2e-2, torch.float16: 2e-3}.get(dtype, 1e-5), rtol=1e-2
        )


@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_any_number_of_threads_gives_the_same(counted, dtype):
    skip_without(dtype)
    linear, states = layer(200, 150, dtype), torch.randn(400, 200).to(dtype)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5, 13):
            torch.set_num_threads(threads)
            found.append(projected(linear, states))
    finally:
        torch.set_num_threads(before)
    assert len(counted) == 4 and all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_what_is_no_number_stays_in_its_row_and_column(dtype, value):
    skip_without(dtype)
    linear, states = layer(33, 20, dtype), torch.ones((40, 33)).to(dtype)
    states[7, 32] = value
    found = projected(linear, states)
    others = torch.arange(40) != 7
    assert found[others].isfinite().all() and not found[7].isfinite().any()
    linear.weight[3, 32] = value
    columns = torch.arange(20) != 3
    assert projected(linear, states[others])[:, columns].isfinite().all()
    assert not projected(linear, states[others])[:, 3].isfinite().any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [8, 12, 17, 64])
@torch.no_grad()
def test_nothing_is_written_beyond_the_end(dtype, tokens):
    skip_without(dtype)
    linear, states = layer(70, 37, dtype, bias=False), torch.randn(tokens, 70).to(dtype)
    room = torch.full((tokens * 37 + 64,), 7.0, dtype=dtype)
    matrix = products_qwen.Matrix(place(linear.weight, dtype), None, None, None, 37, 70, 0, 1)
    kernel = getattr(wait(), f"qwen_{'linear' if tokens <= 16 else 'many'}_{products_qwen.DTYPES[dtype]}")
    places = ctypes.byref(matrix), ctypes.c_void_p(states.data_ptr()), ctypes.c_void_p(room.data_ptr())
    assert kernel(*places, ctypes.c_int64(tokens), ctypes.c_int64(2)) == 0
    assert (room[tokens * 37 :] == 7).all()
    torch.testing.assert_close(room[: tokens * 37].view(tokens, 37), linear(states), atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["8", "4", "4 with zeros"])
@torch.no_grad()
def test_codes_give_what_their_numbers_give(counted, kind, dtype):
    """Several groups, columns of more than one panel, rows that fill no block."""
    skip_without(dtype)
    bits = int(kind[0])
    few = QWenBitsLinear(4096 + 128, 45, bits, 64, own_zeros="zeros" in kind, dtype=dtype)
    few.codes.random_(0, 256)
    few.scales.copy_(torch.empty(few.scales.shape).uniform_(-0.02, 0.02).half().view(torch.int16))
    if few.zeros is not None:
        few.zeros.random_(0, 16)
    few.bias.copy_(torch.randn(45))
    states = torch.randn(30, 4096 + 128).to(dtype)
    found, weights = few(states), few.dequantised(torch.float64)
    expected = nn.functional.linear(states.double(), weights, few.bias.double())
    errors = (found.double() - expected).abs() / (states.double().abs() @ weights.abs().T)
    assert counted == [dtype] and errors.max() < {torch.bfloat16: 4e-3, torch.float16: 5e-4}.get(dtype, 1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_prompt_is_read_by_them(counted, tiny_model, monkeypatch, dtype):
    skip_without(dtype)
    model, ids = tiny_model("sdpa").to(dtype), torch.randint(256, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = model(ids).logits
        assert len(counted) == 5 * model.config.n_layer + 1
        monkeypatch.setenv("QWEN_NATIVE", "0")
        by_torch = model(ids).logits
        exact_logits = model.double()(ids).logits
    errors = [float((logits.double() - exact_logits).norm() / exact_logits.norm()) for logits in (found, by_torch)]
    assert errors[0] < max(1.1 * errors[1], 2**-22)
