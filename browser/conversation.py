"""Conversations of a page: messages in, replies out, with nothing kept here that is one visitor's."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, field, fields
from typing import Any

from transformers import GenerationConfig

from ..programs.tools import ANSWER
from ..qwen_generation_utils import ChatHistory
from ..schemas_qwen import Tool, as_tools
from ..tools_qwen import FIRST_STEP, OBSERVATION, ToolLoopError, ToolReply, ToolResult, ToolRun, ToolStep
from .messages import CALLED, DONE, WRITTEN, Message, message, step, turns_of

DEFAULT_LENGTH = 512
"""Tokens of a reply where the checkpoint sets no limit."""


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
        tools: functions that the model may call, for every visitor.
    """

    def __init__(self, model: Any, tokenizer: Any, carried: int = 4, tools: Sequence[Callable[..., Any]] = ()):
        self.model = model
        self.tokenizer = tokenizer
        self.last_used = LastUsed(carried)
        self.tools = as_tools(tools) if tools else {}

    def reply(
        self,
        query: str,
        messages: list[Message],
        history: ChatHistory,
        system: str,
        sampling: Sampling,
        with_tools: bool = False,
    ) -> Generator[list[Message], None, None]:
        """The messages with a question and the reply so far, each time it has grown; closing it stops the model.

        Args:
            query: what the visitor asks.
            messages: what the page shows above it.
            history: the visitor's own; its turns become those of the messages, and it carries keys and values along.
            system: system message.
            sampling: the settings of the page.
            with_tools: whether the model may call those that there are. No call is made of a step that is `CALLED` when
                this is closed.

        Raises:
            ValueError: settings or a query that can't be; before anything is yielded.
            ToolLoopError: calls without an answer.
        """
        tools = [*self.tools.values()] if with_tools else []
        history[:] = turns_of(messages, with_steps=bool(tools))
        arguments = {"system": system, **sampling.arguments()}
        # Checks the arguments here; run_tools does so when the question is on the page already.
        stream = self.model.chat_stream(self.tokenizer, query, history, **arguments)
        asked = [*messages, message("user", query)]
        yield asked
        replies = self._with_calls(query, tools, history, arguments) if tools else _plain(stream)
        try:
            with closing(replies):
                for reply in replies:
                    yield [*asked, *reply]
        finally:
            self.last_used.use(history)

    def _with_calls(
        self, query: str, tools: list[Tool], history: ChatHistory, arguments: dict[str, Any]
    ) -> Generator[list[Message], None, None]:
        with closing(self.model.run_tools(self.tokenizer, query, tools, history, stream=True, **arguments)) as events:
            run = yield from answering(events)
        history.kept = run.history.kept


def _plain(stream: Generator[str, None, None]) -> Generator[list[Message], None, None]:
    with closing(stream):
        for text in stream:
            yield [message("assistant", text)]


def answering(events: Iterable[Any]) -> Generator[list[Message], None, Any]:
    """The steps of `run_tools` and the answer, each time they have grown; a step is `CALLED` before its call is made.

    Returns:
        the end of the run, a `ToolRun`.

    Raises:
        ToolLoopError: calls without an answer, the last of which is shown as over.
    """
    steps: list[Message] = []
    written = ""
    try:
        for event in events:
            if isinstance(event, ToolRun):
                yield [*steps, message("assistant", event.answer or "")]
                return event
            if isinstance(event, ToolStep):
                told = ToolResult(event.result).text()
                steps.append(step(f"{event.reply}\n{OBSERVATION} {told}", DONE))
                yield [*steps]
            else:
                written = event
                yield [*steps, _so_far(event)]
    except ToolLoopError:
        yield [*steps, step(str(written), DONE)]
        raise
    raise RuntimeError("run_tools ends with a ToolRun.")


def _so_far(text: str) -> Message:
    """A reply that is being written, a step or the answer; one that keeps to no format is an answer."""
    if isinstance(text, ToolReply) and text.call is not None:
        return step(str(text), CALLED)
    first = FIRST_STEP.search(text)
    if first is None and not text.startswith("Thought:"[: len(text)]):
        return message("assistant", text)
    answer = text[first.end() :].strip() if first is not None and first[0] == ANSWER else ""
    return message("assistant", answer) if answer else step(text, WRITTEN)
