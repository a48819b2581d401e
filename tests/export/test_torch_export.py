"""Programs of `torch.export`: a prompt without a cache, a step on keys and values that are inputs."""

import pytest
import torch
from torch.export import Dim
from transformers import DynamicCache

from qwen1.arguments_qwen import CACHE_NAME

from .conftest import CLOSE, LENGTHS, SEQ_LENGTH

VARIANTS = {
    "plain": {"attn_implementation": "sdpa"},
    "grouped": {"attn_implementation": "sdpa", "num_key_value_heads": 2},
    "tied": {"attn_implementation": "eager", "tie_word_embeddings": True, "no_bias": False},
}


def padded(length: int) -> dict[str, torch.Tensor]:
    """Three rows, of which two are padded on the left, and their mask, (3, length)."""
    ids = torch.randint(0, 464, (3, length), generator=torch.Generator().manual_seed(length))
    mask = torch.ones_like(ids)
    mask[1, : length // 2] = 0
    mask[2, : length - 1] = 0
    return {"input_ids": ids, "attention_mask": mask}


def plain(length: int) -> dict[str, torch.Tensor]:
    """A row without padding, (1, length)."""
    return {"input_ids": torch.randint(0, 464, (1, length), generator=torch.Generator().manual_seed(length))}


def export(model, inputs, dynamic=None, strict=False):
    with torch.no_grad():
        arguments = {**inputs, "use_cache": False}
        shapes = dynamic and {**dynamic, "use_cache": None}
        return torch.export.export(model, (), arguments, dynamic_shapes=shapes, strict=strict).module()


@pytest.mark.parametrize(
    "variant, make, strict",
    [("plain", padded, True), ("grouped", plain, False), ("tied", padded, False)],
)
@pytest.mark.no_cover
def test_a_prompt_of_any_length_gives_the_logits_of_eager(tiny_model, variant, make, strict):
    model = tiny_model(**VARIANTS[variant])
    inputs = make(20)
    program = export(model, inputs, {name: {1: Dim.AUTO} for name in inputs}, strict)
    for length in LENGTHS:
        inputs = make(length)
        expected = model(**inputs, use_cache=False).logits
        torch.testing.assert_close(program(**inputs, use_cache=False).logits, expected, **CLOSE)


@pytest.mark.parametrize("make", [plain, padded])
@pytest.mark.no_cover
def test_prompts_of_one_and_of_two_tokens_are_samples_too(tiny_model, make):
    model = tiny_model("sdpa")
    one = make(1)
    expected = model(**one).logits
    torch.testing.assert_close(export(model, one)(**one, use_cache=False).logits, expected, **CLOSE)
    two = make(2)
    program = export(model, two, {name: {1: Dim.AUTO} for name in two})
    for length in (2, 3, SEQ_LENGTH + 1):
        inputs = make(length)
        expected = model(**inputs).logits
        torch.testing.assert_close(program(**inputs, use_cache=False).logits, expected, **CLOSE)


class Step(torch.nn.Module):
    """A step on keys and values that are inputs, which knows no cache; they come back with one token more."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, position_ids, keys, values, ntk_alpha=None):
        cache = DynamicCache(config=self.model.config)
        for layer, states in enumerate(zip(keys, values, strict=True)):
            cache.update(*states, layer)
        given = {} if ntk_alpha is None else {"ntk_alpha": ntk_alpha}
        outputs = self.model(input_ids, position_ids=position_ids, use_cache=True, **{CACHE_NAME: cache}, **given)
        return outputs.logits, [layer.keys for layer in cache.layers], [layer.values for layer in cache.layers]


def prefill(model, ids):
    cache = model(ids, use_cache=True).cache
    return cache, [layer.keys.clone() for layer in cache.layers], [layer.values.clone() for layer in cache.layers]


def step_inputs(ids, position, keys, values):
    return {
        "input_ids": ids[:, position : position + 1],
        "position_ids": torch.tensor([[position]]),
        "keys": keys,
        "values": values,
    }


@torch.no_grad()
def test_steps_on_given_keys_keep_the_given_alpha_over_an_edge(tiny_model, text, warnings_of):
    model = tiny_model("sdpa")
    _, keys, values = prefill(model, text[:, :20])
    sample = {**step_inputs(text, 20, keys, values), "ntk_alpha": torch.ones(1, 1)}
    shapes = {name: [{2: Dim.AUTO}] * 2 if name in ("keys", "values") else None for name in sample}
    program = torch.export.export(Step(model), (), sample, dynamic_shapes=shapes, strict=False).module()
    assert not warnings_of()

    for length in (SEQ_LENGTH - 2, 2 * SEQ_LENGTH - 2, 4 * SEQ_LENGTH + 1):
        cache, keys, values = prefill(model, text[:, :length])
        alpha = model.transformer.choose_alpha(torch.arange(length)[None])[:, -1:]
        for position in range(length, length + 5):
            expected = model(text[:, position : position + 1], **{CACHE_NAME: cache}).logits
            logits, keys, values = program(**step_inputs(text, position, keys, values), ntk_alpha=alpha)
            torch.testing.assert_close(logits, expected, **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("strict", [False, True])
@torch.no_grad()
def test_a_program_that_cannot_know_alpha_says_so(tiny_model, text, warnings_of, strict):
    model = tiny_model("sdpa")
    _, keys, values = prefill(model, text[:, :20])
    torch.export.export(Step(model), (), step_inputs(text, 20, keys, values), strict=strict)
    assert any("ntk_alpha" in warning for warning in warnings_of())


@torch.no_grad()
def test_without_ntk_there_is_nothing_to_say(tiny_model, text, warnings_of):
    model = tiny_model("sdpa", use_dynamic_ntk=False)
    _, keys, values = prefill(model, text[:, :20])
    torch.export.export(Step(model), (), step_inputs(text, 20, keys, values), strict=False)
    assert not warnings_of()
