"""What attention functions are told beside masks: reading in both directions, and the wish for their probabilities."""

import pytest
import torch
from transformers import DynamicCache, StaticCache, pipeline
from transformers.utils import logging as transformers_logging

from qwen1.attention_qwen import FLASH_IMPLEMENTATION, flash_self_attention_forward

PLAIN = dict(use_dynamic_ntk=False, use_logn_attn=False)
MASKS = {
    "none": None,
    "left": torch.tensor([[0] * 4 + [1] * 8, [1] * 12]),
    "right": torch.tensor([[1] * 8 + [0] * 4, [1] * 12]),
}


@pytest.fixture
def ids():
    return torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("where", ["argument", "configuration"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@torch.no_grad()
def test_without_causality_as_qwen2(tiny_model, qwen2_twin, ids, implementation, mask, where):
    model = tiny_model(implementation, **PLAIN)
    causal, found = model(ids, attention_mask=MASKS[mask]).logits, []
    for runner in (model, qwen2_twin(model)):
        arguments = {"is_causal": False} if where == "argument" else {}
        if where == "configuration":
            runner.config.is_causal = False
        whole = runner(ids, attention_mask=MASKS[mask], **arguments).logits
        cache = DynamicCache(config=runner.config)
        for end in (8, 12):
            seen = None if mask == "none" else MASKS[mask][:, :end]
            tokens = ids[:, cache.get_seq_length() : end]
            chunk = runner(tokens, attention_mask=seen, past_key_values=cache, use_cache=True, **arguments).logits
        found.append((whole, chunk))
    shown = torch.ones(2, 12).bool() if mask == "none" else MASKS[mask].bool()
    for ours, theirs in zip(*found, strict=True):
        part = shown[:, -ours.shape[1] :]
        torch.testing.assert_close(ours[part], theirs[part], atol=2e-5, rtol=1e-4)
    assert not torch.allclose(found[0][0][shown], causal[shown], atol=0.1)


@torch.no_grad()
def test_saved_it_stays_without_causality(tiny_model, ids, tmp_path):
    model = tiny_model("sdpa", **PLAIN)
    model.save_pretrained(tmp_path / "causal")
    given = type(model).from_pretrained(tmp_path / "causal", is_causal=False)
    given.save_pretrained(tmp_path / "both ways")
    expected = model(ids, is_causal=False).logits
    assert not torch.allclose(expected, model(ids).logits, atol=0.1)
    for loaded in (given, type(model).from_pretrained(tmp_path / "both ways")):
        torch.testing.assert_close(loaded(ids).logits, expected)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@torch.no_grad()
def test_without_causality_empty_slots_of_a_static_cache_stay_unseen(tiny_model, ids, implementation):
    """Those of Qwen2 are attended to, where no mask tells which are empty."""
    model = tiny_model(implementation, **PLAIN)
    static = StaticCache(config=model.config, max_cache_len=20)
    logits = model(ids, past_key_values=static, use_cache=True, is_causal=False).logits
    torch.testing.assert_close(logits, model(ids, is_causal=False).logits, atol=2e-5, rtol=1e-4)


def test_causal_kernels_refuse_the_other_direction(tiny_model):
    attention = tiny_model().transformer.h[0].attn
    states = torch.randn(1, 4, 3, 16)
    with pytest.raises(ValueError, match="is_causal=False needs another attention than qwen_varlen: choose 'sdpa'"):
        flash_self_attention_forward(attention, states, states, states, None, is_causal=False)


@pytest.fixture
def warnings_of_attention(caplog, monkeypatch):
    """What was said about probabilities, each time anew."""
    monkeypatch.setattr(transformers_logging.get_logger("transformers"), "propagate", True)
    transformers_logging.warning_once.cache_clear()
    return lambda: [record.getMessage() for record in caplog.records if "output_attentions" in record.getMessage()]


@torch.no_grad()
def test_probabilities_that_sdpa_has_not_as_qwen2(tiny_model, qwen2_twin, ids, warnings_of_attention):
    model = tiny_model("sdpa", **PLAIN)
    ours, theirs = (runner(ids, output_attentions=True).attentions for runner in (model, qwen2_twin(model)))
    assert ours == theirs == ()
    assert any("`sdpa`" in said and "`eager`" in said for said in warnings_of_attention())
    eager = tiny_model("eager", **PLAIN)
    ours, theirs = (runner(ids, output_attentions=True).attentions for runner in (eager, qwen2_twin(eager)))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_token_alone_warns_too(tiny_model, ids, warnings_of_attention):
    """In half precision on a CPU another function takes the place of sdpa."""
    model = tiny_model("sdpa", **PLAIN).bfloat16()
    cache = model(ids, use_cache=True).past_key_values
    output = model(ids[:, :1], past_key_values=cache, output_attentions=True)
    assert output.attentions == () and any("`sdpa`" in said for said in warnings_of_attention())


@torch.no_grad()
def test_generation_and_pipelines_go_on_without(tiny_model, qwen2_twin, byte_tokenizer, ids, warnings_of_attention):
    model, found = tiny_model("sdpa", **PLAIN), []
    settings = dict(max_new_tokens=3, do_sample=False, pad_token_id=256, eos_token_id=463)
    for runner in (model, qwen2_twin(model)):
        output = runner.generate(ids, output_attentions=True, return_dict_in_generate=True, **settings)
        found.append((output.sequences.tolist(), output.attentions))
    assert found[0] == found[1] == (found[0][0], ((), (), ()))
    write = pipeline("text-generation", model=model, tokenizer=byte_tokenizer)
    assert len(write("hello", output_attentions=True, **settings)) == 1
    assert warnings_of_attention()


def test_kernels_of_ours_warn(tiny_model, warnings_of_attention, monkeypatch):
    model = tiny_model()
    attention = model.transformer.h[0].attn
    monkeypatch.setattr(attention.core_attention_flash, "forward", lambda q, *_, **__: q)
    states = torch.randn(1, 4, 3, 16)
    output, probabilities = flash_self_attention_forward(
        attention, states, states, states, None, output_attentions=True
    )
    assert probabilities is None and any(FLASH_IMPLEMENTATION in said for said in warnings_of_attention())


@pytest.mark.parametrize("implementation", ["sdpa", "flex_attention"])
def test_a_configuration_that_asks_for_them_is_refused_as_of_qwen2(tiny_model, qwen2_twin, implementation):
    model = tiny_model(implementation)
    for runner in (model, qwen2_twin(model)):
        with pytest.raises(ValueError, match="set it to 'eager'"):
            runner.config.output_attentions = True
