"""Muon and AdamW in one optimizer: against torch's own, and through a checkpoint."""

import copy

import pytest
import torch

from qwen1.training.tiny import optimiser
from qwen1.training.tiny.optimiser import MuonAdamW, orthogonal


def weights(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((6, 4), (6, 4), (5, 3), (7,))]


def steps(optimizer, parameters, count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


def make(parameters):
    return MuonAdamW(parameters[:2], parameters[2:3], parameters[3:], lr=0.01, weight_decay=0.1)


@pytest.mark.parametrize("shape", [(2, 30, 50), (2, 50, 30)])
def test_singular_values_become_one(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonal(matrices).float())
    assert 0.6 < values.min() and values.max() < 1.3
    assert values.shape == (2, 30)


@pytest.mark.parametrize(("fast", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_the_iteration_is_in_a_dtype_that_the_processor_multiplies(monkeypatch, fast, dtype):
    monkeypatch.setattr(optimiser, "multiplies", lambda asked: fast)
    update = orthogonal(torch.randn(2, 30, 50, generator=torch.Generator().manual_seed(0)))
    assert update.dtype == dtype
    values = torch.linalg.svdvals(update.float())
    assert 0.6 < values.min() and values.max() < 1.3


def test_matrices_go_the_way_of_torch():
    mine, theirs = weights(), weights()
    optimizer = torch.optim.Muon(theirs[:2], lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    steps(make(mine), mine, 5)
    steps(optimizer, theirs, 5)
    for a, b in zip(mine[:2], theirs[:2], strict=True):
        torch.testing.assert_close(a, b, atol=2e-3, rtol=0)  # bfloat16 inside


def test_the_rest_goes_the_way_of_adamw():
    mine, theirs = weights(), weights()
    groups = [{"params": theirs[2:3]}, {"params": theirs[3:], "weight_decay": 0.0}]
    steps(make(mine), mine, 5)
    steps(torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.99), weight_decay=0.1), theirs, 5)
    for a, b in zip(mine[2:], theirs[2:], strict=True):
        # The gradients of the first two are drawn before, so the numbers are the same.
        torch.testing.assert_close(a, b)


def test_a_checkpoint_goes_on_as_without_one():
    whole, parts = weights(), weights()
    steps(first := make(whole), whole, 3)
    steps(make_half := make(parts), parts, 3)
    again = make(parts)
    again.load_state_dict(copy.deepcopy(make_half.state_dict()))
    steps(first, whole, 2, seed=1)
    steps(again, parts, 2, seed=1)
    for a, b in zip(whole, parts, strict=True):
        assert torch.equal(a, b)


def test_a_weight_without_a_gradient_stays():
    parameters = weights()
    before = [parameter.clone() for parameter in parameters]
    make(parameters).step()
    assert all(torch.equal(a, b) for a, b in zip(parameters, before, strict=True))
