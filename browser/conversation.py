"""Conversations as a page shows them: messages in, replies out, with nothing kept here that is one visitor's."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Generator, Iterable
from contextlib import closing
from dataclasses import dataclass, field, fields
from typing import Any

from transformers import GenerationConfig

from ..qwen_generation_utils import ChatHistory, HistoryType

Message = dict[str, Any]
"""`{"role": "user" | "assistant", "content": [{"type": "text", "text": …}, …]}`, as Gradio has it."""

DEFAULT_LENGTH = 512
"""Tokens of a reply where the checkpoint sets no limit."""


def message(role: str, text: str) -> Message:
    """A message; as a part, since Gradio takes the indentation out of content that is a bare text."""
    return {"role": role, "content": [{"type": "text", "text": text}]}


def text_of(message: Message) -> str:
    """The text of a message, whose parts are joined."""
    return "".join(part["text"] for part in message["content"] if part["type"] == "text")


def turns_of(messages: Iterable[Message]) -> HistoryType:
    """The turns that have a reply; a question that was stopped before its first word has none and is left out."""
    turns: HistoryType = []
    query = None
    for spoken in messages:
        text = text_of(spoken)
        if spoken["role"] == "user":
            query = text
        elif query is not None and text:
            turns.append((query, text))
            query = None
    return turns


def cut_at_query(messages: list[Message]) -> tuple[list[Message], str | None]:
    """The messages before the last question, and that question, None where there is none."""
    for index in reversed(range(len(messages))):
        if messages[index]["role"] == "user":
            return messages[:index], text_of(messages[index])
    return [], None


NO_SEED = -1
"""Seed of the page for another reply each time; Gradio shows a number that is missing as 0."""


@dataclass(frozen=True)
class Bounds:
    """The numbers that a control of the page offers."""

    low: float
    high: float
    step: float


@dataclass(frozen=True)
class Sampling:
    """How replies are drawn; the fields are what the page asks for, in its order."""

    do_sample: bool = False
    temperature: float = field(default=1.0, metadata={"bounds": Bounds(0.05, 2.0, 0.05)})
    top_p: float = field(default=1.0, metadata={"bounds": Bounds(0.05, 1.0, 0.05)})
    top_k: int = field(default=0, metadata={"bounds": Bounds(0, 200, 1)})
    repetition_penalty: float = field(default=1.0, metadata={"bounds": Bounds(1.0, 2.0, 0.05)})
    max_new_tokens: int = field(default=DEFAULT_LENGTH, metadata={"bounds": Bounds(1, 8192, 1)})
    seed: int = NO_SEED

    @classmethod
    def of(cls, config: GenerationConfig) -> Sampling:
        """What a checkpoint's own configuration asks for, within the bounds of the page."""
        asked: dict[str, Any] = {f.name: getattr(config, f.name, None) for f in fields(cls)}
        chosen = {name: value for name, value in asked.items() if value is not None}
        for name in chosen.keys() & set(cls.numbers()):
            bounds = cls.bounds(name)
            chosen[name] = min(max(chosen[name], bounds.low), bounds.high)
        return cls(**chosen)

    @classmethod
    def numbers(cls) -> list[str]:
        """The fields that have bounds, in order."""
        return [f.name for f in fields(cls) if "bounds" in f.metadata]

    @classmethod
    def bounds(cls, name: str) -> Bounds:
        """Those of a field."""
        bounds: Bounds = cls.__dataclass_fields__[name].metadata["bounds"]
        return bounds

    def arguments(self) -> dict[str, Any]:
        """As arguments of `chat_stream`.

        Raises:
            ValueError: a number outside of its bounds.
        """
        for name in self.numbers():
            bounds, value = self.bounds(name), getattr(self, name)
            if not bounds.low <= value <= bounds.high:
                raise ValueError(f"{name}={value} must lie between {bounds.low:g} and {bounds.high:g}.")
        lasting = {"repetition_penalty": self.repetition_penalty, "max_new_tokens": self.max_new_tokens}
        if not self.do_sample:
            return {"do_sample": False, "temperature": 1.0, "top_p": 1.0, "top_k": 50, **lasting}
        drawn = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        return {"do_sample": True, **drawn, **lasting, "seed": None if self.seed == NO_SEED else self.seed}


class LastUsed:
    """Lets only the conversations that were used last carry keys and values, which take much memory.

    Args:
        limit: how many.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self._lock = threading.Lock()
        self._histories: list[weakref.ref[ChatHistory]] = []

    def use(self, history: ChatHistory) -> None:
        """Count a conversation as the last used one, and drop what those beyond the limit carry."""
        with self._lock:
            others = [ref for ref in self._histories if ref() is not None and ref() is not history]
            self._histories = [*others, weakref.ref(history)]
            while len(self._histories) > self.limit:
                if (oldest := self._histories.pop(0)()) is not None:
                    oldest.drop_cache()


class Chat:
    """A model that answers visitors; it keeps nothing of what they say.

    Args:
        model: the chat model.
        tokenizer: its tokenizer.
        carried: conversations that may keep their keys and values for the next turn.
    """

    def __init__(self, model: Any, tokenizer: Any, carried: int = 4):
        self.model = model
        self.tokenizer = tokenizer
        self.last_used = LastUsed(carried)

    def reply(
        self, query: str, messages: list[Message], history: ChatHistory, system: str, sampling: Sampling
    ) -> Generator[list[Message], None, None]:
        """The messages with a question and the reply so far, each time it has grown; closing it stops the model.

        Args:
            query: what the visitor asks.
            messages: what the page shows above it.
            history: the visitor's own; its turns become those of the messages, and it carries keys and values along.
            system: system message.
            sampling: the settings of the page.

        Raises:
            ValueError: settings or a query that can't be; before anything is yielded.
        """
        history[:] = turns_of(messages)
        stream = self.model.chat_stream(self.tokenizer, query, history, system, **sampling.arguments())
        asked = [*messages, message("user", query)]
        yield asked
        try:
            with closing(stream):
                for text in stream:
                    yield [*asked, message("assistant", text)]
        finally:
            self.last_used.use(history)
