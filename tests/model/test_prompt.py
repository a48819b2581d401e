"""Attention of a prompt by the kernel: what torch's computes, under all masks, and only where it may."""

from types import SimpleNamespace

import pytest
import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qwen1 import QWenAttention, products_qwen, prompt_qwen
from qwen1.arguments_qwen import CACHE_NAME
from qwen1.attention_qwen import PROMPT_IMPLEMENTATION, choose_implementation, eager_attention_forward
from qwen1.native_qwen import wait
from qwen1.prompt_qwen import prompt_attention
from qwen1.translating_qwen import SWITCH

pytestmark = pytest.mark.skipif(wait() is None, reason="needs g++ or clang++ on Linux")

SHAPES = {  # B, H, K, T, S, D
    "square": (1, 4, 4, 150, 150, 16),
    "behind a cache": (2, 4, 4, 70, 131, 24),
    "grouped, odd": (3, 6, 2, 65, 97, 7),
    "one key head": (2, 5, 1, 129, 129, 12),
}


@pytest.fixture
def kernel_alone(monkeypatch):
    """Fail where torch's kernel is called after all."""
    monkeypatch.setattr(prompt_qwen, "sdpa_attention_forward", None)


def drawn(shape, dtype, generator):
    batch, heads, kv_heads, queries, keys, size = shape
    query = torch.randn(batch, queries, heads, size, generator=generator).to(dtype).transpose(1, 2)
    room = torch.randn(2, batch, kv_heads, keys + 5, size, generator=generator).to(dtype)
    return query, *room[..., :keys, :]  # as a cache with room for more gives them


def mask_of(kind, shape, generator):
    batch, heads, _, queries, keys, _ = shape
    causal = torch.ones(queries, keys).tril(keys - queries).bool()[None, None]
    if kind == "none":
        return None
    if kind == "causal":
        return causal.expand(batch, 1, -1, -1)
    if kind == "padded":
        return causal & (torch.arange(keys) >= 9 * torch.arange(batch)[:, None])[:, None, None]
    if kind == "packed":
        texts = torch.arange(keys) // 40
        return causal & (texts[keys - queries :, None] == texts)
    if kind == "prefix":
        return causal | (torch.arange(keys) < keys - 3)
    free = torch.rand(batch, heads, queries, keys, generator=generator) > 0.3
    free[..., 0] = True
    return free


