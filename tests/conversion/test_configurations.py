"""Configurations of every format: what they mean, what they can't say, and that the model classes agree."""

import json
import re
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, Qwen2Config, Qwen2ForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from qwen1 import QWenConfig, QWenLMHeadModel
from qwen1.conversion.errors import CheckpointError
from qwen1.conversion.formats.architecture import Architecture
from qwen1.conversion.formats.hugging_face import read_hf
from qwen1.conversion.formats.kinds import unknown_kind
from qwen1.conversion.formats.llama_original import LLAMA_2_LENGTH, read_llama
from qwen1.conversion.formats.names import hf_shapes
from qwen1.conversion.formats.qwen import as_qwen, qwen_config, qwen_shapes, read_qwen
from qwen1.conversion.formats.qwen2 import RopeScaling, check_qwen2, qwen2_config
from qwen1.ntk_qwen import ntk_alpha

SHAPE = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 172,
    "vocab_size": 320,
    "max_position_embeddings": 256,
}
SMALL = Architecture(
    layers=2,
    width=64,
    heads=4,
    kv_heads=2,
    head_dim=16,
    mlp=172,
    rows=320,
    norm_eps=1e-5,
    rope_theta=1e6,
    length=256,
    settings={"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None, "initializer_range": 0.03},
)
PARAMS = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "norm_eps": 1e-6, "rope_theta": 5e5}
SHAPES = {
    "tok_embeddings.weight": (320, 64),
    "layers.0.feed_forward.w1.weight": (172, 64),
    "output.weight": (320, 64),
}


def hf(model_type="llama", **changes):
    return {"model_type": model_type, **SHAPE, **changes}


def refusal(read, *arguments):
    with pytest.raises(CheckpointError) as error:
        read(*arguments)
    return str(error.value)


# --- QWen ---


@pytest.mark.parametrize("name, length", [("2023-08-chat", 2048), ("2023-12-base", 8192)])
def test_every_published_configuration_is_understood(golden, name, length):
    config = json.loads((golden / "published_configs" / f"{name}.config.json").read_text())
    assert read_qwen(config) == Architecture(
        layers=32,
        width=4096,
        heads=32,
        kv_heads=32,
        head_dim=128,
        mlp=11008,
        rows=151936,
        norm_eps=1e-6,
        rope_theta=10000,
        length=length,
        settings={
            "bos_token_id": 151643 if name == "2023-08-chat" else None,
            "eos_token_id": config.get("eos_token_id", 151643),
            "pad_token_id": None,
            "initializer_range": 0.02,
        },
    )
    assert sum(torch.Size(shape).numel() for shape in qwen_shapes(read_qwen(config)).values()) == 7721324544
    assert ["NTK and LogN" in note for note in check_qwen2(config)] == [True]


def test_a_published_configuration_written_by_this_repository_means_the_same(golden):
    for path in (golden / "published_configs").glob("*.config.json"):
        if "generation" not in path.name and "tokenizer" not in path.name:
            config = json.loads(path.read_text())
            written = json.loads(QWenConfig.from_dict(config).to_json_string())
            assert read_qwen(written) == read_qwen(config)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"no_bias": False},
        {"num_key_value_heads": 2, "kv_channels": 32, "tie_word_embeddings": True},
        {"padded_vocab_size": 512},
        {"rotary_emb_base": 1e6, "layer_norm_epsilon": 1e-5, "seq_length": 128},
    ],
)
def test_qwen_is_read_as_its_model_is_built(tiny_config, changes):
    config = tiny_config(**changes)
    architecture, model = read_qwen(config.to_dict()), QWenLMHeadModel(config)
    assert (architecture.layers, architecture.width) == (len(model.transformer.h), model.transformer.wte.embedding_dim)
    assert (architecture.rows, architecture.mlp) == (
        len(model.lm_head.weight),
        len(model.transformer.h[0].mlp.w1.weight),
    )
    assert architecture.norm_eps == model.transformer.ln_f.eps
    assert (architecture.heads, architecture.kv_heads) == (config.n_head, config.num_key_value_heads)
    assert (architecture.rope_theta, architecture.length) == (config.rotary_emb_base, config.seq_length)
    assert architecture.mlp_bias == (model.transformer.h[0].mlp.w1.bias is not None)
    assert architecture.output_bias == (model.transformer.h[0].attn.c_proj.bias is not None)


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"n_head": 3}, "n_head=3"),
        ({"hidden_size": 128}, "hidden_size=128"),
        ({"ffn_hidden_size": 191}, "ffn_hidden_size=191"),
        ({"n_layer": None}, "n_layer=None"),
        ({"kv_channels": "16"}, "kv_channels='16'"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantised (gptq)"),
        ({"quantization_config": "int4"}, "quantised (int4)"),
    ],
)
def test_impossible_qwen_configurations_are_refused_by_name(tiny_config, changes, named):
    assert named in refusal(read_qwen, {**tiny_config().to_dict(), **changes})


