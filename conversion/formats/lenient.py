"""Configurations that can be read but not converted: their architecture, and the reason."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..errors import CheckpointError
from .architecture import Architecture
from .hugging_face import read_hf
from .kinds import Kind
from .qwen import read_qwen

_SHAPE_KEYS = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
    "rms_norm_eps",
    "tie_word_embeddings",
    "attention_bias",
    "mlp_bias",
)


def kind_name(kind: Kind) -> str:
    """The name of a format that programs are told, as "qwen-2023-08"."""
    return kind.name.lower().replace("_", "-")


def read_architecture(kind: Kind, config: Mapping[str, Any]) -> tuple[Architecture, str | None]:
    """Architecture of a `config.json`, also where it can't be converted, and the reason why it can't be.

    Raises:
        CheckpointError: impossible values.
    """
    config = {name: value for name, value in config.items() if name != "quantization_config"}
    if kind.is_qwen:
        return read_qwen(config), None
    plain = {name: config[name] for name in _SHAPE_KEYS if name in config}
    plain["rope_theta"] = _rope(config).get("rope_theta") or config.get("rope_theta") or 10000.0
    return read_leniently(read_hf, config, plain)


def rope_scaling(config: Mapping[str, Any]) -> str | None:
    """How a Qwen2 or LLaMA configuration stretches long texts, as "yarn"; None if it doesn't."""
    kind = _rope(config).get("rope_type") or _rope(config).get("type")
    return None if kind in (None, "default") else str(kind)


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    rope = config.get("rope_parameters") or config.get("rope_scaling")
    return rope if isinstance(rope, dict) else {}


def read_leniently(
    read: Callable[[Mapping[str, Any]], Architecture], config: Mapping[str, Any], plain: Mapping[str, Any]
) -> tuple[Architecture, str | None]:
    """Read a configuration, or else what is left of it without what can't be converted."""
    try:
        return read(config), None
    except CheckpointError as error:
        return read(plain), str(error)
