"""The table of names and the pure functions between formats, judged by the model classes themselves.

The inverse of LLaMA's original format and its rotary arithmetic are written anew here, from `llama-2.md`.
"""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from qwen1 import QWenConfig, QWenLMHeadModel
from qwen1.conversion.errors import CheckpointError
from qwen1.conversion.files.tensors import TensorInfo
from qwen1.conversion.files.weights import open_weights
from qwen1.conversion.formats.architecture import Architecture
from qwen1.conversion.formats.expected import check_names
from qwen1.conversion.formats.hugging_face import read_hf
from qwen1.conversion.formats.llama_original import llama_shapes, llama_to_hf, read_llama
from qwen1.conversion.formats.names import IGNORED, TABLE, hf_shapes, layer_rows
from qwen1.conversion.formats.qwen import as_qwen, hf_to_qwen, qwen_config, qwen_shapes, qwen_to_hf, read_qwen
from qwen1.conversion.formats.recipes import compose, convert_tensors, halves_from_pairs

QWEN = {
    "plain": {},
    "with biases": {"no_bias": False},
    "grouped heads": {"num_key_value_heads": 2},
    "wide heads": {"kv_channels": 32},
    "narrow grouped heads": {"kv_channels": 8, "num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "padded vocabulary": {"padded_vocab_size": 512},
    "all at once": {"no_bias": False, "num_key_value_heads": 2, "kv_channels": 32, "tie_word_embeddings": True},
}
GROUPED = {"num_key_value_heads": 2}
HF = {
    "qwen2": (Qwen2Config, {}),
    "qwen2 grouped, tied": (Qwen2Config, {**GROUPED, "tie_word_embeddings": True}),
    "qwen2 wide heads": (Qwen2Config, {"head_dim": 32}),
    "llama": (LlamaConfig, {}),
    "llama grouped, tied": (LlamaConfig, {**GROUPED, "tie_word_embeddings": True}),
    "llama attention bias": (LlamaConfig, {**GROUPED, "attention_bias": True}),
    "llama mlp bias": (LlamaConfig, {**GROUPED, "mlp_bias": True}),
    "llama both biases": (LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "llama wide heads": (LlamaConfig, {**GROUPED, "head_dim": 32}),
}
WIDTH = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 320}
LLAMA = Architecture(
    layers=2,
    width=64,
    heads=8,
    kv_heads=4,
    head_dim=8,
    mlp=96,
    rows=40,
    norm_eps=1e-5,
    rope_theta=1e4,
    length=128,
    qkv_bias=False,
)


@pytest.fixture(params=QWEN)
def qwen_model(request, tiny_config):
    return QWenLMHeadModel(tiny_config(use_dynamic_ntk=False, use_logn_attn=False, **QWEN[request.param]))


@pytest.fixture(params=HF)
def hf_model(request):
    config_class, changes = HF[request.param]
    values = {"num_key_value_heads": 4, "intermediate_size": 172, "max_position_embeddings": 256, **WIDTH, **changes}
    config = config_class(**values, attn_implementation="eager")
    torch.manual_seed(0)
    model = (Qwen2ForCausalLM if config_class is Qwen2Config else LlamaForCausalLM)(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def parameters(model):
    """Every weight once, so without a tied head."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def shapes(tensors):
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def random_bits(wanted, seed=0, dtype=torch.bfloat16):
    """Tensors of any bits there are, NaN among them."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randint(-(2**15), 2**15, shape, generator=generator, dtype=torch.int16).view(dtype)
        for name, shape in wanted.items()
    }


def identical(first, second):
    return first.keys() == second.keys() and all(
        tensor.dtype == second[name].dtype and torch.equal(tensor.view(torch.int16), second[name].view(torch.int16))
        for name, tensor in first.items()
    )


def pattern(name):
    """A name with its layer left open."""
    return re.sub(r"\.\d+\.", ".{}.", name)


# --- the table ---


def test_qwen_names_and_shapes_are_those_of_the_model(qwen_model):
    assert qwen_shapes(read_qwen(qwen_model.config.to_dict())) == shapes(parameters(qwen_model))


def test_hf_names_and_shapes_are_those_of_the_model(hf_model):
    assert hf_shapes(read_hf(hf_model.config.to_dict())) == shapes(parameters(hf_model))


@pytest.mark.parametrize("name, files", [("mp1", 1), ("mp2", 2)])
def test_llama_names_and_shapes_are_those_of_the_golden_files(golden, name, files):
    infos = open_weights(golden / "llama_meta" / name).infos
    stored = {name: info.shape for name, info in infos.items() if not IGNORED.fullmatch(name)}
    architecture = replace(
        LLAMA, heads=4, kv_heads=2, head_dim=16, rows=320, mlp=stored["00/layers.0.feed_forward.w1.weight"][0] * files
    )
    assert llama_shapes(architecture, files, embedding_split=1) == stored


def test_every_row_of_the_table_is_a_weight_of_some_model(tiny_config, golden):
    values = dict(num_key_value_heads=2, intermediate_size=172, **WIDTH)
    qwen = QWenLMHeadModel(tiny_config(no_bias=False))
    qwen2 = Qwen2ForCausalLM(Qwen2Config(**values))
    llama = LlamaForCausalLM(LlamaConfig(**values, attention_bias=True, mlp_bias=True))
    original = open_weights(golden / "llama_meta" / "mp1").infos
    assert {row.qwen for row in TABLE} == {pattern(name) for name in parameters(qwen)}
    assert {row.hf for row in TABLE} == {pattern(name) for name in parameters(qwen2) | parameters(llama)}
    assert {row.llama for row in TABLE} - {None} == {
        pattern(name.removeprefix("00/")) for name in original if not IGNORED.fullmatch(name)
    }
    assert len({row.hf for row in TABLE}) == len(TABLE)


def test_layers_come_in_the_order_of_computation():
    rows = [(row.hf, layer) for row, layer in layer_rows(LLAMA)]
    assert rows[0] == ("model.embed_tokens.weight", None)
    assert rows[-2:] == [("model.norm.weight", None), ("lm_head.weight", None)]
    assert [layer for _, layer in rows[1:-2]] == sorted(layer for _, layer in rows[1:-2])


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.rotary_emb.inv_freq",
        "transformer.rotary_emb.inv_freq",
        "transformer.h.11.attn.bias",
        "transformer.h.0.attn.masked_bias",
        "rope.freqs",
        "01/rope.freqs",
        "00/freqs_cos",
        "freqs_sin",
        "00/pos_cis",
    ],
)
def test_tables_that_some_releases_stored_are_passed_over(name):
    check_names({name: None}, {})


