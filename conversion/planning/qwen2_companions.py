"""Tokenizer and generation settings of a QWen folder for Qwen2."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...tokenization_qwen import ENDOFTEXT, IMEND, build_backend
from ..formats.companions import (
    GENERATION_CONFIG,
    TEMPLATE,
    TOKENIZER_CONFIG,
    TOKENIZER_JSON,
    VOCABULARY,
    optional_json,
)
from ..formats.endings import load_ranks, qwen2_generation
from ..writing.files import CopiedFile, PlannedFile, TextFile
from .companions import copied_tokenizer, json_file, plain_template, template_files


def tokenizer_for_qwen2(
    folder: Path, ends: tuple[int, int] | None, chat: bool, length: int
) -> tuple[list[PlannedFile], str | None]:
    """The tokenizer of a QWen checkpoint for Qwen2, and a note where it isn't QWen's.

    Args:
        ends: ids of `<|endoftext|>` and `<|im_end|>`; None where the tokenizer has no such tokens.
        chat: whether a text ends at `<|im_end|>`.
        length: longest text in tokens.

    Raises:
        CheckpointError: a damaged tokenizer.
    """
    if (folder / VOCABULARY).is_file():
        return qwen2_tokenizer(folder, chat, length), None
    if (folder / TOKENIZER_JSON).is_file() and ends is not None:
        return qwen2_tokenizer_of_json(folder), None
    files = copied_tokenizer(folder)
    if files and ends is None:
        return files, f"The tokenizer has no {IMEND}: it is kept as it is."
    return [], f"There is no {VOCABULARY}, so no tokenizer is written."


def generation_for_qwen2(
    folder: Path, generation: Mapping[str, Any] | None, ends: tuple[int, int] | None
) -> tuple[list[PlannedFile], str | None]:
    """Its generation settings for Qwen2, and a note where there were none."""
    if ends is None:
        return [CopiedFile(GENERATION_CONFIG, folder / GENERATION_CONFIG)] if generation is not None else [], None
    note = None
    if generation is None:
        note = f"There is no {GENERATION_CONFIG}: texts end at {ends[0]}, as those of a base model."
    return [json_file(GENERATION_CONFIG, qwen2_generation(generation, *ends))], note


def qwen2_tokenizer(folder: Path, chat: bool, length: int) -> list[PlannedFile]:
    """QWen's vocabulary as the `tokenizer.json` of a Qwen2 model, with identical ids.

    Args:
        folder: has `qwen.tiktoken`, and may have `qwen_extra.tiktoken`.
        chat: whether a text ends at `<|im_end|>`.
        length: longest text in tokens.

    Raises:
        CheckpointError: a damaged vocabulary.
    """
    ranks, special = load_ranks(folder)
    templates = template_files(folder, plain_template())
    own = (optional_json(folder / TOKENIZER_CONFIG) or {}).get("chat_template")
    config = {
        "added_tokens_decoder": {
            str(token_id): {
                "content": token,
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": True,
            }
            for token, token_id in special.items()
        },
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": IMEND if chat else ENDOFTEXT,
        "errors": "replace",
        "model_max_length": length,
        "pad_token": ENDOFTEXT,
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    if own is not None:
        config["chat_template"] = own
    text = build_backend(ranks, special).to_str(pretty=True)
    return [TextFile(TOKENIZER_JSON, text), json_file(TOKENIZER_CONFIG, config), *templates]


def qwen2_tokenizer_of_json(folder: Path) -> list[PlannedFile]:
    """The tokenizer of a QWen folder that has `tokenizer.json` and no vocabulary, for Qwen2."""
    config = {**(optional_json(folder / TOKENIZER_CONFIG) or {}), "tokenizer_class": "Qwen2Tokenizer"}
    config.pop("auto_map", None)
    own = (TOKENIZER_CONFIG, TEMPLATE)
    return [
        *copied_tokenizer(folder, own),
        json_file(TOKENIZER_CONFIG, config),
        *template_files(folder, plain_template()),
    ]
