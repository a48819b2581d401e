"""The published int8 key/value cache."""

import copy
import itertools
import math

import pytest
import torch
from transformers import GenerationConfig
from transformers.cache_utils import DynamicLayer

import qwen1.cache_qwen as cache_qwen
from qwen1 import QWenInt8Cache
from qwen1.cache_qwen import INT8_BACKEND, QWenInt8Layer, dequantize, quantize_chunk

TOLERANCE = 5e-5


@pytest.fixture
def states():
    torch.manual_seed(0)
    return torch.randn(2, 3, 5, 8) * 4 + 1


def test_one_scale_and_zero_point_per_head_and_chunk(states):
    codes, scale, zero = quantize_chunk(states)
    assert codes.dtype == torch.uint8 and codes.shape == states.shape
    assert scale.shape == zero.shape == (2, 3, 5, 1)
    for row in range(2):
        for head in range(3):
            low, high = states[row, head].min(), states[row, head].max()
            torch.testing.assert_close(scale[row, head], ((high - low) / 255).expand(5, 1))
            torch.testing.assert_close(zero[row, head], (-low * 255 / (high - low)).expand(5, 1))


def test_error_is_below_one_step(states):
    codes, scale, zero = quantize_chunk(states)
    restored = dequantize(codes, scale, zero, torch.float32)
    assert ((restored - states).abs() <= scale * 1.001).all()
    assert ((states - restored) / scale).max() > 0.9  # truncated, as published: rounding would stay below a half


@pytest.mark.parametrize("value", [0.0, 3.5, -2.0])
def test_constant_chunk_stays_finite(value):
    codes, scale, zero = quantize_chunk(torch.full((1, 1, 4, 8), value))
    restored = dequantize(codes, scale, zero, torch.float32)
    torch.testing.assert_close(restored, torch.full_like(restored, value))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_layer_appends_chunks_and_gives_the_dtype_back(states, dtype):
    layer = QWenInt8Layer()
    keys, values = layer.update(states.to(dtype), -states.to(dtype))
    again, _ = layer.update(states[:, :, :1].to(dtype), states[:, :, :1].to(dtype))
    assert keys.dtype == values.dtype == dtype
    assert layer.keys.dtype == torch.uint8
    assert layer.get_seq_length() == 6 and again.shape == (2, 3, 6, 8)
    torch.testing.assert_close(again[:, :, :5], keys)  # what was stored is never quantised again


def test_layer_follows_every_cache_operation(states):
    layer = QWenInt8Layer()
    keys, _ = layer.update(states, states)
    layer.reorder_cache(torch.tensor([1, 0]))
    layer.batch_repeat_interleave(2)
    layer.batch_select_indices(torch.tensor([0, 3]))
    layer.crop(-2)
    chunk = states[:, :, :1]
    kept, _ = layer.update(chunk, chunk)
    torch.testing.assert_close(kept[0, :, :3], keys[1, :, :3])
    torch.testing.assert_close(kept[1, :, :3], keys[0, :, :3])
    layer.offload()
    layer.prefetch()
    assert layer.get_seq_length() == 4
    layer.reset()
    assert layer.get_seq_length() == 0
    torch.testing.assert_close(layer.update(states, states)[0], keys)
    layer.reset()
    torch.testing.assert_close(layer.update(states[:1], states[:1])[0], keys[:1])  # a batch of another size
    QWenInt8Layer().crop(-1)  # nothing stored, nothing to drop


def test_crop_counts_as_the_growing_cache_does(states):
    """Transformers 5.4 takes the length to keep, later releases refuse it; negative numbers mean the same in all."""
    layer, plain = QWenInt8Layer(), DynamicLayer()
    for count in (-2, 0, 2):
        for cache in (layer, plain):
            cache.reset()
            cache.update(states, states)
        try:
            plain.crop(count)
        except ValueError:
            with pytest.raises(ValueError):
                layer.crop(count)
        else:
            layer.crop(count)
        lengths = {getattr(layer, name).shape[-2] for name in QWenInt8Layer._STORED}
        assert lengths == {plain.get_seq_length()} == {layer.get_seq_length()}


def test_cache_is_smaller_than_half_precision(tiny_config):
    cache = QWenInt8Cache(tiny_config())
    assert len(cache) == 2
    shape = (1, 4, 100, 128)
    cache.update(torch.randn(shape), torch.randn(shape), 0)
    layer = cache.layers[0]
    stored = sum(getattr(layer, name).nbytes for name in QWenInt8Layer._STORED)
    assert stored < 0.6 * 2 * torch.empty(shape, dtype=torch.bfloat16).nbytes


