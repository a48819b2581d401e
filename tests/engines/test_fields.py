"""What the loaders of other engines read from our files, and from those that `convert --to qwen2` writes."""

import hashlib
import json

import pytest
from safetensors import safe_open
from transformers import AutoTokenizer

from qwen1 import QWenConfig
from qwen1.conversion.planning.upgrade import upgraded_config

LLAMA_CPP_QWEN = {
    ("num_hidden_layers", "n_layers", "n_layer"): "n_layer",
    ("hidden_size", "n_embd"): "n_embd",
    ("num_attention_heads", "n_head"): "n_head",
    ("max_position_embeddings", "n_ctx", "n_positions"): "n_positions",
    ("intermediate_size", "n_inner"): "ffn_hidden_size",
    ("rope_theta", "rotary_emb_base"): "rotary_emb_base",
    ("rms_norm_eps", "norm_eps"): "layer_norm_epsilon",
    ("vocab_size",): "vocab_size",
}
"""The spellings that llama.cpp's converter tries one after the other, and the published key of the same value."""

SGLANG_QWEN = {
    "hidden_size": "n_embd",
    "intermediate_size": "ffn_hidden_size",
    "layer_norm_epsilon": "layer_norm_epsilon",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
    "rope_theta": "rotary_emb_base",
    "vocab_size": "vocab_size",
}
"""What SGLang's own QWen reads from the configuration object of the folder, and the published keys."""

QWEN2 = {
    "architectures": list,
    "hidden_act": str,
    "hidden_size": int,
    "intermediate_size": int,
    "max_position_embeddings": int,
    "max_window_layers": int,
    "model_type": str,
    "num_attention_heads": int,
    "num_hidden_layers": int,
    "num_key_value_heads": int,
    "rms_norm_eps": float,
    "rope_theta": float,
    "tie_word_embeddings": bool,
    "torch_dtype": str,
    "use_sliding_window": bool,
    "vocab_size": int,
}
"""What the Qwen2 loaders of vLLM, SGLang, llama.cpp and Ollama read, and the JSON types that those in Go insist on."""

QWEN2_SPLIT_SHA256 = "1ff7f41064896984db5d1bb6ff64fa4bc29007d08c1b439e505b7392777a319e"
"""By which Ollama knows how Qwen2 cuts texts, of the expression in `tokenizer.json`."""


@pytest.fixture(params=["2023-08-chat", "2023-12-base", "ours", "shipped", "saved"])
def qwen_config(request, repository, golden):
    """`config.json` of upgraded folders, of this repository, and as `save_pretrained` writes it."""
    if request.param == "saved":
        return json.loads(QWenConfig(rotary_emb_base=1_000_000).to_json_string(use_diff=False))
    if request.param.startswith("2023"):
        return upgraded_config(json.loads((golden / "published_configs" / f"{request.param}.config.json").read_text()))
    folder = repository / "qwen-tiny-chat" if request.param == "shipped" else repository
    return json.loads((folder / "config.json").read_text())


def first(config, spellings):
    return next((config[name] for name in spellings if config.get(name) is not None), None)


def published(config, name):
    spellings = {"n_embd": "hidden_size", "n_head": "num_attention_heads", "n_layer": "num_hidden_layers"}
    spellings |= {"n_positions": "max_position_embeddings", "ffn_hidden_size": "intermediate_size"}
    return first(config, (name, spellings.get(name, name)))


def test_llama_cpp_finds_every_value_of_qwen(qwen_config):
    found = {names: first(qwen_config, names) for names in LLAMA_CPP_QWEN}
    assert found == {names: published(qwen_config, name) for names, name in LLAMA_CPP_QWEN.items()}
    assert None not in found.values()
    assert published(qwen_config, "n_head") * qwen_config["kv_channels"] == published(qwen_config, "n_embd")


def test_sglang_finds_every_value_of_qwen(qwen_config):
    config = QWenConfig.from_dict(qwen_config)
    found = {name: getattr(config, name) for name in SGLANG_QWEN}
    assert found == {name: published(qwen_config, key) for name, key in SGLANG_QWEN.items()}
    assert None not in found.values()


def test_servers_on_transformers_find_the_classes(qwen_config):
    """vLLM loads AutoModel and AutoModelForCausalLM, `transformers serve` AutoModelForDecision."""
    classes = {
        name: reference.partition(".")[2] for name, reference in qwen_config["auto_map"].items() if "Model" in name
    }
    assert classes["AutoModel"] == "QWenModel"
    assert classes["AutoModelForCausalLM"] == classes["AutoModelForDecision"] == "QWenLMHeadModel"


