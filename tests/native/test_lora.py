"""LoRA by the kernels of a CPU: the logits of peft's own layers, or where they can't run, by these."""

import gc
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from qwen1 import steps_qwen
from qwen1.native_qwen import wait
from qwen1.steps_qwen import product_of_linear

from .conftest import logits_of, without

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.skipif(wait() is None, reason="needs g++ or clang++ on Linux")

LAYERS = ["c_attn", "attn.c_proj", "w1", "w2", "mlp.c_proj"]
RANK = 5


def adapted(model, seed=7, name="default", autocast_adapter_dtype=True, **changes):
    """With a LoRA whose effect is as large as that of the weights, in eval mode."""
    torch.manual_seed(seed)
    words = dict(r=RANK, lora_alpha=2 * RANK, target_modules=LAYERS, init_lora_weights=False, lora_dropout=0.1)
    config = peft.LoraConfig(**words | changes)
    return peft.get_peft_model(model, config, name, autocast_adapter_dtype=autocast_adapter_dtype).eval()


def first_lora(model):
    return next(module for module in model.modules() if isinstance(module, peft.tuners.lora.Linear))


LORAS = {
    "all layers": {},
    "some layers": {"target_modules": ["w1", "c_attn"]},
    "a rank above the width": {"r": 70},
    "rank 1": {"r": 1},
    "biases": {"lora_bias": True},
    "rslora": {"use_rslora": True},
}


@pytest.mark.parametrize(("rows", "at_once"), [(1, 1), (3, 1), (1, 7), (12, 1)])
@pytest.mark.parametrize("lora", LORAS)
def test_logits_in_float32(tiny_model, monkeypatch, steps, lora, rows, at_once):
    model = adapted(tiny_model("sdpa"), **LORAS[lora])
    words = dict(rows=rows, tokens=2 * at_once, at_once=at_once, padded=rows > 1)
    expected = without(monkeypatch, lambda: logits_of(model, **words))
    assert not steps
    logits = logits_of(model, **words)
    assert len(steps) == 2
    torch.testing.assert_close(logits, expected, atol=5e-5, rtol=5e-5)
    with model.disable_adapter():
        assert not torch.allclose(logits_of(model, **words), expected, atol=0.1)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("float_adapter", [True, False])
@pytest.mark.parametrize(("rows", "at_once"), [(1, 1), (3, 5)])
def test_half_precision_errs_no_more_than_pefts(tiny_model, monkeypatch, steps, float_adapter, rows, at_once, half):
    def made(dtype=half):
        model = adapted(tiny_model("sdpa").to(half), autocast_adapter_dtype=float_adapter)
        return model if dtype == half else model.to(dtype)

    model, words = made(), dict(rows=rows, tokens=12 * at_once, at_once=at_once)
    assert first_lora(model).lora_A["default"].weight.dtype == (torch.float32 if float_adapter else half)
    exact = without(monkeypatch, lambda: logits_of(made(torch.float32), **words))
    modules = without(monkeypatch, lambda: logits_of(model, **words))
    kernel = logits_of(model, **words)
    assert len(steps) == 12
    errors = [float((logits.float() - exact).norm() / exact.norm()) for logits in (kernel, modules)]
    assert errors[0] < 1.1 * errors[1]


def test_what_is_off_or_merged_adds_nothing_more(tiny_model, monkeypatch, steps):
    model = adapted(tiny_model("sdpa"))
    with model.disable_adapter():
        torch.testing.assert_close(logits_of(model), logits_of(tiny_model("sdpa")), atol=1e-6, rtol=1e-6)
    alone = logits_of(model)
    model.merge_adapter()
    torch.testing.assert_close(logits_of(model), alone, atol=1e-4, rtol=1e-4)
    model.unmerge_adapter()
    torch.testing.assert_close(logits_of(model), alone, atol=1e-4, rtol=1e-4)
    assert len(steps) == 5 * 3


