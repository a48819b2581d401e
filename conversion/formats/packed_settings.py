"""The settings of a quantisation, `quantization_config`, translated between QWen's names of layers and Qwen2's."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from .packed import Piece
from .quantised import Packing

_OTHER_NAMES = {"transformer.h": "model.layers", "transformer.wte": "model.embed_tokens"}
_FUSED = {("q_proj", "k_proj", "v_proj"): "qkv_proj", ("gate_proj", "up_proj"): "gate_up_proj"}
"""Layers that vLLM and SGLang put together, and the name by which they then look for rules."""


def settings_for_hf(packing: Packing, layers: Sequence[Piece]) -> dict[str, Any]:
    """Settings for the names of Qwen2, of those for QWen's.

    Args:
        layers: all that may be packed.
    """
    return _translated(packing, {piece.hf: piece.qwen for piece in layers}, _OTHER_NAMES)


def settings_for_qwen(packing: Packing, layers: Sequence[Piece]) -> dict[str, Any]:
    """Settings for QWen's names, of those for the names of Qwen2 or LLaMA."""
    others = {hf: qwen for qwen, hf in _OTHER_NAMES.items()}
    return _translated(packing, {piece.qwen: piece.hf for piece in layers}, others)


def _translated(packing: Packing, sources: Mapping[str, str], others: Mapping[str, str]) -> dict[str, Any]:
    """The settings with other names.

    Args:
        sources: new name of each layer -> its old name.
        others: the same, the other way round, of what is no such layer.
    """
    settings = dict(packing.settings)
    if block := settings.get("block_name_to_quantize"):
        settings["block_name_to_quantize"] = others.get(block, block)
    if before := settings.get("module_name_preceding_first_block"):
        settings["module_name_preceding_first_block"] = [others[name] for name in before if name in others]
    if chosen := settings.get("modules_in_block_to_quantize"):
        settings["modules_in_block_to_quantize"] = _chosen(chosen, sources)
    if settings.get("modules_to_not_convert"):
        settings["modules_to_not_convert"] = [new for new, old in sources.items() if packing.of(old) is None]
    if settings.pop("dynamic", None):
        settings["dynamic"] = dict(_rules(packing, replace(packing, settings=settings), sources))
    return settings


def _chosen(groups: Any, sources: Mapping[str, str]) -> list[Any]:
    inside: dict[str, list[str]] = {}
    for new, old in sources.items():
        if ".0." in new:
            inside.setdefault(old.partition(".0.")[2], []).append(new.partition(".0.")[2])
    flat = [group if isinstance(group, list) else [group] for group in groups]
    return [list(dict.fromkeys(new for name in group for new in inside.get(str(name), ()))) for group in flat]


def _rules(packing: Packing, plain: Packing, sources: Mapping[str, str]) -> Iterable[tuple[str, dict[str, Any]]]:
    """A rule for each part of a block with layers that a rule names, by their full names."""
    groups: dict[tuple[str, str, str], tuple[dict[str, Any], list[str]]] = {}
    for new, old in sources.items():
        rule = packing.rule(old)
        if rule is None or plain.of(new) is None:  # left out in any case
            continue
        parent, _, leaf = new.rpartition(".")
        groups.setdefault((parent, rule[0], repr(rule[1])), (dict(rule[1]), []))[1].append(leaf)
    for (parent, sign, _), (changes, leaves) in groups.items():
        fused = [name for parts, name in _FUSED.items() if set(parts) <= set(leaves)]
        names = "|".join(map(re.escape, (*leaves, *fused)))
        yield f"{sign}{re.escape(parent)}{re.escape('.') if parent else ''}(?:{names})$", changes
