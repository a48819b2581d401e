"""`upgrade`: a folder published in 2023 becomes one that loads today, with the same weights and nothing lost."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...configuration_qwen import AUTO_MAP
from ...tokenization_qwen import IMEND
from ..errors import CheckpointError
from ..files.access import auto_map_of
from ..files.weights import PICKLE, SAFETENSORS
from ..formats.companions import (
    GENERATION_CONFIG,
    OLD_CODE,
    TOKENIZER_CONFIG,
    TOKENIZER_JSON,
    VOCABULARY,
    optional_json,
)
from ..formats.configurations import quantization_method
from ..formats.endings import qwen_generation
from ..formats.names import IGNORED
from ..formats.recipes import Recipe, keep
from ..opening.sources import Source
from ..writing.files import CopiedFile
from ..writing.plans import Plan
from .companions import code_files, json_file, template_files
from .qwen_tokenizer import upgraded_tokenizer_config
from .weights import plan_weights

_ALIASES = {
    "intermediate_size": "ffn_hidden_size",
    "rms_norm_eps": "layer_norm_epsilon",
    "rope_theta": "rotary_emb_base",
}
"""Spellings that programs outside read from the file itself, and the published ones of the same values."""

_SHARD = "5GB"
_PICKLES = (".bin", ".pt", ".pth", ".pkl")
_TRAINING = re.compile(r"(checkpoint-\d+|global_step\d+|runs)/|(trainer_state|adapter_config)\.json$")
_LEFTOVER = re.compile(r"__pycache__/|\.bak\d*$")


def upgraded_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A published `config.json` with our `auto_map`: every key stays, other spellings of present values are added."""
    result = {**config, "auto_map": {**auto_map_of(config, "config.json"), **AUTO_MAP}}
    for alias, name in _ALIASES.items():
        if name in result:
            result.setdefault(alias, result[name])
    return result


def plan_upgrade(source: Source, max_shard_size: str = _SHARD, link: bool = True) -> Plan:
    """Decide what becomes of each file of a QWen folder.

    Args:
        max_shard_size: of the safetensors that pickles become; safetensors stay as they are.
        link: give safetensors a second name in the new folder instead of copying them.

    Raises:
        CheckpointError: not a QWen folder, or a damaged one.
    """
    if not source.kind.is_qwen:
        raise CheckpointError(f"{source.path} is {source.kind.value}, not QWen: use convert --to qwen.")
    plan = Plan("upgrade", source)
    _plan_weights(plan, source, max_shard_size, link)
    plan.files += [json_file("config.json", upgraded_config(source.config)), *code_files()]
    _plan_settings(plan, source)
    _plan_rest(plan, source.folder)
    return plan


def _plan_weights(plan: Plan, source: Source, max_shard_size: str, link: bool) -> None:
    weights, folder = source.weights, source.folder
    if source.packing is not None or quantization_method(source.config) is None:
        source.check()
    plan.notes += quantised_notes(source)
    if all(file.suffix == ".safetensors" for file in weights.files):
        counts = Counter(info.file for info in weights.infos.values())
        plan.files += [CopiedFile(file.name, file, link, counts[file]) for file in weights.files]
        if (folder / f"{SAFETENSORS}.index.json").is_file():
            plan.files.append(CopiedFile(f"{SAFETENSORS}.index.json", folder / f"{SAFETENSORS}.index.json"))
        if max_shard_size != _SHARD:  # no error, so that a run in place can be repeated
            plan.notes.append("--max-shard-size is for pickles that become safetensors: those that are there stay.")
        return
    surplus = ("lm_head.weight",) if source.config.get("tie_word_embeddings") else ()
    names = [name for name in weights.infos if not IGNORED.fullmatch(name) and name not in surplus]
    plan.files += plan_weights([Recipe(name, (name,), keep) for name in names], weights, None, max_shard_size)
    index = f"{PICKLE}.index.json"
    plan.retired += [file.name for file in weights.files] + ([index] if (folder / index).is_file() else [])


def quantised_notes(source: Source) -> list[str]:
    """What `upgrade` does with quantised weights, in sentences for the user; nothing where there are none."""
    method = quantization_method(source.config)
    if method is None:
        return []
    checked = "as they are" if source.packing else "without a check: their layout is unknown here"
    notes = [f"Quantised weights ({method}) are taken over {checked}."]
    if source.settings_file is not None:
        notes.append(f"config.json gets the settings of {source.settings_file}, which transformers doesn't read.")
    return notes


def _plan_settings(plan: Plan, source: Source) -> None:
    folder = source.folder
    generation, ends = source.generation, source.ends
    if ends is None:
        plan.notes.append(f"The tokenizer has no {IMEND}: its files and {GENERATION_CONFIG} stay as they are.")
        return
    if generation is None:
        plan.notes.append(
            f"There is no {GENERATION_CONFIG}: texts end at {ends[0]} only, as those of a base model. For a chat model "
            f'write "chat_format": "chatml" and "eos_token_id": [{ends[1]}, {ends[0]}] into it.'
        )
    plan.files.append(json_file(GENERATION_CONFIG, qwen_generation(generation, *ends)))
    tokenizer = optional_json(folder / TOKENIZER_CONFIG)
    plan.files.append(json_file(TOKENIZER_CONFIG, upgraded_tokenizer_config(tokenizer)))
    plan.files += template_files(folder)
    if not (folder / VOCABULARY).is_file() and not (folder / TOKENIZER_JSON).is_file():
        plan.notes.append(f"There is no {VOCABULARY}: put the published one into the new folder, or nothing can chat.")


def _plan_rest(plan: Plan, folder: Path) -> None:
    """Take along what else is there, but no old code, no pickles, nothing hidden and no earlier backups."""
    planned = {file.name for file in plan.files}
    left_out, links = [], []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        hidden = any(part.startswith(".") and part != ".gitattributes" for part in path.relative_to(folder).parts)
        if path.is_symlink() and path.is_dir() and not hidden:
            links.append(name)
        if not path.is_file() or hidden or name in planned or _LEFTOVER.search(name):
            continue
        if name in OLD_CODE:
            plan.retired.append(name)
        elif _TRAINING.match(name) or path.suffix in (*_PICKLES, ".safetensors") or name.endswith(".index.json"):
            left_out.append(name)
        else:
            plan.files.append(CopiedFile(name, path))
    if links:
        plan.notes.append(f"Left out, as links to folders: {', '.join(links)}.")
    left_out = [name for name in left_out if name not in plan.retired]
    if left_out:
        more = f" and {len(left_out) - 5} more" if len(left_out) > 5 else ""
        plan.notes.append(f"Left out, as no part of the model: {', '.join(left_out[:5])}{more}.")
