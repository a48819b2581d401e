"""Qwen2 as a twin of the small models, whatever their head."""

import pytest
from transformers import (
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2ForQuestionAnswering,
    Qwen2ForSequenceClassification,
    Qwen2ForTokenClassification,
)

from qwen1 import QWenForQuestionAnswering, QWenForSequenceClassification, QWenForTokenClassification, QWenLMHeadModel

CLASSES = {
    QWenLMHeadModel: Qwen2ForCausalLM,
    QWenForSequenceClassification: Qwen2ForSequenceClassification,
    QWenForTokenClassification: Qwen2ForTokenClassification,
    QWenForQuestionAnswering: Qwen2ForQuestionAnswering,
}
NAMES = {
    "wte": "embed_tokens",
    ".h.": ".layers.",
    "ln_f": "norm",
    "ln_1": "input_layernorm",
    "ln_2": "post_attention_layernorm",
    "attn.c_proj": "self_attn.o_proj",
    "mlp.c_proj": "mlp.down_proj",
    "w1": "up_proj",
    "w2": "gate_proj",
}


@pytest.fixture
def qwen2_twin():
    """Make a Qwen2 with the weights, attention and labels of a model of ours without NTK and LogN."""

    def make(model):
        ours = model.config
        config = Qwen2Config(
            vocab_size=ours.vocab_size,
            hidden_size=ours.n_embd,
            num_hidden_layers=ours.n_layer,
            num_attention_heads=ours.n_head,
            num_key_value_heads=ours.n_head,
            intermediate_size=ours.ffn_hidden_size // 2,
            rms_norm_eps=ours.layer_norm_epsilon,
            max_position_embeddings=ours.n_positions,
            num_labels=ours.num_labels,
            pad_token_id=ours.pad_token_id,
        )
        config._attn_implementation = ours._attn_implementation
        twin = CLASSES[type(model)](config)
        weights = {}
        for name, weight in model.state_dict().items():
            name = name.replace("transformer.", f"{twin.base_model_prefix}.")
            for ours_name, theirs_name in NAMES.items():
                name = name.replace(ours_name, theirs_name)
            parts = zip("qkv", weight.chunk(3), strict=True) if "c_attn" in name else [("", weight)]
            for part, rows in parts:
                weights[name.replace("attn.c_attn", f"self_attn.{part}_proj")] = rows
        twin.load_state_dict(weights)
        return twin.eval()

    return make