def test_llama_cpp_finds_every_token(shipped):
    """Its converter calls exactly these on the tokenizer of a folder with remote code."""
    tokenizer = AutoTokenizer.from_pretrained(shipped.upgraded, trust_remote_code=True)
    rows = json.loads((shipped.upgraded / "config.json").read_text())["vocab_size"]
    assert max(tokenizer.get_vocab().values()) < rows
    assert all(isinstance(token, bytes) for token in tokenizer.mergeable_ranks)
    assert sorted(tokenizer.mergeable_ranks.values()) == list(range(len(tokenizer.mergeable_ranks)))
    assert not tokenizer.special_tokens.keys() - tokenizer.get_vocab().keys()
    assert tokenizer.encode("你好") and all(isinstance(token, int) for token in tokenizer.encode("你好"))


def test_qwen2_loaders_find_every_value(shipped):
    config = json.loads((shipped.qwen2 / "config.json").read_text())
    assert {name: type(config[name]) for name in QWEN2} == QWEN2
    assert config["architectures"] == ["Qwen2ForCausalLM"] and config["model_type"] == "qwen2"
    assert "auto_map" not in config and config["use_sliding_window"] is False and config["rope_scaling"] is None
    ours = json.loads((shipped.upgraded / "config.json").read_text())
    assert config["max_position_embeddings"] == ours["seq_length"]
    assert config["intermediate_size"] * 2 == ours["ffn_hidden_size"]
    assert (config["rms_norm_eps"], config["rope_theta"]) == (ours["layer_norm_epsilon"], ours["rotary_emb_base"])


def test_qwen2_loaders_find_every_weight(shipped):
    config = json.loads((shipped.qwen2 / "config.json").read_text())
    with safe_open(shipped.qwen2 / "model.safetensors", framework="pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    width, mlp, rows = (config[name] for name in ("hidden_size", "intermediate_size", "vocab_size"))
    layer = {f"self_attn.{name}_proj.weight": (width, width) for name in "qkvo"}
    layer |= {f"self_attn.{name}_proj.bias": (width,) for name in "qkv"}
    layer |= {"mlp.gate_proj.weight": (mlp, width), "mlp.up_proj.weight": (mlp, width)}
    layer |= {"mlp.down_proj.weight": (width, mlp)}
    layer |= {"input_layernorm.weight": (width,), "post_attention_layernorm.weight": (width,)}
    wanted = {f"model.layers.{i}.{n}": s for i in range(config["num_hidden_layers"]) for n, s in layer.items()}
    wanted |= {"model.embed_tokens.weight": (rows, width), "lm_head.weight": (rows, width)}
    assert shapes == {**wanted, "model.norm.weight": (width,)}


def test_qwen2_loaders_find_where_a_chat_ends(shipped):
    tokenizer = json.loads((shipped.qwen2 / "tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] == "Qwen2Tokenizer" and tokenizer["eos_token"] == "<|im_end|>"
    ids = {token["content"]: int(index) for index, token in tokenizer["added_tokens_decoder"].items()}
    config = json.loads((shipped.qwen2 / "config.json").read_text())
    generation = json.loads((shipped.qwen2 / "generation_config.json").read_text())
    assert config["eos_token_id"] == ids["<|im_end|>"]
    assert generation["eos_token_id"] == [ids["<|im_end|>"], ids["<|endoftext|>"]]
    template = (shipped.qwen2 / "chat_template.jinja").read_text()
    assert "generation %}" not in template  # a tag of transformers' own, which other engines' Jinja refuses


def test_qwen2_loaders_know_how_texts_are_cut(shipped):
    """llama.cpp and Ollama have each split built in and only look at which it is."""
    tokenizer = json.loads((shipped.qwen2 / "tokenizer.json").read_text())
    assert tokenizer["model"]["type"] == "BPE" and tokenizer["normalizer"]["type"] == "NFC"
    assert isinstance(tokenizer["model"]["vocab"], dict) and isinstance(tokenizer["model"]["merges"], list)
    splits = [part for part in tokenizer["pre_tokenizer"]["pretokenizers"] if part["type"] == "Split"]
    expressions = "".join(part["pattern"]["Regex"] for part in splits)
    assert hashlib.sha256(expressions.encode()).hexdigest() == QWEN2_SPLIT_SHA256
