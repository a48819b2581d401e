"""Configurations of Qwen2, written, and what of QWen they cannot say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import transformers

from ...configuration_qwen import QWenConfig
from ..errors import CheckpointError
from .architecture import Architecture
from .configurations import parse


@dataclass(frozen=True)
class RopeScaling:
    """How a Qwen2 model is to stretch texts beyond the length that it was trained on."""

    kind: str
    factor: float

    @classmethod
    def parse(cls, text: str) -> RopeScaling:
        """`yarn:FACTOR`, `dynamic` or `dynamic:FACTOR`.

        With factor 2, transformers' dynamic scaling gives QWen's own stretch where the length is a power of two times
        the trained one, so this is the default.

        Raises:
            CheckpointError: another text.
        """
        kind, _, factor = text.partition(":")
        try:
            value = float(factor) if factor or kind != "dynamic" else 2.0
        except ValueError:
            value = 0.0
        if kind not in ("yarn", "dynamic") or not 1.0 < value < float("inf"):
            raise CheckpointError(
                f"Rope scaling {text!r} is unknown: use yarn:FACTOR, dynamic or dynamic:FACTOR, with a factor above 1."
            )
        return cls(kind, value)


def check_qwen2(config: Mapping[str, Any]) -> list[str]:
    """What is lost when a QWen configuration becomes a Qwen2 one, in sentences for the user.

    Raises:
        CheckpointError: something that changes logits even within the trained length.
    """
    values = parse(QWenConfig, config)
    for name, wanted in (
        ("apply_residual_connection_post_layernorm", False),
        ("scale_attn_weights", True),
        ("rotary_pct", 1.0),
        ("is_causal", True),
    ):
        if getattr(values, name, None) not in (None, wanted):
            raise CheckpointError(f"{name}={getattr(values, name)} has no counterpart in Qwen2, only {wanted} has.")
    notes = []
    stretch = [word for word, on in (("NTK", values.use_dynamic_ntk), ("LogN", values.use_logn_attn)) if on]
    if stretch:
        notes.append(
            f"{' and '.join(stretch)} {'has' if len(stretch) == 1 else 'have'} no counterpart in Qwen2: texts longer "
            f"than the trained {values.seq_length} tokens lose quality."
        )
    if values.use_cache_quantization:
        notes.append("The int8 cache (use_cache_quantization) has no counterpart in Qwen2's configuration.")
    return notes


def qwen2_config(architecture: Architecture, dtype: str, scaling: RopeScaling | None = None) -> dict[str, Any]:
    """`config.json` of a Qwen2ForCausalLM, in the keys that programs of all ages read.

    Args:
        dtype: name of the dtype of the weights, "bfloat16".
        scaling: how to stretch texts beyond the trained length; `max_position_embeddings` is that length without it.

    Raises:
        CheckpointError: the architecture has a scaling of its own.
    """
    settings = dict(architecture.settings or {})
    config: dict[str, Any] = {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": settings.get("bos_token_id"),
        "eos_token_id": settings.get("eos_token_id"),
        "hidden_act": "silu",
        "hidden_size": architecture.width,
        "initializer_range": settings.get("initializer_range") or 0.02,
        "intermediate_size": architecture.mlp,
        "max_position_embeddings": architecture.length,
        "max_window_layers": architecture.layers,
        "model_type": "qwen2",
        "num_attention_heads": architecture.heads,
        "num_hidden_layers": architecture.layers,
        "num_key_value_heads": architecture.kv_heads,
        "pad_token_id": settings.get("pad_token_id"),
        "rms_norm_eps": architecture.norm_eps,
        "rope_scaling": None,
        "rope_theta": float(architecture.rope_theta),
        "sliding_window": None,
        "tie_word_embeddings": architecture.tied,
        "torch_dtype": dtype,
        "transformers_version": transformers.__version__,  # without it, some releases take the tokenizer for another
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": architecture.rows,
    }
    if architecture.queries != architecture.width:
        config["head_dim"] = architecture.head_dim
    return {**config, **_stretched(architecture, scaling)}


def _stretched(architecture: Architecture, scaling: RopeScaling | None) -> dict[str, Any]:
    """What stretches texts beyond the trained length: what the checkpoint has of its own, or what the user chose."""
    if architecture.rope is None:
        return {} if scaling is None else _scaled(architecture.length, scaling)
    kind = architecture.rope["rope_type"]
    if scaling is not None:
        raise CheckpointError(
            f"--rope-scaling {scaling.kind}: the checkpoint has {kind} scaling of its own, which is carried over. "
            "Leave the option out."
        )
    return {"rope_scaling": {**architecture.rope, "type": kind}, "max_position_embeddings": architecture.positions}


def _scaled(length: int, scaling: RopeScaling) -> dict[str, Any]:
    # Both spellings of the type: transformers 4.45 and later read the first, programs before and beside it the second.
    rope: dict[str, Any] = {"rope_type": scaling.kind, "type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "dynamic":  # begins beyond max_position_embeddings, which so stays the trained length
        return {"rope_scaling": rope}
    rope["original_max_position_embeddings"] = length
    return {"rope_scaling": rope, "max_position_embeddings": int(length * scaling.factor)}
