"""Qwen2 and LLaMA to QWen: everything but weights and licences, and the way of the weights."""

from __future__ import annotations

from dataclasses import replace

import torch

from ..formats.companions import GENERATION_CONFIG, TOKENIZER_JSON, VOCABULARY
from ..formats.endings import qwen_generation
from ..formats.kinds import Kind
from ..formats.packed import packed_hf_to_qwen, pieces
from ..formats.packed_settings import settings_for_qwen
from ..formats.qwen import as_qwen, hf_to_qwen, qwen_config
from ..formats.recipes import Recipe, compose
from ..opening.sources import Contents, Source
from ..writing.files import PlannedFile
from ..writing.plans import Plan
from .companions import code_files, json_file
from .qwen_tokenizer import tokenizer_for_qwen


def plan_qwen(plan: Plan, contents: Contents, dtype: torch.dtype, length: int | None) -> list[Recipe]:
    """Plan configuration and companions of a QWen model; gives the recipes of its weights.

    Raises:
        CheckpointError: something that QWen can't represent.
    """
    source, architecture = plan.source, contents.architecture
    if length is not None:
        architecture = replace(architecture, length=length)
    config = {**qwen_config(as_qwen(architecture)), "dtype": str(dtype).removeprefix("torch.")}
    if contents.packing is None:
        recipes = compose(contents.way, hf_to_qwen(architecture, contents.dtype))
    else:
        recipes = packed_hf_to_qwen(architecture, contents.packing, contents.dtype)
        config["quantization_config"] = settings_for_qwen(contents.packing, pieces(architecture))
    if source.kind is Kind.LLAMA_ORIGINAL and length is None and "max_seq_len" not in source.config:
        plan.notes.append(
            f"params.json doesn't tell the trained length: seq_length is {architecture.length}, as for LLaMA 2. "
            "Use --seq-length for another."
        )
    tokenizer, note = tokenizer_for_qwen(source.folder)
    plan.notes += [note] if note else []
    plan.files = [json_file("config.json", config), *code_files(), *tokenizer, *_generation(source)]
    return recipes


def _generation(source: Source) -> list[PlannedFile]:
    if source.generation is None:
        return []
    generation = source.generation
    has_vocabulary = any((source.folder / name).is_file() for name in (VOCABULARY, TOKENIZER_JSON))
    if has_vocabulary and source.ends is not None:  # of QWen's tokenizer, whatever the architecture
        generation = qwen_generation(generation, *source.ends)
    return [json_file(GENERATION_CONFIG, generation)]
