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

from ..chat_template_qwen import CHAT_TEMPLATE
from ..qwen_generation_utils import DEFAULT_SYSTEM
from .records import Item, Messages, ToolConversation

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
        dropped: conversations of which not even the first answer fits.
        split: texts that were cut into several examples.
    """

    examples: list[Example]
    shortened: int = 0
    dropped: int = 0
    split: int = 0


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
        newline = list(tokenizer.encode("\n", add_special_tokens=False))
        self._openings = {
            role: [self.tokenizer.im_start_id, *tokenizer.encode(role, add_special_tokens=False), *newline]
            for role in ("system", "user", "assistant")
        }
        self._newline = newline

    def encode(self, items: Sequence[Item]) -> list[tuple[list[Example], bool]]:
        """For each item its examples, none where it doesn't fit, and whether it was too long for a single whole one."""
        plain = [item for item in items if isinstance(item, list)]
        texts = [item for item in items if isinstance(item, str)]
        chats, pieces = iter(self.conversations(plain)), iter(self.texts(texts))
        found: list[tuple[list[Example], bool]] = []
        for item in items:
            if isinstance(item, str):
                found.append((cut := next(pieces), len(cut) > 1))
            elif isinstance(item, ToolConversation):
                found.append(self.tool_conversation(item))
            else:
                example, was_cut = next(chats)
                found.append(([] if example is None else [example], was_cut))
        return found

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

    def tool_conversation(self, conversation: ToolConversation) -> tuple[list[Example], bool]:
        """An example for each question, and whether steps were left out because they don't fit.

        The tools are described in the last question only, as a chat does. So each question is the last of an example
        of its own, with the turns before it, and the loss is on what the model says to it: thoughts, calls up to
        `Observation:` and the answer, and not on the results.
        """
        messages = conversation.messages
        questions = [index for index, message in enumerate(messages) if message["role"] == "user"]
        examples, was_cut = [], False
        for end in [*questions[1:], len(messages)]:
            example = self._tool_example(messages[:end], conversation.tools)
            length = self._fitting(example)
            was_cut |= length < len(example["input_ids"])
            if length:
                examples.append({key: values[:length] for key, values in example.items()})
        return examples, was_cut

    def _tool_example(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> Example:
        rendered = self.tokenizer.apply_chat_template(
            messages, tools=tools, chat_template=CHAT_TEMPLATE, return_assistant_tokens_mask=True
        )
        ids, said = list(rendered["input_ids"]), rendered["assistant_masks"]
        answer = len(ids) - 1 - ids[::-1].index(self.tokenizer.im_start_id)  # no text can hold this token
        labels = [i if said[place] and place > answer else IGNORED for place, i in enumerate(ids)]
        return {"input_ids": ids, "labels": labels}

    def _fitting(self, example: Example) -> int:
        """Length up to the end of the last thing said that fits; 0 where there is none."""
        labels = example["labels"]
        if self.max_length is None or len(labels) <= self.max_length:
            return len(labels)
        ends = (end for end in range(self.max_length, 0, -1) if labels[end - 1] != IGNORED and labels[end] == IGNORED)
        return next(ends, 0)

    def _encode(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        options: dict[str, Any] = {"add_special_tokens": False, "return_attention_mask": False}
        encoded = self.tokenizer(texts, allowed_special=set(), **options)
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
    items: Sequence[Item],
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
            for item, (examples, was_cut) in zip(batch, encoder.encode(batch), strict=True):
                is_text = isinstance(item, str)
                result.split += is_text and was_cut
                result.dropped += not examples
                result.shortened += was_cut and bool(examples) and not is_text
                result.examples += map(_compact, examples)
            bar.update(len(batch))
    return result


def _batches(items: Sequence[Any]) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), _BATCH):
        yield items[start : start + _BATCH]


def _compact(example: Example) -> Example:
    return {key: array("i", values) for key, values in example.items()}
