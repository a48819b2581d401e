"""`upgrade`: a folder published in 2023 becomes one that loads today, with the same weights and nothing lost."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import __version__
from ..configuration_qwen import AUTO_MAP
from ..tokenization_qwen import IMEND
from .errors import CheckpointError
from .files.access import check_exists, read_value
from .files.links import check_links, resolved
from .files.weights import PICKLE, SAFETENSORS
from .formats.companions import GENERATION_CONFIG, OLD_CODE, TOKENIZER_CONFIG, TOKENIZER_JSON, VOCABULARY, optional_json
from .formats.configurations import quantization_method
from .formats.endings import end_ids, qwen_generation
from .formats.names import IGNORED
from .formats.recipes import Recipe, keep
from .opening.sources import MOVES_FILE, WORK_FOLDER, Source, open_source
from .planning.companions import code_files, template_files
from .planning.qwen_tokenizer import upgraded_tokenizer_config
from .planning.weights import plan_outputs, plan_shards
from .writing.files import CopiedFile, PlannedFile, json_file
from .writing.folders import describe_files, write_folder
from .writing.progress import Progress
from .writing.work_folder import remove_work_folder, replace_text, work_folder, write_files

_ALIASES = {
    "intermediate_size": "ffn_hidden_size",
    "rms_norm_eps": "layer_norm_epsilon",
    "rope_theta": "rotary_emb_base",
}
"""Spellings that programs outside read from the file itself, and the published ones of the same values."""

_PICKLES = (".bin", ".pt", ".pth", ".pkl")
_TRAINING = re.compile(r"(checkpoint-\d+|global_step\d+|runs)/|(trainer_state|adapter_config)\.json$")
_LEFTOVER = re.compile(r"__pycache__/|\.bak\d*$")


@dataclass
class Plan:
    """What a command is going to do.

    Attributes:
        files: what there will be.
        retired: files of the source that have no place in the result.
        notes: sentences for the user.
    """

    files: list[PlannedFile] = field(default_factory=list)
    retired: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def upgraded_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A published `config.json` with our `auto_map`: every key stays, other spellings of present values are added."""
    result = {**config, "auto_map": {**(config.get("auto_map") or {}), **AUTO_MAP}}
    for alias, name in _ALIASES.items():
        if name in result:
            result.setdefault(alias, result[name])
    return result


def plan_upgrade(source: Source, max_shard_size: str = "5GB", link: bool = True) -> Plan:
    """Decide what becomes of each file of a QWen folder.

    Args:
        max_shard_size: of the safetensors that pickles become; safetensors stay as they are.
        link: give safetensors a second name in the new folder instead of copying them.

    Raises:
        CheckpointError: not a QWen folder, or a damaged one.
    """
    if not source.kind.is_qwen:
        raise CheckpointError(f"{source.path} is {source.kind.value}, not QWen: use convert --to qwen.")
    plan = Plan()
    _plan_weights(plan, source, max_shard_size, link)
    plan.files += [json_file("config.json", upgraded_config(source.config)), *code_files()]
    _plan_settings(plan, source)
    _plan_rest(plan, source.folder)
    return plan


def _plan_weights(plan: Plan, source: Source, max_shard_size: str, link: bool) -> None:
    weights, folder = source.weights, source.folder
    if method := quantization_method(source.config):
        checked = "as they are" if source.check_packed() else "without a check: their layout is unknown here"
        plan.notes.append(f"Quantised weights ({method}) are taken over {checked}.")
        if source.settings_file is not None:
            plan.notes.append(
                f"config.json gets the settings of {source.settings_file}, which transformers doesn't read."
            )
    else:
        source.check()
    if all(file.suffix == ".safetensors" for file in weights.files):
        counts = Counter(info.file for info in weights.infos.values())
        plan.files += [CopiedFile(file.name, file, link, counts[file]) for file in weights.files]
        if (folder / f"{SAFETENSORS}.index.json").is_file():
            plan.files.append(CopiedFile(f"{SAFETENSORS}.index.json", folder / f"{SAFETENSORS}.index.json"))
        return
    surplus = ("lm_head.weight",) if source.config.get("tie_word_embeddings") else ()
    names = [name for name in weights.infos if not IGNORED.fullmatch(name) and name not in surplus]
    outputs = plan_outputs([Recipe(name, (name,), keep) for name in names], weights, None)
    plan.files += plan_shards(outputs, weights, max_shard_size)
    index = f"{PICKLE}.index.json"
    plan.retired += [file.name for file in weights.files] + ([index] if (folder / index).is_file() else [])


def _plan_settings(plan: Plan, source: Source) -> None:
    folder = source.folder
    generation, ends = optional_json(folder / GENERATION_CONFIG), end_ids(source.config, folder)
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


