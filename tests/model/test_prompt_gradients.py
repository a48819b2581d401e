"""What the attention of a prompt passes back by the kernel, beside torch's own in float64 and by its fused kernel."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from qwen1 import gradients_qwen, prompt_qwen
from qwen1.native_qwen import wait
from qwen1.prompt_qwen import prompt_attention
from qwen1.translating_qwen import SWITCH

pytestmark = pytest.mark.skipif(wait() is None, reason="needs g++ or clang++ on Linux")

SHAPES = {  # B, H, K, T, S, D
    "square": (2, 2, 2, 150, 150, 32),
    "whole": (1, 2, 2, 128, 128, 64),
    "more keys": (2, 2, 2, 65, 131, 24),
    "grouped, odd": (1, 6, 2, 61, 97, 7),
    "one key head, wide": (1, 3, 1, 129, 129, 72),
    "few": (3, 4, 2, 16, 16, 3),
}
MASKS = ("none", "packed", "padded", "of heads", "both ways")


def drawn(shape, dtype):
    batch, heads, kv_heads, queries, keys, size = shape
    generator = torch.Generator().manual_seed(0)
    sizes = (queries, heads), (keys, kv_heads), (keys, kv_heads)
    return [torch.randn(batch, *some, size, generator=generator).to(dtype).transpose(1, 2) for some in sizes]


def mask_of(kind, shape):
    """(mask, `is_causal`)."""
    batch, heads, _, queries, keys, _ = shape
    causal = torch.ones(queries, keys).tril().bool()[None, None]
    texts = torch.arange(max(queries, keys)) // 37
    masks = {
        "packed": causal & (texts[:queries, None] == texts[:keys]),
        "padded": (causal & (torch.arange(keys) >= 9 * torch.arange(batch)[:, None])[:, None, None]).clone(),
        "of heads": torch.rand(batch, heads, queries, keys, generator=torch.Generator().manual_seed(1)) > 0.3,
    }
    return masks.get(kind), False if kind == "both ways" else None


def by_kernel(states, mask, given, shape, is_causal=None, scaling=0.3):
    """Result and gradients of copies."""
    leaves = [part.detach().clone().requires_grad_() for part in states]
    module = SimpleNamespace(is_causal=True, num_key_value_groups=shape[1] // shape[2], training=True)
    output, weights = prompt_attention(module, *leaves, mask, scaling=scaling, is_causal=is_causal)
    assert weights is None and type(output.grad_fn).__name__ == "_DifferentiatedBackward"
    return [output.detach(), *torch.autograd.grad(output, leaves, given)]


def by_torch(states, mask, given, shape, is_causal=None, fused=False):
    leaves = [part.detach().clone().requires_grad_() for part in states]
    query, key, value = leaves
    key, value = (part.repeat_interleave(shape[1] // shape[2], 1) for part in (key, value))
    causal = mask is None and is_causal is None
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION if fused else SDPBackend.MATH):
        output = scaled_dot_product_attention(query, key, value, mask, is_causal=causal, scale=0.3).transpose(1, 2)
    return [output.detach(), *torch.autograd.grad(output, leaves, given.to(output.dtype))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_it_passes_back_what_torch_does(shape, kind, dtype):
    states, (mask, is_causal) = drawn(shape, dtype), mask_of(kind, shape)
    before = [part.clone() for part in states]
    given = torch.randn(states[0].transpose(1, 2).shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    found = by_kernel(states, mask, given, shape, is_causal)
    assert all(torch.equal(*pair) for pair in zip(states, before, strict=True))
    truth = by_torch([part.double() for part in states], mask, given, shape, is_causal)
    other = by_torch(states, mask, given, shape, is_causal, fused=True)
    for ours, exact, theirs in zip(found, truth, other, strict=True):
        assert ours.shape == exact.shape and ours.dtype == dtype
        assert (ours - exact).norm() <= 1.3 * (theirs - exact).norm() + 3e-7 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_query_that_sees_nothing(dtype):
    """As with torch, its result is zero, and nothing comes back to it or by it."""
    shape = SHAPES["square"]
    states, mask = drawn(shape, dtype), torch.ones(1, 1, 150, 150, dtype=torch.bool).tril()
    mask[..., [0, 70, 149], :] = False
    mask[..., 100:140, :] = False  # most of a square, and all of a block of queries
    given = torch.ones(2, 150, 2, 32, dtype=dtype)
    output, *back = by_kernel(states, mask, given, shape)
    expected = by_torch(states, mask, given, shape, fused=True)
    assert not output[:, [0, 70, 149]].any() and not back[0][:, :, 100:140].any()
    for ours, theirs in zip((output, *back), expected, strict=True):
        torch.testing.assert_close(
            ours, theirs, rtol=1e-2, atol={torch.bfloat16: 2e-2, torch.float16: 2e-3}.get(dtype, 2e-6)
        )


@pytest.mark.parametrize("threads", [1, 3, 8])
def test_any_number_of_threads_gives_the_same(threads):
    shape = SHAPES["grouped, odd"]
    states, given = drawn(shape, torch.float32), torch.ones(1, 61, 6, 7)
    expected, before = by_kernel(states, None, given, shape), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = by_kernel(states, None, given, shape)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_gradients_that_lie_otherwise():
    """Of a sum each number is the same one; and channels may lie apart."""
    shape = SHAPES["square"]
    states = drawn(shape, torch.float32)
    given = torch.randn(2, 150, 32, 2, generator=torch.Generator().manual_seed(2)).transpose(2, 3)
    for some in (torch.ones(()).expand(2, 150, 2, 32), given):
        found, expected = by_kernel(states, None, some, shape), by_kernel(states, None, some.contiguous(), shape)
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    apart = [part.transpose(2, 3).contiguous().transpose(2, 3) for part in states]
    found, expected = by_kernel(apart, None, given, shape), by_kernel(states, None, given, shape)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_large_scores_stay_finite():
    """Shares are of exponentials that alone would be infinite, or zero."""
    shape = SHAPES["square"]
    query, key, value = drawn(shape, torch.float32)
    given = torch.ones(2, 150, 2, 32)
    for factor in (300.0, -300.0):
        found = by_kernel([query * factor, key, value], None, given, shape)
        truth = by_torch([query.double() * factor, key.double(), value.double()], None, given, shape)
        other = by_torch([query * factor, key, value], None, given, shape, fused=True)
        for ours, exact, theirs in zip(found, truth, other, strict=True):
            assert ours.isfinite().all() and (ours - exact).norm() <= 3 * (theirs - exact).norm() + 1e-5 * exact.norm()


def test_only_some_are_learnt():
    query, key, value = drawn(SHAPES["square"], torch.float32)
    given = torch.ones(2, 150, 2, 32)
    _, _, _, expected = by_kernel((query, key, value), None, given, SHAPES["square"])
    value = value.clone().requires_grad_()
    module = SimpleNamespace(is_causal=True, num_key_value_groups=1)
    output, _ = prompt_attention(module, query, key, value, None, scaling=0.3)
    assert torch.equal(torch.autograd.grad(output, value, given)[0], expected)


def test_no_second_derivatives():
    """torch's fused kernel has none either; a wrong number would be worse than none."""
    query, key, value = (part.clone().requires_grad_() for part in drawn(SHAPES["few"], torch.float32))
    output, _ = prompt_attention(SimpleNamespace(is_causal=True, num_key_value_groups=1), query, key, value, None)
    (first,) = torch.autograd.grad(output.square().sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_model_learns_the_same(tiny_model, monkeypatch, autocast, checkpointing):
    """All gradients of a packed batch; under autocast, where numbers are bfloat16, they are as exact as torch's."""
    model = tiny_model(attn_implementation="sdpa", n_positions=256, seq_length=256).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.randint(1, 100, (2, 200), generator=torch.Generator().manual_seed(0))
    places = torch.cat([torch.arange(70), torch.arange(130)]).expand(2, -1)
    counted, real = [], gradients_qwen.passed_back
    monkeypatch.setattr(prompt_qwen, "passed_back", lambda *args: counted.append(1) or real(*args))

    def learn(autocast):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(ids, labels=ids, position_ids=places, use_cache=False).loss
        loss.backward()
        return [weight.grad.clone() for weight in model.parameters()]

    ours = learn(autocast)
    assert len(counted) == model.config.num_hidden_layers
    monkeypatch.setenv(SWITCH, "0")
    for found, other, exact in zip(ours, learn(autocast), learn(False), strict=True):
        assert (found - exact).norm() <= 1.5 * (other - exact).norm() + 1e-5 * exact.norm()
    assert len(counted) == model.config.num_hidden_layers


@pytest.mark.parametrize("name", ["qwen_prompt_float32", "qwen_gradients_float32"])
def test_no_room_is_told(name):
    """The kernels answer 1 where they get no memory."""
    states = [part.clone().requires_grad_() for part in drawn(SHAPES["few"], torch.float32)]
    native = prompt_qwen._kernel_for(states[0])
    short = SimpleNamespace(
        **{kernel: getattr(native, kernel) for kernel in ("qwen_prompt_float32", "qwen_gradients_float32")}
        | {name: lambda _: 1}
    )
    with pytest.raises(MemoryError, match="16 keys: take (a shorter text|shorter texts)"):
        prompt_qwen._Differentiated.apply(short, *states, None, True, 1.0).sum().backward()
