"""A reply while it is written: tokens from a thread that generates, and the text of them so far."""

from __future__ import annotations

import atexit
import queue
import threading
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing
from types import SimpleNamespace
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from .qwen_generation_utils import TokensType, decode_text, find_end

_INCOMPLETE = "\ufffd"


class Stopped(StoppingCriteria):
    """Ends every row once a flag is set, which another thread does."""

    def __init__(self, flag: threading.Event):
        self.flag = flag

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """(B, length) -> (B,), true for all rows or for none."""
        return torch.full((len(input_ids),), self.flag.is_set(), dtype=torch.bool, device=input_ids.device)


class _TokenQueue(BaseStreamer):
    """Hands new tokens from the thread that generates to the one that reads; the prompt is left out."""

    def __init__(self) -> None:
        self.items: queue.SimpleQueue[TokensType | BaseException | None] = queue.SimpleQueue()
        self.prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        if self.prompt_seen:
            self.items.put(value.flatten().tolist())
        elif len(value) > 1:
            raise ValueError(f"A stream carries one reply, not {len(value)}: leave num_return_sequences at 1.")
        self.prompt_seen = True

    def end(self) -> None:
        """Nothing to do: the reader waits for the thread."""


_process = SimpleNamespace(ends=False)
"""Whether the interpreter is about to end; no lock, as dill would pickle it along with this code."""


class _StreamThread(threading.Thread):
    """Runs `generate` for a reader in another thread.

    A daemon, since the interpreter waits for all others before it tells anybody that it ends. But it can't stop one
    that is in the middle of torch, and would abort, so each is stopped and waited for at the exit.

    Attributes:
        tokens: what was generated, an error, and None behind the last. The error of a stream that was stopped at the
            exit ends the thread that reads it, without a message.
        stop: ends the generation after the step under way.
        finished: nothing more is generated.
    """

    def __init__(self, generate: Callable[..., Any]):
        super().__init__(name="qwen-chat-stream", daemon=True)
        self.tokens, self.stop, self.finished = _TokenQueue(), threading.Event(), threading.Event()
        self._generate = generate

    def run(self) -> None:
        try:
            if not _process.ends:
                self._generate(streamer=self.tokens, stopping_criteria=[Stopped(self.stop)])
            if _process.ends:
                raise SystemExit("The interpreter ends, and this stream with it: read or close it before.")
        except BaseException as error:  # handed to the reader, who raises it
            self.tokens.items.put(error)
        finally:
            del self._generate  # and with it the model
            self.tokens.items.put(None)
            self.finished.set()


@atexit.register
def _end_streams() -> None:
    """Stop every stream that is open, and wait for the steps under way."""
    _process.ends = True
    threads = [thread for thread in threading.enumerate() if isinstance(thread, _StreamThread)]
    for thread in threads:
        thread.stop.set()
    for thread in threads:
        thread.finished.wait()


def stream_tokens(generate: Callable[..., Any]) -> Generator[TokensType, None, None]:
    """Run `generate` in a thread of its own and yield the tokens of one conversation as they come.

    The thread ends with the generator: closing it stops the generation after the step under way, on a GPU after the one
    behind it, and waits for that. One that is open when the interpreter ends is closed then.

    Args:
        generate: called once with the keyword arguments `streamer` and `stopping_criteria`.

    Raises:
        Exception: whatever `generate` raised.
    """
    thread = _StreamThread(generate)
    thread.start()
    try:
        while (item := thread.tokens.items.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        thread.stop.set()
        if thread is not threading.current_thread():  # where the garbage collector happened to run
            thread.join()


def stream_text(
    chunks: Generator[TokensType, None, None],
    tokenizer: PreTrainedTokenizerBase,
    cut: Sequence[Sequence[int]],
    kept: Sequence[Sequence[int]] = (),
) -> Generator[str, None, None]:
    """The reply so far each time it has grown, from new tokens as they come; `chunks` is closed with it.

    Half a character is held back until the rest of its bytes is there, half a stop word that is cut off until it is
    none; the last text, of which each one before is the beginning, is that of `chat`. There is always one, if only an
    empty one.
    """
    reply: TokensType = []
    shown = ""
    end = None
    with closing(chunks):
        for chunk in chunks:
            searched = len(reply)
            reply += chunk
            end = find_end(reply, cut, kept, searched)
            if end is not None:
                break
            text = decode_text(tokenizer, reply[: len(reply) - _held_back(reply, cut)])
            text = text.rstrip(_INCOMPLETE).strip()
            if len(text) > len(shown):
                shown = text
                yield shown
    text = decode_text(tokenizer, reply[:end]).strip()
    if not shown or text != shown:
        yield text


def _held_back(reply: Sequence[int], stops: Iterable[Sequence[int]]) -> int:
    """Tokens at the end of `reply` that may turn out to be the beginning of a stop sequence."""
    longest = 0
    for stop in stops:
        for length in range(1, min(len(stop), len(reply) + 1)):
            if list(reply[-length:]) == list(stop[:length]):
                longest = max(longest, length)
    return longest


def stream_until(texts: Generator[str, None, None], stop: str) -> Generator[str, None, None]:
    """The reply so far as `stream_text` gives it, up to a text that ends it; `texts` is closed with it.

    The beginning of what may become that text is held back until it is clear that it doesn't.
    """
    text = shown = ""
    with closing(texts):
        for text in texts:
            if stop in text:
                break
            visible = text[: len(text) - _begun_length(text, stop)].rstrip()
            if len(visible) > len(shown):
                shown = visible
                yield shown
    text = text.partition(stop)[0].rstrip()
    if not shown or text != shown:
        yield text


def _begun_length(text: str, stop: str) -> int:
    """Characters at the end of `text` that may turn out to be the beginning of `stop`."""
    return next((length for length in range(len(stop) - 1, 0, -1) if text.endswith(stop[:length])), 0)
