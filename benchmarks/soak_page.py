"""The part `page` of `soak.py`: visitors of the page in the browser, over the addresses that the page itself uses."""

from __future__ import annotations

import json
import os
import sys
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any

import typer
from soaking import LENGTH, Findings, conversation, free_port, report, running, settled

PROGRAM = "from qwen1_commands import browser; browser()"


class Visitor:
    """One who asks, reads, stops or leaves: what the page's own script sends, without a browser.

    Args:
        address: of the page.
        config: what the page tells the browser of itself, `/config`.
    """

    def __init__(self, address: str, config: dict[str, Any]):
        import httpx

        places = {part["props"].get("elem_id"): part["id"] for part in config["components"]}
        self._submit = places["submit"]
        click = [self._submit, "click"]
        events = [event for event in config["dependencies"] if click in event["targets"] and len(event["inputs"]) > 4]
        self._event = events[0]["id"]
        self._values = [
            next(part["props"].get("value") for part in config["components"] if part["id"] == place)
            for place in events[0]["inputs"]
        ]
        self._length = events[0]["inputs"].index(places["max_new_tokens"])
        self._sample = events[0]["inputs"].index(places["do_sample"])
        self._session = uuid.uuid4().hex[:11]
        self._http = httpx.Client(base_url=f"{address}{config['api_prefix']}", timeout=300, trust_env=False)
        self.messages: list[Any] = []

    def ask(self, query: str, leave_after: int | None = None, stop: bool = False) -> str:
        """The reply, as the page holds it in the end.

        Args:
            leave_after: close the connection behind so many parts of it; with `stop`, click Stop there.
        """
        from qwen1.browser.messages import text_of
        from qwen1.browser.rendering import behind

        data = [query, self.messages, None, *self._values[3:]]
        data[self._length], data[self._sample] = LENGTH, False
        asked = {"data": data, "fn_index": self._event, "trigger_id": self._submit, "session_hash": self._session}
        answer = self._http.post("/queue/join", json={**asked, "event_data": None})
        answer.raise_for_status()
        event, grown = answer.json()["event_id"], self.messages
        for count, messages in enumerate(self._grown()):
            grown = messages
            if leave_after is not None and count >= leave_after:
                if not stop:
                    break
                leave_after = None
                cancelled = {"session_hash": self._session, "fn_index": self._event, "event_id": event}
                self._http.post("/cancel", json=cancelled).raise_for_status()
        self.messages = grown
        return text_of(behind(grown[-1])) if grown and grown[-1]["role"] == "assistant" else ""

    def _grown(self) -> Iterator[list[Any]]:
        """The conversation each time the page would draw it."""
        from gradio_client.utils import apply_diff

        values: list[Any] = []
        with self._http.stream("GET", "/queue/data", params={"session_hash": self._session}) as lines:
            for line in lines.iter_lines():
                told = json.loads(line.removeprefix("data:")) if line.startswith("data:") else {}
                if told.get("msg") in ("unexpected_error",) or told.get("success") is False:
                    raise RuntimeError(f"the page says {told}")
                output = told.get("output") or {}
                if told.get("msg") == "process_generating":
                    new = output["data"]
                    values = [apply_diff(*pair) for pair in zip(values, new, strict=True)] if values else new
                    yield values[1]
                elif told.get("msg") == "process_completed":
                    return

    def close(self) -> None:
        """End the connection."""
        self._http.close()


def twins(model: Any, tokenizer: Any, number: int, turns: int) -> list[str]:
    """The replies of `chat`, one after the other."""
    history, replies = None, []
    for query in questions(number, turns):
        reply, history = model.chat(tokenizer, query, history, do_sample=False, max_new_tokens=LENGTH)
        replies.append(reply)
    return replies


def questions(number: int, turns: int) -> list[str]:
    """What a visitor asks."""
    return [query for part in range(-(-turns // 2)) for query in conversation(1000 * part + number)][:turns]


def visit(address: str, config: dict[str, Any], number: int, expected: list[str]) -> tuple[list[str], list[str], int]:
    """(what was expected, what came, replies that were stopped or left) of one visitor, who comes anew each time."""
    visitor, given, wanted, left = Visitor(address, config), [], [], 0
    for turn, query in enumerate(questions(number, len(expected))):
        is_last = turn == len(expected) - 1
        if is_last and number % 5 > 2:  # of five visitors one stops the last reply, and one leaves during it
            given.append(visitor.ask(query, leave_after=2, stop=number % 5 == 3))
            wanted.append(expected[turn][: len(given[-1])])
            left += 1
        else:
            given.append(visitor.ask(query))
            wanted.append(expected[turn])
    visitor.close()
    return wanted, given, left


def command(
    model: Annotated[str | None, typer.Option(help="Folder of the model.", show_default="the one that ships")] = None,
    visitors: Annotated[int, typer.Option(min=1, help="Visitors at once.")] = 50,
    turns: Annotated[int, typer.Option(min=1, help="Questions of a visitor.")] = 4,
    rounds: Annotated[int, typer.Option(min=2, help="How often all of them come; then memory is looked at.")] = 10,
    writing: Annotated[int, typer.Option(min=1, help="Replies that the page writes at a time.")] = 4,
) -> None:
    """Visitors of `qwen1-browser`: conversations, some stopped, some left, each with the page's own requests."""
    import httpx
    import torch

    from qwen1.native_qwen import wait
    from qwen1.programs.models import open_model
    from qwen1.programs.shipped import TINY_CHAT

    wait()
    torch.set_num_threads(1)
    folder = str(model or TINY_CHAT)
    opened = open_model(folder)
    expected = [twins(*opened, number, turns) for number in range(visitors)]
    found = Findings(f"page, {visitors} visitors", warm=max(1, rounds // 5))
    port = free_port()
    words = [folder, "--cpu-only", "--server-port", str(port), "--queue-size", str(visitors)]
    address = f"http://127.0.0.1:{port}"
    limits = ["--concurrency-limit", str(writing)]
    with running([sys.executable, "-c", PROGRAM, *words, *limits], address, dict(os.environ)) as process:
        config = httpx.get(f"{address}/config", trust_env=False).json()
        with ThreadPoolExecutor(visitors) as pool:
            for _ in range(rounds):
                came = pool.map(lambda number: visit(address, config, number, expected[number]), range(visitors))
                for number, (wanted, given, left) in enumerate(came):
                    found.compare(f"visitor {number}", wanted, given)
                    found.abandoned, found.replies = found.abandoned + left, found.replies - left
                found.held.append(settled(process))
    report(found)
