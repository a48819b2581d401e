"""The accurate int8 key/value cache: rounded, with a scale for each token, head and group of values."""

import copy
import random

import pytest
import torch
from transformers import GenerationConfig
from transformers.cache_utils import DynamicLayer, StaticCache

from qwen1 import QWenCache, QWenGroupedInt8Cache, QWenInt8Cache
from qwen1.cache_qwen import (
    GROUPED_BACKEND,
    INT8_BACKEND,
    QWenGroupedInt8Layer,
    dequantize,
    group_size_for,
    quantize_chunk,
    restore_groups,
    round_groups,
)

NAMED = {"cache_implementation": "quantized", "cache_config": {"backend": GROUPED_BACKEND}}


def relative_error(got, expected):
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("size", [1e-30, 1e-6, 1.0, 1e4, 1e30])
@pytest.mark.parametrize("group_size", [1, 4, 32, 64])
def test_error_is_at_most_half_a_scale(size, group_size):
    states = torch.randn(2, 3, 50, 64, generator=torch.Generator().manual_seed(0)) * size
    codes, scale = round_groups(states, group_size)
    assert codes.dtype == torch.int8 and codes.shape == states.shape
    assert scale.shape == (2, 3, 50, 64 // group_size)
    error = (restore_groups(codes, scale, torch.float32).double() - states.double()).abs()
    bound = scale.double().repeat_interleave(group_size, dim=-1) / 2
    assert (error <= bound * (1 + 1e-6)).all()
    assert codes.abs().amax() <= 127


@pytest.mark.parametrize("value", [0.0, 3.5, -2.0, 1e-38])
def test_constant_groups_stay_finite(value):
    states = torch.full((1, 1, 4, 64), value)
    restored = restore_groups(*round_groups(states, 32), torch.float32)
    torch.testing.assert_close(restored, states, rtol=2**-8, atol=1e-37)


def test_what_is_no_number_stays_none():
    states = torch.randn(1, 1, 2, 64)
    states[0, 0, 0, 0], states[0, 0, 1, 40] = torch.nan, torch.inf
    restored = restore_groups(*round_groups(states, 32), torch.float32)
    assert restored[0, 0, 0, :32].isnan().all() and restored[0, 0, 1, 32:].isnan().all()
    assert restored[0, 0, 0, 32:].isfinite().all() and restored[0, 0, 1, :32].isfinite().all()


@pytest.mark.parametrize("outlier", [1.0, 50.0])
def test_it_is_several_times_as_accurate_as_the_published_one(outlier):
    """Also where one channel is far larger than the others, as the biases of keys make some."""
    states = torch.randn(1, 4, 200, 128, generator=torch.Generator().manual_seed(1))
    states[..., 5] *= outlier
    published = dequantize(*quantize_chunk(states), torch.float32)
    rounded = restore_groups(*round_groups(states, 32), torch.float32)
    others = torch.arange(128) >= 32  # the outlier costs its own group only
    assert relative_error(rounded, states) < relative_error(published, states) / 3
    assert relative_error(rounded[..., others], states[..., others]) < 0.006
    assert relative_error(published[..., others], states[..., others]) > 0.018


@pytest.mark.parametrize(("head", "expected"), [(128, 32), (64, 32), (80, 20), (16, 16), (36, 18), (31, 31), (37, 1)])
def test_groups_divide_every_head(head, expected):
    assert group_size_for(head) == expected
    codes, scale = round_groups(torch.randn(1, 2, 3, head), group_size_for(head))
    assert restore_groups(codes, scale, torch.float32).shape == (1, 2, 3, head)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_layer_gives_the_dtype_back(dtype):
    layer = QWenGroupedInt8Layer()
    states = torch.randn(2, 3, 5, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    keys, values = layer.update(states, -states)
    assert keys.dtype == values.dtype == dtype and layer.keys.dtype == torch.int8
    assert relative_error(keys, states) < 0.006 and torch.equal(keys, -values)


@pytest.mark.parametrize("seed", range(8))
def test_any_course_of_operations_leaves_the_rounded_values_of_what_transformers_keeps(seed, operations, change_both):
    """Whatever the course, what is held is what rounding gives of the plain cache: each token on its own."""
    drawn, ours, theirs, rows = random.Random(seed), QWenGroupedInt8Layer(8), DynamicLayer(), 2
    for _ in range(60):
        operation = drawn.choice(operations)
        torch.manual_seed(drawn.randrange(10**6))
        if operation == "append":
            keys = torch.randn(rows, 3, drawn.choice([1, 1, 1, 2, 7, 90]), 16)
            ours.update(keys, -keys), theirs.update(keys, -keys)
        elif operation == "reset":
            ours.reset()
            theirs, rows = DynamicLayer(), 2  # reset, it forgets nothing in transformers 5.4
        elif not theirs.get_seq_length():
            continue
        else:
            ours, rows = change_both(operation, drawn, ours, theirs, rows)
        assert ours.get_seq_length() == theirs.get_seq_length()
        if theirs.get_seq_length():
            for held, name in ((theirs.keys, "key"), (theirs.values, "value")):
                codes, scale = round_groups(held, 8)
                assert torch.equal(getattr(ours, f"{name}s"), codes), operation
                assert torch.equal(getattr(ours, f"{name}_scale"), scale), operation


def test_copies_go_on_apart():
    layer, chunk = QWenGroupedInt8Layer(), torch.randn(3, 1, 2, 5, 16)
    layer.update(chunk[0], chunk[0])
    other = copy.copy(layer)
    first, _ = layer.update(chunk[1], chunk[1])
    second, _ = other.update(chunk[2], chunk[2])
    again, _ = layer.update(chunk[0][:, :, :1], chunk[0][:, :, :1])
    torch.testing.assert_close(again[:, :, :10], first, rtol=0, atol=0)
    assert relative_error(second[:, :, 5:], chunk[2]) < 0.01 and relative_error(first[:, :, 5:], chunk[1]) < 0.01


def test_tokens_are_written_without_copying_the_rest():
    layer, moved = QWenGroupedInt8Layer(), 0
    layer.update(torch.randn(1, 2, 1000, 16), torch.randn(1, 2, 1000, 16))
    for _ in range(500):
        place = layer.keys.data_ptr()
        layer.update(torch.randn(1, 2, 1, 16), torch.randn(1, 2, 1, 16))
        moved += layer.keys.data_ptr() != place
    assert layer.get_seq_length() == 1500 and 0 < moved <= 9


def test_another_batch_is_refused():
    layer = QWenGroupedInt8Layer()
    layer.update(torch.randn(2, 3, 5, 16), torch.randn(2, 3, 5, 16))
    with pytest.raises(ValueError, match="can't go on with"):
        layer.update(torch.randn(1, 3, 5, 16), torch.randn(1, 3, 5, 16))


def test_it_takes_little_more_than_half_of_half_precision():
    layer, states = QWenGroupedInt8Layer(), torch.randn(1, 4, 100, 128)
    layer.update(states, states)
    stored = sum(getattr(layer, name).nbytes for name in QWenGroupedInt8Layer._STORED)
    assert stored == (1 + 2 / 32) / 2 * 2 * states.bfloat16().nbytes


@torch.no_grad()
@pytest.mark.parametrize("ends", [(1,), (17, 18, 40), tuple(range(1, 80))])
def test_a_text_gives_the_same_logits_however_it_is_cut(tiny_model, ends):
    model = tiny_model("eager", use_dynamic_ntk=False).double()
    ids = torch.randint(0, 256, (2, 80), generator=torch.Generator().manual_seed(0))
    whole = model(ids, past_key_values=QWenGroupedInt8Cache(model.config)).logits
    cache, found = QWenGroupedInt8Cache(model.config), []
    for start, end in zip((0, *ends), (*ends, 80), strict=True):
        found.append(model(ids[:, start:end], past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(found, 1), whole, atol=1e-9, rtol=0)


@torch.no_grad()
def test_its_logits_are_nearer_to_those_without_a_cache_than_the_published_ones(tiny_model):
    """Full recomputation is the judge, with the stretch and LogN of a long prompt."""
    model = tiny_model("eager", n_layer=4)
    ids = torch.randint(0, 256, (4, 100), generator=torch.Generator().manual_seed(0))
    exact = model(ids, use_cache=False).logits
    errors = []
    for cache in (QWenCache(config=model.config), QWenGroupedInt8Cache(model.config), QWenInt8Cache(model.config)):
        errors.append(relative_error(model(ids, past_key_values=cache).logits, exact))
    assert errors[0] < 1e-6
    assert errors[1] < 0.05 and errors[1] < errors[2] / 2


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@torch.no_grad()
def test_generation_of_a_padded_batch_is_that_of_each_row(tiny_model, implementation):
    model = tiny_model(implementation, use_cache_quantization="grouped").double()
    rows = [torch.arange(1, 64), torch.arange(50, 57)]  # of which the first asks for another stretch
    settings = dict(max_new_tokens=6, do_sample=False, pad_token_id=256, eos_token_id=463)
    batch = torch.full((2, 63), 256)
    batch[0], batch[1, 56:] = rows
    written = model.generate(batch, attention_mask=(batch != 256).long(), **settings)
    for row, ids in enumerate(rows):
        assert torch.equal(written[row, 63:], model.generate(ids[None], **settings)[0, len(ids) :])


def written_by_recomputing(model, ids, count, cache_class=QWenGroupedInt8Cache):
    """Greedy tokens, each from a pass over the whole text with a cache of its own; of prompts that stretch nothing."""
    for _ in range(count):
        logits = model(ids, past_key_values=cache_class(model.config)).logits[:, -1]
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], -1)
    return ids


@torch.no_grad()
def test_generate_takes_it_by_configuration_by_name_and_by_object(tiny_model):
    prompt = torch.arange(1, 41)[None]
    plain = tiny_model(use_dynamic_ntk=False).double()
    configured = tiny_model(use_cache_quantization="grouped", use_dynamic_ntk=False).double()
    settings = dict(max_new_tokens=8, do_sample=False, return_dict_in_generate=True)
    named = plain.generate(prompt, **NAMED, **settings)
    by_settings = plain.generate(prompt, GenerationConfig(**NAMED, **settings))
    given = plain.generate(prompt, past_key_values=QWenGroupedInt8Cache(plain.config), **settings)
    expected = written_by_recomputing(plain, prompt, 8)
    for output in (named, by_settings, given, configured.generate(prompt, **settings)):
        assert isinstance(output.past_key_values, QWenGroupedInt8Cache)
        assert output.past_key_values.get_seq_length() == 47
        assert torch.equal(output.sequences, expected)


@torch.no_grad()
def test_prompt_lookup_and_an_assistant_change_nothing(tiny_model):
    """Drafts are read in chunks and cropped; each token has its codes whatever it was read with."""
    model, prompt = tiny_model(use_dynamic_ntk=False).double(), torch.arange(1, 21).repeat(2)[None]
    settings = dict(max_new_tokens=12, do_sample=False, pad_token_id=256, eos_token_id=463)
    expected = model.generate(prompt, **NAMED, **settings)
    assert torch.equal(model.generate(prompt, **NAMED, **settings, prompt_lookup_num_tokens=3), expected)
    assistant = tiny_model(seed=1, n_layer=1, use_dynamic_ntk=False).double()
    assert torch.equal(model.generate(prompt, **NAMED, **settings, assistant_model=assistant), expected)


@pytest.mark.parametrize("length", [20, 60])
@torch.no_grad()
def test_beams_follow_their_rows(tiny_model, length):
    """Each beam that is written has the score that the whole text gives, read at once."""
    model = tiny_model(use_dynamic_ntk=False).double()
    prompt = torch.randint(0, 256, (2, length), generator=torch.Generator().manual_seed(3))
    output = model.generate(
        prompt, **NAMED, min_new_tokens=6, max_new_tokens=6, num_beams=3, do_sample=False, pad_token_id=256,
        eos_token_id=463, return_dict_in_generate=True, output_scores=True, length_penalty=0.0,
    )  # fmt: skip
    logits = model(output.sequences, past_key_values=QWenGroupedInt8Cache(model.config)).logits[:, length - 1 : -1]
    tokens = output.sequences[:, length:]
    scores = logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0].sum(-1)
    torch.testing.assert_close(output.sequences_scores.double(), scores, atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_reset_cache_takes_another_batch(tiny_model):
    model, cache = tiny_model(), QWenGroupedInt8Cache()
    model(torch.arange(40)[None], past_key_values=cache)
    cache.reset()
    ids = torch.arange(60).view(2, 30)
    again = model(ids, past_key_values=cache).logits
    torch.testing.assert_close(again, model(ids, past_key_values=QWenGroupedInt8Cache(model.config)).logits)
    assert len(cache) == model.config.n_layer


def test_rows_keep_their_stretch(tiny_model):
    model, cache = tiny_model(), QWenGroupedInt8Cache()
    batch, mask = torch.full((2, 60), 256), torch.zeros(2, 60, dtype=torch.long)
    batch[0], mask[0] = torch.arange(60), 1
    batch[1, 40:], mask[1, 40:] = torch.arange(20), 1
    with torch.no_grad():
        model(batch, attention_mask=mask, past_key_values=cache)
        cache.batch_select_indices(torch.tensor([1]))
        alone = QWenGroupedInt8Cache()
        model(batch[1:, 40:], past_key_values=alone)
        got = model(torch.tensor([[7]]), attention_mask=torch.cat([mask[1:], torch.ones(1, 1).long()], -1),
                    past_key_values=cache).logits  # fmt: skip
        torch.testing.assert_close(got, model(torch.tensor([[7]]), past_key_values=alone).logits, atol=1e-4, rtol=0)


def test_in_training_a_growing_cache_takes_its_place(tiny_model):
    model = tiny_model(use_cache_quantization="grouped")
    with torch.no_grad():
        assert type(model(torch.arange(9)[None]).past_key_values) is QWenGroupedInt8Cache
        assert type(model.train()(torch.arange(9)[None]).past_key_values) is QWenCache


@pytest.mark.parametrize("value", ["groups", "published", 2, 1, 0.5])
def test_an_unknown_kind_of_quantisation_is_refused(tiny_config, value):
    with pytest.raises(ValueError, match="use_cache_quantization=.*'grouped'"):
        tiny_config(use_cache_quantization=value).check_values()


def test_the_configuration_is_saved_and_loaded(tiny_model, tmp_path):
    tiny_model(use_cache_quantization="grouped").save_pretrained(tmp_path)
    loaded = type(tiny_model()).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert isinstance(loaded(torch.arange(9)[None]).past_key_values, QWenGroupedInt8Cache)


@pytest.mark.parametrize("backend", [INT8_BACKEND, GROUPED_BACKEND])
def test_settings_that_it_does_not_know_are_refused(tiny_model, backend):
    settings = {"backend": backend, "nbits": 4}
    with pytest.raises(ValueError, match="has no nbits"):
        tiny_model().generate(torch.arange(9)[None], cache_implementation="quantized", cache_config=settings)


@pytest.mark.parametrize("name", [None, "dynamic", "static"])
def test_settings_of_a_cache_that_nobody_would_make_are_refused(tiny_model, name):
    model, prompt = tiny_model(), torch.arange(9)[None]
    settings = {"cache_config": {"backend": GROUPED_BACKEND}, "cache_implementation": name}
    message = (
        rf"cache_config=.*{GROUPED_BACKEND}.* is read with cache_implementation='quantized' alone, not with {name!r}"
    )
    with pytest.raises(ValueError, match=message):
        model.generate(prompt, **settings)
    with pytest.raises(ValueError, match=message):
        model.generate(prompt, generation_config=GenerationConfig(**settings))


def test_a_call_may_ask_for_another_cache_than_the_models_settings(tiny_model):
    model = tiny_model()
    model.generation_config.update(**NAMED)
    settings = dict(max_new_tokens=2, cache_implementation="static", return_dict_in_generate=True)
    output = model.generate(torch.arange(9)[None], **settings)
    assert isinstance(output.past_key_values, StaticCache)


@pytest.mark.parametrize("settings", [GROUPED_BACKEND, [("backend", GROUPED_BACKEND)]])
def test_settings_of_a_cache_are_a_dictionary(tiny_model, settings):
    with pytest.raises(ValueError, match="cache_config=.* must be a dictionary, such as"):
        tiny_model().generate(torch.arange(9)[None], cache_implementation="quantized", cache_config=settings)


@pytest.mark.parametrize("size", [0, -1, 1.5, True, "32"])
def test_a_group_size_that_is_none_is_refused(tiny_model, size):
    settings = {"backend": GROUPED_BACKEND, "q_group_size": size}
    with pytest.raises(ValueError, match="group_size="):
        tiny_model().generate(torch.arange(9)[None], cache_implementation="quantized", cache_config=settings)


@torch.no_grad()
def test_the_size_of_groups_can_be_chosen(tiny_model):
    settings = {"backend": GROUPED_BACKEND, "q_group_size": 8}
    output = tiny_model().generate(
        torch.arange(9)[None], cache_implementation="quantized", cache_config=settings, max_new_tokens=2,
        return_dict_in_generate=True,
    )  # fmt: skip
    assert output.past_key_values.layers[0].key_scale.shape[-1] == 2  # of heads of 16
