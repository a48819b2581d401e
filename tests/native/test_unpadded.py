"""Padded prompts on a CPU, read without their padding: what the modules give for the whole rows."""

import pytest
import torch
from transformers import AttentionInterface, StaticCache
from transformers.cache_utils import DynamicCache

from qwen1 import (
    QWenBitsConfig,
    QWenForQuestionAnswering,
    QWenForTokenClassification,
    QWenLMHeadModel,
    unpadded_qwen,
)
from qwen1.attention_qwen import eager_attention_forward
from qwen1.cache_qwen import QWenInt8Cache, new_cache
from qwen1.native_qwen import wait
from qwen1.translating_qwen import SWITCH

pytestmark = [
    pytest.mark.skipif(wait() is None, reason="needs g++ or clang++ on Linux"),
    pytest.mark.skipif(wait() is not None and not hasattr(wait(), "qwen_many_float32"), reason="needs AVX2"),
]

PADDING = (0, 5, 21, 39, 1)
TOKENS = 40


@pytest.fixture
def laid(monkeypatch):
    """Numbers of tokens that were laid end to end."""
    counted, gather = [], unpadded_qwen._Texts.arguments

    def count(texts, arguments):
        counted.append(len(texts.places))
        return gather(texts, arguments)

    monkeypatch.setattr(unpadded_qwen._Texts, "arguments", count)
    return counted


