"""The loss without logits: equal to the plain one, with its gradients, and never holding what it is to spare."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.loss.loss_utils import ForCausalLMLoss

from qwen1 import loss_qwen
from qwen1.loss_qwen import head_loss, holds_its_weight

VOCABULARY = 1000


@pytest.fixture
def ids():
    return torch.randint(0, VOCABULARY, (2, 70), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def several_pieces(monkeypatch):
    """Of 140 tokens: more than one piece, block and slice, and a rest of each."""
    monkeypatch.setattr(loss_qwen, "_PIECE", 48)
    monkeypatch.setattr(loss_qwen, "_BLOCK", 20)
    monkeypatch.setattr(loss_qwen, "_SLICE", 300)


def steps(model, ids, labels, **kwargs):
    """Loss and gradients, with and without logits."""
    found = []
    for skip in (True, False):
        model.zero_grad()
        output = model.train()(ids, labels=labels, skip_logits=skip, **kwargs)
        assert (output.logits is None) == skip
        output.loss.backward()
        found.append((output.loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    return found


def assert_equal(found, tolerance=1e-6):
    """Within a share of the loss, and of the size of the whole gradient."""
    (loss, gradients), (plain_loss, plain_gradients) = found
    torch.testing.assert_close(loss, plain_loss, rtol=tolerance, atol=0)
    assert gradients.keys() == plain_gradients.keys()
    size = torch.stack([gradient.norm() for gradient in plain_gradients.values()]).norm()
    for name, gradient in gradients.items():
        assert gradient.dtype == plain_gradients[name].dtype
        assert (gradient - plain_gradients[name]).norm() <= tolerance * size, name


@pytest.mark.parametrize("tied", [False, True])
def test_loss_and_gradients_are_the_plain_ones(tiny_model, ids, tied):
    labels = ids.clone()
    labels[0, :30] = -100
    found = steps(tiny_model(vocab_size=VOCABULARY, tie_word_embeddings=tied), ids, labels)
    assert_equal(found)
    assert found[0][0].dtype == torch.float32


@pytest.mark.parametrize("arguments", [{"num_items_in_batch": torch.tensor(300)}, {"num_items_in_batch": 7}])
def test_the_sum_can_be_divided_otherwise(tiny_model, ids, arguments):
    assert_equal(steps(tiny_model(vocab_size=VOCABULARY), ids, ids, **arguments))


def test_labels_may_be_shifted_already_and_ignored_by_another_name(tiny_model, ids):
    model = tiny_model(vocab_size=VOCABULARY)
    shifted = ids.roll(3, -1)
    shifted[:, -5:] = 999
    assert_equal(steps(model, ids, ids, shift_labels=shifted, ignore_index=999))


def test_a_loss_of_nothing_is_as_undefined_as_the_plain_one(tiny_model, ids):
    model = tiny_model(vocab_size=VOCABULARY).train()
    nothing = torch.full_like(ids, -100)
    assert model(ids, labels=nothing).loss.isnan() and model(ids, labels=nothing, skip_logits=False).loss.isnan()
    loss = model(ids, labels=nothing, num_items_in_batch=10).loss
    loss.backward()
    assert loss == 0 and model.lm_head.weight.grad.abs().max() == 0


def test_a_frozen_head_and_frozen_states(tiny_model, ids):
    model = tiny_model(vocab_size=VOCABULARY)
    model.lm_head.requires_grad_(False)
    found = steps(model, ids, ids)
    assert_equal(found)
    assert "lm_head.weight" not in found[0][1]
    model.requires_grad_(False).lm_head.requires_grad_(True)
    found = steps(model, ids, ids)
    assert_equal(found)
    assert list(found[0][1]) == ["lm_head.weight"]


def test_later_scaling_of_the_loss_scales_its_gradients(tiny_model, ids):
    model = tiny_model(vocab_size=VOCABULARY).train()
    model(ids, labels=ids).loss.backward()
    once = model.lm_head.weight.grad.clone()
    model.zero_grad()
    (model(ids, labels=ids).loss * 3).backward()
    torch.testing.assert_close(model.lm_head.weight.grad, once * 3)


def test_a_second_backward_pass_is_refused(tiny_model, ids):
    loss = tiny_model(vocab_size=VOCABULARY).train()(ids, labels=ids).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_second_derivative_is_refused_or_right(tiny_model, ids):
    """Without logits the gradients would pass for constants, as in a penalty of them."""
    model = tiny_model(vocab_size=VOCABULARY).train()

    def penalty(**arguments):
        model.zero_grad()
        loss = model(ids, labels=ids, **arguments).loss
        gradients = torch.autograd.grad(loss, model.transformer.ln_f.weight, create_graph=True)
        sum(gradient.square().sum() for gradient in gradients).backward()
        return model.lm_head.weight.grad

    with pytest.raises(RuntimeError, match="not with create_graph=True: call the model with skip_logits=False"):
        penalty()
    found = penalty(skip_logits=False)
    model.loss_function = ForCausalLMLoss  # of the caller's own, as far as the model knows
    assert found.norm() > 0
    torch.testing.assert_close(penalty(), found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_further_from_the_truth_than_the_plain_loss(dtype):
    generator = torch.Generator().manual_seed(2)
    states = torch.randn((1, 400, 64), generator=generator).to(dtype)
    weight = (torch.randn((VOCABULARY, 64), generator=generator) * 0.2).to(dtype)
    labels = torch.randint(0, VOCABULARY, (1, 400), generator=generator)

    def run(loss_of, dtype):
        leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in (states, weight)]
        loss = loss_of(*leaves)
        loss.backward()
        return [loss.detach().double(), *(leaf.grad.double() for leaf in leaves)]

    def plain(states, weight):
        logits = nn.functional.linear(states, weight).float() if states.dtype == dtype else states @ weight.t()
        return nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:])

    exact = run(plain, torch.float64)
    for ours, theirs, truth in zip(
        run(lambda states, weight: head_loss(states, weight, labels), dtype), run(plain, dtype), exact, strict=True
    ):
        # Each gradient is rounded once more, when it is divided by the number of tokens.
        assert (ours - truth).norm() <= 1.5 * (theirs - truth).norm() + 1e-6


def test_a_gradient_scaler_comes_in_time():
    """Divided by the count before it is scaled, a float16 gradient would have vanished."""
    states = torch.ones((1, 3, 4), dtype=torch.float16, requires_grad=True)
    weight = torch.full((VOCABULARY, 4), 1e-3, dtype=torch.float16, requires_grad=True)
    labels = torch.tensor([[1, 2, 3]])
    (head_loss(states, weight, labels, num_items_in_batch=100_000) * 2.0**16).backward()
    expected = 2 / VOCABULARY / 100_000 * 2.0**16
    torch.testing.assert_close(weight.grad[10].float(), torch.full((4,), expected), rtol=1e-2, atol=0)


def test_under_autocast_as_the_plain_loss(tiny_model, ids):
    model = tiny_model(vocab_size=VOCABULARY)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = steps(model, ids, ids)
    assert_equal(found, 0.01)
    assert all(grad.dtype == torch.float32 for grad in found[0][1].values())


class Largest(TorchDispatchMode):
    """The greatest number of elements of a tensor made by any operation."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.elements = max(self.elements, result.numel())
        return result


