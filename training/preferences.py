"""Preference pairs: files of them, and prompts with two answers each as token ids.

A pair is {"prompt_ids": ids, "chosen_ids": ids, "rejected_ids": ids}; an answer ends with its `<|im_end|>`. The ids are
those of `Encoder`, so nothing in a text can become a control token.
"""

from __future__ import annotations

import os
import random
import sys
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

from packaging.version import Version
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..programs.packages import MissingPackage, require
from .data import Messages, parse_conversation, read_records
from .errors import DataError
from .examples import IGNORED, Encoder, Example

_ANSWERING = ("assistant", "gpt")
_BATCH = 128
_OLDEST_TRL = "1.16"


@dataclass
class Preference:
    """A prompt, which ends with the user's turn, and two messages of the assistant, the first of which is better."""

    prompt: Messages
    chosen: dict[str, Any]
    rejected: dict[str, Any]


def require_trl() -> None:
    """Refuse to begin without the library that trains on pairs.

    Raises:
        MissingPackage: it isn't installed, or is too old; none for Python 3.10 is new enough.
    """
    wanted = "--dpo"
    if sys.version_info < (3, 11):
        raise MissingPackage(f"{wanted} needs trl {_OLDEST_TRL}, which needs Python 3.11 or newer", name="trl")
    require("trl", wanted)
    if Version(found := version("trl")) < Version(_OLDEST_TRL):
        raise MissingPackage(
            f"{wanted} needs trl {_OLDEST_TRL} or newer, found {found}: pip install --upgrade trl", name="trl"
        )


# --- files ---


def read_preferences(path: str | os.PathLike) -> list[Preference]:
    """Read the preference pairs of a JSON list or of JSON Lines.

    | key of the record | its value |
    |---|---|
    | `prompt` | a text; or messages in either spelling of `read_conversations`, the last of which is the user's |
    | `chosen`, `rejected` | a text, or a message of the assistant, alone or in a list |
    | `system`, `history` | beside a text under `prompt`: the system message, and pairs [question, answer] before it |

    Without `prompt`, `chosen` and `rejected` are whole conversations that differ in the last answer alone.

    Raises:
        DataError: anything else; the first bad record by its line and field, and how many more there are.
        OSError: the file can't be read.
    """
    return read_records(Path(path), parse_preference)


def parse_preference(record: Any) -> Preference:
    """The pair of one record.

    Raises:
        DataError: it is none; the message names the field and says why, but not the line.
    """
    if not isinstance(record, dict):
        raise DataError(f"a record must be an object, got {record!r:.80}")
    if missing := [key for key in ("chosen", "rejected") if key not in record]:
        raise DataError(f"{missing[0]!r} is missing; found {list(record)!r:.80}")
    if "prompt" not in record:
        return _part_conversations(record)
    prompt = _parse_prompt(record)
    answers = {key: _parse_answer(key, record[key]) for key in ("chosen", "rejected")}
    return Preference(prompt, **answers)


def _parse_prompt(record: dict[str, Any]) -> Messages:
    prompt = record["prompt"]
    beside = [key for key in ("system", "history") if record.get(key)]
    if isinstance(prompt, str):
        turns = [*_turns_before(record), {"role": "user", "content": prompt}]
    elif not isinstance(prompt, list) or not prompt:
        raise DataError(f"'prompt' must be a text, or a list of messages, got {prompt!r:.80}")
    elif beside:
        raise DataError(f"{beside[0]!r} goes with a text under 'prompt': put it among its messages")
    else:
        turns = prompt
    form, (role, content) = _form(turns[0])
    if isinstance(turns[-1], dict) and turns[-1].get(role) in _ANSWERING:
        raise DataError("'prompt' must end with the user's turn: the answers come behind it")
    return _parse("prompt", {form: [*turns, {role: "assistant", content: "any"}]})[:-1]


