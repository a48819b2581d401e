"""A conversation with a checkpoint: its turns, its settings, and what the last reply cost."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, cast

import psutil
import torch
from transformers import PreTrainedTokenizerBase, StoppingCriteria

from ..pieces_qwen import repair_surrogates
from ..programs.few_bits import in_bits
from ..programs.models import open_model
from ..programs.tools import texts_of, unless
from ..qwen_generation_utils import ChatHistory
from ..tools_qwen import ToolLoopError
from .settings import Settings


@dataclass(frozen=True)
class Statistics:
    """What a reply cost.

    Attributes:
        prompt_tokens: length of the prompt, the conversation before included.
        tokens: length of the reply, with the token that ended it.
        first_token: seconds until the first token.
        rate: tokens per second from then on, None for a single token.
        memory: bytes that the process holds.
        device_memory: most bytes that tensors took on the GPU, None without one.
    """

    prompt_tokens: int
    tokens: int
    first_token: float
    rate: float | None
    memory: int
    device_memory: int | None

    def __str__(self) -> str:
        rate = "" if self.rate is None else f", then {self.rate:.1f} tokens/s"
        device = "" if self.device_memory is None else f", at most {self.device_memory / 1e6:.0f} MB on the GPU"
        return (
            f"{self.tokens} tokens, the first after {self.first_token:.2f} s{rate}; "
            f"prompt of {self.prompt_tokens} tokens; memory {self.memory / 1e6:.0f} MB{device}"
        )


class Meter(StoppingCriteria):
    """Takes the time of each new token, and ends the reply after the token under way once `stop` is set."""

    def __init__(self, stop: threading.Event):
        self.stop = stop
        self.begin = time.perf_counter()
        self.times: list[float] = []
        self.prompt_tokens = 0

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """(B, length) -> (B,), true where the reply is to end."""
        if not self.times:
            self.prompt_tokens = input_ids.shape[1] - 1
        self.times.append(time.perf_counter())
        return torch.full((len(input_ids),), self.stop.is_set(), dtype=torch.bool, device=input_ids.device)

    def statistics(self, device: torch.device) -> Statistics | None:
        """What the reply cost, None if there is no token of it."""
        if not self.times:
            return None
        first, last, more = self.times[0], self.times[-1], len(self.times) - 1
        return Statistics(
            prompt_tokens=self.prompt_tokens,
            tokens=more + 1,
            first_token=first - self.begin,
            rate=more / (last - first) if more else None,
            memory=psutil.Process().memory_info().rss,
            device_memory=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        )


class Conversation:
    """What was said so far, and how the model is to go on.

    Attributes:
        history: turns, with the keys and values that the model keeps of them.
        system: system message.
        settings: generation settings.
        seed: makes sampled replies repeatable, None for none.
        tools: functions that the model may call.
        statistics: of the last reply, None before it.
    """

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase, system: str, settings: Settings):
        self.model = model
        self.tokenizer = tokenizer
        self.system = _clean(system)
        self.settings = settings
        self.seed: int | None = None
        self.tools: list[Callable[..., Any]] = []
        self.history = ChatHistory()
        self.statistics: Statistics | None = None

    def reply(self, query: str, stop: threading.Event) -> Generator[str, None, None]:
        """Yield the reply so far each time it has grown; then, or once closed, the turn is part of the history.

        Args:
            query: what the user says; bytes of the terminal that were no text in it are replaced.
            stop: set by someone else, ends the reply as far as it went. Of a reply that never began nothing is kept.

        Raises:
            ValueError: a query that leaves no room for a reply, a base model; no answer after several calls of tools.
        """
        query = _clean(query)
        meter = Meter(stop)
        arguments = {"system": self.system, "stopping_criteria": [meter], **self.settings.changed}
        if self.seed is not None:
            arguments["seed"] = self.seed
        if self.tools:
            yield from self._reply_with_tools(query, stop, meter, arguments)
            return
        stream = self.model.chat_stream(self.tokenizer, query, self.history, **arguments)
        response, failed = "", False
        try:
            for text in stream:
                if stop.is_set():  # what comes now may end in half a character
                    break
                response = text
                yield response
        except Exception:
            failed = True
            raise
        finally:
            stream.close()
            self.statistics = meter.statistics(self.model.device)
            if not failed and (response or not stop.is_set()):
                self.history = self.history.copy()  # with what the model keeps of the conversation
                self.history.append((query, response))

    def _reply_with_tools(
        self, query: str, stop: threading.Event, meter: Meter, arguments: dict[str, Any]
    ) -> Generator[str, None, None]:
        """The same with calls; the turn is part of the history once it is answered."""
        tools = [unless(stop, tool) for tool in self.tools]
        events = self.model.run_tools(self.tokenizer, query, tools, self.history, stream=True, **arguments)
        try:
            run = yield from texts_of(itertools.takewhile(lambda _: not stop.is_set(), events))
        except ToolLoopError as error:
            raise ValueError(f"There is no answer after {len(error.run.steps) + 1} replies with calls.") from error
        finally:
            events.close()
            self.statistics = meter.statistics(self.model.device)
        if run is not None:
            self.history = cast(ChatHistory, run.history)

    def restart(self, turns: list[tuple[str, str]] | None = None, system: str | None = None) -> None:
        """Go on from these turns, none by default, which the model reads anew; with another system message if given."""
        self.history = ChatHistory(turns or [])
        self.system = self.system if system is None else system


def _clean(text: str) -> str:
    """A text without bytes of the terminal that were none, and without halves of characters."""
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    except UnicodeEncodeError:
        return repair_surrogates(text)


def open_conversation(
    checkpoint: str,
    system: str,
    max_new_tokens: int | None = None,
    seed: int | None = None,
    bits: int | None = None,
    cpu_only: bool = False,
) -> Conversation:
    """Load a checkpoint, from a folder or the Hub.

    Args:
        bits: of the weights, 8 or 4, on the processor; None for those that the checkpoint has, on a GPU if any.

    Raises:
        ImportError, OSError, ValueError: no checkpoint, no package to load it with, or settings that can't be.
    """
    model, tokenizer = open_model(checkpoint, **in_bits(bits, cpu_only))
    given = {} if max_new_tokens is None else {"max_new_tokens": max_new_tokens}
    conversation = Conversation(model, tokenizer, system, Settings(model, given))
    conversation.seed = seed
    return conversation
