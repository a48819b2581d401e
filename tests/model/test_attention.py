"""The documented attention functions, masks, grouped heads and the registry."""

import ast
import math

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qwen1 import QWenAttention, attention_qwen, modeling_qwen
from qwen1.arguments_qwen import CACHE_NAME
from qwen1.attention_qwen import (
    FLASH_IMPLEMENTATION,
    LONE_QUERY_IMPLEMENTATION,
    choose_implementation,
    eager_attention_forward,
    lone_query_attention,
    mask_scores,
    repeat_kv,
)
from qwen1.translating_qwen import SWITCH

TOLERANCE = 1e-6


@pytest.fixture
def attention(tiny_config):
    def make(**changes):
        torch.manual_seed(0)
        return QWenAttention(tiny_config(**changes), layer_number=0).eval()

    return make


@pytest.fixture
def qkv():
    generator = torch.Generator().manual_seed(1)

    def make(query_length, key_length, dtype=torch.float32):
        shapes = [(2, 4, length, 16) for length in (query_length, key_length, key_length)]
        return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]

    return make


def reference(query, key, value, visible, scale=None):
    """Attention one query at a time in float64; visible: (B, T, S)."""
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    output = torch.zeros(*query.shape[:3], value.shape[-1], dtype=torch.float64)
    for row in range(query.shape[0]):
        for head in range(query.shape[1]):
            for index in range(query.shape[2]):
                keys = visible[row, index].nonzero().flatten()
                scores = key[row, head, keys].double() @ query[row, head, index].double() * scale
                output[row, head, index] = scores.softmax(0) @ value[row, head, keys].double()
    return output  # (B, H, T, D)


def bottom_right(query_length, key_length):
    """(2, T, S): the queries are the last of the keys."""
    return torch.ones(query_length, key_length).tril(key_length - query_length).bool().expand(2, -1, -1)


@pytest.mark.parametrize(("query_length", "key_length"), [(5, 5), (1, 7), (3, 8)])
@pytest.mark.parametrize("name", ["_attn", "_upcast_and_reordered_attn"])
def test_documented_functions_are_causal_from_the_end(attention, qkv, name, query_length, key_length):
    query, key, value = qkv(query_length, key_length)
    output, weights = getattr(attention(), name)(query, key, value)
    output = output.transpose(1, 2) if name == "_attn" else output  # the documented layouts differ
    expected = reference(query, key, value, bottom_right(query_length, key_length))
    torch.testing.assert_close(output.double(), expected, atol=TOLERANCE, rtol=0)
    assert weights.shape == (2, 4, query_length, key_length)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, query_length))
    assert (weights[~bottom_right(query_length, key_length)[:, None].expand_as(weights)] == 0).all()


