"""A few tokens of each row by the kernel: the logits of the modules, or where it can't run, by the modules."""

import os

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AttentionInterface, StaticCache
from transformers.cache_utils import DynamicCache

from qwen1 import QWenLMHeadModel, products_qwen, steps_qwen
from qwen1.attention_qwen import eager_attention_forward
from qwen1.cache_qwen import QWenInt8Cache, new_cache
from qwen1.modeling_qwen import QWenAttention, QWenMLP
from qwen1.native_qwen import wait
from qwen1.translating_qwen import SWITCH

from .conftest import LENGTH, logits_of, without

pytestmark = pytest.mark.skipif(wait() is None, reason="needs g++ or clang++ on Linux")

SHAPES = {
    "plain": {},
    "grouped": {"num_key_value_heads": 2},
    "odd": {"n_embd": 4 * 23, "kv_channels": 22, "ffn_hidden_size": 2 * 37},
    "wide heads": {"n_embd": 4 * 152, "kv_channels": 152, "ffn_hidden_size": 2 * 331, "initializer_range": 0.05},
    "biases": {"no_bias": False},
    "partial rotary": {"rotary_pct": 0.5},
    "NTK and LogN": {"use_dynamic_ntk": True, "use_logn_attn": True, "seq_length": 16},
    "scores not scaled": {"scale_attn_weights": False, "initializer_range": 0.02},
}


@pytest.mark.parametrize("rows", [1, 2, 3, 11, 16, 64])
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_in_float32(tiny_model, monkeypatch, steps, shape, rows):
    model = tiny_model("sdpa", **SHAPES[shape])
    expected = without(monkeypatch, lambda: logits_of(model, rows, padded=rows > 1))
    assert not steps
    logits = logits_of(model, rows, padded=rows > 1)
    assert len(steps) == (3 if rows <= 16 or hasattr(wait(), "qwen_many_float32") else 0)
    torch.testing.assert_close(logits, expected, atol=3e-5, rtol=3e-5)


