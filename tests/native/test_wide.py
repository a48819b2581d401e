"""Products of many tokens in half precision on a processor that has none of these: in float32, rounded once."""

import pytest
import torch
from torch import nn

from qwen1 import products_qwen
from qwen1.bits_qwen import QWenBitsLinear
from qwen1.native_qwen import wait
from qwen1.products_qwen import FEW, multiplies, wide_product
from qwen1.steps_qwen import projected
from qwen1.translating_qwen import SWITCH

HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def widened(monkeypatch):
    """The calls, on a processor that multiplies nothing but float32."""
    calls = []

    def count(*args):
        result = wide_product(*args)
        calls.extend([args] * (result is not None))
        return result

    for module in ("products_qwen", "bits_qwen"):
        monkeypatch.setattr(f"qwen1.{module}.multiplies", lambda dtype: dtype == torch.float32)
    monkeypatch.setattr(products_qwen, "library", lambda: None)  # which has such products of its own
    monkeypatch.setattr("qwen1.steps_qwen.wide_product", count)
    return calls


def layer(inputs, outputs, dtype, bias=True):
    torch.manual_seed(0)
    return nn.Linear(inputs, outputs, bias=bias).to(dtype)


def exact(linear, states):
    """In float64, rounded once."""
    bias = None if linear.bias is None else linear.bias.double()
    return nn.functional.linear(states.double(), linear.weight.double(), bias).to(states.dtype)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(17, 1, 1), (33, 40, 3), (64, 96, 2752), (18, 5504, 7)])
@torch.no_grad()
def test_numbers(widened, monkeypatch, dtype, bias, rows, inputs, outputs):
    monkeypatch.setattr(products_qwen, "_PIECE", 4096)
    linear = layer(inputs, outputs, dtype, bias)
    states = torch.randn(rows, inputs).to(dtype)
    expected, found = exact(linear, states), projected(linear, states)
    assert len(widened) == 1 and found.dtype == dtype and found.is_contiguous()
    # Half of the last place where the sum in float32 lies between two numbers.
    assert torch.allclose(found.float(), expected.float(), rtol=torch.finfo(dtype).eps, atol=1e-4)
    assert (found == expected).float().mean() > 0.95


@torch.no_grad()
def test_any_strides(widened):
    linear = layer(40, 24, torch.bfloat16)
    states = torch.randn(40, 9, 3).bfloat16().permute(2, 1, 0)
    found = projected(linear, states)
    assert len(widened) == 1 and found.shape == (3, 9, 24)
    assert torch.equal(found, projected(linear, states.contiguous()))


def hooked(linear):
    linear.register_forward_hook(lambda module, args, result: result + 1)


def overwritten(linear):
    linear.forward = lambda states: states


def frozen_elsewhere(linear):
    linear.weight = nn.Parameter(linear.weight.float())


class Other(nn.Linear):
    """Someone's own."""


def of_another_class(linear):
    linear.__class__ = Other


@pytest.mark.parametrize("change", [hooked, overwritten, frozen_elsewhere, of_another_class])
@torch.no_grad()
def test_what_is_not_plain_is_called(widened, change):
    linear = layer(24, 24, torch.bfloat16)
    change(linear)
    states = torch.randn(20, 24).bfloat16()
    try:
        expected = linear(states)
    except RuntimeError:
        with pytest.raises(RuntimeError, match="dtype"):
            projected(linear, states)
    else:
        assert torch.equal(projected(linear, states), expected)
    assert widened == []


@torch.no_grad()
def test_few_tokens_and_float32_are_left_to_torch(widened):
    projected(layer(24, 24, torch.bfloat16), torch.randn(FEW, 24).bfloat16())
    projected(layer(24, 24, torch.float32), torch.randn(100, 24))
    assert widened == []


def test_gradients_autocast_modes_and_the_switch_are_left_to_torch(widened, monkeypatch):
    linear, states = layer(24, 24, torch.bfloat16), torch.randn(20, 24).bfloat16()
    projected(linear, states).sum().backward()
    assert linear.weight.grad is not None
    linear.requires_grad_(False)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            projected(linear, states)
        torch.func.vmap(lambda some: projected(linear, some))(states.view(1, 20, 24))
        torch.jit.trace(lambda some: projected(linear, some), states, check_trace=False)
        torch.compile(lambda some: projected(linear, some), backend="eager", fullgraph=True)(states)
        projected(linear.to("meta"), states.to("meta"))
        monkeypatch.setenv(SWITCH, "0")
        projected(linear, states.to("meta"))
    assert widened == []


@torch.no_grad()
def test_a_prompt_is_as_near_to_float32_as_torch_brings_it(widened, monkeypatch, tiny_model):
    model, ids = tiny_model().eval(), torch.randint(256, (2, 40), generator=torch.Generator().manual_seed(0))
    exact_logits = model(ids).logits
    model.bfloat16()
    found = model(ids).logits
    assert len(widened) == 5 * model.config.num_hidden_layers + 1
    monkeypatch.setenv(SWITCH, "0")
    by_torch = model(ids).logits
    errors = [float((logits.float() - exact_logits).pow(2).mean().sqrt()) for logits in (found, by_torch)]
    assert 0 < errors[0] < 1.1 * errors[1]


@pytest.mark.skipif(wait() is None, reason="needs g++ or clang++ on Linux")
@pytest.mark.parametrize("bits", [8, 4])
@torch.no_grad()
def test_few_bits(monkeypatch, bits):
    """By a library that has products of a few tokens alone."""
    monkeypatch.setattr(products_qwen, "library", wait)
    monkeypatch.setattr(products_qwen, "_has_many", lambda native, dtype: False)
    few = QWenBitsLinear.of(layer(96, 40, torch.bfloat16), bits, 32)
    states = torch.randn(20, 96).bfloat16()
    wanted = []
    decoded = products_qwen.decoded
    monkeypatch.setattr("qwen1.bits_qwen.decoded", lambda *args: wanted.append(args[-1]) or decoded(*args))
    found = few(states)
    expected = nn.functional.linear(states.double(), few.dequantised().double(), few.bias.double()).bfloat16()
    assert set(wanted) == {torch.float32} and torch.allclose(found.float(), expected.float(), rtol=2**-7, atol=1e-4)


def test_where_torch_multiplies_half_precision_itself(monkeypatch):
    multiplies.cache_clear()
    try:
        assert multiplies(torch.float32) and multiplies(torch.float64)
        if torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
            assert multiplies(torch.bfloat16)
        multiplies.cache_clear()
        monkeypatch.setattr("platform.machine", lambda: "arm64")  # not measured there
        assert multiplies(torch.bfloat16) and multiplies(torch.float16)
    finally:
        multiplies.cache_clear()