def test_what_is_merged_and_then_off_is_taken_out_by_peft(tiny_model, steps):
    model = adapted(tiny_model("sdpa"))
    alone = logits_of(model)
    model.merge_adapter()
    with model.disable_adapter():
        torch.testing.assert_close(logits_of(model), logits_of(tiny_model("sdpa")), atol=1e-4, rtol=1e-4)
        assert not any(lora.merged for lora in model.modules() if isinstance(lora, peft.tuners.lora.Linear))
    torch.testing.assert_close(logits_of(model), alone, atol=1e-4, rtol=1e-4)


def test_a_change_of_adapters_counts_from_the_next_token_on(tiny_model, monkeypatch, steps):
    model = adapted(tiny_model("sdpa"))
    model.add_adapter("other", peft.LoraConfig(r=3, target_modules=LAYERS[2:], init_lora_weights=False))
    model.eval()  # peft's new dropout is in training
    first = logits_of(model)
    model.set_adapter("other")
    second = logits_of(model)
    assert len(steps) == 6 and not torch.allclose(first, second, atol=0.1)
    torch.testing.assert_close(second, without(monkeypatch, lambda: logits_of(model)), atol=5e-5, rtol=5e-5)
    changed = [module for module in model.modules() if isinstance(module, peft.tuners.lora.Linear)]
    for lora in (lora for lora in changed if "other" in lora.scaling):
        lora.scaling["other"] *= 2
        lora.lora_B["other"].weight.data = lora.lora_B["other"].weight.detach() * 0.75
    third = logits_of(model)
    torch.testing.assert_close(third, without(monkeypatch, lambda: logits_of(model)), atol=5e-5, rtol=5e-5)
    assert not torch.allclose(second, third, atol=1e-3)


def test_what_the_kernel_is_told_lives_as_long_as_its_call(tiny_model, monkeypatch, steps):
    """The adapters are objects of their own, that nothing but the call holds."""
    model = adapted(tiny_model("sdpa"))
    expected = without(monkeypatch, lambda: logits_of(model))
    logits_of(model)
    layers = steps[0][1]
    gc.collect()
    ranks = {layers[0].c_attn.adapter.contents.down.rows for _ in range(3)}
    assert ranks == {RANK}
    torch.testing.assert_close(logits_of(model), expected, atol=5e-5, rtol=5e-5)


def dropout_in_training(model):
    first_lora(model).lora_dropout["default"].train()


def hook_on_the_way_down(model):
    first_lora(model).lora_A["default"].register_forward_hook(lambda module, given, result: result * 2)


def hook_beside(model):
    first_lora(model).register_forward_hook(lambda module, given, result: result * 2)


def forward_of_an_object(model):
    lora = first_lora(model)
    lora.forward = lambda states: type(lora).forward(lora, states) * 2


def two_at_once(model):
    model.add_adapter("other", peft.LoraConfig(r=3, target_modules=LAYERS, init_lora_weights=False))
    model.base_model.set_adapter(["default", "other"])
    model.eval()


def other_base(model):
    base = first_lora(model).base_layer
    base.register_forward_hook(lambda module, given, result: result * 2)


def columns(model):
    down = first_lora(model).lora_A["default"]
    down.weight = nn.Parameter(down.weight.t().contiguous().t())


BY_PEFTS_LAYERS = (dropout_in_training, hook_on_the_way_down, hook_beside, forward_of_an_object, two_at_once)
BY_PEFTS_LAYERS += (other_base, columns)


@pytest.mark.parametrize("change", BY_PEFTS_LAYERS, ids=lambda change: change.__name__)
def test_what_is_not_plain_goes_through_pefts_layers(tiny_model, monkeypatch, steps, change):
    model = adapted(tiny_model("sdpa"))
    change(model)
    torch.manual_seed(1)
    logits = logits_of(model)
    torch.manual_seed(1)
    torch.testing.assert_close(logits, without(monkeypatch, lambda: logits_of(model)), atol=5e-5, rtol=5e-5)
    assert not steps


