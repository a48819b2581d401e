"""Any configuration: refused by an error that says why, or the same when saved and loaded, and a model comes of it."""

import json

import torch
from hypothesis import example, given
from hypothesis import strategies as st

from qwen1 import QWenConfig, QWenLMHeadModel

from .conftest import changed, damaged, heavy, values

TINY = {
    "vocab_size": 24,
    "n_embd": 8,
    "n_layer": 1,
    "n_head": 2,
    "kv_channels": 4,
    "ffn_hidden_size": 16,
    "seq_length": 8,
    "n_positions": 32,
    "use_flash_attn": False,
    "use_dynamic_ntk": True,
    "use_logn_attn": True,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-6,
    "rotary_emb_base": 10000,
    "rotary_pct": 1.0,
    "no_bias": True,
    "tie_word_embeddings": False,
    "num_key_value_heads": 2,
    "rope_scaling": {"rope_type": "linear", "factor": 2.0},
}
OTHER_SPELLINGS = [
    *("hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size", "head_dim", "rms_norm_eps"),
    *(
        "rope_theta",
        "rope_parameters",
        "attention_dropout",
        "use_cache_quantization",
        "padded_vocab_size",
        "bf16",
        "fp16",
    ),
    *("hidden_act", "sliding_window", "quantization_config", "eos_token_id", "pad_token_id", "dtype", "torch_dtype"),
    *("layer_types", "id2label", "num_labels", "architectures", "auto_map", "softmax_in_fp32", "scale_attn_weights"),
    *("label2id", "problem_type", "per_layer_config", "attn_implementation", "experts_implementation", "name_or_path"),
    *("output_attentions", "output_hidden_states", "return_dict", "chunk_size_feed_forward", "is_encoder_decoder"),
    *("use_cache", "tokenizer_class", "model_type", "transformers_version", "max_position_embeddings", "n_inner"),
]
keys = st.sampled_from([*TINY, *OTHER_SPELLINGS])
SMALL = 64  # sizes beyond which a model isn't made here


def is_small(config):
    sizes = ("vocab_size", "n_embd", "n_layer", "n_head", "kv_channels", "ffn_hidden_size", "embedding_rows")
    return all(getattr(config, name) <= SMALL for name in sizes)


@heavy
@given(changed(TINY, keys))
@example({**TINY, "quantization_config": True})  # accepted, and a model of it failed by an AttributeError
@example({**TINY, "auto_map": 1})
@example({**TINY, "id2label": True})  # an AttributeError of transformers
@example({**TINY, "architectures": True})  # with transformers 5.4 an error of huggingface_hub's own
def test_saved_as_given(tmp_path_factory, given_values):
    folder = tmp_path_factory.getbasetemp() / "configuration"
    try:
        config = QWenConfig(**given_values)
    except (ValueError, TypeError) as error:
        assert str(error)
        return
    assert QWenConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()
    try:
        config.save_pretrained(folder)
    except (ValueError, TypeError) as error:  # what JSON can't hold
        assert str(error)
    else:
        assert QWenConfig.from_pretrained(folder).to_dict() == config.to_dict()


@heavy
@given(changed(TINY, keys, most=2))
@example({**TINY, "torch_dtype": []})
@example({**TINY, "torch_dtype": ""})  # looked for among the names of torch
def test_models_of_configurations(given_values):
    """Whatever is accepted computes finite numbers."""
    try:
        config = QWenConfig(**given_values)
    except (ValueError, TypeError):
        return
    if not is_small(config):
        return
    try:
        model = QWenLMHeadModel(config).eval()
        logits = model(torch.tensor([[1, 2, 3]]) % config.vocab_size).logits
    except ValueError as error:
        assert str(error)
    else:
        assert logits.shape == (1, 3, config.embedding_rows) and torch.isfinite(logits).all()


@heavy
@given(damaged(json.dumps({**TINY, "model_type": "qwen"}, indent=1).encode()))
@example(b"0")  # no object: a TypeError of transformers
@example(b'""')
def test_damaged_files(tmp_path_factory, content):
    folder = tmp_path_factory.getbasetemp() / "damaged"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_bytes(content)
    try:
        config = QWenConfig.from_pretrained(folder)
    except (ValueError, OSError) as error:
        assert str(error)
    else:
        assert config.model_type == "qwen"


@heavy
@given(st.dictionaries(keys, values, max_size=3))
def test_overrides(tmp_path_factory, overrides):
    """Of `from_pretrained`, checked as the file is."""
    folder = tmp_path_factory.getbasetemp() / "overridden"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**TINY, "model_type": "qwen"}))
    try:
        config = QWenConfig.from_pretrained(folder, **overrides)
    except (ValueError, TypeError, OSError) as error:
        assert str(error)
    else:
        config.check_values()