@pytest.mark.parametrize("name", ["_attn", "_upcast_and_reordered_attn"])
@pytest.mark.parametrize("additive", [True, False])
def test_padding_is_hidden(attention, qkv, name, additive):
    query, key, value = qkv(3, 6)
    real = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]]).bool()
    mask = real[:, None, None, :]
    if additive:
        mask = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
    output, _ = getattr(attention(), name)(query, key, value, mask)
    output = output.transpose(1, 2) if name == "_attn" else output
    expected = reference(query, key, value, bottom_right(3, 6) & real[:, None])
    torch.testing.assert_close(output.double(), expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("prefix", [0, 3])
def test_a_complete_mask_replaces_the_diagonal(attention, qkv, prefix):
    """Three tokens in the first slots of a static cache of eight; with a prefix, they see what follows them too."""
    query, key, value = qkv(3, 8) if prefix == 0 else qkv(3, 3)
    visible = torch.ones(3, key.shape[-2]).tril().bool()
    visible[:, :prefix] = True
    visible = visible.expand(2, -1, -1)
    output, _ = attention()._attn(query, key, value, visible[:, None])
    expected = reference(query, key, value, visible)
    torch.testing.assert_close(output.transpose(1, 2).double(), expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_row_without_any_key_stays_finite(dtype):
    scores = torch.full((1, 1, 2, 4), -100).to(dtype)  # below the least number, with the mask added
    least = torch.finfo(dtype).min
    for mask in (torch.zeros(1, 1, 1, 4).bool(), torch.full((1, 1, 2, 4), least, dtype=dtype)):
        assert mask_scores(scores, mask).softmax(-1).isfinite().all()


@pytest.mark.parametrize("name", ["_attn", "_upcast_and_reordered_attn"])
def test_scores_can_be_left_unscaled(attention, qkv, name):
    query, key, value = qkv(4, 4)
    module = attention(scale_attn_weights=False)
    assert module.scaling == 1.0
    output, _ = getattr(module, name)(query, key, value)
    output = output.transpose(1, 2) if name == "_attn" else output
    expected = reference(query, key, value, bottom_right(4, 4), scale=1.0)
    torch.testing.assert_close(output.double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["_attn", "_upcast_and_reordered_attn"])
def test_head_mask_scales_probabilities(attention, qkv, name):
    query, key, value = qkv(4, 4)
    function = getattr(attention(), name)
    head_mask = torch.tensor([1.0, 0.0, 0.5, 1.0]).view(1, 4, 1, 1)
    _, plain = function(query, key, value)
    _, masked = function(query, key, value, head_mask=head_mask)
    torch.testing.assert_close(masked, plain * head_mask)


def test_upcast_attention_is_closer_in_half_precision(attention, qkv):
    query, key, value = qkv(48, 48, torch.bfloat16)
    expected = reference(query, key, value, bottom_right(48, 48))
    plain, weights = attention()._attn(query, key, value)
    upcast, upcast_weights = attention()._upcast_and_reordered_attn(query, key, value)
    assert weights.dtype == upcast_weights.dtype == torch.bfloat16
    assert (upcast - expected).abs().mean() < (plain.transpose(1, 2) - expected).abs().mean()


def test_upcast_attention_ignores_autocast(attention, qkv):
    query, key, value = qkv(4, 4)
    module = attention()
    _, plain = module._upcast_and_reordered_attn(query, key, value)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, inside = module._upcast_and_reordered_attn(query, key, value)
    assert torch.equal(plain, inside)


def test_dropout_only_while_training(attention, qkv):
    query, key, value = qkv(16, 16)
    module = attention(attn_pdrop=0.5)
    _, weights = module._attn(query, key, value)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 16))
    _, dropped = module.train()._attn(query, key, value)
    kept = dropped != 0
    share = kept[weights > 0].float().mean()
    assert 0.4 < share < 0.6
    torch.testing.assert_close(dropped[kept], weights[kept] * 2)


def test_heads_split_and_merge(attention):
    module, tensor = attention(), torch.randn(2, 3, 64)
    split = module._split_heads(tensor, 4, 16)
    assert split.shape == (2, 3, 4, 16)
    assert torch.equal(split[0, 1, 2], tensor[0, 1, 32:48])
    assert torch.equal(module._merge_heads(split, 4, 16), tensor)
    assert torch.equal(module._merge_heads(split.transpose(0, 1).contiguous().transpose(0, 1), 4, 16), tensor)