def upgrade(source: Source, target: Path, plan: Plan, progress: Progress) -> bool:
    """Write the upgraded folder beside the source.

    Returns:
        False if the target was there already, equal in every file.

    Raises:
        CheckpointError, OSError: see `write_folder`.
    """
    if resolved(source.folder) == resolved(target):
        raise CheckpointError(f"{target} is the source itself: use --in-place.")
    refuse_inside(source, target)
    return write_folder(target, plan.files, job_of("upgrade", source, plan.files), progress)


def refuse_inside(source: Source, target: Path) -> None:
    """Refuse a target inside the source, of which the next run would take it for a part.

    Raises:
        CheckpointError: it is.
    """
    if source.path.is_dir() and resolved(target).is_relative_to(resolved(source.path)):
        raise CheckpointError(f"{target} is inside the source: name a folder beside it.")


def job_of(command: str, source: Source, files: Sequence[PlannedFile]) -> dict[str, Any]:
    """All that the tensors of a result depend on, as JSON: a later run takes up an interrupted one if it is equal."""
    return {
        "command": command,
        "config": source.config,
        "files": [[file.name, file.kind] for file in files if file.tensors],
        "source": describe_files(source.weights.files),
        "version": __version__,
    }


# --- in place ---


def upgrade_in_place(folder: Path, max_shard_size: str, progress: Progress) -> tuple[Plan, list[str]]:
    """Replace the files of a folder that change; the old ones stay beside them as `NAME.bak`.

    New files are written into a folder of their own first. A list of what is to be moved where is kept until all is
    moved, so that a run that was killed is finished by the next.

    Returns:
        The plan, and the names of the files that were replaced, added or set aside: none if all was up to date.

    Raises:
        CheckpointError, OSError: see `plan_upgrade` and `write_folder`.
    """
    check_exists(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder.")
    check_links(folder)
    with work_folder(folder / WORK_FOLDER, MOVES_FILE):
        moved = _carry_out_moves(folder)
        source = open_source(folder)
        plan = plan_upgrade(source, max_shard_size)
        changed = [file for file in plan.files if not _is_current(file, folder)]
        retired = [name for name in plan.retired if (folder / name).is_file()]
        if changed or retired:
            moved += _replace_files(folder, changed, retired, source, progress)
        remove_work_folder(folder / WORK_FOLDER)
    return plan, moved


def _is_current(file: PlannedFile, folder: Path) -> bool:
    path = folder / file.name
    return path.is_file() and file.equals(path)


def _replace_files(
    folder: Path, changed: Sequence[PlannedFile], retired: Sequence[str], source: Source, progress: Progress
) -> list[str]:
    write_files(folder / WORK_FOLDER, changed, job_of("upgrade", source, changed), progress)
    source.weights.close()
    moves = []
    for name in (*(file.name for file in changed), *retired):
        moves.append([name, _backup_name(folder, name) if (folder / name).is_file() else None])
    replace_text(folder / WORK_FOLDER / MOVES_FILE, json.dumps(moves))
    return _carry_out_moves(folder)


def _backup_name(folder: Path, name: str) -> str:
    backups = (f"{name}.bak{number}" for number in ("", *range(2, 1000)))
    return next(backup for backup in backups if not (folder / backup).exists())


def _read_moves(record: Path) -> list[tuple[str, str | None]]:
    """What is to be moved: only names in the folder itself, as whoever made the folder may have written the list.

    Raises:
        CheckpointError: anything else.
    """
    moves = read_value(record)
    if not isinstance(moves, list) or not all(_is_move(move) for move in moves):
        raise CheckpointError(f"{record} was not written by this program: remove the folder {record.parent}.")
    return [(name, backup) for name, backup in moves]


def _is_move(value: Any) -> bool:
    if not isinstance(value, list) or len(value) != 2:
        return False
    name, backup = value
    return _is_inside(name) and (backup is None or _is_inside(backup))


def _is_inside(name: Any) -> bool:
    return isinstance(name, str) and not Path(name).is_absolute() and ".." not in Path(name).parts


def _carry_out_moves(folder: Path) -> list[str]:
    """Do what is left of the recorded moves; each step can be seen to have been done before."""
    record = folder / WORK_FOLDER / MOVES_FILE
    if not record.is_file():
        return []
    moves = _read_moves(record)
    for name, backup in moves:
        new, current = folder / WORK_FOLDER / name, folder / name
        if backup is not None and not (folder / backup).exists():
            current.rename(folder / backup)
        if new.is_file():
            current.parent.mkdir(parents=True, exist_ok=True)
            new.replace(current)
    record.unlink()
    return [name for name, _ in moves]