def _turns_before(record: dict[str, Any]) -> Messages:
    """System message and history beside a text."""
    system, history = record.get("system") or "", record.get("history") or []
    if not isinstance(system, str):
        raise DataError(f"'system' must be a text, got {system!r:.80}")
    if not isinstance(history, list):
        raise DataError(f"'history' must be a list of pairs [question, answer], got {history!r:.80}")
    turns = [{"role": "system", "content": system}] if system else []
    for number, pair in enumerate(history, start=1):
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) and text for text in pair):
            raise DataError(f"'history': pair {number} must be [question, answer], two texts, got {pair!r:.80}")
        turns += [{"role": role, "content": text} for role, text in zip(("user", "assistant"), pair, strict=True)]
    return turns


def _parse_answer(field: str, answer: Any) -> dict[str, Any]:
    """The assistant's message under `chosen` or `rejected`."""
    if isinstance(answer, list) and len(answer) != 1:
        raise DataError(f"{field!r} must be one answer of the assistant beside 'prompt', got {len(answer)} messages")
    turn = answer[0] if isinstance(answer, list) else answer
    if isinstance(turn, str):
        turn = {"role": "assistant", "content": turn}
    form, (role, content) = _form(turn)
    if isinstance(turn, dict) and role in turn and turn[role] not in _ANSWERING:
        raise DataError(f"{field!r} must be a message of the assistant, got one of {turn[role]!r:.80}")
    try:
        return cast(Messages, parse_conversation({form: [{role: "user", content: "any"}, turn]}))[-1]
    except DataError as error:
        raise DataError(f"{field!r}: {str(error).replace('turn 2', 'the answer')}") from None


def _part_conversations(record: dict[str, Any]) -> Preference:
    """The prompt that two whole conversations have in common, and the answers behind it."""
    whole = {}
    for field in ("chosen", "rejected"):
        turns = record[field]
        if not isinstance(turns, list) or len(turns) < 2:
            raise DataError(f"'prompt' is missing, and {field!r} is no whole conversation that begins with it")
        whole[field] = _parse(field, {_form(turns[0])[0]: turns})
    chosen, rejected = whole["chosen"], whole["rejected"]
    if chosen[:-1] != rejected[:-1]:
        raise DataError("'chosen' and 'rejected' must differ in the last answer alone, but what is before it differs")
    return Preference(chosen[:-1], chosen[-1], rejected[-1])


def _parse(field: str, conversation: dict[str, Any]) -> Messages:
    try:
        return cast(Messages, parse_conversation(conversation))  # no tools are given
    except DataError as error:
        raise DataError(f"{field!r}: {error}") from None


def _form(turn: Any) -> tuple[str, tuple[str, str]]:
    """Key of a record, and keys of its turns, in the spelling of a turn."""
    published = isinstance(turn, dict) and "from" in turn
    return ("conversations", ("from", "value")) if published else ("messages", ("role", "content"))


# --- token ids ---


@dataclass
class EncodedPairs:
    """Pairs as token ids, and what became of the others.

    Attributes:
        examples: `prompt_ids`, `chosen_ids` and `rejected_ids` as arrays of 32-bit numbers.
        shortened: pairs whose oldest turns were left out.
        dropped: pairs of which not even the last question fits with both answers.
        equal: pairs with the same answer twice, from which nothing is learnt.
    """

    examples: list[Example]
    shortened: int = 0
    dropped: int = 0
    equal: int = 0

    def report(self) -> str:
        """A line for the user."""
        prompts, chosen, rejected = (
            sum(len(pair[key]) for pair in self.examples) for key in ("prompt_ids", "chosen_ids", "rejected_ids")
        )
        return (
            f"{len(self.examples)} pairs, prompts of {prompts} tokens, chosen answers of {chosen}, rejected ones of "
            f"{rejected}; too long: {self.shortened} prompts shortened, {self.dropped} pairs left out; the same answer "
            f"twice: {self.equal} left out."
        )


