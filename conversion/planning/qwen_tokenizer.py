"""The tokenizer of any folder for QWen."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer
from transformers import Qwen2Tokenizer

from ...configuration_qwen import AUTO_MAP
from ...tokenization_qwen import ENDOFTEXT, IMEND, IMSTART, SPECIAL_TOKENS, QWenTokenizerFast
from ..errors import CheckpointError
from ..files.access import auto_map_of, check_readable, is_present
from ..formats.companions import (
    EXTRA_VOCABULARY,
    TOKENIZER_CONFIG,
    TOKENIZER_FILES,
    TOKENIZER_JSON,
    VOCABULARY,
    optional_json,
)
from ..formats.endings import load_ranks
from ..writing.files import CopiedFile, PlannedFile, TextFile
from .companions import copied_tokenizer, json_file, template_files


def upgraded_tokenizer_config(config: Mapping[str, Any] | None) -> dict[str, Any]:
    """`tokenizer_config.json` for our tokenizers, with what a published one lacks.

    Where only the fast class is named, there is a `tokenizer.json` whose control tokens the slow one doesn't know.
    """
    config = dict(config or {})
    config.setdefault("tokenizer_class", "QWenTokenizer")
    config.setdefault("eos_token", ENDOFTEXT)
    config.setdefault("pad_token", ENDOFTEXT)
    classes = AUTO_MAP["AutoTokenizer"]
    only_fast = [None, classes[1]]
    before = auto_map_of(config, TOKENIZER_CONFIG)
    auto_map = {"AutoTokenizer": only_fast if before.get("AutoTokenizer") == only_fast else classes}
    return {**config, "auto_map": {**before, **auto_map}}


def llama_tokenizer(folder: Path) -> list[PlannedFile]:
    """LLaMA's tokenizer as it is; its original format tells nothing about it, so that is written."""
    files = copied_tokenizer(folder)
    if [file.name for file in files] != ["tokenizer.model"]:
        return files
    named = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "LlamaTokenizer", "unk_token": "<unk>"}
    return [*files, json_file(TOKENIZER_CONFIG, named)]


def tokenizer_for_qwen(folder: Path) -> tuple[list[PlannedFile], str | None]:
    """The tokenizer of any folder that becomes a QWen one, and a note where it can't chat.

    What its files hold decides, not the architecture of the model: QWen's vocabulary goes with weights under LLaMA's
    names as well, and LLaMA's tokenizer with Qwen2's.

    Raises:
        CheckpointError: a damaged tokenizer.
    """
    if is_present(folder / VOCABULARY):
        load_ranks(folder)
        names = [name for name in (VOCABULARY, EXTRA_VOCABULARY) if (folder / name).is_file()]
        config = json_file(TOKENIZER_CONFIG, upgraded_tokenizer_config(_settings_of_qwen(folder)))
        return [*(CopiedFile(name, folder / name) for name in names), config, *template_files(folder)], None
    if is_present(folder / TOKENIZER_JSON) or (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return qwen_tokenizer(folder)
    if files := llama_tokenizer(folder):
        return files, "LLaMA's tokenizer is kept as it is, and can't chat."
    return [], "There is no tokenizer, so none is written."


def _settings_of_qwen(folder: Path) -> dict[str, Any]:
    """Tokenizer settings without the names of other programs' classes, for which a folder may have been made ready."""
    config = optional_json(folder / TOKENIZER_CONFIG) or {}
    return {name: value for name, value in config.items() if name not in ("tokenizer_class", "auto_map")}


def qwen_tokenizer(folder: Path) -> tuple[list[PlannedFile], str | None]:
    """The tokenizer of a Qwen2 folder for our code, with identical ids; and a note where it isn't possible.

    Qwen2.5 has other control tokens behind `<|im_end|>` than QWen has. `qwen.tiktoken` doesn't name them, so there is
    none for those: the fast class reads them from `tokenizer.json`.

    Raises:
        CheckpointError: a damaged tokenizer.
    """
    names = {name for name in TOKENIZER_FILES if (folder / name).is_file()}
    if TOKENIZER_JSON not in names and not {"vocab.json", "merges.txt"} <= names:
        return [], "There is no tokenizer, so none is written."
    backend = load_backend(folder)
    _name_control_tokens(backend)
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    if not {ENDOFTEXT, IMSTART, IMEND} <= known or not _is_byte_level(backend):
        lacks = f"has no {IMSTART}" if IMSTART not in known else "is not QWen's"
        return copied_tokenizer(folder), f"The tokenizer {lacks}: it is kept as it is, and can't chat."
    tokenizer = QWenTokenizerFast(tokenizer_object=backend)
    config = optional_json(folder / TOKENIZER_CONFIG) or {}
    kept = {name: value for name, value in config.items() if name in ("model_max_length", "chat_template", "eos_token")}
    vocabulary = list(_vocabulary_files(tokenizer))
    slow = AUTO_MAP["AutoTokenizer"][0] if vocabulary else None
    auto_map = {"AutoTokenizer": [slow, AUTO_MAP["AutoTokenizer"][1]]}
    written = {"auto_map": auto_map, "pad_token": ENDOFTEXT, **kept, "tokenizer_class": "QWenTokenizer"}
    files = [TextFile(TOKENIZER_JSON, backend.to_str(pretty=True)), json_file(TOKENIZER_CONFIG, written), *vocabulary]
    return [*files, *template_files(folder)], None


def _name_control_tokens(backend: Tokenizer) -> None:
    """Make tokens of the vocabulary control tokens that only the settings of other classes call so."""
    vocabulary = backend.get_vocab(with_added_tokens=False)
    added = {token.content for token in backend.get_added_tokens_decoder().values()}
    names = [token for token in SPECIAL_TOKENS if token in vocabulary and token not in added]
    if {ENDOFTEXT, IMSTART, IMEND} <= added.union(names):
        backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])


def _is_byte_level(backend: Tokenizer) -> bool:
    """Whether tokens are made of bytes, as QWen's are, and not of characters, as LLaMA's."""
    content = json.loads(backend.to_str())
    return content["model"].get("type") == "BPE" and "ByteLevel" in json.dumps(content.get("decoder"))


def load_backend(folder: Path) -> Tokenizer:
    """The tokenizer of `tokenizer.json`, or of `vocab.json` with `merges.txt`.

    Raises:
        CheckpointError: it can't be read.
    """
    for name in (TOKENIZER_JSON, "vocab.json", "merges.txt"):
        if is_present(folder / name):
            check_readable(folder / name)
    try:
        if (folder / TOKENIZER_JSON).is_file():
            return Tokenizer.from_file(str(folder / TOKENIZER_JSON))
        return Qwen2Tokenizer.from_pretrained(folder).backend_tokenizer
    except Exception as error:  # the library raises its bare base class
        raise CheckpointError(f"The tokenizer in {folder} can't be read: {error}") from error


def _vocabulary_files(tokenizer: QWenTokenizerFast) -> Iterator[PlannedFile]:
    """`qwen.tiktoken` and the extra tokens, if the control tokens are QWen's."""
    first = tokenizer.eod_id
    if tokenizer.special_tokens != {token: first + i for i, token in enumerate(SPECIAL_TOKENS)}:
        return
    for name, wanted in ((VOCABULARY, lambda rank: rank < first), (EXTRA_VOCABULARY, lambda rank: rank > first)):
        lines = [
            f"{base64.b64encode(token).decode()} {rank}\n"
            for token, rank in tokenizer.mergeable_ranks.items()
            if wanted(rank)
        ]
        if lines:
            yield TextFile(name, "".join(lines))