def test_groups_share_a_key_head():
    states = torch.randn(1, 2, 3, 4)
    repeated = repeat_kv(states, 3)
    for head in range(6):
        assert torch.equal(repeated[:, head], states[:, head // 3])
    assert repeat_kv(states, 1) is states


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@torch.no_grad()
def test_grouped_heads_equal_full_heads_with_repeated_weights(tiny_model, kv_heads):
    grouped, full = tiny_model("eager", num_key_value_heads=kv_heads), tiny_model("eager")
    state = grouped.state_dict()
    for layer in range(2):
        for name in ("weight", "bias"):
            key = f"transformer.h.{layer}.attn.c_attn.{name}"
            query, keys, values = state[key].split((64, 16 * kv_heads, 16 * kv_heads))
            widened = [
                part.view(kv_heads, 16, -1).repeat_interleave(4 // kv_heads, dim=0).reshape(64, -1)
                for part in (keys, values)
            ]
            state[key] = torch.cat([query.reshape(64, -1), *widened]).view(192, *state[key].shape[1:])
    full.load_state_dict(state)
    ids = torch.arange(1, 41)[None]
    for implementation in ("eager", "sdpa"):
        grouped.set_attn_implementation(implementation)
        torch.testing.assert_close(grouped(ids).logits, full(ids).logits, atol=1e-4, rtol=0)
    assert grouped(ids).past_key_values.layers[0].keys.shape[1] == kv_heads


@torch.no_grad()
def test_head_size_need_not_divide_the_width(tiny_model):
    model = tiny_model("eager", kv_channels=24)
    assert model.transformer.h[0].attn.c_attn.weight.shape == (3 * 96, 64)
    assert model.transformer.h[0].attn.c_proj.weight.shape == (64, 96)
    assert model(torch.arange(5)[None]).logits.isfinite().all()


def test_probabilities_come_with_eager_only(tiny_model):
    ids = torch.arange(6)[None]
    output = tiny_model("eager")(ids, output_attentions=True)
    assert len(output.attentions) == 2 and output.attentions[0].shape == (1, 4, 6, 6)
    assert not tiny_model("sdpa")(ids, output_attentions=True).attentions, "as the models of transformers do"


@torch.no_grad()
def test_implementations_can_be_switched(tiny_model):
    model, ids = tiny_model("eager"), torch.arange(1, 41)[None]
    eager = model(ids).logits
    model.set_attn_implementation("sdpa")
    assert model.config._attn_implementation == "sdpa"
    torch.testing.assert_close(model(ids).logits, eager, atol=1e-4, rtol=0)
    assert FLASH_IMPLEMENTATION in ALL_ATTENTION_FUNCTIONS.valid_keys()


@torch.no_grad()
def test_a_registered_backend_gets_everything_it_needs(tiny_model, monkeypatch):
    """What vLLM's backend asks for: (B, H, T, D) tensors, scaling, an integer layer_idx, all keyword arguments."""
    calls = []

    def backend(module, query, key, value, attention_mask, scaling=None, dropout=0.0, backend_state=None, **kwargs):
        calls.append((module.layer_idx, query.shape, key.shape, scaling, attention_mask, backend_state))
        return torch.zeros_like(query.transpose(1, 2)), None

    model = tiny_model("eager", num_key_value_heads=2)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "outside_engine", backend)
    model.config._attn_implementation = "outside_engine"
    output = model.transformer(
        input_ids=None,
        inputs_embeds=torch.randn(1, 7, 64),
        position_ids=torch.tensor([[0, 1, 2, 0, 1, 40, 41]]),
        use_cache=False,
        return_dict=False,
        backend_state="state",
    )
    assert isinstance(output, tuple) and output[0].shape == (1, 7, 64)
    expected = [(layer, (1, 4, 7, 16), (1, 2, 7, 16), 0.25, None, "state") for layer in (0, 1)]
    assert calls == expected


@torch.no_grad()
def test_a_registered_backend_may_return_flat_rows(tiny_model, monkeypatch):
    """vLLM's gives (B * T, H * D), which every model of transformers brings back into shape."""

    def flat(*args, **kwargs):
        output, weights = eager_attention_forward(*args, **kwargs)
        return output.flatten(2).flatten(0, 1), weights

    model, ids = tiny_model("eager"), torch.arange(1, 9)[None]
    expected = model(ids, use_cache=False).logits
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "outside_engine", flat)
    model.config._attn_implementation = "outside_engine"
    torch.testing.assert_close(model(ids, use_cache=False).logits, expected)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("chunk", [16, 5 * 2 * 4 * 16, 2**20])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_lone_query_sees_what_it_should(attention, qkv, monkeypatch, dtype, chunk, padded):
    monkeypatch.setattr(attention_qwen, "_CHUNK_ELEMENTS", chunk)  # one key at a time, five, all
    query, key, value = qkv(1, 37, dtype)
    visible = torch.ones(2, 1, 37, dtype=torch.bool)
    visible[0, 0, : 9 * padded] = False
    output, weights = lone_query_attention(attention(), query, key, value, visible[:, None] if padded else None)
    assert output.shape == (2, 1, 4, 16) and output.dtype == dtype and weights is None
    expected = reference(query, key, value, visible).transpose(1, 2)
    # All but the result is float32.
    torch.testing.assert_close(output.double(), expected, atol=TOLERANCE, rtol=torch.finfo(dtype).eps)


def test_lone_queries_share_key_heads(attention, qkv):
    query, key, value = qkv(1, 37)
    module = attention(num_key_value_heads=2)
    output, _ = lone_query_attention(module, query, key[:, :2], value[:, :2], None)
    repeated, _ = module._attn(query, repeat_kv(key[:, :2], 2), repeat_kv(value[:, :2], 2))
    torch.testing.assert_close(output, repeated, atol=TOLERANCE, rtol=0)


def test_a_lone_query_is_one_token_in_half_precision(attention, qkv):
    def choose(query, cache=None, **changes):
        return choose_implementation(attention(**{"attn_implementation": "sdpa"} | changes), query, cache)

    lone = qkv(1, 7, torch.bfloat16)[0]
    assert choose(lone) == choose(lone.half()) == LONE_QUERY_IMPLEMENTATION
    assert choose(lone, attn_implementation="eager") == "eager"
    others = [lone.float(), qkv(2, 7, torch.bfloat16)[0], lone.to("meta"), lone.clone().requires_grad_()]
    assert [choose(query) for query in others] == ["sdpa"] * 4
    engines = LONE_QUERY_IMPLEMENTATION if CACHE_NAME == "cache" else "sdpa"  # which adds to the cache itself
    assert choose(lone, cache="an engine's") == engines
    assert choose_implementation(attention(attn_implementation="sdpa").train(), lone, None) == "sdpa"
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph.code)
        return graph.forward

    with torch.no_grad():
        module = attention(attn_implementation="sdpa").bfloat16()
        states = torch.zeros(1, 1, module.hidden_size, dtype=torch.bfloat16)
        angles = torch.zeros(1, 1, 1, 16)
        torch.compile(module, backend=backend, fullgraph=True)(states, (angles.cos(), angles.sin(), None))
    assert len(graphs) == 1 and "scaled_dot_product_attention" in graphs[0]


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True])
def test_decoding_in_half_precision_is_no_further_from_the_truth(tiny_model, monkeypatch, padded):
    monkeypatch.setenv(SWITCH, "0")
    model = tiny_model(attn_implementation="sdpa").to(torch.bfloat16)
    ids = torch.arange(1, 25).view(2, 12)
    mask = torch.ones_like(ids)
    mask[0, : 5 * padded] = 0

    def decode():
        cache = model(ids[:, :-1], attention_mask=mask[:, :-1], use_cache=True).past_key_values
        return model(ids[:, -1:], attention_mask=mask, past_key_values=cache).logits

    seen = []
    monkeypatch.setitem(
        ALL_ATTENTION_FUNCTIONS,
        LONE_QUERY_IMPLEMENTATION,
        lambda module, *args, **kwargs: seen.append(module.layer_idx) or lone_query_attention(module, *args, **kwargs),
    )
    ours = decode()
    assert seen == list(range(model.config.num_hidden_layers))
    monkeypatch.setattr(modeling_qwen, "choose_implementation", lambda *_: "sdpa")
    fused = decode()
    truth = model.float()(ids, attention_mask=mask).logits[:, -1:]
    assert (ours - truth).norm() < 1.2 * (fused - truth).norm()


def test_engines_find_what_they_look_for(repository):
    """vLLM reads the source of the attention: one call of a local interface, three parts of `c_attn`."""
    tree = ast.parse((repository / "modeling_qwen.py").read_text(encoding="utf-8"))
    (attention,) = (n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "QWenAttention")
    (forward,) = (n for n in attention.body if isinstance(n, ast.FunctionDef) and n.name == "forward")
    calls = [node for node in ast.walk(forward) if isinstance(node, ast.Call)]
    (interface,) = (c for c in calls if isinstance(c.func, ast.Attribute) and c.func.attr == "get_interface")
    (local,) = (n.target.id for n in ast.walk(forward) if isinstance(n, ast.AnnAssign) and n.value is interface)
    (attend,) = (c for c in calls if isinstance(c.func, ast.Name) and c.func.id == local)
    assert {k.arg: ast.unparse(k.value) for k in attend.keywords}["scaling"] == "self.scaling"
    (split,) = (c for c in calls if isinstance(c.func, ast.Attribute) and c.func.attr == "split")
    assert ast.unparse(split.func.value) == "self.c_attn(hidden_states)" and len(split.args[0].elts) == 3
