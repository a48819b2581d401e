"""QWen to Qwen2: everything but weights and licences, and the way of the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from ..errors import CheckpointError
from ..formats.endings import is_chat
from ..formats.packed import packed_qwen_to_hf, pieces
from ..formats.packed_settings import settings_for_hf
from ..formats.qwen2 import RopeScaling, check_qwen2, qwen2_config
from ..formats.recipes import Recipe
from ..opening.sources import Contents, Source
from ..writing.plans import Plan
from .companions import json_file
from .qwen2_companions import generation_for_qwen2, tokenizer_for_qwen2


def plan_qwen2(plan: Plan, contents: Contents, dtype: torch.dtype, scaling: RopeScaling | None) -> list[Recipe]:
    """Plan configuration and companions of a Qwen2 model; gives the recipes of its weights.

    Raises:
        CheckpointError: something that Qwen2 can't represent.
    """
    source, ends = plan.source, contents.ends
    lost = check_qwen2(source.plain_config)
    packing = contents.packing
    way = contents.way if packing is None else packed_qwen_to_hf(contents.architecture, packing)
    recipes = without_zero_biases(source, way)
    chat = ends is not None and is_chat(contents.generation, ends[1])
    settings = dict(contents.architecture.settings or {})
    if ends is not None:
        settings["eos_token_id"] = ends[1] if chat else ends[0]
    architecture = replace(contents.architecture, settings=settings)
    config = qwen2_config(architecture, str(dtype).removeprefix("torch."), scaling)
    if packing is not None:
        config["quantization_config"] = settings_for_hf(packing, pieces(architecture))
    plan.notes = _length_notes(source, lost, config)
    plan.files = [json_file("config.json", config)]
    for files, note in (
        tokenizer_for_qwen2(source.folder, ends, chat, config["max_position_embeddings"]),
        generation_for_qwen2(source.folder, contents.generation, ends),
    ):
        plan.files += files
        plan.notes += [note] if note else []
    return recipes


def _length_notes(source: Source, lost: Sequence[str], config: Mapping[str, Any]) -> list[str]:
    rope, limit, length = config["rope_scaling"], config["max_position_embeddings"], source.architecture.length
    before = source.config.get("max_position_embeddings", source.config.get("n_positions", length))
    notes = list(lost)
    if limit != before:
        reason = "the trained length" if rope is None else f"the trained length is {length}"
        notes.append(f"max_position_embeddings becomes {limit}, {reason}; it was {before}.")
    if rope is not None:
        notes.append(f"Longer texts are stretched by {rope['type']} scaling with factor {rope['factor']:g}.")
    elif lost:
        notes.append("For longer texts choose --rope-scaling yarn:FACTOR or dynamic.")
    return notes


def without_zero_biases(source: Source, recipes: Sequence[Recipe]) -> list[Recipe]:
    """Leave out the biases that Qwen2 lacks, if they are zero."""
    kept = []
    for recipe in recipes:
        lacking = recipe.name.endswith(".bias") and recipe.name.split(".")[-2] not in ("q_proj", "k_proj", "v_proj")
        if not lacking:
            kept.append(recipe)
        elif source.weights.read(recipe.sources[0]).any():
            raise CheckpointError(
                f"{recipe.sources[0]!r} is not zero, and Qwen2 has no such bias (no_bias=false): it can't be converted."
            )
    return kept
