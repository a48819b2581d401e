"""The part `serve` of `soak.py`: clients of `transformers serve` with continuous batching."""

from __future__ import annotations

import os
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import typer
from soaking import LENGTH, Findings, conversation, free_port, report, running, settled

DISTINCT = 400
"""Conversations that are different; clients ask them again and again."""


class Client:
    """Asks the server through the `openai` client, each in turn in another way."""

    def __init__(self, address: str, model: str):
        from openai import DefaultHttpxClient, OpenAI

        self._connection = DefaultHttpxClient(trust_env=False, timeout=300)
        self._client = OpenAI(base_url=f"{address}/v1", api_key="none", http_client=self._connection, max_retries=0)
        self._model = model

    def close(self) -> None:
        """End the connections."""
        self._connection.close()

    def ask(self, messages: list[dict[str, str]], stream: bool) -> Any:
        """A completion, or its chunks."""
        return self._client.chat.completions.create(
            model=self._model, messages=messages, temperature=0, max_tokens=LENGTH, stream=stream
        )

    def reply(self, messages: list[dict[str, str]], stream: bool) -> str:
        """The text of a reply."""
        if not stream:
            return self.ask(messages, stream=False).choices[0].message.content
        return "".join(chunk.choices[0].delta.content or "" for chunk in self.ask(messages, stream=True))

    def begun(self, messages: list[dict[str, str]], pieces: int) -> str:
        """What comes in the first chunks, behind which the connection is closed."""
        text = ""
        with self.ask(messages, stream=True) as chunks:
            for chunk, _ in zip(chunks, range(pieces), strict=False):
                text += chunk.choices[0].delta.content or ""
        return text


def twins(model: Any, tokenizer: Any, conversations: int) -> list[list[str]]:
    """The replies of `chat`, one conversation after the other."""
    found = []
    for number in range(conversations):
        history, replies = None, []
        for query in conversation(number):
            reply, history = model.chat(tokenizer, query, history, do_sample=False, max_new_tokens=LENGTH)
            replies.append(reply)
        found.append(replies)
    return found


def visit(client: Client, number: int, expected: list[str], system: str) -> tuple[list[str], list[str]]:
    """(what was expected, what came) of one conversation; every fourth is left in the middle of its second reply."""
    messages, given = [{"role": "system", "content": system}], []
    for turn, query in enumerate(conversation(number)):
        messages.append({"role": "user", "content": query})
        if number % 4 == 3 and turn:
            begun = client.begun(messages, pieces=3)
            return [*given, expected[turn][: len(begun)]], [*given, begun]
        given.append(client.reply(messages, stream=bool((number + turn) % 2)))
        messages.append({"role": "assistant", "content": given[-1]})
    return expected, given


def soak(server: int, address: str, folder: str, expected: list[list[str]], size: tuple[int, int, int]) -> Findings:
    """Ask from many clients at once, and compare.

    Args:
        server: its process.
        size: replies, clients, rounds.
    """
    from qwen1.qwen_generation_utils import DEFAULT_SYSTEM

    replies, clients, rounds = size
    found = Findings(f"serve, {clients} clients, continuous batching", warm=max(1, rounds // 5))
    part = -(-replies // (2 * rounds))

    def do(job: int) -> tuple[int, tuple[list[str], list[str]]]:
        number, client = job % len(expected), Client(address, folder)
        try:
            return number, visit(client, number, expected[number], DEFAULT_SYSTEM)
        finally:
            client.close()

    with ThreadPoolExecutor(clients) as pool:
        for start in range(0, rounds * part, part):
            for number, (wanted, given) in pool.map(do, range(start, start + part)):
                found.compare(f"conversation {number}", wanted, given)
                if number % 4 == 3:
                    found.abandoned, found.replies = found.abandoned + 1, found.replies - 1
            found.held.append(settled(server))
    return found


def command(
    model: Annotated[str | None, typer.Option(help="Folder of the model.", show_default="the one that ships")] = None,
    replies: Annotated[int, typer.Option(min=1, help="Replies that are compared, and streams that are left.")] = 2000,
    clients: Annotated[int, typer.Option(min=1, help="Clients at once.")] = 32,
    rounds: Annotated[int, typer.Option(min=2, help="Parts, after each of which memory is looked at.")] = 20,
) -> None:
    """Conversations, streamed and not, some left, over `transformers serve` with continuous batching, in float32."""
    import torch

    from qwen1.programs.models import open_model
    from qwen1.programs.shipped import TINY_CHAT

    folder = str(model or TINY_CHAT)
    opened = open_model(folder, dtype=torch.float32)
    expected = twins(*opened, min(DISTINCT, -(-replies // 2)))
    port = free_port()
    program = [str(Path(sys.executable).with_name("transformers")), "serve", folder, "--trust-remote-code"]
    batching = ["--continuous-batching", "--dtype", "float32", "--cb-num-blocks", "64", "--cb-max-batch-tokens", "256"]
    address = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryDirectory() as home:
        Path(home, "hub").mkdir()  # without which listing the models is an error
        environment = {**os.environ, "HF_HOME": home, "HF_HUB_OFFLINE": "1", "NO_PROXY": "127.0.0.1"}
        words = [*program, "--host", "127.0.0.1", "--port", str(port), *batching]
        with running(words, f"{address}/health", environment) as process:
            found = soak(process, address, folder, expected, (replies, clients, rounds))
    report(found)
