"""Gradients, checkpointing, dropout, half precision and LoRA."""

import pytest
import torch
from torch.func import functional_call, grad, vmap


@pytest.fixture
def ids():
    return torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(0))


def gradients(model, ids):
    model.zero_grad()
    model.train()(ids, labels=ids).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(tiny_model, ids, use_reentrant):
    model = tiny_model("sdpa")
    expected = gradients(model, ids)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    assert all(block.gradient_checkpointing for block in model.transformer.h)
    for name, gradient in gradients(model, ids).items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-6, rtol=1e-5)
    model.gradient_checkpointing_disable()
    assert not any(block.gradient_checkpointing for block in model.transformer.h)


def test_gradients_agree_with_finite_differences(tiny_model):
    model = tiny_model("eager", n_layer=1, seq_length=4).double().train()
    ids, weight = torch.arange(6)[None], model.transformer.h[0].attn.c_attn.weight
    model(ids, labels=ids).loss.backward()
    direction = torch.randn_like(weight)
    slope = (weight.grad * direction).sum()
    with torch.no_grad():
        losses = []
        for step in (1e-4, -1e-4):
            weight += step * direction
            losses.append(model(ids, labels=ids).loss)
            weight -= step * direction
    # Rotary angles and norms are float32 by definition, so the loss is exact to about 1e-7 only.
    torch.testing.assert_close((losses[0] - losses[1]).double() / 2e-4, slope, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("training", [False, True])
def test_gradients_of_each_text_by_torch_func(tiny_model, ids, training):
    """Which takes no checkpoints and none of the loss without logits."""
    model = tiny_model("sdpa").train(training)
    weights = {name: weight.detach() for name, weight in model.named_parameters()}

    def loss(weights, text):
        return functional_call(model, weights, (text[None],), dict(labels=text[None], use_cache=False)).loss

    found = vmap(grad(loss), in_dims=(None, 0), randomness="different")(weights, ids)
    for row, text in enumerate(ids):
        model.zero_grad()
        model(text[None], labels=text[None], use_cache=False).loss.backward()
        for name, weight in model.named_parameters():
            torch.testing.assert_close(found[name][row], weight.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["embd_pdrop", "attn_pdrop"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_dropout_only_while_training(tiny_model, ids, name, implementation):
    model = tiny_model(implementation, **{name: 0.5})
    assert torch.equal(model.eval()(ids).logits, model(ids).logits)
    torch.manual_seed(0)
    first = model.train()(ids).logits
    assert not torch.allclose(first, model(ids).logits)
    torch.manual_seed(0)
    assert torch.equal(model(ids).logits, first)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_stays_finite_under_padding(tiny_model, ids, dtype):
    mask = torch.ones_like(ids)
    mask[0, :39] = 0
    for implementation in ("eager", "sdpa"):
        assert tiny_model(implementation).to(dtype)(ids, attention_mask=mask).logits.isfinite().all()


def test_autocast_keeps_positions_in_float32(tiny_model, ids):
    model = tiny_model("sdpa")
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        inside = model(ids).logits
    torch.testing.assert_close(inside.float(), model(ids).logits, atol=0.2, rtol=0)


def test_lora_merges_into_the_same_model(tiny_model, ids):
    from peft import LoraConfig, get_peft_model

    base = tiny_model("sdpa")
    model = get_peft_model(base, LoraConfig(target_modules=["c_attn", "c_proj", "w1", "w2"], task_type="CAUSAL_LM"))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        losses.append(model.train()(ids, labels=ids).loss)
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    with torch.no_grad():
        adapted = model.eval()(ids).logits
        merged = model.merge_and_unload()(ids).logits
    torch.testing.assert_close(merged, adapted, atol=1e-4, rtol=0)


def test_an_int8_cache_does_not_cut_gradients(tiny_model, ids):
    expected = gradients(tiny_model("sdpa"), ids)
    for name, gradient in gradients(tiny_model("sdpa", use_cache_quantization=True), ids).items():
        torch.testing.assert_close(gradient, expected[name])


def test_learns_a_text_by_heart(tiny_model, ids):
    model = tiny_model("sdpa", initializer_range=0.02)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        loss = model.train()(ids[:1], labels=ids[:1]).loss
        loss.backward()
        optimizer.step()
    assert loss < 0.1
    written = model.eval().generate(ids[:1, :4], max_new_tokens=20, do_sample=False, pad_token_id=256)
    assert written.tolist() == ids[:1, :24].tolist()
