"""The shape that is measured, about 0.5 B parameters, as our model and as transformers' Qwen2."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, Qwen2Config, Qwen2ForCausalLM

from qwen1 import QWenConfig, QWenLMHeadModel
from qwen1.conversion.formats.hugging_face import read_hf
from qwen1.conversion.formats.qwen import hf_to_qwen
from qwen1.conversion.formats.recipes import convert_tensors

WIDTH, LAYERS, HEADS, INTERMEDIATE, VOCABULARY = 1024, 16, 8, 2752, 151_936
LONGEST = 16_384


def configurations(**changes: Any) -> tuple[QWenConfig, Qwen2Config]:
    """Of ours, with changes, and of theirs; a `vocab_size` is that of both."""
    shape: dict[str, Any] = dict(hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS)
    shape["vocab_size"] = changes.pop("vocab_size", VOCABULARY)
    theirs = Qwen2Config(
        **shape,
        num_key_value_heads=HEADS,
        intermediate_size=INTERMEDIATE,
        rms_norm_eps=1e-6,
        max_position_embeddings=LONGEST,
        attn_implementation="sdpa",
    )
    values = dict(
        shape,
        kv_channels=WIDTH // HEADS,
        ffn_hidden_size=2 * INTERMEDIATE,
        layer_norm_epsilon=1e-6,
        seq_length=LONGEST,
        n_positions=LONGEST,
        use_flash_attn=False,
        attn_implementation="sdpa",
    )
    return QWenConfig(**(values | changes)), theirs


@torch.inference_mode(False)  # whose tensors torch computes with in other ways than with those that are loaded
def build(dtype: torch.dtype, **changes: Any) -> tuple[QWenLMHeadModel, Qwen2ForCausalLM]:
    """Both with the same random weights, saved and loaded again as users load them; `changes` of our configuration."""
    mine, other = configurations(**changes)
    torch.manual_seed(0)
    theirs = Qwen2ForCausalLM(other).to(dtype)
    ours = QWenLMHeadModel(mine).to(dtype)
    ours.load_state_dict(convert_tensors(hf_to_qwen(read_hf(other.to_dict()), dtype), theirs.state_dict()))
    with tempfile.TemporaryDirectory() as folder:
        for model, name in ((ours, "ours"), (theirs, "theirs")):
            model.save_pretrained(f"{folder}/{name}")
        del model, ours, theirs
        loaded = tuple(AutoModelForCausalLM.from_pretrained(f"{folder}/{name}") for name in ("ours", "theirs"))
    for model in loaded:
        model.generation_config = GenerationConfig(pad_token_id=0, do_sample=False)
    return loaded


def build_one(side: str, dtype: torch.dtype) -> QWenLMHeadModel | Qwen2ForCausalLM:
    """One of them, "ours" or "theirs", with random weights, made in its dtype."""
    mine, other = configurations()
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return QWenLMHeadModel(mine) if side == "ours" else Qwen2ForCausalLM(other)
    finally:
        torch.set_default_dtype(default)
