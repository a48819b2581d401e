"""Texts that GPTQ looks at, and others that its result is measured on, as rows of token ids."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jinja2.exceptions import TemplateError

from ...tokenization_qwen import QWenTokenizer
from ..errors import CheckpointError
from ..files.access import is_present, read_text
from ..formats.companions import VOCABULARY
from ..formats.endings import load_ranks

OWN_TEXTS = Path(__file__).with_name("texts.jsonl")
"""Short passages of many kinds in English and Chinese, and some code, for whoever gives none."""

_LEAST_ROWS, _HELD_OUT = 8, 0.125
_SHORTEST = 16


@dataclass(frozen=True)
class Calibration:
    """Token ids, all rows of one length.

    Attributes:
        seen: (N, T) int64, what weights are rounded by.
        held_out: (M, T) int64, what perplexity is measured on; none of it is in `seen`.
        counted: (M, T) bool, which tokens of these count: of a conversation those that the model is to say.
    """

    seen: torch.Tensor
    held_out: torch.Tensor
    counted: torch.Tensor


def read_calibration(path: Path) -> list[Any]:
    """Texts of a file, or conversations.

    Args:
        path: JSON lines, each a string, `{"text": …}` or `{"messages": [{"role": …, "content": …}, …]}`; any other file
            is plain text, whose empty lines part it.

    Raises:
        CheckpointError: the file can't be read, has no text, or holds something else; the message names the line.
    """
    content = read_text(path)
    if path.suffix not in (".jsonl", ".json"):
        texts: list[Any] = [part.strip() for part in content.split("\n\n") if part.strip()]
    else:
        texts = [_item(line, f"{path}, line {number}") for number, line in _lines(content)]
    if not texts:
        raise CheckpointError(f"{path} has no text to calibrate on.")
    return texts


def _lines(content: str) -> list[tuple[int, str]]:
    return [(number, line) for number, line in enumerate(content.split("\n"), 1) if line.strip()]


def _item(line: str, where: str) -> Any:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is not JSON ({error}): write one value a line, or name a .txt file.") from error
    value = value.get("text", value.get("messages")) if isinstance(value, dict) else value
    if isinstance(value, str) and value.strip():
        return value
    if isinstance(value, list) and value and all(map(_is_turn, value)):
        return value
    raise CheckpointError(
        f'{where} is no text: use "…", {{"text": "…"}} or {{"messages": [{{"role": "user", "content": "…"}}, …]}}.'
    )


def _is_turn(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(name), str) for name in ("role", "content"))


def open_tokenizer(folder: Path) -> QWenTokenizer:
    """The tokenizer of a QWen folder.

    Raises:
        CheckpointError: there is no vocabulary, or a damaged one.
    """
    if not is_present(folder / VOCABULARY):
        raise CheckpointError(f"{folder} has no {VOCABULARY}, without which no text can be read: put it there.")
    load_ranks(folder)
    return QWenTokenizer.from_pretrained(folder, local_files_only=True)


def make_rows(texts: Sequence[Any], tokenizer: Any, samples: int, length: int, seed: int) -> Calibration:
    """Texts one after the other in a random order, cut into rows; an eighth of them is held out.

    Args:
        tokenizer: QWen's.
        samples: most rows to round by.
        length: tokens of a row; fewer, where that would give less than eight rows.

    Raises:
        CheckpointError: too little text, or a conversation that the chat template refuses.
    """
    order = list(texts)
    random.Random(seed).shuffle(order)
    ids, counted = [], []
    for text in order:
        tokens, said = _encoded(text, tokenizer)
        ids += [*tokens, tokenizer.eod_id]
        counted += [*said, isinstance(text, str)]
    length = min(length, len(ids) // _LEAST_ROWS)
    if length < _SHORTEST:
        raise CheckpointError(
            f"The texts have {len(ids)} tokens, and {_LEAST_ROWS * _SHORTEST} are the least to calibrate on: give more."
        )
    whole, most = len(ids) // length * length, samples + max(1, samples // 7)
    rows, marks = (torch.tensor(values[:whole]).view(-1, length)[:most] for values in (ids, counted))
    held_out = max(1, round(_HELD_OUT * len(rows)))
    if not marks[:held_out, 1:].any():
        marks[:] = True
    return Calibration(rows[held_out:], rows[:held_out], marks[:held_out])


def _encoded(text: Any, tokenizer: Any) -> tuple[list[int], list[bool]]:
    """Token ids of a text or a conversation, and which of them count; nothing in them becomes a control token."""
    if isinstance(text, str):
        ids = tokenizer(text, allowed_special=set())["input_ids"]
        return ids, [True] * len(ids)
    try:
        found = tokenizer.apply_chat_template(text, return_dict=True, return_assistant_tokens_mask=True)
    except (ValueError, TemplateError) as error:
        raise CheckpointError(f"The conversation {text!r:.120} is none to calibrate on: {error}.") from error
    return found["input_ids"], [bool(said) for said in found["assistant_masks"]]
