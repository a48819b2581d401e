"""The quantised caches of transformers, on our model: each works, or says in a sentence why it doesn't."""

import importlib.util

import pytest
import torch
from transformers import QuantizedCache
from transformers.cache_utils import DynamicLayer, QuantizedLayer

from qwen1 import QWenCache

FOLLOWS = QuantizedLayer.reorder_cache is not DynamicLayer.reorder_cache  # from a release after 5.4 on

BACKENDS = {
    "quanto4": ("optimum.quanto", {"backend": "quanto", "nbits": 4, "q_group_size": 16}),
    "quanto2": ("optimum.quanto", {"backend": "quanto", "nbits": 2, "q_group_size": 16}),
    "hqq8": ("hqq", {"backend": "hqq", "nbits": 8, "axis_key": 1, "axis_value": 1, "q_group_size": 16}),
    "hqq4": ("hqq", {"backend": "hqq", "nbits": 4, "q_group_size": 16}),
    "fp8": ("torch", {"backend": "fp8"}),
}


@pytest.fixture(params=BACKENDS)
def named(request):
    """Arguments of `generate` for a cache of transformers."""
    package, settings = BACKENDS[request.param]
    if importlib.util.find_spec(package.partition(".")[0]) is None:
        pytest.skip(f"needs {package}")
    if request.param == "fp8" and not FOLLOWS:
        pytest.skip("this release of transformers has no fp8 cache")
    return {"cache_implementation": "quantized", "cache_config": dict(settings)}


SETTINGS = dict(max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=256, eos_token_id=463)


@torch.no_grad()
def test_the_prompt_and_its_stretch_are_read_as_by_the_models_own_cache(tiny_model, named):
    """The first token, which is written from keys as they are; the cache holds the alpha of the prompt."""
    model, prompt = tiny_model(), torch.randint(0, 256, (2, 70), generator=torch.Generator().manual_seed(0))
    output = model.generate(prompt, **named, **SETTINGS, return_dict_in_generate=True, output_logits=True)
    expected = model(prompt, past_key_values=QWenCache(config=model.config)).logits[:, -1]
    torch.testing.assert_close(output.logits[0], expected, atol=1e-4, rtol=0)
    assert isinstance(output.past_key_values, QuantizedCache)
    assert output.past_key_values.qwen_ntk.alpha.tolist() == [[7.0], [7.0]]  # of 70 tokens, trained on 32
    assert output.past_key_values.get_seq_length() == 73


@torch.no_grad()
def test_steps_are_near_those_without_a_cache(tiny_model, named):
    model, prompt = tiny_model(use_dynamic_ntk=False), torch.arange(1, 61)[None]
    output = model.generate(prompt, **named, **SETTINGS, return_dict_in_generate=True, output_logits=True)
    exact = model(output.sequences, use_cache=False).logits[:, 59:-1]
    error = ((torch.stack(output.logits, 1) - exact).norm() / exact.norm()).item()
    bits = named["cache_config"].get("nbits", 8)
    assert error < {2: 1.2, 4: 0.5, 8: 0.2}[bits]


def test_settings_are_left_as_they_are_and_serve_again(tiny_model, named):
    model, before = tiny_model(), dict(named["cache_config"])
    first = model.generate(torch.arange(9)[None], **named, **SETTINGS)
    assert named["cache_config"] == before
    assert torch.equal(model.generate(torch.arange(9)[None], **named, **SETTINGS), first)


@pytest.mark.skipif(FOLLOWS, reason="this release of transformers rearranges quantised caches itself")
@pytest.mark.parametrize("setting", [{"num_beams": 2}, {"prompt_lookup_num_tokens": 2}])
def test_beams_and_drafts_are_refused_where_they_would_be_wrong(tiny_model, named, setting):
    with pytest.raises(ValueError, match="neither beams nor drafts.*qwen_int8_grouped"):
        tiny_model().generate(torch.arange(40)[None], **named, **SETTINGS, **setting)
    cache = QuantizedCache(config=tiny_model().config, **named["cache_config"])
    with pytest.raises(ValueError, match="neither beams nor drafts"):
        tiny_model().generate(torch.arange(40)[None], past_key_values=cache, **SETTINGS, **setting)


@pytest.mark.skipif(not FOLLOWS, reason="this release of transformers doesn't rearrange quantised caches")
@torch.no_grad()
def test_beams_are_rearranged(tiny_model, named):
    """Their scores are about those of the texts without a cache."""
    model, prompt = tiny_model(use_dynamic_ntk=False, initializer_range=0.1), torch.arange(1, 61)[None]
    output = model.generate(
        prompt, **named, **SETTINGS, num_beams=4, length_penalty=0.0, return_dict_in_generate=True, output_scores=True
    )
    logits = model(output.sequences, use_cache=False).logits[:, 59:-1]
    scores = logits.log_softmax(-1).gather(-1, output.sequences[:, 60:, None]).sum()
    assert abs(output.sequences_scores.item() - scores.item()) < 1.0


@pytest.mark.skipif(not FOLLOWS, reason="refused by us there")
def test_drafts_are_refused_by_transformers(tiny_model, named):
    with pytest.raises(ValueError, match="crop"):
        tiny_model().generate(torch.arange(40)[None], **named, **SETTINGS, prompt_lookup_num_tokens=2)


@pytest.mark.parametrize(
    "settings",
    [
        {"nbits": 4, "axis_key": 1, "axis_value": 1, "q_group_size": 64, "heads": 3},
        {"nbits": 2, "axis_value": 1, "q_group_size": 32, "heads": 3},
        {"nbits": 8, "heads": 4, "q_group_size": 48},
    ],
)
def test_groups_that_hqq_can_not_pack_are_refused(tiny_model, settings):
    model = tiny_model(n_head=settings.pop("heads"), kv_channels=64)
    with pytest.raises(ValueError, match="q_group_size.*must divide"):
        model.generate(
            torch.arange(9)[None], cache_implementation="quantized", cache_config={"backend": "hqq"} | settings
        )


def test_chats_take_them_and_carry_nothing(chat_tiny, named):
    model, tokenizer = chat_tiny
    arguments = {**named, "max_new_tokens": 4, "min_new_tokens": 4}
    reply, history = model.chat(tokenizer, "What?", None, **arguments)
    assert history.kept is None
    again, _ = model.chat(tokenizer, "And?", history, **arguments)
    assert list(model.chat_stream(tokenizer, "And?", history, **arguments))[-1] == again
    assert len(model.batch_chat(tokenizer, ["What?", "And?"], [None, history], **arguments)[0]) == 2


@pytest.fixture
def chat_tiny(tiny_model, byte_tokenizer):
    model = tiny_model("sdpa")
    model.generation_config.update(chat_format="chatml", pad_token_id=256, do_sample=False, allow_custom_entries=True)
    return model, byte_tokenizer