@torch.no_grad()
def test_the_model_builds_it_from_its_configuration(golden_model, golden_tensors):
    model, ids = golden_model("dec_cache_int8"), golden_tensors("dec_cache_int8")["ids_9"]
    assert isinstance(model(ids).past_key_values, QWenInt8Cache)


class Ties:
    """Quantiser that tells each code at a truncation boundary, for each row, on which side to fall.

    The largest value of each head's chunk lies exactly at code 255, where the last bit of a matrix product, which
    differs between processors, decides between 254 and 255; now and then another value lies as close to a code. The
    golden logits tell which sides the published run took.
    """

    def __init__(self, places=(), sides=None):
        self.places, self.sides = list(places), sides  # (call, head, index in the chunk); (B, places) of 0 and 1
        self.found, self.calls = [], 0

    def __call__(self, states):
        codes, scale, zero = quantize_chunk(states)
        codes = codes.contiguous()  # else what is flat is a copy
        exact, flat = (states / scale + zero).flatten(2), codes.flatten(2)
        near = ((exact[0] - exact[0].round()).abs() < 1e-3) & (exact[0] > 0.5)
        near.scatter_(-1, exact[0].argmax(-1, keepdim=True), True)
        self.found += [(self.calls, *place) for place in near.nonzero().tolist()]
        for column, (call, head, index) in enumerate(self.places):
            if call == self.calls:
                flat[:, head, index] = (exact[:, head, index].round() - 1 + self.sides[:, column]).to(torch.uint8)
        self.calls += 1
        return codes, scale, zero


def flips(places, at_most, together=2048):
    """All ways to change at most so many of the places, (ways, places) of 0 and 1, fewest first, some at a time."""
    ways = itertools.chain.from_iterable(itertools.combinations(range(places), n) for n in range(at_most + 1))
    while some := list(itertools.islice(ways, together)):
        table = torch.zeros(len(some), places, dtype=torch.long)
        for row, chosen in enumerate(some):
            table[row, list(chosen)] = 1
        yield table


@pytest.mark.slow
@pytest.mark.parametrize(("length", "steps"), [(9, 6), (37, 2)])
@torch.no_grad()
def test_golden_logits(golden_model, golden_tensors, monkeypatch, length, steps):
    """Of the longer case two steps only: sides that hardly matter at first are lost, and the search grows with them."""
    model, expected = golden_model("dec_cache_int8"), golden_tensors("dec_cache_int8")
    ids = expected[f"ids_{length}"][:, : length + steps]
    golden = torch.cat([expected[f"prefill_{length}"], expected[f"decode_{length}"]], dim=1)

    def run(tokens, cache, ties, rows=1):
        monkeypatch.setattr(cache_qwen, "quantize_chunk", ties)
        for layer in cache.layers:
            layer.batch_repeat_interleave(rows)
        return model(tokens.expand(rows, -1), past_key_values=cache).logits

    cache, start = QWenInt8Cache(model.config), 0
    for end in range(length, ids.shape[1] + 1):
        tokens, wanted = ids[:, start:end], golden[:, start:end]
        natural = Ties()
        run(tokens, copy.deepcopy(cache), natural)
        best, sides = math.inf, torch.ones(1, len(natural.found), dtype=torch.long)  # where exact arithmetic falls
        while best > 1e-9:  # from there to the nearest that is nearer to the golden logits, and on
            before = best
            for changed in flips(len(natural.found), at_most=2):
                rows = sides ^ changed
                logits = run(tokens, copy.deepcopy(cache), Ties(natural.found, rows), len(rows))
                errors = (logits - wanted).double().pow(2).sum((1, 2))
                if errors.min() < best:
                    best, nearest = errors.min().item(), rows[errors.argmin()][None]
                if best < 1e-9:
                    break
            if best == before:
                break
            sides = nearest
        logits = run(tokens, cache, Ties(natural.found, sides))
        torch.testing.assert_close(logits, wanted, atol=TOLERANCE, rtol=0)
        start = end


@torch.no_grad()
def test_generate_takes_it_by_configuration_by_name_and_by_object(tiny_model):
    prompt = torch.arange(1, 41)[None]
    plain, configured = tiny_model(), tiny_model(use_cache_quantization=True)
    settings = dict(max_new_tokens=8, do_sample=False, return_dict_in_generate=True)
    named = plain.generate(prompt, cache_implementation="quantized", cache_config={"backend": INT8_BACKEND}, **settings)
    given = plain.generate(prompt, past_key_values=QWenInt8Cache(plain.config), **settings)
    default = configured.generate(prompt, **settings)
    for output in (named, given, default):
        assert isinstance(output.past_key_values, QWenInt8Cache)
        assert output.past_key_values.get_seq_length() == 47
        assert output.sequences.tolist() == named.sequences.tolist()