# --- Qwen2 and LLaMA in Hugging Face's format ---


@pytest.mark.parametrize("name", ["qwen2_gqa_tied", "qwen2_mha_untied", "llama_gqa"])
def test_golden_configurations_are_understood(golden, name):
    config = json.loads((golden / "native" / name / "config.json").read_text())
    found = read_hf(config)
    assert (found.layers, found.width, found.heads, found.head_dim, found.mlp, found.rows) == (2, 64, 4, 16, 172, 320)
    assert found.kv_heads == (4 if "mha" in name else 2)
    assert found.tied == name.endswith("gqa_tied")
    assert found.rope_theta == (1e6 if found.tied else 1e4)
    assert found.norm_eps == (1e-5 if "llama" in name else 1e-6)
    assert (found.qkv_bias, found.output_bias, found.mlp_bias) == ("qwen2" in name, False, False)
    assert found.length == 256


OLDER = {
    "rope_theta": 1e6,
    "rope_scaling": None,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.37.0",
    "attention_dropout": 0.0,
    "use_cache": True,
}


@pytest.mark.parametrize(
    "config",
    [
        hf("qwen2", **OLDER, use_sliding_window=False, sliding_window=32768, max_window_layers=1),
        hf("qwen2", **OLDER, use_sliding_window=True, sliding_window=64, max_window_layers=2),
        hf("llama", **OLDER, pretraining_tp=2, attention_bias=False),
        hf("llama", rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
        hf("qwen2", rope_parameters={"rope_type": "default", "rope_theta": 1e6}, hidden_act="swish"),
    ],
)
def test_older_spellings_are_understood(config):
    found = read_hf(config)
    assert (found.rope_theta, found.kv_heads, found.head_dim, found.length) == (1e6, 2, 16, 256)


def test_what_a_configuration_leaves_out_is_what_transformers_takes():
    config = hf("llama")
    del config["num_key_value_heads"]
    found, theirs = read_hf(config), LlamaConfig.from_dict(config)
    assert (found.kv_heads, found.norm_eps, found.tied) == (4, theirs.rms_norm_eps, theirs.tie_word_embeddings)
    assert found.rope_theta == 10000.0


@pytest.mark.parametrize("attention_bias", [True, False])
@pytest.mark.parametrize("mlp_bias", [True, False])
def test_biases_are_where_the_class_has_them(attention_bias, mlp_bias):
    found = read_hf(hf("llama", attention_bias=attention_bias, mlp_bias=mlp_bias))
    assert (found.qkv_bias, found.output_bias, found.mlp_bias) == (attention_bias, attention_bias, mlp_bias)
    assert read_hf(hf("qwen2", attention_bias=attention_bias, mlp_bias=mlp_bias)).output_bias is False


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
@pytest.mark.parametrize(
    "changes, named",
    [
        (
            {
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 128,
                }
            },
            "Rope scaling 'llama3'",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "Layers of type 'sliding_attention'"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"num_experts": 8}, "num_experts=8"),
        ({"num_local_experts": 8}, "num_local_experts=8"),
        ({"use_qk_norm": True}, "use_qk_norm=True"),
        ({"logit_scale": 0.0625}, "logit_scale=0.0625"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantised (awq)"),
        ({"num_attention_heads": 0}, "zero|heads=0"),
        ({"num_key_value_heads": 3}, "kv_heads=3"),
        ({"num_hidden_layers": -1}, "-1"),
        ({"hidden_size": "64"}, "hidden_size"),
        ({"vocab_size": None}, "vocab_size"),
        ({"rms_norm_eps": None}, "rms_norm_eps"),
        ({"rope_theta": None}, "rope_theta"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": "much"}}, "rope_theta='much'"),
        ({"rope_scaling": "linear"}, "linear"),
        ({"dtype": "nonsense"}, "nonsense"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
    ],
)
def test_what_cannot_be_represented_is_refused_by_name(model_type, changes, named):
    message = refusal(read_hf, hf(model_type, **changes))
    assert re.search(named.replace("(", r"\(").replace(")", r"\)"), message), message
    assert "\n" not in message


def test_sliding_windows_of_qwen2_are_refused():
    message = refusal(read_hf, hf("qwen2", use_sliding_window=True, sliding_window=64, max_window_layers=1))
    assert "'sliding_attention' (sliding windows)" in message


@pytest.mark.parametrize(
    "changes",
    [
        {"num_experts": 0},
        {"use_qk_norm": False},
        {"logit_scale": 1.0},
        {"final_logit_softcapping": None},
        {"partial_rotary_factor": 1.0},
        {"hidden_act": "silu"},
    ],
)
def test_what_changes_nothing_is_no_reason_to_refuse(changes):
    assert read_hf(hf(**changes)) == read_hf(hf())


@pytest.mark.parametrize(
    "model_type, named",
    [
        ("mixtral", "mixture of experts"),
        ("qwen2_moe", "mixture of experts"),
        ("qwen3_moe", "mixture of experts"),
        ("deepseek_v3", "mixture of experts"),
        ("qwen3", "norms of queries and keys"),
        ("mistral", "sliding windows"),
        ("gemma2", "capped logits"),
        ("qwen2_vl", "images"),
        ("bert", "model_type='bert' can't be handled"),
        (None, "model_type=None"),
        (["llama"], "model_type=['llama']"),
    ],
)
def test_other_model_types_are_refused_by_name(model_type, named):
    message = str(unknown_kind({"model_type": model_type}))
    assert named in message and "only qwen, dense qwen2 and llama" in message


# --- LLaMA's original format ---


def test_params_and_shapes_make_the_architecture():
    assert read_llama(PARAMS, SHAPES, 1) == Architecture(
        layers=2,
        width=64,
        heads=4,
        kv_heads=2,
        head_dim=16,
        mlp=172,
        rows=320,
        norm_eps=1e-6,
        rope_theta=5e5,
        length=LLAMA_2_LENGTH,
        qkv_bias=False,
        settings={"bos_token_id": 1, "eos_token_id": 2},
    )


def test_defaults_are_those_of_the_published_code():
    found = read_llama({"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": None, "vocab_size": -1}, SHAPES, 1)
    assert (found.kv_heads, found.norm_eps, found.rope_theta, found.length) == (4, 1e-5, 10000.0, 4096)


@pytest.mark.parametrize(
    "files, embedding, gate",
    [(1, (320, 64), (172, 64)), (2, (320, 32), (86, 64)), (2, (160, 64), (86, 64)), (4, (80, 64), (43, 64))],
)
def test_slices_add_up_to_the_whole(files, embedding, gate):
    shapes = {**SHAPES, "tok_embeddings.weight": embedding, "layers.0.feed_forward.w1.weight": gate}
    assert read_llama(PARAMS, shapes, files) == read_llama(PARAMS, SHAPES, 1)


def test_what_small_trainings_add_is_read():
    shapes = {name: shape for name, shape in SHAPES.items() if name != "output.weight"}
    found = read_llama({**PARAMS, "max_seq_len": 512, "dropout": 0.0, "multiple_of": 32, "vocab_size": 320}, shapes, 1)
    assert (found.length, found.tied) == (512, True)
    assert read_llama({**PARAMS, "head_dim": 32}, SHAPES, 1).head_dim == 32


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"dim": None}, "'dim', not None"),
        ({"n_layers": 0}, "'n_layers', not 0"),
        ({"n_layers": True}, "'n_layers', not True"),
        ({"n_heads": 4.0}, "'n_heads', not 4.0"),
        ({"n_kv_heads": "2"}, "'n_kv_heads', not '2'"),
        ({"n_kv_heads": 0}, "'n_kv_heads', not 0"),
        ({"n_kv_heads": 3}, "kv_heads=3"),
        ({"n_heads": 5}, "n_heads=5"),
        ({"head_dim": -16}, "'head_dim', not -16"),
        ({"norm_eps": None}, "norm_eps=None"),
        ({"rope_theta": 0}, "rope_theta=0"),
        ({"max_seq_len": -1}, "length=-1"),
        ({"vocab_size": 321}, "vocab_size=321"),
        ({"use_scaled_rope": True}, "use_scaled_rope=True"),
        ({"rope_scaling": {"factor": 2}}, "rope_scaling={'factor': 2}"),
        ({"sliding_window": 4096}, "sliding_window=4096"),
        ({"use_moe": True}, "use_moe=True"),
        ({"moe": {"num_experts": 8}}, "moe={'num_experts': 8}"),
        ({"qk_norm": True}, "qk_norm=True"),
        ({"n_experts": 4}, "n_experts=4"),
    ],
)
def test_what_llama_cannot_mean_is_refused_by_name(changes, named):
    assert named in refusal(read_llama, {**PARAMS, **changes}, SHAPES, 1)


