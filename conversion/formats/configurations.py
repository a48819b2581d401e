"""What reading the configuration of any format begins with, and what is refused in all of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...configuration_qwen import ARITHMETIC
from ..errors import CheckpointError
from .architecture import MOST_LAYERS, short

_LAYERS = ("n_layer", "num_hidden_layers", "num_layers", "max_window_layers")
_SETTINGS = ("bos_token_id", "eos_token_id", "pad_token_id", "initializer_range")


def parse(config_class: Any, config: Mapping[str, Any]) -> Any:
    _refuse_quantised(config)
    refuse_sizes(config)
    try:
        return config_class.from_dict(dict(config))
    except Exception as error:  # what configuration classes raise differs between releases of transformers
        raise CheckpointError(f"config.json can't be used: {' '.join(str(error).split())}") from error


def refuse_sizes(config: Mapping[str, Any]) -> None:
    """Refuse numbers of layers over which a configuration class would count for minutes, and what fits no word.

    Raises:
        CheckpointError: such a number; the message names it.
    """
    for name, value in config.items():
        most = MOST_LAYERS if name in _LAYERS else 2**63
        if type(value) is int and value > most:
            raise CheckpointError(
                f"config.json can't be used: {name}={short(value)} is more than {most:,}, which no model has. Mend it."
            )


def quantization_method(config: Mapping[str, Any]) -> str | None:
    """Name of the method by which weights are quantised, None where they are not."""
    quantization = config.get("quantization_config")
    if not quantization:
        return None
    return str(quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else quantization)


def _refuse_quantised(config: Mapping[str, Any]) -> None:
    if method := quantization_method(config):
        raise CheckpointError(
            f"The weights are quantised ({method}), so they can't be converted: convert the full ones, then quantise."
        )


def settings_of(values: Any) -> dict[str, Any]:
    return {name: getattr(values, name, None) for name in _SETTINGS}


def scaling_of(rope: Mapping[str, Any]) -> dict[str, Any] | None:
    """What of rotary parameters scales."""
    if rope.get("rope_type", "default") == "default":
        return None
    return {key: value for key, value in rope.items() if key not in ("rope_theta", "partial_rotary_factor", "type")}


def refuse_arithmetic(config: Mapping[str, Any]) -> None:
    for name in ARITHMETIC:
        value = config.get(name)
        if value is True or value not in (None, False, 0, 1):  # True equals 1
            raise CheckpointError(f"{name}={config[name]!r} changes what is computed and has no counterpart in QWen.")