def test_all_logits_are_never_held(tiny_model):
    ids = torch.arange(200).view(2, 100)
    model = tiny_model(vocab_size=4000).train()
    found = {}
    for skip in (None, False):
        with Largest() as largest:
            model(ids, labels=ids, skip_logits=skip).loss.backward()
        found[skip] = largest.elements
    assert found[False] >= ids.numel() * 4000
    assert found[None] <= max(weight.numel() for weight in model.parameters())


def test_logits_are_there_where_they_are_wanted(tiny_model, ids):
    model = tiny_model(vocab_size=VOCABULARY)
    assert model.eval()(ids, labels=ids).logits.shape == (2, 70, VOCABULARY)
    model.train()
    assert model(ids).logits is not None
    with torch.no_grad():
        assert model(ids, labels=ids).logits is not None
        assert model(ids, labels=ids, skip_logits=True).logits is None
    model.loss_function = lambda logits, labels, vocab_size, **_: logits.sum()
    assert model(ids, labels=ids).logits is not None


@pytest.mark.parametrize("arguments", [{}, {"labels": torch.zeros(2, 70).long(), "logits_to_keep": 3}])
def test_skipping_what_is_needed_is_refused(tiny_model, ids, arguments):
    with pytest.raises(ValueError, match="skip_logits=True needs labels"):
        tiny_model(vocab_size=VOCABULARY)(ids, skip_logits=True, **arguments)


WATCHERS = {
    "forward": lambda head, seen: head.register_forward_hook(
        lambda module, given, output: seen.append(1) or output * 2
    ),
    "before it": lambda head, seen: head.register_forward_pre_hook(
        lambda module, given: seen.append(1) or given[0] * 2
    ),
    "backward": lambda head, seen: head.register_full_backward_hook(lambda *gradients: seen.append(1)),
    "in its place": lambda head, seen: setattr(head, "forward", lambda x: seen.append(1) or x @ head.weight.t() * 2),
}


@pytest.mark.parametrize("watcher", WATCHERS)
def test_what_watches_or_changes_a_head_is_called(tiny_model, ids, watcher):
    """As where logits are asked for: once, with what it makes of them."""
    model, seen = tiny_model(vocab_size=VOCABULARY).train(), []
    WATCHERS[watcher](model.lm_head, seen)
    output, expected = (model(ids, labels=ids, skip_logits=skip) for skip in (None, False))
    output.loss.backward()
    expected.loss.backward()
    assert seen == [1, 1]
    torch.testing.assert_close((output.loss, output.logits), (expected.loss, expected.logits))
    with pytest.raises(ValueError, match="without adapter, hook, "):
        model(ids, labels=ids, skip_logits=True)


def test_heads_that_are_more_than_a_matrix(tiny_model, ids):
    class Adapted(nn.Linear):
        pass

    assert holds_its_weight(nn.Linear(4, 8, bias=False))
    assert not holds_its_weight(nn.Linear(4, 8))
    assert not holds_its_weight(Adapted(4, 8, bias=False))
    sharded = nn.Linear(4, 8, bias=False)
    sharded.weight = nn.Parameter(torch.empty(0))
    assert not holds_its_weight(sharded)
    model = tiny_model(vocab_size=VOCABULARY).train()
    plain = model(ids, labels=ids).loss
    model.lm_head._hf_hook = object()
    output = model(ids, labels=ids)
    torch.testing.assert_close(output.loss, plain)
    assert output.logits is not None
    with pytest.raises(ValueError, match="Linear here"):
        model(ids, labels=ids, skip_logits=True)