# --- there and back ---


def test_qwen_comes_back_from_hf_to_the_bit(qwen_model):
    architecture = read_qwen(qwen_model.config.to_dict())
    tensors = random_bits(qwen_shapes(architecture))
    middle = convert_tensors(qwen_to_hf(architecture), tensors)
    assert shapes(middle) == hf_shapes(architecture)
    assert identical(convert_tensors(hf_to_qwen(architecture, torch.bfloat16), middle), tensors)


def test_hf_comes_back_from_qwen_to_the_bit(hf_model):
    architecture = read_hf(hf_model.config.to_dict())
    tensors = random_bits(hf_shapes(architecture))
    middle = convert_tensors(hf_to_qwen(architecture, torch.bfloat16), tensors)
    assert shapes(middle) == qwen_shapes(as_qwen(architecture))
    back = convert_tensors(qwen_to_hf(as_qwen(architecture)), middle)
    added = {name: back.pop(name) for name in back.keys() - tensors.keys()}
    assert identical(back, tensors)
    assert all(name.endswith(".bias") and not tensor.any() for name, tensor in added.items())
    assert all(tensor.dtype == torch.bfloat16 for tensor in middle.values())


def test_a_composed_way_is_the_two_ways_one_after_the_other():
    tensors = random_bits(llama_shapes(LLAMA, 2, 1))
    first, second = llama_to_hf(LLAMA, 2, 1), hf_to_qwen(LLAMA, torch.bfloat16)
    assert identical(
        convert_tensors(compose(first, second), tensors),
        convert_tensors(second, convert_tensors(first, tensors)),
    )


def test_conversions_leave_their_tensors_alone():
    tensors = random_bits(llama_shapes(LLAMA, 2, 0))
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    for _ in range(2):
        convert_tensors(compose(llama_to_hf(LLAMA, 2, 0), hf_to_qwen(LLAMA, torch.bfloat16)), tensors)
    assert identical(tensors, before)


