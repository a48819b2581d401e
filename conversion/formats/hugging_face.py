"""Dense Qwen2 (Qwen1.5, Qwen2, Qwen2.5) and LLaMA in Hugging Face's format, read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import LlamaConfig, Qwen2Config

from ..errors import CheckpointError
from .architecture import Architecture
from .configurations import parse, refuse_arithmetic, scaling_of, settings_of
from .names import hf_shapes
from .recipes import Recipe, keep

_SCALINGS = ("linear", "dynamic", "yarn")
"""Kinds of rotary scaling that QWen computes as transformers' classes do."""


def read_hf(config: Mapping[str, Any]) -> Architecture:
    """Architecture of a dense Qwen2 (Qwen1.5, Qwen2, Qwen2.5) or LLaMA configuration in Hugging Face's format.

    Raises:
        CheckpointError: impossible values, or something that QWen can't represent.
    """
    is_llama = config["model_type"] == "llama"
    values = parse(LlamaConfig if is_llama else Qwen2Config, config)
    rope = _check_hf(values, config)
    scaling = scaling_of(rope)
    return Architecture(
        layers=values.num_hidden_layers,
        width=values.hidden_size,
        heads=values.num_attention_heads,
        kv_heads=values.num_key_value_heads,
        head_dim=getattr(values, "head_dim", None) or values.hidden_size // max(values.num_attention_heads, 1),
        mlp=values.intermediate_size,
        rows=values.vocab_size,
        norm_eps=values.rms_norm_eps,
        rope_theta=rope["rope_theta"],
        length=rope["original_max_position_embeddings"] if _is_yarn(scaling) else values.max_position_embeddings,
        tied=values.tie_word_embeddings,
        qkv_bias=not is_llama or values.attention_bias,
        output_bias=is_llama and values.attention_bias,
        mlp_bias=is_llama and values.mlp_bias,
        rope=scaling,
        positions=None if scaling is None else values.max_position_embeddings,
        settings=settings_of(values),
    )


def keep_all(architecture: Architecture) -> list[Recipe]:
    """The way from these names to themselves."""
    return [Recipe(name, (name,), keep) for name in hf_shapes(architecture)]


def _is_yarn(scaling: Mapping[str, Any] | None) -> bool:
    return scaling is not None and scaling["rope_type"] == "yarn"


def _check_hf(values: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary parameters, after refusing what QWen has no counterpart for."""
    rope = dict(values.rope_parameters or {})
    rope.setdefault("rope_theta", 10000.0)
    kind = rope.get("rope_type", "default")
    if kind not in ("default", *_SCALINGS):
        raise CheckpointError(f"Rope scaling {kind!r} has no counterpart in QWen, which has {', '.join(_SCALINGS)}.")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise CheckpointError(f"partial_rotary_factor={rope['partial_rotary_factor']} can't be converted.")
    refuse_arithmetic(config)
    windows = [kind for kind in getattr(values, "layer_types", None) or [] if kind != "full_attention"]
    if windows:
        raise CheckpointError(f"Layers of type {windows[0]!r} (sliding windows) have no counterpart in QWen.")
    if values.hidden_act not in ("silu", "swish"):
        raise CheckpointError(f"hidden_act={values.hidden_act!r} has no counterpart in QWen, which computes SwiGLU.")
    return rope
