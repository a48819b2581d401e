"""`convert`: the same model in another architecture, with the same logits and the same token ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ...tokenization_qwen import IMEND
from ..errors import CheckpointError
from ..files.links import check_links
from ..formats.companions import GENERATION_CONFIG, TOKENIZER_JSON, VOCABULARY, companion_names, optional_json
from ..formats.endings import end_ids, is_chat, qwen2_generation, qwen_generation
from ..formats.kinds import Kind
from ..formats.qwen import as_qwen, hf_to_qwen, qwen_config
from ..formats.qwen2 import RopeScaling, check_qwen2, qwen2_config
from ..formats.recipes import Recipe, compose
from ..opening.sources import Source
from ..writing.files import CopiedFile, PlannedFile, json_file
from ..writing.plans import Plan
from .companions import code_files, copied_tokenizer, legal_files
from .qwen2_tokenizer import qwen2_tokenizer, qwen2_tokenizer_of_json
from .qwen_tokenizer import tokenizer_for_qwen
from .weights import plan_outputs, plan_shards

TARGETS = ("qwen2", "qwen")


def plan_conversion(
    source: Source,
    to: str,
    dtype: torch.dtype | None = None,
    max_shard_size: str = "5GB",
    scaling: RopeScaling | None = None,
    length: int | None = None,
) -> Plan:
    """Decide on every file of the converted checkpoint.

    Args:
        to: "qwen2" or "qwen".
        dtype: of the new weights, None for that of the old ones.
        scaling: for Qwen2, how to stretch texts beyond the trained length.
        length: trained length in tokens, where the source doesn't tell it.

    Raises:
        CheckpointError: something that the other architecture can't represent, by name; or a damaged source.
    """
    if to not in TARGETS:
        raise CheckpointError(f"Target {to!r} is unknown: use {' or '.join(TARGETS)}.")
    if (to == "qwen2") != source.kind.is_qwen:
        remedy = "use upgrade" if source.kind.is_qwen else "only QWen becomes Qwen2"
        raise CheckpointError(f"{source.path} is {source.kind.value} and can't be converted to {to}: {remedy}.")
    if scaling is not None and to != "qwen2":
        raise CheckpointError("--rope-scaling is for --to qwen2 only: QWen has its own stretch, use_dynamic_ntk.")
    if not source.path.is_dir():  # whose folder may hold much else
        check_links(source.folder, companion_names(source.folder))
    source.check()
    if to == "qwen2":
        plan, recipes = _plan_qwen2(source, dtype, scaling)
    else:
        plan, recipes = _plan_qwen(source, dtype, length)
    outputs = plan_outputs(recipes, source.weights, dtype)
    plan.files = [*plan_shards(outputs, source.weights, max_shard_size), *plan.files, *legal_files(source.folder)]
    return plan


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# --- QWen -> Qwen2 ---


def _plan_qwen2(source: Source, dtype: torch.dtype | None, scaling: RopeScaling | None) -> tuple[Plan, list[Recipe]]:
    architecture, folder = source.architecture, source.folder
    lost = check_qwen2(source.config)
    recipes = _without_zero_biases(source, source.to_hf())
    generation = optional_json(folder / GENERATION_CONFIG)
    ends = end_ids(source.config, folder)
    chat = ends is not None and is_chat(generation, ends[1])
    settings = dict(architecture.settings or {})
    if ends is not None:
        settings["eos_token_id"] = ends[1] if chat else ends[0]
    config = qwen2_config(replace(architecture, settings=settings), _dtype_name(dtype or source.dtype), scaling)
    plan = Plan("convert", source, notes=_length_notes(source, lost, config))
    plan.files = [json_file("config.json", config), *_qwen2_tokenizer(plan, folder, ends, chat, config)]
    if ends is not None:
        plan.files.append(json_file(GENERATION_CONFIG, qwen2_generation(generation, *ends)))
        if generation is None:
            plan.notes.append(f"There is no {GENERATION_CONFIG}: texts end at {ends[0]}, as those of a base model.")
    elif generation is not None:
        plan.files.append(CopiedFile(GENERATION_CONFIG, folder / GENERATION_CONFIG))
    return plan, recipes


def _qwen2_tokenizer(
    plan: Plan, folder: Path, ends: tuple[int, int] | None, chat: bool, config: dict[str, Any]
) -> list[PlannedFile]:
    if (folder / VOCABULARY).is_file():
        return qwen2_tokenizer(folder, chat, config["max_position_embeddings"])
    if (folder / TOKENIZER_JSON).is_file() and ends is not None:
        return qwen2_tokenizer_of_json(folder)
    files = copied_tokenizer(folder)
    plan.notes.append(
        f"The tokenizer has no {IMEND}: it is kept as it is."
        if files and ends is None
        else f"There is no {VOCABULARY}, so no tokenizer is written."
    )
    return files if ends is None else []


def _length_notes(source: Source, lost: list[str], config: dict[str, Any]) -> list[str]:
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


def _without_zero_biases(source: Source, recipes: Sequence[Recipe]) -> list[Recipe]:
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


# --- Qwen2, LLaMA -> QWen ---


def _plan_qwen(source: Source, dtype: torch.dtype | None, length: int | None) -> tuple[Plan, list[Recipe]]:
    architecture = source.architecture
    if length is not None:
        architecture = replace(architecture, length=length)
    config = {**qwen_config(as_qwen(architecture)), "dtype": _dtype_name(dtype or source.dtype)}
    recipes = compose(source.to_hf(), hf_to_qwen(architecture, source.dtype))
    plan = Plan("convert", source)
    if source.kind is Kind.LLAMA_ORIGINAL and length is None and "max_seq_len" not in source.config:
        plan.notes.append(
            f"params.json doesn't tell the trained length: seq_length is {architecture.length}, as for LLaMA 2. "
            "Use --seq-length for another."
        )
    plan.files = [json_file("config.json", config), *code_files(), *_tokenizer(plan, source), *_generation(source)]
    return plan, recipes


def _tokenizer(plan: Plan, source: Source) -> list[PlannedFile]:
    files, note = tokenizer_for_qwen(source.folder)
    if note is not None:
        plan.notes.append(note)
    return files


def _generation(source: Source) -> list[PlannedFile]:
    generation = optional_json(source.folder / GENERATION_CONFIG)
    if generation is None:
        return []
    has_vocabulary = any((source.folder / name).is_file() for name in (VOCABULARY, TOKENIZER_JSON))
    ends = end_ids(source.config, source.folder) if has_vocabulary else None
    if ends is not None:  # of QWen's tokenizer, whatever the architecture
        generation = qwen_generation(generation, *ends)
    return [json_file(GENERATION_CONFIG, generation)]