def module_of(shape):
    return SimpleNamespace(is_causal=True, num_key_value_groups=shape[1] // shape[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["none", "causal", "padded", "packed", "prefix", "of heads"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_it_computes_what_that_of_torch_does(kernel_alone, shape, kind, dtype):
    generator = torch.Generator().manual_seed(0)
    states, mask = drawn(shape, dtype, generator), mask_of(kind, shape, generator)
    before = [part.clone() for part in states]
    output, weights = prompt_attention(module_of(shape), *states, mask, scaling=0.3)
    assert weights is None and output.dtype == dtype and output.is_contiguous()
    assert all(torch.equal(*pair) for pair in zip(states, before, strict=True))
    doubles = [part.double() for part in states]
    truth, _ = sdpa_attention_forward(module_of(shape), *doubles, mask, scaling=0.3)
    fused, _ = sdpa_attention_forward(module_of(shape), *states, mask, scaling=0.3)
    seen = torch.ones(truth.shape[:3], dtype=torch.bool) if mask is None else mask.any(-1)
    seen = seen if seen.shape == truth.shape[:3] else seen.transpose(1, 2).expand(truth.shape[:3])
    assert output.isfinite().all() and (output[~seen] == 0).all() and (fused[~seen] == 0).all()
    error, other = ((found.double() - truth)[seen].norm() for found in (output, fused))
    assert error <= 1.5 * other + 1e-6 * truth[seen].norm()


def test_no_causality_without_a_mask(kernel_alone):
    states = drawn(SHAPES["behind a cache"], torch.float32, torch.Generator().manual_seed(0))
    module = module_of(SHAPES["behind a cache"])
    output, _ = prompt_attention(module, *states, None, is_causal=False)
    expected, _ = sdpa_attention_forward(module, *states, None, is_causal=False)
    torch.testing.assert_close(output, expected, atol=1e-6, rtol=1e-5)
    causal, _ = prompt_attention(module, *states, None)
    assert not torch.allclose(output, causal, atol=1e-3)


@pytest.mark.parametrize("wrong", ["rows of the mask", "heads of the mask", "size of the keys", "dtype"])
def test_what_does_not_fit_is_told_by_torch(monkeypatch, wrong):
    """The kernel would read beyond its end."""
    query, key, value = drawn(SHAPES["square"], torch.float32, torch.Generator())
    masks = {"rows of the mask": (2, 1, 150, 150), "heads of the mask": (1, 3, 150, 150)}
    mask = torch.ones(masks[wrong], dtype=torch.bool) if wrong in masks else None
    key = key[..., :15] if wrong == "size of the keys" else key.double() if wrong == "dtype" else key
    monkeypatch.setattr(prompt_qwen, "_attend", None)
    with pytest.raises(RuntimeError):
        prompt_attention(module_of(SHAPES["square"]), query, key, value, mask)


@pytest.mark.parametrize("threads", [1, 3])
def test_any_number_of_threads(kernel_alone, threads):
    states = drawn(SHAPES["grouped, odd"], torch.float32, torch.Generator().manual_seed(0))
    expected, _ = sdpa_attention_forward(module_of(SHAPES["grouped, odd"]), *states, None, is_causal=False)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        output, _ = prompt_attention(module_of(SHAPES["grouped, odd"]), *states, None, is_causal=False)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(output, expected, atol=1e-6, rtol=1e-5)


def test_keys_that_are_not_seen_may_hold_anything(kernel_alone):
    """Scores of what isn't seen, as of padding, are never looked at."""
    shape = SHAPES["square"]
    query, key, value = drawn(shape, torch.bfloat16, torch.Generator().manual_seed(0))
    mask = torch.ones(150, 150, dtype=torch.bool).tril()[None, None].clone()
    mask[..., :9] = False
    mask[..., 9] = True
    expected, _ = prompt_attention(module_of(shape), query, key, value, mask)
    key = key.clone()
    key[:, :, :9] = torch.nan
    assert torch.equal(prompt_attention(module_of(shape), query, key, value, mask)[0], expected)


def test_an_empty_batch(kernel_alone):
    states = drawn((0, 4, 2, 70, 70, 16), torch.float32, torch.Generator())
    assert prompt_attention(module_of((0, 4, 2)), *states, None)[0].shape == (0, 70, 4, 16)


def test_a_training_waits_for_a_kernel_that_is_being_made(monkeypatch):
    """Else it would go on with another attention than it began with."""
    states = torch.zeros(1, 4, 40, 16)
    monkeypatch.setattr(products_qwen, "library", lambda: None)
    assert not prompt_qwen.kernel_reads(states)
    assert prompt_qwen.kernel_reads(states.clone().requires_grad_())
    with torch.no_grad():
        assert not prompt_qwen.kernel_reads(states.clone().requires_grad_())


def test_what_autocast_would_round_is_torchs_matter():
    states = torch.zeros(1, 4, 40, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not prompt_qwen.kernel_reads(states)
        assert prompt_qwen.kernel_reads(states.bfloat16())
    with torch.autocast("cpu", dtype=torch.float16):
        assert not prompt_qwen.kernel_reads(states.bfloat16())


@pytest.mark.parametrize(
    "option", ["dropout", "position_bias", "softcap", "mask of other keys", "mask of numbers", "float64"]
)
def test_the_rest_is_left_to_the_kernel(monkeypatch, option):
    asked = []
    monkeypatch.setattr(prompt_qwen, "sdpa_attention_forward", lambda *args, **kwargs: asked.append((args, kwargs)))
    shape = SHAPES["square"]
    states = drawn(shape, torch.float64 if option == "float64" else torch.float32, torch.Generator())
    masks = {"mask of other keys": torch.ones(1, 1, 150, 151).bool(), "mask of numbers": torch.zeros(1, 1, 150, 150)}
    mask = masks.get(option)
    given = {option: 0.5} if option in ("dropout", "position_bias", "softcap") else {}
    prompt_attention(module_of(shape), *states, mask, **given)
    ((args, kwargs),) = asked
    assert args[-1] is mask and all(kwargs[name] == value for name, value in given.items())


def test_where_it_takes_the_place_of_that_of_torch(tiny_config, monkeypatch):
    def choose(query, cache=None, training=False, **changes):
        module = QWenAttention(tiny_config(**{"attn_implementation": "sdpa"} | changes)).train(training)
        return choose_implementation(module, query, cache)

    query = torch.zeros(1, 4, 40, 16)
    assert choose(query) == choose(query.bfloat16()) == choose(query.half()) == PROMPT_IMPLEMENTATION
    assert choose(query, attn_implementation="eager") == "eager"
    learnt = query.clone().requires_grad_()
    others = [
        query.double(),
        query[:, :, :15],
        query.to("meta"),
        torch.nn.Parameter(query, False),
    ]
    assert [choose(other) for other in others] == ["sdpa"] * 4
    engines = PROMPT_IMPLEMENTATION if CACHE_NAME == "cache" else "sdpa"  # which adds to the cache itself
    assert choose(query, cache="an engine's") == engines
    assert choose(learnt) == choose(query, training=True) == PROMPT_IMPLEMENTATION
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "sdpa", eager_attention_forward)
    assert choose(query) == "sdpa"


@torch.no_grad()
def test_an_attention_registered_under_the_name_is_called(tiny_model, monkeypatch):
    called = []

    def mine(module, *args, **kwargs):
        called.append(module.layer_idx)
        return sdpa_attention_forward(module, *args, **kwargs)

    model = tiny_model(attn_implementation="sdpa")
    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", mine)
    model(torch.arange(40)[None])
    assert called == list(range(model.config.num_hidden_layers))


@torch.no_grad()
@pytest.mark.parametrize("chunk", [200, 90])
def test_a_model_reads_the_same(tiny_model, monkeypatch, chunk):
    model = tiny_model(attn_implementation="sdpa", n_positions=256, seq_length=256)
    ids = torch.randint(1, 100, (2, 200), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :50] = 0

    def read():
        cache, logits = None, []
        for start in range(0, 200, chunk):
            part = slice(start, start + chunk)
            seen = mask[:, : start + chunk]
            output = model(ids[:, part], attention_mask=seen, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            logits.append(output.logits)
        return torch.cat(logits, 1)[mask.bool()]

    calls = []
    real = prompt_qwen._attend
    monkeypatch.setattr(prompt_qwen, "_attend", lambda *args: calls.append(1) or real(*args))
    ours = read()
    assert calls
    monkeypatch.setenv(SWITCH, "0")
    torch.testing.assert_close(ours, read(), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_compiling_and_exporting_keep_the_kernel(tiny_model):
    model, ids = tiny_model(attn_implementation="sdpa"), torch.arange(1, 41)[None]
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph.code)
        return graph.forward

    with torch.no_grad():
        compiled = torch.compile(model, backend=backend)(ids, use_cache=False).logits
        program = torch.export.export(model, (ids,), {"use_cache": False}, strict=False)
        torch.testing.assert_close(compiled, model(ids, use_cache=False).logits, atol=1e-5, rtol=1e-5)
    assert any("scaled_dot_product_attention" in code for code in graphs)
    assert "scaled_dot_product_attention" in program.graph_module.code
