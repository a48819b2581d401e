"""The part `chat` of `soak.py`: threads that share one model."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any

import typer
from soaking import LENGTH, Findings, Held, conversation, report

GREEDY = {"do_sample": False, "max_new_tokens": LENGTH}
ROWS = 4
"""Conversations of a batch."""

Job = Callable[[Any, Any, int], list[str]]


def chat(model: Any, tokenizer: Any, number: int) -> list[str]:
    """Two turns, of which the second takes up the keys and values of the first."""
    history, replies = None, []
    for query in conversation(number):
        reply, history = model.chat(tokenizer, query, history, **GREEDY)
        replies.append(reply)
    return replies


def stream(model: Any, tokenizer: Any, number: int) -> list[str]:
    """A stream that is read to its end."""
    return [list(model.chat_stream(tokenizer, conversation(number)[0], **GREEDY))[-1]]


def abandoned(model: Any, tokenizer: Any, number: int) -> list[str]:
    """A stream that is left after its first words; what came until then."""
    texts = model.chat_stream(tokenizer, conversation(number)[0], **GREEDY)
    begun = [text for text, _ in zip(texts, range(1 + number % 4), strict=False)]
    texts.close()
    return begun[-1:]


def batch(model: Any, tokenizer: Any, number: int) -> list[str]:
    """Several conversations in one batch."""
    queries = [conversation(number + row)[row % 2] for row in range(ROWS)]
    return model.batch_chat(tokenizer, queries, **GREEDY)[0]


def sampled(model: Any, tokenizer: Any, number: int) -> list[str]:
    """A reply that is drawn with a seed, at a temperature at which hardly two are the same."""
    drawn = {"do_sample": True, "temperature": 1.5, "top_p": 0.95, "seed": number, "max_new_tokens": LENGTH}
    return [model.chat(tokenizer, conversation(number)[0], **drawn)[0]]


JOBS: tuple[Job, ...] = (chat, stream, abandoned, batch, sampled)
PER_CYCLE = 8
"""Replies of one job of each kind, without the one that is abandoned."""


def do(model: Any, tokenizer: Any, number: int) -> list[str]:
    """The job of a number."""
    return JOBS[number % len(JOBS)](model, tokenizer, number)


def soak(model: Any, tokenizer: Any, replies: int, threads: int, rounds: int) -> Findings:
    """Do all jobs one after the other, then again by threads at once, and compare.

    Args:
        rounds: parts, after each of which nothing is under way and what the process holds is looked at.
    """
    jobs = range(-(-replies // PER_CYCLE) * len(JOBS))
    expected = [do(model, tokenizer, number) for number in jobs]
    found = Findings(f"chat, {threads} threads", warm=max(1, rounds // 5))
    size = -(-len(jobs) // rounds)
    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(jobs), size):
            part = jobs[start : start + size]
            for number, given in zip(part, pool.map(lambda n: do(model, tokenizer, n), part), strict=True):
                asked = f"{JOBS[number % len(JOBS)].__name__} {number}"
                found.compare(asked, expected[number], given)
                if JOBS[number % len(JOBS)] is abandoned:
                    found.abandoned, found.replies = found.abandoned + 1, found.replies - len(given)
            gc.collect()
            found.held.append(Held.by(os.getpid()))
    return found


def command(
    model: Annotated[str | None, typer.Option(help="Folder of the model.", show_default="the one that ships")] = None,
    replies: Annotated[int, typer.Option(min=1, help="Replies that are compared.")] = 2000,
    threads: Annotated[int, typer.Option(min=1, help="Threads that ask at once.")] = 8,
    rounds: Annotated[int, typer.Option(min=2, help="Parts, after each of which memory is looked at.")] = 20,
) -> None:
    """Chats, streams, batches and seeds, by threads that share one model."""
    import torch

    from qwen1.native_qwen import wait
    from qwen1.programs.models import open_model
    from qwen1.programs.shipped import TINY_CHAT

    torch.set_num_threads(1)  # of each of our threads
    wait()  # for the kernels, so that all replies are computed by them
    report(soak(*open_model(model or TINY_CHAT), replies, threads, rounds))
