"""Qwen-VL and Qwen-Audio, which share QWen's `model_type` but see and hear: they are told apart and refused by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ...foreign_qwen import RELATIVES, relative_refusal
from ..errors import CheckpointError


def relative_of(config: Mapping[str, Any], names: Iterable[str] = ()) -> str | None:
    """Key of `config.json` by which a QWen checkpoint is Qwen-VL or Qwen-Audio; None if it is neither.

    A key without content, as None or {}, makes it none.

    Args:
        config: `config.json`.
        names: of the stored tensors, which tell where config.json doesn't.
    """
    if config.get("model_type") != "qwen":
        return None
    if key := next((key for key in RELATIVES if config.get(key)), None):
        return key
    parts = {f"transformer.{key}.": key for key in RELATIVES}
    return next((key for name in names for part, key in parts.items() if name.startswith(part)), None)


def refuse_relative(config: Mapping[str, Any], names: Iterable[str] = ()) -> None:
    """Refuse Qwen-VL and Qwen-Audio; the arguments are those of `relative_of`.

    Raises:
        CheckpointError: it is one of them.
    """
    key = relative_of(config, names)
    if key is None:
        return
    sign = f"config.json has {key!r}" if config.get(key) else f"it has weights called transformer.{key}.*"
    raise CheckpointError(relative_refusal(key, sign))