@pytest.mark.parametrize("variant", [{"use_dora": True}, {"target_modules": ["w1"], "use_dora": True}])
def test_variants_go_through_pefts_layers(tiny_model, monkeypatch, steps, variant):
    model = adapted(tiny_model("sdpa"), **variant)
    expected = without(monkeypatch, lambda: logits_of(model))
    torch.testing.assert_close(logits_of(model), expected, atol=5e-5, rtol=5e-5)
    assert not steps


def test_adapters_beside_few_bits(tiny_model, monkeypatch, steps, tmp_path):
    from qwen1 import QWenBitsConfig, QWenLMHeadModel

    tiny_model("sdpa").save_pretrained(tmp_path)
    few = QWenLMHeadModel.from_pretrained(tmp_path, quantization_config=QWenBitsConfig(bits=8), dtype=torch.float32)
    model = adapted(few, target_modules=LAYERS)
    expected = without(monkeypatch, lambda: logits_of(model))
    torch.testing.assert_close(logits_of(model), expected, atol=2e-2, rtol=2e-2)
    assert len(steps) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("used", [True, False])
def test_products_of_a_prompt(tiny_model, monkeypatch, dtype, used):
    model = adapted(tiny_model("sdpa").to(dtype))
    lora, states = first_lora(model), torch.randn((2, 40, 64)).to(dtype)
    lora.enable_adapters(used)
    with torch.no_grad():
        expected, found = lora(states), product_of_linear(lora, states)
        if not hasattr(wait(), "qwen_many_float32"):
            assert found is None
            return
        assert found.dtype == dtype
        bound = 1e-4 if dtype == torch.float32 else 5e-2
        torch.testing.assert_close(found, expected, atol=bound, rtol=bound)
        lora.base_layer.register_forward_hook(lambda module, given, result: result * 2)
        assert product_of_linear(lora, states) is None


@pytest.mark.skipif(not hasattr(wait(), "qwen_many_float32"), reason="needs AVX2")
@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("float_adapter", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_are_rounded_as_by_peft(tiny_model, dtype, float_adapter, tokens):
    """Of small whole numbers, whose sums are exact in float32 in any order."""
    model = adapted(tiny_model("sdpa").to(dtype), lora_alpha=1.3 * RANK, autocast_adapter_dtype=float_adapter)
    lora = first_lora(model)
    with torch.no_grad():
        for weight in lora.parameters():
            weight.copy_(torch.randint(-2, 3, weight.shape))
        states = torch.randint(-3, 4, (tokens, 64)).to(dtype)
        found = product_of_linear(lora, states)
        assert found is not None or not hasattr(wait(), f"qwen_many_{str(dtype)[6:]}")
        assert found is None or torch.equal(found, lora(states))


def test_a_head_that_was_trained_with_the_adapter(tiny_model, monkeypatch):
    """As those of base models are, with the embedding."""
    model = adapted(tiny_model("sdpa"), modules_to_save=["lm_head", "wte"])
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.mul_(2)
    products = []
    product = steps_qwen.product_of_head
    monkeypatch.setattr(
        steps_qwen, "product_of_head", lambda *given: (products.append(product(*given)), products[-1])[1]
    )
    for used in (True, False):
        with nullcontext() if used else model.disable_adapter():
            expected = without(monkeypatch, lambda: logits_of(model))
            products.clear()
            torch.testing.assert_close(logits_of(model), expected, atol=5e-5, rtol=5e-5)
            prompts = hasattr(wait(), "qwen_many_float32")
            assert [product is not None for product in products] == [prompts, True, True, True]
    model.base_model.model.lm_head.register_forward_hook(lambda module, given, result: result * 2)
    products.clear()
    torch.testing.assert_close(logits_of(model), without(monkeypatch, lambda: logits_of(model)), atol=5e-5, rtol=5e-5)
    assert not any(product is not None for product in products)


def test_an_adapter_of_another_size_is_told_by_torch(tiny_model, steps):
    model = adapted(tiny_model("sdpa"))
    down = first_lora(model).lora_A["default"]
    down.weight = nn.Parameter(down.weight[:, :-1].contiguous())
    with pytest.raises(RuntimeError):
        logits_of(model)
    assert not steps