@pytest.mark.parametrize("rows", [1, 3, 16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_errs_no_more_than_the_modules(tiny_model, monkeypatch, steps, shape, rows, dtype):
    model, settings = tiny_model("sdpa", **SHAPES[shape]).to(dtype), dict(rows=rows, tokens=12)  # of few, chance tells
    wide = tiny_model("sdpa", **SHAPES[shape]).to(dtype).float()
    exact = without(monkeypatch, lambda: logits_of(wide, **settings))
    modules = without(monkeypatch, lambda: logits_of(model, **settings))
    kernel = logits_of(model, **settings)
    assert steps
    errors = [float((logits.float() - exact).norm() / exact.norm()) for logits in (kernel, modules)]
    assert errors[0] < 1.1 * errors[1]


@pytest.mark.parametrize(("rows", "at_once"), [(1, 2), (1, 7), (1, 16), (2, 3), (3, 5), (8, 2)])
@pytest.mark.parametrize("shape", SHAPES)
def test_several_tokens_of_a_row_in_float32(tiny_model, monkeypatch, steps, shape, rows, at_once):
    model = tiny_model("sdpa", **SHAPES[shape])
    settings = dict(rows=rows, tokens=2 * at_once, padded=rows > 1)
    one_by_one = logits_of(model, **settings)
    expected = without(monkeypatch, lambda: logits_of(model, **settings, at_once=at_once))
    steps.clear()
    logits = logits_of(model, **settings, at_once=at_once)
    assert len(steps) == 2
    torch.testing.assert_close(logits, expected, atol=3e-5, rtol=3e-5)
    torch.testing.assert_close(logits, one_by_one, atol=3e-5, rtol=3e-5)


@pytest.mark.parametrize(("rows", "at_once"), [(1, 4), (1, 11), (3, 5)])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_several_tokens_of_a_row_in_half_precision(tiny_model, monkeypatch, steps, shape, rows, at_once, dtype):
    model = tiny_model("sdpa", **SHAPES[shape]).to(dtype)
    wide = tiny_model("sdpa", **SHAPES[shape]).to(dtype).float()
    settings = dict(rows=rows, tokens=12 * at_once, at_once=at_once)  # of few, chance would tell
    exact = without(monkeypatch, lambda: logits_of(wide, **settings))
    modules = without(monkeypatch, lambda: logits_of(model, **settings))
    kernel = logits_of(model, **settings)
    assert steps
    errors = [float((logits.float() - exact).norm() / exact.norm()) for logits in (kernel, modules)]
    assert errors[0] < 1.1 * errors[1]


def test_a_mask_of_the_callers_own_for_several_tokens(tiny_model, monkeypatch, steps):
    """One in which tokens see others behind them, not all of those before, or, as padding, nothing."""
    model = tiny_model("sdpa")
    seen = torch.rand((2, 1, 4, LENGTH + 4), generator=torch.Generator().manual_seed(3)) < 0.7
    seen[..., -1] = True
    seen[1, :, :2] = False
    ids = torch.randint(0, model.config.vocab_size, (2, LENGTH + 4))

    def run():
        cache = new_cache(model.transformer)
        with torch.no_grad():
            model(ids[:, :LENGTH], cache=cache)
            return model(ids[:, LENGTH:], attention_mask=seen, cache=cache).logits

    expected = without(monkeypatch, run)
    assert not steps
    torch.testing.assert_close(run(), expected, atol=3e-5, rtol=3e-5)
    assert steps


@pytest.mark.parametrize("by", ["prompt lookup", "an assistant"])
def test_guesses_are_looked_over_by_the_kernel(tiny_model, monkeypatch, steps, by):
    """What is guessed wrongly leaves the cache again."""
    model = tiny_model("sdpa", use_dynamic_ntk=True, use_logn_attn=True, seq_length=16)
    assistant = {"assistant_model": tiny_model("sdpa", seed=1)}
    guessed = {"prompt_lookup_num_tokens": 5} if by == "prompt lookup" else assistant
    ids = torch.randint(0, 50, (1, 20), generator=torch.Generator().manual_seed(5)).repeat(1, 2)
    settings = dict(max_new_tokens=24, min_new_tokens=24, do_sample=False)
    expected = without(monkeypatch, lambda: model.generate(ids, **settings))
    assert torch.equal(model.generate(ids, **settings, **guessed), expected)
    assert any(call[3].shape[1] > 1 for call in steps)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_threads(tiny_model, monkeypatch, threads):
    model = tiny_model("sdpa")
    expected = without(monkeypatch, lambda: logits_of(model, 3))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        torch.testing.assert_close(logits_of(model, 3), expected, atol=3e-5, rtol=3e-5)
    finally:
        torch.set_num_threads(before)


def test_generate_and_its_cache(tiny_model, monkeypatch, steps):
    model = tiny_model("sdpa", use_dynamic_ntk=True, use_logn_attn=True, seq_length=16)
    ids = torch.randint(0, model.config.vocab_size, (2, 20))
    settings = dict(max_new_tokens=12, min_new_tokens=12, do_sample=False, return_dict_in_generate=True)
    expected = without(monkeypatch, lambda: model.generate(ids, **settings))
    assert not steps
    found = model.generate(ids, **settings)
    assert steps
    assert torch.equal(found.sequences, expected.sequences)
    for mine, other in zip(found.past_key_values.layers, expected.past_key_values.layers, strict=True):
        torch.testing.assert_close(mine.keys, other.keys, atol=3e-5, rtol=3e-5)
        torch.testing.assert_close(mine.values, other.values, atol=3e-5, rtol=3e-5)


@pytest.mark.parametrize("asked", ["argument", "configuration"])
def test_hidden_states_come_from_the_modules_and_later_tokens_from_the_kernel(tiny_model, monkeypatch, steps, asked):
    """Transformers' hooks, by which it collects them, stay on the model."""
    model = tiny_model("sdpa")
    cache, ids = new_cache(model.transformer), torch.arange(8)[None]
    states = {} if asked == "configuration" else {"output_hidden_states": True}
    with torch.no_grad():
        model(ids, cache=cache)
        model.config.output_hidden_states = asked == "configuration"
        found = model(ids[:, :1], cache=cache, **states).hidden_states
        assert len(found) == 1 + len(model.transformer.h) and not steps
        again = model(ids[:, :1], cache=cache, **states).hidden_states
        assert len(again) == len(found) and not steps
        model.config.output_hidden_states = False
        model(ids[:, :1], cache=cache)
    assert len(steps) == 1
    logits = logits_of(model, 2, padded=True)
    assert len(steps) == 4
    torch.testing.assert_close(
        logits, without(monkeypatch, lambda: logits_of(model, 2, padded=True)), atol=3e-5, rtol=3e-5
    )


def test_stop_strings_and_what_nobody_reads_leave_tokens_to_the_kernel(tiny_model, steps, byte_tokenizer):
    model, ids = tiny_model("sdpa"), torch.arange(8)[None]
    words = dict(max_new_tokens=4, min_new_tokens=4, do_sample=False)
    expected = model.generate(ids, **words)
    assert len(steps) == 3
    assert torch.equal(model.generate(ids, stop_strings=["\0\1\2"], tokenizer=byte_tokenizer, **words), expected)
    assert len(steps) == 6
    logits_of(model, output_hidden_states=False, token_type_ids=torch.zeros((1, 1), dtype=torch.long))
    assert len(steps) == 9


def hook(module, *args):
    return None


WAYS_BY_THE_MODULES = {
    "hook": lambda model: model.transformer.h[0].mlp.register_forward_hook(hook),
    "hook before": lambda model: model.transformer.h[0].attn.c_attn.register_forward_pre_hook(hook),
    "forward of an object": lambda model: setattr(
        model.transformer.h[0].mlp, "forward", model.transformer.h[0].mlp.forward
    ),
    "another activation": lambda model: setattr(model.transformer.h[0].mlp, "act_fn", nn.GELU()),
    "another linear": lambda model: setattr(model.transformer.h[0].mlp, "w1", type("Other", (nn.Linear,), {})(64, 96)),
    "training": lambda model: model.transformer.h[0].mlp.train(),
    "double": lambda model: model.double(),
    "eager": lambda model: model.set_attn_implementation("eager"),
    "weights in columns": lambda model: setattr(
        model.transformer.h[0].mlp.w1, "weight", nn.Parameter(model.transformer.h[0].mlp.w1.weight.t().contiguous().t())
    ),
    "one weight of another dtype": lambda model: model.transformer.h[0].ln_1.double(),
}


@pytest.mark.parametrize("change", WAYS_BY_THE_MODULES)
def test_what_is_not_plain_goes_through_the_modules(tiny_model, steps, change):
    model = tiny_model("sdpa")
    WAYS_BY_THE_MODULES[change](model)
    try:
        logits_of(model)
    except RuntimeError as error:  # of the modules, which don't take two dtypes
        assert "dtype" in str(error)
    assert not steps


def test_a_patched_class_is_obeyed(tiny_model, monkeypatch, steps):
    model = tiny_model("sdpa")
    plain = logits_of(model)
    steps.clear()
    monkeypatch.setattr(QWenMLP, "forward", lambda self, states: torch.zeros_like(states))
    assert not torch.allclose(logits_of(model), plain)
    assert not steps


def test_an_attention_of_the_users_own_is_obeyed(tiny_model, monkeypatch, steps):
    calls = []

    def own(module, query, *args, **kwargs):
        calls.append(query.shape)
        return eager_attention_forward(module, query, *args, **kwargs)

    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", own)
    logits_of(tiny_model("sdpa"))
    assert calls and not steps


@pytest.mark.parametrize("make", [DynamicCache, QWenInt8Cache, lambda: None])
def test_other_caches(tiny_model, steps, make):
    model = tiny_model("sdpa")
    cache = make() or StaticCache(config=model.config, max_cache_len=64)
    logits_of(model, cache=cache)
    assert not steps


def test_modes(tiny_model, steps):
    model = tiny_model("sdpa").bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits_of(model)
    with FlopCounterMode(display=False) as counter:
        logits_of(model)
    assert counter.get_total_flops()
    assert not steps


def test_gradients(tiny_model, steps):
    model = tiny_model("sdpa")
    cache = new_cache(model.transformer)
    with torch.no_grad():
        model(torch.arange(8)[None], cache=cache)
    model(torch.tensor([[3]]), cache=cache).logits.sum().backward()
    assert model.transformer.h[0].attn.c_attn.weight.grad is not None and not steps


@pytest.mark.parametrize(("rows", "at_once"), [(65, 1), (1, 17), (22, 3)])
def test_more_tokens_go_through_the_modules(tiny_model, steps, rows, at_once):
    assert logits_of(tiny_model("sdpa"), rows, at_once, at_once=at_once).shape[:2] == (rows, at_once)
    assert not steps


@pytest.mark.parametrize(("rows", "at_once"), [(17, 1), (6, 3)])
def test_more_than_sixteen_in_all_need_kernels_for_them(tiny_model, monkeypatch, steps, rows, at_once):
    monkeypatch.setattr(products_qwen, "_has_many", lambda native, dtype: False)
    logits_of(tiny_model("sdpa"), rows, at_once, at_once=at_once)
    assert not steps


def test_a_mask_of_numbers(tiny_model, steps):
    """Added to the scores: the kernel knows only which keys are seen."""
    model = tiny_model("sdpa")
    cache = new_cache(model.transformer)
    with torch.no_grad():
        model(torch.arange(8)[None], cache=cache)
        mask = torch.zeros((1, 1, 1, 9))
        mask[..., 2] = torch.finfo(torch.float32).min
        model(torch.tensor([[3]]), attention_mask=mask, cache=cache)
    assert not steps


def test_the_head(tiny_model, monkeypatch):
    model = tiny_model("sdpa")
    states = torch.randn((3, 1, model.config.n_embd))
    with torch.no_grad():
        torch.testing.assert_close(
            steps_qwen.product_of_head(model.lm_head, steps_qwen.Plain(), states), model.lm_head(states)
        )
        assert steps_qwen.product_of_head(nn.Identity(), steps_qwen.Plain(), states) is None
        handle = model.lm_head.register_forward_hook(hook)
        assert steps_qwen.product_of_head(model.lm_head, steps_qwen.Plain(), states) is None
        handle.remove()


@pytest.mark.parametrize("part", ["ln_1", "attn.c_attn", "mlp.c_proj"])
def test_weights_of_another_size_are_told_by_torch(tiny_model, steps, part):
    """The kernel would read beyond their end."""
    model = tiny_model("sdpa")
    ids = torch.arange(8)[None]
    cache = new_cache(model.transformer)
    with torch.no_grad():
        model(ids, cache=cache)
        module = model.transformer.h[1].get_submodule(part)
        module.weight = nn.Parameter(module.weight[..., :-1].contiguous())
        with pytest.raises(RuntimeError):
            model(ids[:, :1], cache=cache)
    assert not steps


def test_a_head_of_another_width_is_told_by_torch(tiny_model):
    model = tiny_model("sdpa")
    with torch.no_grad(), pytest.raises(RuntimeError):
        steps_qwen.logits_of_head(nn.Linear(63, 9), steps_qwen.Plain(), torch.ones((1, 1, model.config.n_embd)))


def test_compiled_and_exported_programs_hold_the_modules(tiny_model, steps):
    model = tiny_model("sdpa")
    torch.compile(model, backend="eager")(torch.tensor([[3]]), use_cache=False)
    assert not steps
    assert isinstance(model, QWenLMHeadModel) and isinstance(model.transformer.h[0].attn, QWenAttention)


def test_the_switch(tiny_model, monkeypatch, steps):
    monkeypatch.setenv(SWITCH, "0")
    logits_of(tiny_model("sdpa"))
    assert wait() is None and not steps
    assert os.environ[SWITCH] == "0"