@pytest.mark.parametrize("missing", ["dim", "n_layers", "n_heads"])
def test_a_missing_value_is_named(missing):
    params = {name: value for name, value in PARAMS.items() if name != missing}
    assert repr(missing) in refusal(read_llama, params, SHAPES, 1)


@pytest.mark.parametrize("name", ["tok_embeddings.weight", "layers.0.feed_forward.w1.weight"])
@pytest.mark.parametrize("shape", [None, (), (320,), (2, 3, 4)])
def test_weights_that_are_no_llama_are_refused(name, shape):
    shapes = {**SHAPES, name: shape}
    if shape is None:
        del shapes[name]
    assert repr(name) in refusal(read_llama, PARAMS, shapes, 1)


# --- writing ---


@pytest.mark.parametrize("changes", [{}, {"tied": True}, {"head_dim": 32}, {"kv_heads": 4, "norm_eps": 1e-6}])
def test_a_written_qwen2_configuration_means_the_same(changes):
    architecture = replace(SMALL, **changes)
    config = json.loads(json.dumps(qwen2_config(architecture, "bfloat16")))
    assert read_hf(config) == architecture
    model = Qwen2ForCausalLM(Qwen2Config.from_dict(config))
    assert {name: tuple(weight.shape) for name, weight in model.named_parameters()} == hf_shapes(architecture)
    assert (model.config.dtype, model.config.sliding_window) == (torch.bfloat16, None)
    assert ("head_dim" in config) == (changes == {"head_dim": 32})