@pytest.mark.parametrize("settings", [{"prompt_lookup_num_tokens": 3}, {"assistant": True}, {"num_beams": 2}])
def test_generate_in_other_ways(tiny_model, settings):
    model, prompt = tiny_model(use_cache_quantization=True), torch.arange(1, 41)[None]
    if settings.pop("assistant", False):
        settings["assistant_model"] = tiny_model(seed=1, n_layer=1)
    written = model.generate(prompt, max_new_tokens=8, do_sample=False, pad_token_id=256, eos_token_id=463, **settings)
    assert written.shape == (1, 48)  # which tokens depends on how many were quantised together


@torch.no_grad()
def test_an_explicit_cache_wins_over_the_configuration(tiny_model):
    model, prompt = tiny_model(use_cache_quantization=True), torch.arange(1, 20)[None]
    static = model.generate(
        prompt, max_new_tokens=4, do_sample=False, return_dict_in_generate=True, cache_implementation="static"
    )
    assert type(static.past_key_values).__name__ == "StaticCache"
    uncached = model.generate(prompt, generation_config=GenerationConfig(use_cache=False, max_new_tokens=4))
    assert uncached.shape == (1, 23)


def test_layers_come_as_needed_without_a_configuration(states):
    cache = QWenInt8Cache()
    cache.update(states, states, 0)
    cache.update(states, states, 1)
    assert len(cache) == 2 and cache.get_seq_length() == 5


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@torch.no_grad()
def test_a_row_is_as_alone_whatever_its_padding(tiny_model, implementation):
    """Prefill, chunks and single tokens; in float64, where no code lies so near a boundary that a batch moves it."""
    model = tiny_model(implementation, use_cache_quantization=True).double()
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(0, 256, (length,), generator=generator) for length in (20, 11, 5, 1)]
    more = torch.randint(0, 256, (len(rows), 6), generator=generator)
    mask = torch.stack([torch.arange(20) >= 20 - len(row) for row in rows]).long()
    batch = torch.stack([torch.cat([torch.full((20 - len(row),), 300), row]) for row in rows])
    mask, batch = torch.cat([mask, torch.ones_like(more)], -1), torch.cat([batch, more], -1)
    logits = chunked(model, batch, mask)
    for row, ids in enumerate(rows):
        alone = chunked(model, torch.cat([ids, more[row]])[None], None, ends=(-6, -3, -2, -1))
        torch.testing.assert_close(logits[row, 20 - len(ids) :], alone[0], atol=1e-9, rtol=0)


def chunked(model, ids, mask, ends=(20, 23, 24, 25)):
    """Logits of all tokens, read up to each of `ends` in turn."""
    found, cache, start = [], None, 0
    for end in (*(end % ids.shape[1] for end in ends), ids.shape[1]):
        seen = None if mask is None else mask[:, :end]
        output = model(ids[:, start:end], attention_mask=seen, past_key_values=cache, use_cache=True)
        assert isinstance(output.past_key_values, QWenInt8Cache)
        found.append(output.logits)
        cache, start = output.past_key_values, end
    return torch.cat(found, dim=1)


@torch.no_grad()
def test_padding_told_by_a_prepared_mask(tiny_model):
    model = tiny_model(use_cache_quantization=True).double()
    ids = torch.randint(0, 256, (1, 9), generator=torch.Generator().manual_seed(1))
    padded = torch.cat([torch.full((1, 4), 300), ids], -1)
    kept = torch.arange(13)[None] >= 4
    visible = (torch.ones(13, 13).tril().bool() & kept)[None, None]
    additive = torch.zeros(1, 1, 13, 13, dtype=torch.float64).masked_fill(~visible, torch.finfo(torch.float64).min)
    positions = (torch.arange(13)[None] - 4).clamp(min=0)
    expected = model(ids).logits
    for mask in (visible, additive):
        logits = model(padded, attention_mask=mask, position_ids=positions).logits[:, 4:]
        torch.testing.assert_close(logits, expected, atol=1e-9, rtol=0)


@torch.no_grad()
def test_generation_of_a_padded_batch_is_that_of_each_row(tiny_model):
    model = tiny_model(use_cache_quantization=True).double()
    rows = [torch.arange(1, 24), torch.arange(50, 57)]
    settings = dict(max_new_tokens=6, do_sample=False, pad_token_id=256, eos_token_id=463)
    batch = torch.full((2, 23), 256)
    batch[0], batch[1, 16:] = rows
    written = model.generate(batch, attention_mask=(batch != 256).long(), **settings)
    for row, ids in enumerate(rows):
        assert torch.equal(written[row, 23:], model.generate(ids[None], **settings)[0, len(ids) :])