def batch(model, left=True):
    ids = torch.randint(0, model.config.vocab_size, (len(PADDING), TOKENS), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(TOKENS) >= torch.tensor(PADDING)[:, None]
    return dict(input_ids=ids, attention_mask=(mask if left else mask.flip(1)).long())


def with_padding(monkeypatch, run):
    with monkeypatch.context() as context:
        context.setattr(unpadded_qwen, "_LEAST_SHARE", 1)
        return run()


SHAPES = {
    "plain": {},
    "grouped": {"num_key_value_heads": 2},
    "biases": {"no_bias": False},
    "partial rotary": {"rotary_pct": 0.5},
    "NTK and LogN": {"use_dynamic_ntk": True, "use_logn_attn": True, "seq_length": 16},
}


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_states_and_cache(tiny_model, monkeypatch, laid, shape):
    model = tiny_model("sdpa", **SHAPES[shape])
    calls = batch(model)
    real = calls["attention_mask"].bool()
    expected = with_padding(monkeypatch, lambda: model.transformer(**calls, use_cache=True))
    assert not laid
    found = model.transformer(**calls, use_cache=True)
    assert laid == [int(real.sum())]
    torch.testing.assert_close(found.last_hidden_state[real], expected.last_hidden_state[real], atol=1e-5, rtol=1e-5)
    assert (found.last_hidden_state[~real] == 0).all()
    for ours, others in zip(found.past_key_values.layers, expected.past_key_values.layers, strict=True):
        for mine, other in ((ours.keys, others.keys), (ours.values, others.values)):
            assert mine.shape == other.shape
            mine, other = mine.transpose(1, 2)[real], other.transpose(1, 2)[real]
            torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision(tiny_model, monkeypatch, laid, dtype):
    model = tiny_model("sdpa").to(dtype)
    calls = batch(model)
    real = calls["attention_mask"].bool()
    expected = with_padding(monkeypatch, lambda: model(**calls).logits[real])
    torch.testing.assert_close(model(**calls).logits[real], expected, atol=2e-2, rtol=2e-2)
    assert laid


def test_each_row_is_what_it_is_alone(tiny_model, laid):
    """Judged by rows without any padding."""
    model = tiny_model("sdpa", use_dynamic_ntk=True, use_logn_attn=True, seq_length=16)
    calls = batch(model)
    settings = dict(do_sample=False, max_new_tokens=6, pad_token_id=0)
    together = model.generate(**calls, **settings)
    assert laid
    for row, (ids, mask) in enumerate(zip(calls["input_ids"], calls["attention_mask"], strict=True)):
        text = ids[mask.bool()][None]
        alone = model.generate(text, attention_mask=torch.ones_like(text), **settings)
        assert torch.equal(together[row, PADDING[row] :], alone[0])


@pytest.mark.parametrize("bits", [8, 4])
@torch.no_grad()
def test_few_bits(repository, monkeypatch, laid, bits):
    settings = QWenBitsConfig(bits=bits)
    model = QWenLMHeadModel.from_pretrained(repository / "qwen-tiny-chat", quantization_config=settings).eval()
    calls = batch(model)
    expected = with_padding(monkeypatch, lambda: model(**calls, logits_to_keep=1).logits)
    torch.testing.assert_close(model(**calls, logits_to_keep=1).logits, expected, atol=1e-3, rtol=1e-3)
    assert laid


def hooked(part):
    return lambda model: model.transformer.h[1].get_submodule(part).register_forward_hook(lambda *args: None)


CHANGES = {
    "hook of a linear": hooked("attn.c_attn"),
    "hook of a norm": hooked("ln_2"),
    "hook of a block": hooked(""),
    "training": lambda model: model.transformer.h[0].mlp.train(),
    "eager": lambda model: model.set_attn_implementation("eager"),
    "double": lambda model: model.double(),
}


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_what_is_not_plain_is_given_whole_rows(tiny_model, laid, change):
    model = tiny_model("sdpa")
    CHANGES[change](model)
    model(**batch(model))
    assert not laid


CALLS = {
    "padding behind": lambda model: batch(model, left=False),
    "no padding": lambda model: batch(model) | dict(attention_mask=None),
    "little padding": lambda model: {name: part[[0, 4]] for name, part in batch(model).items()},
    "one row": lambda model: {name: part[2:3] for name, part in batch(model).items()},
    "hidden states": lambda model: batch(model) | dict(output_hidden_states=True),
    "a static cache": lambda model: batch(model) | dict(cache=StaticCache(config=model.config, max_cache_len=60)),
    "transformers' cache": lambda model: batch(model) | dict(cache=DynamicCache()),
    "an int8 cache": lambda model: batch(model) | dict(cache=QWenInt8Cache(model.config)),
}


@pytest.mark.parametrize("part", ["h.1", "h.1.attn", "h.1.mlp", "h.1.mlp.w1"])
@torch.no_grad()
def test_a_class_of_somebodys_own_is_given_whole_rows(tiny_model, laid, somebodys_own, part):
    """Which has nothing of what the kernels would look at."""
    model = tiny_model("sdpa")
    model.transformer.set_submodule(part, somebodys_own(model.transformer.get_submodule(part)))
    model(**batch(model))
    assert not laid


@pytest.mark.parametrize("call", CALLS)
@torch.no_grad()
def test_other_calls_are_given_whole_rows(tiny_model, laid, call):
    model = tiny_model("sdpa")
    model(**CALLS[call](model))
    assert not laid


def test_heads_that_read_padding(tiny_model, laid):
    """A loss, and what a token is weighed against, are the same whether gradients are wanted or not."""
    calls = batch(tiny_model("sdpa"))
    labels = calls["input_ids"].masked_fill(calls["attention_mask"] == 0, -100)
    heads = {
        QWenLMHeadModel: dict(labels=labels),  # the first token of a row is guessed from the padding before it
        QWenForTokenClassification: dict(labels=torch.zeros_like(labels)),
        QWenForQuestionAnswering: {},
    }
    for head, given in heads.items():
        model = tiny_model("sdpa", head)
        with_gradients = model(**calls, **given)
        with torch.no_grad():
            found = model(**calls, **given)
        torch.testing.assert_close(found[0], with_gradients[0].detach(), atol=1e-5, rtol=1e-5)
    assert not laid


@torch.no_grad()
def test_a_cache_that_holds_something(tiny_model, laid):
    model = tiny_model("sdpa")
    calls, cache = batch(model), new_cache(model.transformer)
    some = {name: part[:, :20] for name, part in calls.items()}
    model(**some, cache=cache)
    laid.clear()
    model(calls["input_ids"][:, 20:], attention_mask=calls["attention_mask"], cache=cache)
    assert not laid


@torch.no_grad()
def test_a_mask_of_the_callers_own(tiny_model, laid):
    """That hides more than padding: whole rows are read, as they are asked for."""
    model = tiny_model("sdpa")
    calls = batch(model)
    seen = calls["attention_mask"].bool()
    mask = (seen[:, :, None] & seen[:, None]).tril()
    expected = model(**calls).logits[:, -1]
    torch.testing.assert_close(
        model(calls["input_ids"], attention_mask=mask[:, None], position_ids=(seen.cumsum(1) - 1).clamp(min=0)).logits[
            :, -1
        ],
        expected,
    )
    assert len(laid) == 2
    laid.clear()
    mask[0, 30:39, 10] = False
    model(calls["input_ids"], attention_mask=mask[:, None])
    assert not laid


@torch.no_grad()
def test_packed_texts_are_no_padding(tiny_model, laid):
    """The last token sees nothing of the text before its own."""
    model = tiny_model("sdpa")
    positions = torch.cat([torch.arange(10), torch.arange(30)]).expand(3, -1)
    found = model(batch(model)["input_ids"][:3], position_ids=positions, use_cache=False).logits
    alone = model(batch(model)["input_ids"][:3, :10]).logits
    torch.testing.assert_close(found[:, :10], alone, atol=1e-4, rtol=1e-4)
    assert not laid


def test_gradients_programs_and_the_switch(tiny_model, monkeypatch, laid):
    model = tiny_model("sdpa")
    calls = batch(model)
    model(**calls).logits.sum().backward()
    with torch.no_grad():
        torch.compile(model, backend="eager")(**calls, use_cache=False)
        with torch.autocast("cpu", torch.bfloat16):
            model(**calls)
        monkeypatch.setenv(SWITCH, "0")
        model(**calls)
    assert not laid


@torch.no_grad()
def test_an_attention_of_the_users_own(tiny_model, monkeypatch, laid):
    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", eager_attention_forward)
    model = tiny_model("sdpa")
    model(**batch(model))
    assert not laid