@pytest.mark.parametrize(
    "changes", [{}, {"tied": True}, {"head_dim": 32}, {"qkv_bias": False}, {"output_bias": True}, {"mlp_bias": True}]
)
def test_a_written_qwen_configuration_means_the_same(changes):
    architecture = replace(SMALL, **changes)
    config = json.loads(json.dumps(qwen_config(architecture)))
    assert read_qwen(config) == as_qwen(architecture)
    model = QWenLMHeadModel(QWenConfig.from_dict(config))
    weights = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    assert weights == qwen_shapes(as_qwen(architecture))
    assert (config["use_dynamic_ntk"], config["use_logn_attn"]) == (False, False)
    assert config["n_positions"] == config["seq_length"] == 256


def test_a_qwen_configuration_that_cannot_be_is_refused():
    assert "kv_channels=15" in refusal(qwen_config, replace(SMALL, head_dim=15))


def test_llama_biases_move_to_where_qwen_has_them():
    for changes, no_bias in (({}, True), ({"attention_bias": True}, False), ({"mlp_bias": True}, False)):
        config = QWenConfig.from_dict(qwen_config(as_qwen(read_hf(hf("llama", **changes)))))
        assert config.no_bias is no_bias


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"apply_residual_connection_post_layernorm": True}, "apply_residual_connection_post_layernorm=True"),
        ({"scale_attn_weights": False}, "scale_attn_weights=False"),
        ({"rotary_pct": 0.5}, "rotary_pct=0.5"),
        ({"is_causal": False}, "is_causal=False"),
    ],
)
def test_what_qwen2_cannot_represent_is_refused_by_name(tiny_config, changes, named):
    assert named in refusal(check_qwen2, tiny_config(**changes).to_dict())


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"use_dynamic_ntk": True, "use_logn_attn": True}, ["NTK and LogN have no counterpart"]),
        ({"use_dynamic_ntk": True, "use_logn_attn": False}, ["NTK has no counterpart"]),
        ({"use_dynamic_ntk": False, "use_logn_attn": True}, ["LogN has no counterpart"]),
        ({"use_dynamic_ntk": False, "use_logn_attn": False}, []),
        ({"use_dynamic_ntk": False, "use_logn_attn": False, "use_cache_quantization": True}, ["int8 cache"]),
    ],
)
def test_what_qwen2_loses_is_told(tiny_config, changes, told):
    notes = check_qwen2(tiny_config(**changes).to_dict())
    assert len(notes) == len(told) and all(words in note for words, note in zip(told, notes, strict=True))


# --- rope scaling ---