def encode_pairs(
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[Preference],
    max_length: int | None = None,
    *,
    description: str = "Encoding",
    progress: bool = True,
) -> EncodedPairs:
    """Encode preference pairs, in batches and with a progress bar.

    Args:
        tokenizer: a QWen tokenizer.
        items: as `read_preferences` gives them; a missing system message is `DEFAULT_SYSTEM`.
        max_length: of a prompt with the longer of its answers. Of longer prompts the oldest turns are left out, as in a
            chat; a pair whose last question doesn't fit is left out.
        description: stands before the bar.
        progress: show the bar.

    Raises:
        DataError: no pair has two different answers.
        ValueError: as `Encoder`.
    """
    encoder, result = Encoder(tokenizer), EncodedPairs([])
    with tqdm(total=len(items), desc=description, unit="", disable=not progress) as bar:
        for start in range(0, len(items), _BATCH):
            batch = items[start : start + _BATCH]
            different = [item for item in batch if item.chosen != item.rejected]
            result.equal += len(batch) - len(different)
            for item, pair in zip(different, _encode(encoder, different), strict=True):
                fitting = _shorten(encoder, item, pair, max_length)
                result.dropped += fitting is None
                result.shortened += fitting is not None and fitting is not pair
                result.examples += [] if fitting is None else [{key: array("i", ids) for key, ids in fitting.items()}]
            bar.update(len(batch))
    if items and result.equal == len(items):
        raise DataError(f"{description}: every pair has the same answer twice, so there is nothing to prefer.")
    return result


def _encode(encoder: Encoder, items: Sequence[Preference]) -> list[Example]:
    conversations = [[*item.prompt, answer] for item in items for answer in (item.chosen, item.rejected)]
    halves = iter([_part(example) for example, _ in encoder.conversations(conversations) if example is not None])
    return [{"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": next(halves)[1]} for prompt, chosen in halves]


def _part(example: Example) -> tuple[list[int], list[int]]:
    """(the prompt, the last answer): in front of each answer is a header without a loss."""
    ids, labels = example["input_ids"], example["labels"]
    length = next(count for count, label in enumerate(reversed(labels)) if label == IGNORED)
    return ids[: len(ids) - length], ids[len(ids) - length :]


def _shorten(encoder: Encoder, item: Preference, pair: Example, max_length: int | None) -> Example | None:
    """The pair with as many of the last turns as fit; None where the last question doesn't."""
    system, turns = (item.prompt[:1], item.prompt[1:]) if item.prompt[0]["role"] == "system" else ([], item.prompt)
    while max_length is not None and _length(pair) > max_length:
        later = [index for index, turn in enumerate(turns) if index and turn["role"] == "user"]
        if not later:
            return None
        turns = turns[later[0] :]
        (pair,) = _encode(encoder, [Preference([*system, *turns], item.chosen, item.rejected)])
    return pair


def _length(pair: Example) -> int:
    return len(pair["prompt_ids"]) + max(len(pair["chosen_ids"]), len(pair["rejected_ids"]))


# --- what a training takes ---


def load_pairs(
    tokenizer: PreTrainedTokenizerBase, data: Any, seed: int, *, progress: bool = True
) -> tuple[EncodedPairs, EncodedPairs | None]:
    """Read and encode files of pairs: (to train on, to evaluate on or None).

    Args:
        data: the options `data_path`, `eval_data_path`, `eval_fraction` and `model_max_length`.

    Raises:
        DataError: bad data, or none of it left.
        OSError: a file can't be read.
    """
    items, held_out = _read_all(data.data_path), _read_all(data.eval_data_path)
    if data.eval_fraction:
        random.Random(seed).shuffle(items)
        count = max(1, round(len(items) * data.eval_fraction))
        held_out, items = items[:count], items[count:]
        if not items:
            raise DataError(f"--eval_fraction {data.eval_fraction} leaves nothing of {data.data_path} to train on.")
    found = []
    for name, part in (("Training data", items), ("Evaluation data", held_out)):
        if not part:
            continue
        encoded = encode_pairs(tokenizer, part, data.model_max_length, description=name, progress=progress)
        if not encoded.examples:
            raise DataError(f"{name}: none fits into --model_max_length {data.model_max_length}; raise it.")
        if progress:
            print(f"{name}: {encoded.report()}", file=sys.stderr)
        found.append(encoded)
    return found[0], found[1] if held_out else None


def _read_all(paths: str | Sequence[str] | None) -> list[Preference]:
    paths = [paths] if isinstance(paths, str) else paths or ()
    return [pair for path in paths for pair in read_preferences(path)]
