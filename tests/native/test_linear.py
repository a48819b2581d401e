"""Linear layers of modules by the kernels, in whatever the kernel of whole blocks doesn't stand for."""

import pytest
import torch
from torch import nn
from transformers import StaticCache
from transformers.cache_utils import DynamicCache

from qwen1 import products_qwen, steps_qwen
from qwen1.cache_qwen import QWenInt8Cache
from qwen1.native_qwen import wait
from qwen1.steps_qwen import projected
from qwen1.translating_qwen import SWITCH

pytestmark = pytest.mark.skipif(wait() is None, reason="needs g++ or clang++ on Linux")


@pytest.fixture
def products(monkeypatch):
    """Shapes of the states that the kernel multiplied."""
    counted, multiply = [], steps_qwen.product

    def count(native, matrix, states):
        counted.append(tuple(states.shape))
        return multiply(native, matrix, states)

    monkeypatch.setattr(steps_qwen, "product", count)
    return counted


def layer(inputs=24, outputs=40, dtype=torch.float32, bias=True):
    torch.manual_seed(0)
    return nn.Linear(inputs, outputs, bias=bias).to(dtype).requires_grad_(False).eval()


@pytest.mark.parametrize("shape", [(1,), (1, 1), (3, 5), (16, 1), (2, 1, 4)])
@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_few_tokens(products, shape, bias):
    linear, states = layer(bias=bias), torch.randn((*shape, 24))
    torch.testing.assert_close(projected(linear, states), linear(states), atol=1e-5, rtol=1e-5)
    assert products == [(*shape, 24)]


@torch.no_grad()
def test_half_precision_is_rounded_once(products):
    linear, states = layer(512, 64, torch.bfloat16), torch.randn(4, 512).bfloat16()
    exact = nn.functional.linear(states.double(), linear.weight.double(), linear.bias.double())
    error = (projected(linear, states).double() - exact).abs()
    assert (error <= exact.abs() * 2**-8 + 1e-4).all() and products


def hooked(linear):
    linear.register_forward_hook(lambda module, args, output: output * 2)


def overwritten(linear):
    linear.forward = lambda states: states


def in_training(linear):
    linear.train()


def of_another_class(linear):
    linear.__class__ = type("Other", (nn.Linear,), {"forward": lambda self, states: states * 3})


def in_columns(linear):
    linear.weight = nn.Parameter(linear.weight.t().contiguous().t(), requires_grad=False)


def of_another_dtype(linear):
    linear.double()


@pytest.mark.parametrize("change", [hooked, overwritten, in_training, of_another_class, in_columns, of_another_dtype])
@torch.no_grad()
def test_what_is_not_plain_is_called(products, change):
    linear, states = layer(24, 24), torch.randn(3, 24)
    change(linear)
    if change is of_another_dtype:
        with pytest.raises(RuntimeError, match="dtype"):
            projected(linear, states)
    else:
        assert torch.equal(projected(linear, states), linear(states))
    assert not products


@torch.no_grad()
def test_states_of_another_width_are_told_by_torch(products):
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        projected(layer(), torch.randn(3, 23))
    assert not products


@torch.no_grad()
def test_none_are_left_to_torch(products):
    assert projected(layer(), torch.randn(0, 24)).shape == (0, 40)
    assert not products


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("tokens", [1, 9, 40])
@torch.no_grad()
def test_weights_without_a_number_are_left_to_torch(products, tokens):
    for linear in (layer(inputs=0), layer(outputs=0)):
        states = torch.randn(tokens, linear.in_features)
        assert torch.equal(projected(linear, states), linear(states))
    assert not products


@torch.no_grad()
def test_many_are_left_to_torch_where_the_library_has_no_kernel_for_them(products, monkeypatch):
    monkeypatch.setattr(products_qwen, "_has_many", lambda native, dtype: False)
    linear, states = layer(), torch.randn(17, 24)
    assert torch.equal(projected(linear, states), linear(states)) and not products
    projected(linear, states[:16])
    assert products == [(16, 24)]


@pytest.mark.parametrize("tokens", [2, 40])
def test_gradients_autocast_modes_and_the_switch_are_left_to_torch(products, monkeypatch, tokens):
    linear, states = layer(), torch.randn(tokens, 24, requires_grad=True)
    projected(linear, states).sum().backward()
    assert states.grad is not None
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            projected(linear, states)
        projected(linear.double(), states.double())
        linear.float()
        torch.jit.trace(lambda some: projected(linear, some), states, check_trace=False)
        torch.func.vmap(lambda some: projected(linear, some))(states.view(1, tokens, 24))
        torch.compile(lambda some: projected(linear, some), backend="eager", fullgraph=True)(states)
        monkeypatch.setenv(SWITCH, "0")
        projected(linear, states)
    assert not products


def static(model):
    return StaticCache(config=model.config, max_cache_len=40)


CACHES = {"none": lambda model: None, "static": static, "transformers' own": lambda model: DynamicCache()}
CACHES["int8"] = lambda model: QWenInt8Cache(model.config)


@pytest.mark.parametrize("kind", CACHES)
@torch.no_grad()
def test_other_caches_read_by_it(tiny_model, products, monkeypatch, kind):
    model = tiny_model("sdpa", use_dynamic_ntk=True, use_logn_attn=True, seq_length=16)
    ids = torch.randint(0, model.config.vocab_size, (2, 26), generator=torch.Generator().manual_seed(4))

    def run():
        cache = CACHES[kind](model)
        logits = [model(part, cache=cache, use_cache=cache is not None).logits for part in ids.split((5, 1, 20), 1)]
        return torch.cat(logits, 1)

    with monkeypatch.context() as context:
        context.setenv(SWITCH, "0")
        expected = run()
    products.clear()
    tolerance = 0.1 if kind == "int8" else 3e-5  # the least change rounds a key to another of 256 numbers
    torch.testing.assert_close(run(), expected, atol=tolerance, rtol=tolerance)
    parts = 3 if hasattr(wait(), "qwen_many_float32") else 2  # without such kernels, the last one is left to torch
    assert len(products) == parts * (5 * model.config.n_layer + 1)  # blocks and head
