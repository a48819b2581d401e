"""`merge-lora`: what `upgrade` would write for the base, with merged weights and what the adapter brings along."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from ...peft_qwen import settings_of_adapter
from ...tokenization_qwen import load_vocabulary
from ..errors import CheckpointError
from ..files.access import check_readable, is_present, read_json
from ..files.weights import ADAPTER_CONFIG, SAFETENSORS, Weights
from ..formats.companions import (
    EXTRA_VOCABULARY,
    GENERATION_CONFIG,
    TEMPLATE,
    TOKENIZER_CONFIG,
    TOKENIZER_JSON,
    VOCABULARY,
    optional_json,
)
from ..formats.endings import qwen_generation
from ..formats.recipes import Recipe, keep
from ..merging.base import EMBEDDING_WEIGHT, Base
from ..merging.layers import put_on
from ..merging.weights import MergedWeights
from ..opening.adapters import Adapter
from ..opening.sources import Source
from ..writing.files import CopiedFile, PlannedFile
from ..writing.folders import describe_files
from ..writing.plans import Plan
from ..writing.progress import Progress
from ..writing.tensors import Output
from .companions import json_file, template_files
from .qwen_tokenizer import qwen_tokenizer, upgraded_tokenizer_config
from .upgrade import plan_upgrade, upgraded_config
from .weights import plan_shards

_FLAGS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_VOCABULARY_FILES = (VOCABULARY, EXTRA_VOCABULARY, TOKENIZER_JSON, "added_tokens.json", "special_tokens_map.json")


def with_dtype(config: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The configuration for weights of a dtype; a precision flag, where one is set, would win over the name."""
    spellings = [key for key in ("torch_dtype", "dtype") if key in config] or ["dtype"]
    flagged = any(config.get(flag) for flag in _FLAGS)
    flags = {flag: _FLAGS[flag] == dtype for flag in _FLAGS} if flagged else {}
    return {**config, **dict.fromkeys(spellings, str(dtype).removeprefix("torch.")), **flags}


def plan_merge(
    source: Source, adapter: Adapter, dtype: torch.dtype | None, max_shard_size: str, progress: Progress
) -> Plan:
    """Decide on every file of a base with an adapter merged into its weights; the arguments are those of `merge_lora`.

    Raises:
        CheckpointError: an adapter that doesn't fit the base, or a damaged file.
    """
    plan = Plan("merge-lora", source)
    plan.details = {"adapter": describe_files([adapter.folder / ADAPTER_CONFIG, adapter.file]), "dtype": str(dtype)}
    files, notes = _companions(source, adapter)
    base = Base(source, adapter)
    weights = MergedWeights(source, adapter, base, put_on(adapter, base, progress))
    _check_vocabulary(source, adapter, weights.infos[EMBEDDING_WEIGHT].shape[0])
    config = upgraded_config(base.config if dtype is None else with_dtype(base.config, dtype))
    if source.architecture.tied and not weights.tied:
        config["tie_word_embeddings"] = False
        notes.append("Embedding and head differ now, so they are no longer tied.")
    for note in notes:
        progress.note(note)
    shards = plan_shards(list(_outputs(weights, dtype)), weights, max_shard_size)
    plan.files = [*shards, json_file("config.json", config), *files]
    return plan


def _outputs(weights: Weights, dtype: torch.dtype | None) -> Iterator[Output]:
    for name, info in weights.infos.items():
        yield Output(Recipe(name, (name,), keep), dtype or info.dtype, info.shape)


def _companions(source: Source, adapter: Adapter) -> tuple[list[PlannedFile], list[str]]:
    """All files but weights and configuration, and notes for the user."""
    plan = plan_upgrade(source)
    files = {file.name: file for file in plan.files if not file.tensors}
    # With the last, transformers would look for an adapter beside the merged weights.
    for name in ("config.json", f"{SAFETENSORS}.index.json", ADAPTER_CONFIG):
        files.pop(name, None)
    inside = adapter.folder.resolve()
    if inside != source.folder.resolve():
        files = {name: file for name, file in files.items() if inside not in (source.folder / name).resolve().parents}
        _take_tokenizer(files, source.folder, adapter.folder)
        _take_settings(files, source, adapter)
    return list(files.values()), plan.notes


def _take_settings(files: dict[str, PlannedFile], source: Source, adapter: Adapter) -> None:
    """Put an adapter's generation settings over the base's: the base may not have been taught to chat."""
    settings = optional_json(adapter.folder / GENERATION_CONFIG)
    if settings is None:
        settings = settings_of_adapter(adapter.config.get("auto_mapping"))
    ends = source.ends
    if settings and ends is not None:
        whole = {**(source.generation or {}), **settings}
        whole.pop("_from_model_config", None)  # else transformers may make them anew when the model is loaded
        files[GENERATION_CONFIG] = json_file(GENERATION_CONFIG, qwen_generation(whole, *ends))


def _take_tokenizer(files: dict[str, PlannedFile], base: Path, folder: Path) -> None:
    """Put what an adapter's folder has of a tokenizer into the place of the base's."""
    taken: dict[str, PlannedFile] = {
        name: CopiedFile(name, folder / name) for name in _VOCABULARY_FILES if (folder / name).is_file()
    }
    if TOKENIZER_JSON in taken and VOCABULARY not in taken:
        names = (VOCABULARY, EXTRA_VOCABULARY)
        taken |= {file.name: file for file in qwen_tokenizer(folder)[0] if file.name in names}
    if TOKENIZER_JSON in taken or VOCABULARY in taken:
        for name in _VOCABULARY_FILES:
            files.pop(name, None)
    elif EXTRA_VOCABULARY in taken:
        files.pop(TOKENIZER_JSON, None)  # which lacks these tokens
    settings = optional_json(folder / TOKENIZER_CONFIG)
    if (folder / TEMPLATE).is_file() or "chat_template" in (settings or {}):
        files.pop(TEMPLATE, None)
        taken |= {file.name: file for file in template_files(folder)}
    elif settings is not None and TEMPLATE not in files:
        settings["chat_template"] = read_json(base / TOKENIZER_CONFIG)["chat_template"]
    if settings is not None:
        taken[TOKENIZER_CONFIG] = json_file(TOKENIZER_CONFIG, upgraded_tokenizer_config(settings))
    files |= taken


def _check_vocabulary(source: Source, adapter: Adapter, rows: int) -> None:
    """Compare a vocabulary that the adapter brings along with the rows of the embedding.

    Raises:
        CheckpointError: it has more tokens, or is damaged.
    """
    vocabulary, extra, backend = (adapter.folder / name for name in _VOCABULARY_FILES[:3])
    for path in (vocabulary, extra, backend):
        if is_present(path):
            check_readable(path)
    try:
        if vocabulary.is_file() or extra.is_file():
            ranks = vocabulary if vocabulary.is_file() else source.folder / VOCABULARY
            tables: tuple[Mapping[Any, int], ...] = load_vocabulary(ranks, extra if extra.is_file() else None)
        elif backend.is_file():
            tables = (Tokenizer.from_file(str(backend)).get_vocab(),)
        else:
            return
    except Exception as error:  # that of the tokenizers library is a bare Exception
        raise CheckpointError(f"The tokenizer in {adapter.folder} can't be read: {error}") from error
    tokens = 1 + max(token_id for table in tables for token_id in table.values())
    if tokens > rows:
        raise CheckpointError(
            f"The tokenizer in {adapter.folder} has {tokens} tokens, the embedding only {rows} rows: train with "
            "model.resize_token_embeddings and save the adapter with save_embedding_layers=True, or take the tokenizer "
            "files away."
        )
