"""The MLP does again in its backward pass what it doesn't keep: against plain torch, hooks and random numbers.

How much it keeps is in `conversion/test_sizing.py`.
"""

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

from qwen1.modeling_qwen import QWenMLP

WIDTH, INNER, ROWS = 8, 10, (2, 3)


@pytest.fixture
def mlp(tiny_config):
    torch.manual_seed(0)
    return QWenMLP(tiny_config(n_embd=WIDTH, n_head=1, kv_channels=WIDTH, ffn_hidden_size=2 * INNER)).train()


def states(dtype=torch.float32):
    return torch.randn(*ROWS, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()


def plain(mlp, x):
    """The arithmetic of the document, by torch alone."""
    gated = nn.functional.silu(nn.functional.linear(x, mlp.w2.weight)) * nn.functional.linear(x, mlp.w1.weight)
    return nn.functional.linear(gated, mlp.c_proj.weight)


def gradients(function, mlp, x):
    mlp.zero_grad()
    x.grad = None
    result = function(x)
    (result.float() * torch.arange(result.numel()).view_as(result)).sum().backward()
    return [result.detach(), x.grad.clone(), *(weight.grad.clone() for weight in mlp.parameters())]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_those_of_plain_torch(mlp, dtype, autocast):
    mlp, x = mlp.to(dtype), states(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        found, expected = gradients(mlp, mlp, x), gradients(lambda x: plain(mlp, x), mlp, x)
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.equal(mine, theirs)


def test_gradients_and_theirs_agree_with_finite_differences(mlp):
    mlp, x = mlp.double(), states(torch.float64)
    assert gradcheck(mlp, (x,)) and gradgradcheck(mlp, (x,))


def test_what_is_not_bare_is_called_once(mlp):
    calls = []
    mlp.c_proj.forward = lambda x, forward=mlp.c_proj.forward: calls.append(x.shape) or forward(x)
    mlp(states()).sum().backward()
    assert calls == [(*ROWS, INNER)]


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_inside_of_another_checkpoint_nothing_changes(mlp, use_reentrant):
    x = states()
    expected = gradients(mlp, mlp, x)
    found = gradients(lambda x: checkpoint(mlp, x, use_reentrant=use_reentrant), mlp, x)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("part", ["act_fn", "c_proj"])
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_hooks_see_one_pass(mlp, part, kind):
    calls, x = [], states()
    expected = gradients(mlp, mlp, x)
    hook = getattr(getattr(mlp, part), f"register_{kind}_hook")(lambda *seen: calls.append(kind))
    assert all(map(torch.equal, gradients(mlp, mlp, x), expected))
    assert len(calls) == 1
    hook.remove()


@pytest.mark.parametrize("kind", ["forward", "forward_pre"])
def test_a_hook_of_all_modules_sees_each_once(mlp, kind):
    calls, x = [], states()
    hook = getattr(nn.modules.module, f"register_module_{kind}_hook")(lambda module, *seen: calls.append(module))
    try:
        mlp(x).sum().backward()
    finally:
        hook.remove()
    assert len(calls) == len(set(calls)) == 5


def test_what_a_hook_makes_of_the_activation_is_learnt_from(mlp):
    x = states()
    mlp.act_fn.register_forward_hook(lambda module, given, result: 2 * result)
    found = gradients(mlp, mlp, x)
    expected = gradients(lambda x: 2 * plain(mlp, x), mlp, x)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs)


class Noisy(nn.Linear):
    """Draws random numbers, as an adapter with dropout does."""

    def forward(self, x):
        self.mask = torch.rand_like(x) < 0.5
        return super().forward(x * self.mask)


def test_random_numbers_are_drawn_once(mlp):
    mlp.c_proj = Noisy(INNER, WIDTH, bias=False)
    x = states()
    mlp(x).sum().backward()
    mask, found = mlp.c_proj.mask, x.grad.clone()
    x.grad = None
    gated = nn.functional.silu(mlp.w2(x)) * mlp.w1(x)
    nn.functional.linear(gated * mask, mlp.c_proj.weight).sum().backward()
    torch.testing.assert_close(found, x.grad)


def test_frozen_weights_below_a_learning_one(mlp):
    x = states().detach()
    mlp.requires_grad_(False)
    mlp.w1.weight.requires_grad_()
    mlp(x).sum().backward()
    found = mlp.w1.weight.grad.clone()
    mlp.zero_grad()
    plain(mlp, x).sum().backward()
    assert torch.equal(found, mlp.w1.weight.grad)


def test_without_gradients_it_is_one_pass(mlp):
    with torch.no_grad():
        assert torch.equal(mlp(states()), plain(mlp, states()))