def test_ways_can_be_followed_without_values(qwen_model):
    architecture = read_qwen(qwen_model.config.to_dict())
    tensors = {name: torch.empty(shape, device="meta") for name, shape in qwen_shapes(architecture).items()}
    result = convert_tensors(qwen_to_hf(architecture), tensors)
    assert all(tensor.is_meta for tensor in result.values()) and shapes(result) == hf_shapes(architecture)


def test_every_source_is_used_and_every_result_made_once():
    architecture = replace(LLAMA, qkv_bias=True)
    for recipes, sources, results in (
        (qwen_to_hf(architecture), qwen_shapes(architecture), hf_shapes(architecture)),
        (hf_to_qwen(architecture, torch.float32), hf_shapes(architecture), qwen_shapes(architecture)),
    ):
        assert [recipe.name for recipe in recipes] == list(results)
        assert {source for recipe in recipes for source in recipe.sources} == sources.keys()


# --- the same model ---


def test_the_same_logits_under_qwen_names(hf_model):
    """Biases that LLaMA has in one place only, or nowhere, are zero elsewhere."""
    architecture = read_hf(hf_model.config.to_dict())
    state = convert_tensors(hf_to_qwen(architecture, torch.float32), parameters(hf_model))
    config = QWenConfig.from_dict({**qwen_config(as_qwen(architecture)), "use_flash_attn": False})
    config._attn_implementation = "eager"
    ours = QWenLMHeadModel(config).eval()
    ours.load_state_dict({"lm_head.weight": state["transformer.wte.weight"], **state}, strict=True)
    ids = torch.randint(320, (2, 23), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, hf_model(ids).logits, atol=1e-4, rtol=1e-4)


# --- LLaMA's original format ---


