"""Which tokens end a text: what vocabulary, tokenizer and generation settings say of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...programs.models import wrong_end
from ...tokenization_qwen import ENDOFTEXT, IMEND, IMSTART, SPECIAL_TOKENS, load_vocabulary
from ..errors import CheckpointError
from ..files.access import check_readable, is_present, read_json
from .companions import (
    EXTRA_VOCABULARY,
    GENERATION_CONFIG,
    TEMPLATE,
    TOKENIZER_CONFIG,
    TOKENIZER_FILES,
    TOKENIZER_JSON,
    VOCABULARY,
    optional_json,
)

_PUBLISHED_END = 151643
_QWEN_GENERATION = (
    "chat_format",
    "decay_bound",
    "decay_factor",
    "factual_nucleus_sampling",
    "max_context_size",
    "max_generate_size",
    "max_window_size",
    "stop_words_ids",
)
"""Keys of QWen's generation settings that only its own code knows."""


def is_chat(generation: Mapping[str, Any] | None, end_of_turn: int | None = None) -> bool:
    """Whether generation settings are those of a chat model: they say so, or say nothing and end at `<|im_end|>`."""
    settings = generation or {}
    if "chat_format" in settings:
        return settings["chat_format"] == "chatml"
    return end_of_turn is not None and end_of_turn in as_list(settings.get("eos_token_id"))


def end_ids(config: Mapping[str, Any], folder: Path) -> tuple[int, int] | None:
    """Ids of `<|endoftext|>` and `<|im_end|>`; None where the tokenizer has no such tokens.

    They are those of the vocabulary, else of `tokenizer.json`. In a folder without any tokenizer they are counted from
    `eos_token_id`, as QWen's control tokens follow one another.

    Raises:
        CheckpointError: a damaged vocabulary or tokenizer, or one that is another model's by what lies beside it.
    """
    if is_present(folder / VOCABULARY):
        special = load_ranks(folder)[1]
        _check_same(special, folder)
        _check_ends(special, config, folder)
        return special[ENDOFTEXT], special[IMEND]
    if is_present(folder / TOKENIZER_JSON):
        ids = _added_tokens(folder / TOKENIZER_JSON)
        return (ids[ENDOFTEXT], ids[IMEND]) if {ENDOFTEXT, IMSTART, IMEND} <= ids.keys() else None
    end = config.get("eos_token_id", _PUBLISHED_END)
    if type(end) is not int or _has_tokenizer(folder):
        return None
    return end, end + SPECIAL_TOKENS.index(IMEND)


def _check_same(special: Mapping[str, int], folder: Path) -> None:
    """Refuse two vocabularies in one folder that place the control tokens differently, as where one is cut short."""
    if not is_present(folder / TOKENIZER_JSON):
        return
    ids = _added_tokens(folder / TOKENIZER_JSON)
    for token in (ENDOFTEXT, IMEND):
        if ids.get(token, special[token]) != special[token]:
            raise CheckpointError(
                f"{token} is token {special[token]:,} by {folder / VOCABULARY}, but {ids[token]:,} by "
                f"{TOKENIZER_JSON}: one of the two is truncated or another model's. Download both again."
            )


def _check_ends(special: Mapping[str, int], config: Mapping[str, Any], folder: Path) -> None:
    """Refuse a vocabulary in which none of the tokens that end a text is one that the settings name."""
    rows = config.get("vocab_size")
    if type(rows) is int and special[ENDOFTEXT] >= rows:
        return  # it is longer than the model's own, of which `inspect` says so
    told = {"config.json": config, GENERATION_CONFIG: _lenient(folder / GENERATION_CONFIG)}
    ends = {name: settings.get("eos_token_id") for name, settings in told.items()}
    reason = wrong_end(str(folder / VOCABULARY), special, rows, ends, _named_end(special, folder))
    if reason is not None:
        raise CheckpointError(reason)


def _lenient(path: Path) -> dict[str, Any]:
    try:
        return optional_json(path) or {}
    except CheckpointError:  # a damaged file, which is reported by itself
        return {}


def _named_end(ids: Mapping[str, int], folder: Path) -> int | None:
    """Id of a control token that the tokenizer's settings let texts end with."""
    named = _lenient(folder / TOKENIZER_CONFIG).get("eos_token")
    return ids.get(str(named.get("content") if isinstance(named, dict) else named))


def _has_tokenizer(folder: Path) -> bool:
    """Whether there is any file of a tokenizer but settings and template."""
    names = [name for name in TOKENIZER_FILES if name not in (TOKENIZER_CONFIG, TEMPLATE) and (folder / name).is_file()]
    for name in names:
        check_readable(folder / name)
    return bool(names)


def _added_tokens(path: Path) -> dict[str, int]:
    added = read_json(path).get("added_tokens") or []
    try:
        return {str(token["content"]): int(token["id"]) for token in added}
    except (TypeError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path} has 'added_tokens' that are no tokens with ids. Download it again.") from error


def load_ranks(folder: Path) -> tuple[dict[bytes, int], dict[str, int]]:
    extra = folder / EXTRA_VOCABULARY
    for path in (folder / VOCABULARY, *([extra] if is_present(extra) else ())):
        check_readable(path)
    try:
        return load_vocabulary(folder / VOCABULARY, extra if extra.is_file() else None)
    except (OSError, ValueError, OverflowError) as error:
        raise CheckpointError(str(error)) from error


def as_list(value: Any) -> list[int]:
    """Token ids of a setting that may be one id, a list or nothing."""
    return [] if value is None else list(value) if isinstance(value, list) else [value]


def qwen_generation(generation: Mapping[str, Any] | None, end_of_text: int, end_of_turn: int) -> dict[str, Any]:
    """Generation settings for our code: those that are there; chats end at `<|im_end|>` as well.

    Pipelines and servers know no stop words, so without it they would never stop.
    """
    if generation is None:
        return {"eos_token_id": end_of_text, "pad_token_id": end_of_text}
    if not is_chat(generation, end_of_turn):
        return {**generation, "eos_token_id": generation.get("eos_token_id", end_of_text)}
    ends = as_list(generation.get("eos_token_id", end_of_text))
    return {**generation, "eos_token_id": [end_of_turn, *(end for end in ends if end != end_of_turn)]}


def qwen2_generation(generation: Mapping[str, Any] | None, end_of_text: int, end_of_turn: int) -> dict[str, Any]:
    """The same for a Qwen2 model: what only QWen's code knows is left out."""
    ours = qwen_generation(generation, end_of_text, end_of_turn)
    return {name: value for name, value in ours.items() if name not in _QWEN_GENERATION}
