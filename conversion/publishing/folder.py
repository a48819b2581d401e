"""What of a folder is published, and whether it can be."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from huggingface_hub import ModelCard
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from transformers.dynamic_module_utils import get_relative_imports

from ..errors import CheckpointError
from ..files.access import auto_map_of, check_readable, is_present, read_json
from ..files.links import check_links, resolved
from ..files.weights import Weights, open_weights
from ..formats.configurations import refuse_sizes
from ..formats.kinds import Kind, detect_kind

README = "README.md"

_PUBLISHED = (
    *("*.safetensors", "*.json", "*.tiktoken", "*.model", "*.txt", "*.jinja"),
    *("*.py", "*.cpp", "*.cu"),
    *("*.md", "licen[cs]e*", "notice*", "*.pdf"),
    *("*.png", "*.jpg", "*.jpeg", "*.gif", "*.svg", "*.webp"),
    ".gitattributes",
)
_PRIVATE = (".*", "*.bak*", "*.partial", "*.tmp", "*.orig", "*~", "__pycache__")
_PICKLES = ("*.bin", "*.pth", "*.pt", "*.ckpt", "*.pkl", "*.pickle", "*.bin.index.json")


@dataclass(frozen=True)
class Checkpoint:
    """A folder that has passed all checks; `paths` are what is published of it, `readme` the text of its own card."""

    folder: Path
    kind: Kind
    config: dict[str, Any]
    weights: Weights
    paths: list[str]
    readme: str | None


def examine(folder: Path) -> Checkpoint:
    resolved(folder)
    if not folder.is_dir():
        state = "is a file" if folder.exists() else "doesn't exist"
        raise CheckpointError(f"{folder} {state}: name the folder of a checkpoint.")
    check_links(folder)
    if not is_present(folder / "config.json"):
        raise CheckpointError(f"{folder} has no config.json, so nothing could load it: convert the checkpoint first.")
    config = read_json(folder / "config.json")
    kind = detect_kind(config)
    refuse_sizes(config)
    paths = sorted(_published(folder))
    weights = open_weights(folder)
    detect_kind(config, weights.infos)
    _refuse_strays(folder, weights)
    if kind.is_qwen:
        _check_code(folder, config)
        _check_vocabulary(folder)
    return Checkpoint(folder, kind, config, weights, paths, _read_card(folder / README))


def _published(folder: Path) -> Iterator[str]:
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not _matches(name, _PRIVATE)]
        for name in names:
            path = Path(parent, name)
            if name != ".gitattributes" and _matches(name, _PRIVATE):
                continue
            if _matches(name, _PICKLES):
                raise CheckpointError(
                    f"{path} is a pickle, or an index of some. Pickles can run code, so they aren't published: turn "
                    "weights into safetensors with `upgrade`, and move anything else out of the folder."
                )
            if _matches(name, _PUBLISHED):
                if not path.is_file():
                    raise CheckpointError(f"{path} leads to no file: mend the link, or remove it.")
                check_readable(path)
                yield path.relative_to(folder).as_posix()


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name.lower(), pattern) for pattern in patterns)


def _refuse_strays(folder: Path, weights: Weights) -> None:
    for path in sorted(folder.glob("model*.safetensors")):
        if path not in weights.files:
            named = " and ".join(file.name for file in weights.files[:2])
            raise CheckpointError(f"{path} isn't part of the weights ({named} …): remove what is stale.")


def _check_code(folder: Path, config: Mapping[str, Any]) -> None:
    tokenizer = folder / "tokenizer_config.json"
    of_tokenizer = read_json(tokenizer) if tokenizer.is_file() else {}
    maps = [auto_map_of(config, "config.json"), auto_map_of(of_tokenizer, tokenizer.name)]
    if "AutoModelForCausalLM" not in maps[0]:
        raise CheckpointError(
            f"{folder / 'config.json'} has no auto_map with AutoModelForCausalLM, so nobody could load the checkpoint "
            "from the Hub: run `upgrade` on the folder."
        )
    wanted = [(module, "auto_map") for values in maps for value in values.values() for module in _modules(value)]
    seen = set()
    while wanted:
        module, origin = wanted.pop()
        path = folder / f"{module.replace('.', '/')}.py"
        if not path.is_file():
            raise CheckpointError(f"{path} doesn't exist, but {origin} names it: run `upgrade` on the folder.")
        seen.add(module)
        wanted += [(name, path.name) for name in sorted(get_relative_imports(path)) if name not in seen]


def _modules(value: Any) -> Iterator[str]:
    """Modules of an entry of `auto_map`: "module.Class", or a list of such for the slow and the fast tokenizer."""
    for reference in value if isinstance(value, list) else [value]:
        if isinstance(reference, str):
            yield reference.rpartition(".")[0]


def _check_vocabulary(folder: Path) -> None:
    if not any((folder / name).is_file() for name in ("qwen.tiktoken", "tokenizer.json")):
        raise CheckpointError(f"{folder} has neither qwen.tiktoken nor tokenizer.json: put one of them into it.")


def _read_card(path: Path) -> str | None:
    if not path.is_file():
        return None
    try:
        text = path.read_bytes().decode("utf-8-sig")  # as bytes, so that line ends stay as they are
        if REGEX_YAML_BLOCK.search(text):
            ModelCard(text, ignore_metadata_errors=True)
    except (ValueError, TypeError, yaml.YAMLError) as error:
        raise CheckpointError(f"{path} begins with no valid YAML, or isn't UTF-8: mend it. {error}") from error
    return text
