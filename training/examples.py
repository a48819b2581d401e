"""Conversations and texts as token ids, with labels that say which tokens are to be learnt.

An example is {"input_ids": ids, "labels": ids or -100}. The labels stand at the places of their own tokens; the model
shifts them.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..qwen_generation_utils import DEFAULT_SYSTEM
from .data import Messages

IGNORED = -100
"""Label of tokens without a loss."""

Example = dict[str, Any]
"""`input_ids` and `labels`: sequences of as many whole numbers, lists or arrays."""

_BATCH = 256


@dataclass
class Encoded:
    """Examples, and what became of those that were too long.

    Attributes:
        examples: `input_ids` and `labels` as arrays of 32-bit numbers, which take a tenth of the space of lists.
        shortened: conversations of which the last turns were left out.
        dropped: conversations of which not even the first pair of turns fits.
        split: texts that were cut into several examples.
    """

    examples: list[Example]
    shortened: int = 0
    dropped: int = 0
    split: int = 0

    def report(self) -> str:
        """A line for the user."""
        tokens = sum(len(example["input_ids"]) for example in self.examples)
        learnt = sum(len(example["labels"]) - example["labels"].count(IGNORED) for example in self.examples)
        cut = f"{self.shortened} conversations shortened, {self.dropped} left out, {self.split} texts split"
        return f"{len(self.examples)} examples of {tokens} tokens, {learnt} of them with a loss; too long: {cut}."


class Encoder:
    """Encodes conversations and texts; the ids that frame a turn are looked up once.

    The ids are those of `make_context`: nothing in a content can become a control token. The loss is on what the
    assistant writes, its content and the `<|im_end|>` behind it, and not on the header in front or the newline behind.

    Args:
        tokenizer: a QWen tokenizer, slow or fast.
        max_length: of an example in tokens; None for any.

    Raises:
        ValueError: a tokenizer without QWen's control tokens, or a `max_length` below 2.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int | None = None):
        if not hasattr(tokenizer, "im_start_id"):
            raise ValueError(f"{type(tokenizer).__name__} has no im_start_id: training needs a QWen tokenizer.")
        if max_length is not None and max_length < 2:
            raise ValueError(f"max_length={max_length} must be at least 2, or None for any length.")
        self.tokenizer: Any = tokenizer
        self.max_length = max_length
        newline = list(tokenizer.encode("\n"))
        self._openings = {
            role: [self.tokenizer.im_start_id, *tokenizer.encode(role), *newline]
            for role in ("system", "user", "assistant")
        }
        self._newline = newline

    def conversations(self, conversations: Sequence[Messages]) -> list[tuple[Example | None, bool]]:
        """For each conversation its example, None where it doesn't fit, and whether turns were left out."""
        conversations = [self._with_system(messages) for messages in conversations]
        contents = self._encode([message["content"] for messages in conversations for message in messages])
        found = iter(contents)
        return [self._assemble([(message["role"], next(found)) for message in chat]) for chat in conversations]

    def texts(self, texts: Sequence[str]) -> list[list[Example]]:
        """For each text its examples: several where it is longer than `max_length`.

        They overlap by a token, because nothing predicts the first token of an example: so each is learnt once.
        """
        examples = []
        for ids in self._encode(list(texts)):
            ids = [*ids, self.tokenizer.eod_id]
            length = self.max_length or len(ids)
            pieces = [ids[start : start + length] for start in range(0, max(len(ids) - 1, 1), max(length - 1, 1))]
            examples.append([{"input_ids": piece, "labels": list(piece)} for piece in pieces])
        return examples

    def _encode(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        encoded = self.tokenizer(texts, allowed_special=set(), return_attention_mask=False)
        return list(encoded["input_ids"])

    @staticmethod
    def _with_system(messages: Messages) -> Messages:
        if messages and messages[0]["role"] == "system":
            return messages
        return [{"role": "system", "content": DEFAULT_SYSTEM}, *messages]

    def _assemble(self, turns: list[tuple[str, list[int]]]) -> tuple[Example | None, bool]:
        """Lay the turns end to end, as many whole pairs of them as fit."""
        ids: list[int] = []
        labels: list[int] = []
        whole = 0  # length up to the last answer that fits
        for role, content in turns:
            opening = self._newline + self._openings[role] if ids else self._openings[role]
            ids += [*opening, *content, self.tokenizer.im_end_id]
            learnt = len(content) + 1 if role == "assistant" else 0
            labels += [IGNORED] * (len(ids) - len(labels) - learnt)
            labels += ids[len(ids) - learnt :] if learnt else []
            if self.max_length is not None and len(ids) > self.max_length:
                return ({"input_ids": ids[:whole], "labels": labels[:whole]} if whole else None), True
            whole = len(ids) if role == "assistant" else whole
        return {"input_ids": ids, "labels": labels}, False


def encode_conversation(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, max_length: int | None = None
) -> Example | None:
    """Encode one conversation for training; of many, `encode_all` is faster.

    Args:
        tokenizer: a QWen tokenizer.
        messages: as `read_conversations` gives them; a missing system message is `DEFAULT_SYSTEM`.
        max_length: leave out whole pairs of turns from the end beyond so many tokens.

    Returns:
        `input_ids` and `labels`, lists of ints (length,); None where not even the first pair fits.

    Raises:
        ValueError: as `Encoder`.
    """
    return Encoder(tokenizer, max_length).conversations([messages])[0][0]


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> Example:
    """Encode one text with the `<|endoftext|>` behind it, all of which is learnt but the first token.

    Returns:
        `input_ids` and `labels`, lists of ints (length,).

    Raises:
        ValueError: as `Encoder`.
    """
    return Encoder(tokenizer).texts([text])[0][0]


def encode_all(
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[Messages] | Sequence[str],
    max_length: int | None = None,
    *,
    description: str = "Encoding",
    progress: bool = True,
) -> Encoded:
    """Encode conversations or texts, in batches and with a progress bar.

    Args:
        tokenizer: a QWen tokenizer.
        items: conversations, or texts.
        max_length: of an example. Of longer conversations the last turns are left out; longer texts are cut into
            examples of this length, see `Encoder.texts`.
        description: stands before the bar.
        progress: show the bar.

    Raises:
        ValueError: as `Encoder`.
    """
    encoder, result = Encoder(tokenizer, max_length), Encoded([])
    with tqdm(total=len(items), desc=description, unit="", disable=not progress) as bar:
        for batch in _batches(items):
            if isinstance(batch[0], str):
                for pieces in encoder.texts(batch):
                    result.split += len(pieces) > 1
                    result.examples += map(_compact, pieces)
            else:
                for example, was_cut in encoder.conversations(batch):
                    result.dropped += example is None
                    result.shortened += was_cut and example is not None
                    result.examples += [] if example is None else [_compact(example)]
            bar.update(len(batch))
    return result


def _batches(items: Sequence[Any]) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), _BATCH):
        yield items[start : start + _BATCH]


def _compact(example: Example) -> Example:
    return {key: array("i", values) for key, values in example.items()}
