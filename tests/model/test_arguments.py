"""What `forward` and `generate` take: the cache under both of its names on every release, and nothing unknown."""

import warnings

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.utils import logging as transformers_logging

from qwen1 import QWenCache, QWenForSequenceClassification, QWenInt8Cache
from qwen1.arguments_qwen import CACHE_NAMES, KNOWN_ARGUMENTS, TESTED_RELEASES, check_arguments, one_cache

CACHES = {
    "own": lambda config: QWenCache(config=config),
    "dynamic": lambda config: DynamicCache(config=config),
    "static": lambda config: StaticCache(config=config, max_cache_len=64),
    "int8": QWenInt8Cache,
}


def ids(length, seed=0):
    return torch.randint(0, 256, (1, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def no_deprecation(caplog, monkeypatch):
    """Fails where transformers says that a name is deprecated."""
    monkeypatch.setattr(transformers_logging.get_logger("transformers"), "propagate", True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        yield
    assert not [record for record in caplog.records if "deprecated" in record.getMessage()]


@pytest.mark.parametrize("name", CACHE_NAMES)
@pytest.mark.parametrize("kind", CACHES)
@torch.no_grad()
def test_a_cache_goes_on_under_either_name(tiny_model, no_deprecation, name, kind):
    model, text = tiny_model("sdpa"), ids(40)
    whole = model(text, use_cache=True, cache=CACHES[kind](model.config)).logits
    cache = CACHES[kind](model.config)
    first = model(text[:, :39], use_cache=True, ntk_alpha=torch.tensor([[3.0]]), **{name: cache})
    assert first.past_key_values is first.cache is cache and int(cache.get_seq_length()) == 39
    second = model(text[:, 39:], use_cache=True, **{name: cache})
    assert int(cache.get_seq_length()) == 40
    tolerance = 0.2 if kind == "int8" else 1e-4  # chunks are quantised one by one
    torch.testing.assert_close(second.logits[:, -1], whole[:, -1], atol=tolerance, rtol=0)


@pytest.mark.parametrize("name", CACHE_NAMES)
@torch.no_grad()
def test_generate_goes_on_under_either_name(tiny_model, no_deprecation, name):
    model, prompt = tiny_model("sdpa"), ids(20)
    settings = dict(do_sample=False, max_new_tokens=5, pad_token_id=256, eos_token_id=463, return_dict_in_generate=True)
    first = model.generate(prompt, **settings)
    assert first.cache is first.past_key_values and first.cache.get_seq_length() == 24
    expected = model.generate(first.sequences, **settings).sequences
    again = model.generate(first.sequences, **{name: first.cache}, **settings).sequences
    assert torch.equal(again, expected)


@torch.no_grad()
def test_the_layers_take_either_name(tiny_model):
    """Called by hand, as the documents do."""
    model = tiny_model("eager").transformer
    attention, states = model.h[0].attn, torch.randn(1, 4, 64)
    angles = model.rotary_emb.angles(torch.arange(4)[None])
    embeddings = (angles.cos(), angles.sin(), None)
    outputs = [attention(states, embeddings, **{name: DynamicCache()})[0] for name in CACHE_NAMES]
    torch.testing.assert_close(outputs[0], outputs[1], atol=0, rtol=0)


@pytest.mark.parametrize("given", [{"max_new_tokens": 5}, {}, "greedy"])
def test_settings_that_are_no_configuration(tiny_model, given):
    with pytest.raises(
        ValueError, match="generation_config=.* must be a GenerationConfig or None: give single settings"
    ):
        tiny_model().generate(ids(4), generation_config=given)


@torch.no_grad()
def test_two_caches_are_too_many(tiny_model):
    model = tiny_model()
    same = DynamicCache()
    model(ids(3), cache=same, past_key_values=same, use_cache=True)
    with pytest.raises(ValueError, match="past_key_values and cache are two names"):
        model(ids(1), cache=same, past_key_values=DynamicCache())
    with pytest.raises(ValueError, match="past_key_values and cache are two names"):
        model.generate(ids(4), cache=same, past_key_values=DynamicCache())


@pytest.mark.parametrize("legacy", [((torch.zeros(1), torch.zeros(1)),), [None]])
def test_tuples_are_no_cache(tiny_model, legacy):
    with pytest.raises(ValueError, match="give a Cache, such as DynamicCache"):
        tiny_model()(ids(3), past_key_values=legacy)
    with pytest.raises(ValueError, match="give a Cache, such as DynamicCache"):
        one_cache(None, legacy)


UNKNOWN = {
    "kv_cache": object(),
    "cache_position": torch.arange(3),
    "past_key_value": DynamicCache(),
    "cache_params": DynamicCache(),
    "causal_mask": torch.ones(1, 1, 3, 3),
    "positions": torch.arange(3),
    "sliding_window": 4,
    "head_mask": torch.ones(4),
    "encoder_hidden_states": torch.ones(1, 3, 64),
    "typo": False,
}


@pytest.mark.parametrize("unknown", UNKNOWN)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_what_nobody_reads_is_refused(tiny_model, unknown, attention):
    model = tiny_model(attention)
    classifier = tiny_model(attention, cls=QWenForSequenceClassification, pad_token_id=0)
    for called in (model, model.transformer, classifier):
        with pytest.raises(TypeError, match=rf"doesn't know {unknown}, so it would be ignored.*{TESTED_RELEASES[-1]}"):
            called(ids(3), **{unknown: UNKNOWN[unknown]})
        called(ids(3), **{unknown: None})  # asks for nothing


def test_the_message_names_the_remedy(tiny_model):
    with pytest.raises(TypeError, match="cache_position: give position_ids"):
        tiny_model()(ids(3), cache_position=torch.arange(3))
    with pytest.raises(TypeError, match="labels: a model without a head has no loss: use QWenLMHeadModel"):
        tiny_model().transformer(ids(3), labels=ids(3))


def test_every_known_argument_passes():
    check_arguments("Model", dict.fromkeys(KNOWN_ARGUMENTS, 1))
    with pytest.raises(TypeError, match="mine"):
        check_arguments("Model", {"mine": 1}, lambda other=None: None)
    check_arguments("Model", {"mine": 1}, lambda mine=None: None)


@torch.no_grad()
def test_what_has_no_effect_in_the_published_code_has_none(tiny_model):
    model = tiny_model()
    assert torch.equal(model(ids(5), token_type_ids=torch.ones(1, 5)).logits, model(ids(5)).logits)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"attention_mask": torch.ones(1, 3)},
            "attention_mask covers 3 tokens.*the 0 of the cache and the 5 of this call",
        ),
        ({"attention_mask": torch.ones(1, 9)}, "give it 5 columns"),
        ({"position_ids": torch.zeros(1, 1, dtype=torch.long)}, r"position_ids has the shape \(1, 1\).*\(B or 1, 5\)"),
        ({"position_ids": torch.arange(5)}, r"position_ids has the shape \(5,\)"),
        ({"position_ids": torch.zeros(3, 1, 5, dtype=torch.long)}, "position_ids has the shape"),
    ],
)
def test_masks_and_positions_of_other_tokens(tiny_model, arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny_model()(ids(5), **arguments)


@torch.no_grad()
def test_a_mask_covers_the_cache_too(tiny_model):
    model = tiny_model()
    cache = model(ids(5), use_cache=True).cache
    with pytest.raises(ValueError, match="the 5 of the cache and the 2 of this call: give it 7 columns"):
        model(ids(2), attention_mask=torch.ones(1, 2), cache=cache)


@torch.no_grad()
def test_packed_texts_told_by_their_starts_alone(tiny_model):
    """Positions start anew where a text starts, so no text sees another, whichever the attention."""
    texts = [ids(7, 1), ids(5, 2), ids(4, 3)]
    starts = torch.tensor([0, 7, 12, 16], dtype=torch.int32)
    for attention in ("eager", "sdpa"):
        model = tiny_model(attention)
        packed = model(torch.cat(texts, dim=1), cu_seq_lens_q=starts, cu_seq_lens_k=starts, use_cache=False).logits
        alone = torch.cat([model(text, use_cache=False).logits for text in texts], dim=1)
        torch.testing.assert_close(packed, alone, atol=1e-4, rtol=0)


def test_an_alpha_that_would_be_ignored(tiny_model):
    alpha = torch.ones(1, 1)
    with pytest.raises(ValueError, match="ntk_alpha is given, but nothing is stretched in training"):
        tiny_model().train()(ids(5), ntk_alpha=alpha)
    with pytest.raises(ValueError, match="set use_dynamic_ntk=True"):
        tiny_model(use_dynamic_ntk=False)(ids(5), ntk_alpha=alpha)