@pytest.mark.parametrize(
    "text, kind, factor",
    [("yarn:4", "yarn", 4.0), ("yarn:1.5", "yarn", 1.5), ("dynamic", "dynamic", 2.0), ("dynamic:3", "dynamic", 3.0)],
)
def test_rope_scaling_is_parsed(text, kind, factor):
    assert RopeScaling.parse(text) == RopeScaling(kind, factor)


@pytest.mark.parametrize(
    "text", ["", "yarn", "yarn:", "yarn:x", "yarn:1", "yarn:nan", "yarn:inf", "linear:2", "dynamic:0"]
)
def test_other_rope_scaling_is_refused_by_name(text):
    assert f"{text!r} is unknown" in refusal(RopeScaling.parse, text)


@pytest.mark.parametrize("scaling, longest", [(RopeScaling("yarn", 4.0), 1024), (RopeScaling("dynamic", 2.0), 256)])
def test_transformers_understands_a_written_rope_scaling(scaling, longest):
    config = Qwen2Config.from_dict(qwen2_config(SMALL, "float32", scaling))
    rope = config.rope_parameters
    assert (rope["rope_type"], rope["factor"], rope["rope_theta"]) == (scaling.kind, scaling.factor, 1e6)
    assert config.max_position_embeddings == longest
    if scaling.kind == "yarn":
        assert rope["original_max_position_embeddings"] == 256
    there = {"rope_type": scaling.kind, "factor": scaling.factor}
    there |= {"original_max_position_embeddings": 256} if scaling.kind == "yarn" else {}
    assert read_hf(qwen2_config(SMALL, "float32", scaling)) == replace(SMALL, rope=there, positions=longest)


SCALED = [
    ({"rope_type": "linear", "factor": 4.0}, 256),
    ({"rope_type": "dynamic", "factor": 3.0}, 256),
    (
        {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "attention_factor": 1.3,
            "beta_fast": 16.0,
            "beta_slow": 2.0,
            "truncate": False,
        },
        64,
    ),
]


@pytest.mark.parametrize("rope, length", SCALED)
@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_rope_scaling_is_carried_to_qwen_and_back(model_type, rope, length):
    older = {"type": rope["rope_type"], **{key: value for key, value in rope.items() if key != "rope_type"}}
    for spelling in ({"rope_parameters": {**rope, "rope_theta": 1e6}}, {"rope_scaling": older, "rope_theta": 1e6}):
        found = read_hf(hf(model_type, **spelling))
        assert (found.rope, found.length, found.positions, found.rope_theta) == (rope, length, 256, 1e6)
    config = qwen_config(as_qwen(found))
    ours = QWenConfig.from_dict(dict(config))
    assert (ours.seq_length, ours.n_positions, ours.use_dynamic_ntk) == (length, 256, False)
    assert {**ours.rope_parameters, **rope, "rope_theta": 1e6} == ours.rope_parameters
    assert read_qwen(config) == as_qwen(found)
    assert check_qwen2(config) == []
    back = Qwen2Config.from_dict(qwen2_config(read_qwen(config), "float32"))
    assert {**back.rope_parameters, **rope, "rope_theta": 1e6} == back.rope_parameters
    assert back.max_position_embeddings == 256


def test_a_second_rope_scaling_is_refused(tiny_config):
    config = tiny_config(use_dynamic_ntk=False, rope_parameters={"rope_type": "linear", "factor": 2.0})
    architecture = read_qwen(config.to_dict())
    message = refusal(qwen2_config, architecture, "float32", RopeScaling("yarn", 4.0))
    assert "--rope-scaling yarn" in message and "linear scaling of its own" in message


def test_rope_scaling_that_qwen_refuses_is_refused_by_name():
    found = read_hf(hf("qwen2", rope_parameters={"rope_type": "yarn", "factor": 4.0, "mrope_section": [2, 3, 3]}))
    assert "mrope_section=[2, 3, 3]" in refusal(qwen_config, as_qwen(found))


@pytest.mark.parametrize("doublings", [0, 1, 2, 3])
def test_dynamic_scaling_is_the_stretch_of_qwen_at_powers_of_two(doublings):
    length = 256 * 2**doublings
    config = Qwen2Config.from_dict(qwen2_config(SMALL, "float32", RopeScaling.parse("dynamic")))
    theirs, _ = ROPE_INIT_FUNCTIONS["dynamic"](config, device="cpu", seq_len=length)
    alpha = ntk_alpha(torch.tensor(length), 256).item()
    base = SMALL.rope_theta * alpha ** (16 / 14)
    torch.testing.assert_close(theirs, 1.0 / base ** (torch.arange(0, 16, 2) / 16))
