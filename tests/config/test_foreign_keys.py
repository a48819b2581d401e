"""Keys that transformers' other decoders have: what QWen does passes, what it doesn't do is refused by name."""

import pytest
from transformers import Gemma2Config, GemmaConfig, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from qwen1 import QWenConfig

PASSING = [
    {"hidden_act": "silu"},
    {"hidden_act": "swish"},
    {"hidden_act": None},
    {"sliding_window": None},
    {"use_sliding_window": False, "max_window_layers": 28},
    {"layer_types": ["full_attention"] * 32},
    {"mlp_bias": False, "no_bias": True},
    {"mlp_bias": True, "attention_bias": True, "no_bias": False},
    {"qkv_bias": True},
    {"is_causal": True},
    {"is_causal": False},
    {"query_pre_attn_scalar": 128},
    {"pretraining_tp": 2, "initializer_range": 0.01, "tie_word_embeddings": True},
    {"num_experts": 0, "logit_scale": 1.0, "final_logit_softcapping": None},
    {"original_max_position_embeddings": None},
]
REFUSED = [
    {"hidden_act": "gelu"},
    {"hidden_activation": "gelu_pytorch_tanh"},
    {"sliding_window": 4096},
    {"use_sliding_window": True},
    {"layer_types": ["sliding_attention"] * 32},
    {"layer_types": "full_attention"},
    {"mlp_layer_types": ["sparse"] * 32},
    {"attention_chunk_size": 8192},
    {"attention_bias": False},
    {"attention_bias": True},
    {"mlp_bias": True},
    {"qkv_bias": False},
    {"is_causal": "no"},
    {"use_bidirectional_attention": True},
    {"query_pre_attn_scalar": 256},
    {"per_layer_config": {"0": {"n_head": 2}}},
    {"num_kv_shared_layers": 2},
    {"attn_logit_softcapping": 50.0},
    {"final_logit_softcapping": 30.0},
    {"num_experts": 8},
    {"use_qk_norm": True},
    {"original_max_position_embeddings": 2048},
]


@pytest.mark.parametrize("keys", PASSING, ids=str)
def test_what_qwen_does_passes_and_is_kept(tmp_path, keys):
    QWenConfig(**keys).save_pretrained(tmp_path)
    again = QWenConfig.from_pretrained(tmp_path)
    assert {name: getattr(again, name) for name in keys} == keys


def test_what_qwen_does_passes_as_an_override(tmp_path):
    """And isn't given back, as the model's constructor would be given it."""
    QWenConfig().save_pretrained(tmp_path)
    given = {"hidden_act": "silu", "sliding_window": None, "no_bias": False, "attention_bias": True}
    config, unused = QWenConfig.from_pretrained(tmp_path, **given, return_unused_kwargs=True)
    assert {name: getattr(config, name) for name in given} == given and not unused


@pytest.mark.parametrize("keys", REFUSED, ids=str)
def test_what_qwen_does_not_do_is_refused_by_name(tmp_path, keys):
    ((name, value),) = keys.items()
    with pytest.raises(ValueError) as error:
        QWenConfig(**keys)
    assert f"{name}={value!r}" in str(error.value) and "out" in str(error.value)
    QWenConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"{name}="):
        QWenConfig.from_pretrained(tmp_path, **keys)


def test_a_window_that_is_switched_off_is_none():
    """As in Qwen2, whose files carry it; transformers would build a cache of windows by it."""
    assert getattr(QWenConfig(use_sliding_window=False, sliding_window=32768), "sliding_window", None) is None


def their_keys(config_class, **changes):
    return {key: value for key, value in config_class(**changes).to_dict().items() if key not in QWenConfig().to_dict()}


def test_every_key_of_qwen2_and_llama_is_honoured_passes_or_is_refused():
    """Their defaults ask for nothing else, but for LLaMA's lack of biases, which QWen has."""
    QWenConfig(**their_keys(Qwen2Config, num_hidden_layers=32))
    with pytest.raises(ValueError, match="attention_bias=False"):
        QWenConfig(**their_keys(LlamaConfig))
    with pytest.raises(ValueError, match="attention_bias=False"):
        QWenConfig(**their_keys(Qwen3Config, num_hidden_layers=32))


@pytest.mark.parametrize(
    ("config_class", "named"),
    [(MistralConfig, "sliding_window=4096"), (GemmaConfig, "hidden_act="), (Gemma2Config, "=")],
)
def test_the_defaults_of_other_families_are_refused(config_class, named):
    with pytest.raises(ValueError, match=named):
        QWenConfig(**their_keys(config_class))