def pairs_from_halves(tensor, head_dim):
    """Row i and row i + D / 2 of each head become neighbours, told row by row."""
    order = [
        head * head_dim + half * head_dim // 2 + i
        for head in range(tensor.shape[0] // head_dim)
        for i in range(head_dim // 2)
        for half in (0, 1)
    ]
    return tensor[order]


LLAMA_NAMES = {
    "self_attn.q_proj": ("attention.wq", 0),
    "self_attn.k_proj": ("attention.wk", 0),
    "self_attn.v_proj": ("attention.wv", 0),
    "self_attn.o_proj": ("attention.wo", 1),
    "mlp.gate_proj": ("feed_forward.w1", 0),
    "mlp.down_proj": ("feed_forward.w2", 1),
    "mlp.up_proj": ("feed_forward.w3", 0),
    "input_layernorm": ("attention_norm", None),
    "post_attention_layernorm": ("ffn_norm", None),
}
"""Name in transformers -> name in LLaMA's code and the dimension that its parallel layer splits."""


def to_llama(tensors, files, embedding_split, head_dim=8):
    """The inverse of the conversion: ColumnParallelLinear splits rows, RowParallelLinear columns."""
    ends = {"embed_tokens": ("tok_embeddings", embedding_split), "norm": ("norm", None), "lm_head": ("output", 0)}
    result = {}
    for name, tensor in tensors.items():
        stem = name.removeprefix("model.").removesuffix(".weight")
        if match := re.fullmatch(r"layers\.(\d+)\.(.+)", stem):
            own, dimension = LLAMA_NAMES[match[2]]
            own = f"layers.{match[1]}.{own}"
        else:
            own, dimension = ends[stem]
        if own.endswith(("wq", "wk")):
            tensor = pairs_from_halves(tensor, head_dim)
        parts = [tensor] * files if dimension is None else tensor.tensor_split(files, dimension)
        result |= {f"{number:02d}/{own}.weight": part.clone() for number, part in enumerate(parts)}
    return result


@pytest.mark.parametrize("embedding_split", [0, 1])
@pytest.mark.parametrize("files", [1, 2, 4])
@pytest.mark.parametrize("kv_heads", [8, 4])
def test_llama_comes_back_from_its_original_format_to_the_bit(files, kv_heads, embedding_split):
    architecture = replace(LLAMA, kv_heads=kv_heads)
    tensors = random_bits(hf_shapes(architecture))
    split = to_llama(tensors, files, embedding_split)
    assert shapes(split) == llama_shapes(architecture, files, embedding_split)
    assert identical(convert_tensors(llama_to_hf(architecture, files, embedding_split), split), tensors)


def test_a_tied_llama_has_no_head_of_its_own():
    architecture = replace(LLAMA, tied=True)
    tensors = random_bits(hf_shapes(architecture))
    split = to_llama(tensors, 1, 1)
    assert "00/output.weight" not in split
    assert identical(convert_tensors(llama_to_hf(architecture, 1, 1), split), tensors)


def test_both_golden_splits_are_the_same_model(golden):
    results = []
    for files in (1, 2):
        weights = open_weights(golden / "llama_meta" / f"mp{files}")
        mlp = weights.infos["00/layers.0.feed_forward.w1.weight"].shape[0] * files
        architecture = replace(LLAMA, heads=4, kv_heads=2, head_dim=16, rows=320, mlp=mlp)
        tensors = {name: weights.read(name).clone() for name in weights.infos}
        results.append(convert_tensors(llama_to_hf(architecture, files, 1), tensors))
    assert results[0].keys() == results[1].keys()
    assert all(torch.equal(tensor, results[1][name]) for name, tensor in results[0].items())


def rotated_in_pairs(x, theta=10000.0):
    """LLaMA's own arithmetic: adjacent channels are the parts of a complex number; x (T, H, D)."""
    length, _, size = x.shape
    frequencies = 1.0 / theta ** (torch.arange(0, size, 2).double() / size)
    turns = torch.polar(torch.ones(length, size // 2).double(), torch.outer(torch.arange(length), frequencies))
    return torch.view_as_real(torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2)) * turns[:, None]).flatten(2)


def rotated_in_halves(x, theta=10000.0):
    """The arithmetic of transformers and of QWen: channel i is turned against channel i + D / 2."""
    length, _, size = x.shape
    frequencies = 1.0 / theta ** (torch.arange(0, size, 2).double() / size)
    angles = torch.outer(torch.arange(length).double(), frequencies).repeat(1, 2)[:, None]
    return x * angles.cos() + torch.cat((-x[..., size // 2 :], x[..., : size // 2]), dim=-1) * angles.sin()


@pytest.mark.parametrize("head_dim", [2, 8, 64])
def test_reordered_projections_give_the_scores_of_complex_rotation(head_dim):
    torch.manual_seed(0)
    x = torch.randn(9, 16).double()
    query, key = torch.randn(4 * head_dim, 16).double(), torch.randn(4 * head_dim, 16).double()

    def scores(rotate, *projections):
        q, k = (rotate((x @ projection.T).view(9, 4, head_dim)) for projection in projections)
        return torch.einsum("qhd,khd->hqk", q, k)

    reordered = [halves_from_pairs(projection, head_dim) for projection in (query, key)]
    expected = scores(rotated_in_pairs, query, key)
    torch.testing.assert_close(scores(rotated_in_halves, *reordered), expected)
    if head_dim > 2:
        assert not torch.allclose(scores(rotated_in_halves, query, key), expected)


def test_reordering_undoes_what_is_told_row_by_row():
    rows = torch.arange(48).reshape(24, 2)
    assert torch.equal(halves_from_pairs(pairs_from_halves(rows, 8), 8), rows)
    assert halves_from_pairs(torch.arange(8), 8).tolist() == [0, 2, 4, 6, 1, 3, 5, 7]


def test_tensors_that_are_stored_transposed_are_converted_as_well():
    tensor = torch.randn(6, 24).T
    assert torch.equal(halves_from_pairs(tensor, 8), halves_from_pairs(tensor.contiguous(), 8))


# --- what doesn't fit ---


def infos(wanted):
    path = Path("folder") / "model.safetensors"
    return {name: TensorInfo(name, path, torch.float32, shape) for name, shape in wanted.items()}


def test_weights_that_fit_are_accepted():
    expected = qwen_shapes(LLAMA)
    check_names(infos({**expected, "transformer.h.1.attn.bias": (1, 1, 8, 8)}), expected)


@pytest.mark.parametrize("name", ["transformer.h.2.ln_1.weight", "transformer.wte.weight_scale", "lm_head.bias"])
def test_an_unknown_name_is_named(name):
    expected = qwen_shapes(LLAMA)
    named = (
        f"{name!r} in {Path('folder') / 'model.safetensors'} is not a weight of this architecture (1 such tensors, 0"
    )
    with pytest.raises(CheckpointError, match=re.escape(named)):
        check_names(infos({**expected, name: (3,)}), expected)


def test_a_missing_tensor_is_named():
    expected = qwen_shapes(LLAMA)
    for name in expected:
        rest = {other: shape for other, shape in expected.items() if other != name}
        with pytest.raises(CheckpointError, match=rf"^'{name}' is missing \(1 of {len(expected)} tensors"):
            check_names(infos(rest), expected)


def test_a_renamed_tensor_is_named_with_what_is_missing_in_its_place():
    expected = qwen_shapes(LLAMA)
    renamed = {name.replace("ln_f", "ln_g"): shape for name, shape in expected.items()}
    with pytest.raises(CheckpointError, match="1 such tensors, 1 missing, first 'transformer.ln_f.weight'"):
        check_names(infos(renamed), expected)


@pytest.mark.parametrize(
    "change", [lambda shape: (*shape[:-1], shape[-1] + 1), lambda shape: shape[::-1], lambda _: ()]
)
def test_a_wrong_shape_is_named(change):
    expected = qwen_shapes(replace(LLAMA, kv_heads=2))
    for name, shape in expected.items():
        if change(shape) != shape:
            named = (
                f"{name!r} in {Path('folder') / 'model.safetensors'} has shape {change(shape)}, but the configuration"
            )
            with pytest.raises(CheckpointError, match=re.escape(named) + rf".*{re.escape(str(shape))}"):
                check_names(infos({**expected, name: change(shape)}), expected)


@pytest.mark.parametrize(
    "change, named",
    [
        ({"layers": 0}, "layers=0"),
        ({"layers": -1}, "layers=-1"),
        ({"width": 64.0}, "width=64.0"),
        ({"rows": None}, "rows=None"),
        ({"heads": "8"}, "heads='8'"),
        ({"mlp": True}, "mlp=True"),
        ({"kv_heads": 3}, "kv_heads=3"),
        ({"norm_eps": None}, "norm_eps=None"),
        ({"norm_eps": -1e-5}, "norm_eps=-1e-05"),
        ({"rope_theta": float("nan")}, "rope_theta=nan"),
        ({"rope_theta": "10000"}, "rope_theta='10000'"),
        ({"length": 0}, "length=0"),
    ],
)
def test_impossible_architectures_are_refused_by_name(change, named):
    with pytest.raises(CheckpointError, match=re.escape(named)):
        replace(LLAMA, **change)


def test_many_random_shapes_go_there_and_back():
    generator = torch.Generator().manual_seed(0)

    def pick(*choices):
        return choices[int(torch.randint(len(choices), (), generator=generator))]

    for seed in range(25):
        files, groups = pick(1, 2, 4), pick(4, 8)
        heads, head_dim = groups * pick(1, 2, 3), pick(2, 6, 16)
        architecture = replace(
            LLAMA,
            layers=pick(1, 3),
            width=heads * head_dim,
            heads=heads,
            kv_heads=groups,
            head_dim=head_dim,
            mlp=8 * pick(3, 5, 11),
            rows=4 * pick(7, 10),
            tied=files == 1 and pick(True, False),
        )
        tensors = random_bits(hf_shapes(architecture), seed)
        split = to_llama(tensors, files, pick(0, 1), head_dim)
        vocabulary = split["00/tok_embeddings.weight"].shape[1] == architecture.width
        found = read_llama(
            {"dim": architecture.width, "n_layers": architecture.layers, "n_heads": heads, "n_kv_heads": groups},
            {name[3:]: tuple(tensor.shape) for name, tensor in split.items() if name.startswith("00/")},
            files,
        )
        assert replace(found, length=LLAMA.length, settings=architecture.settings) == architecture
        way = compose(llama_to_hf(found, files, 0 if vocabulary else 1), hf_to_qwen(found, torch.bfloat16))
        back = convert_tensors(qwen_to_hf(as_qwen(found)), convert_tensors(way, split))
        assert identical({name: back[name] for name in tensors}, tensors)
