"""Messages of a page, and the turns that they are for the model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from ..qwen_generation_utils import HistoryType
from ..tools_qwen import ANSWERED_WITHOUT_TOOLS

Message = dict[str, Any]
"""`{"role": "user" | "assistant", "content": [{"type": "text", "text": …}, …]}`, as Gradio has it; with `metadata` it
is a step on the way to an answer, whose text is what the model wrote in it and was told."""
WRITTEN, CALLED, DONE = "written", "called", "done"
"""What a step is: being written, a call that is being made, over."""


def message(role: str, text: str) -> Message:
    """A message; as a part, since Gradio takes the indentation out of content that is a bare text."""
    return {"role": role, "content": [{"type": "text", "text": text}]}


def step(text: str, state: str) -> Message:
    """A step."""
    return {**message("assistant", text), "metadata": {"status": state}}


def is_step(spoken: Message) -> bool:
    """Whether a message is one, of ours or as the page holds it."""
    return spoken["role"] == "assistant" and bool(spoken.get("metadata"))


def state_of(spoken: Message) -> str | None:
    """What a step is, None for other messages."""
    return spoken["metadata"].get("status") if is_step(spoken) else None


def text_of(message: Message) -> str:
    """The text of a message, whose parts are joined."""
    return "".join(part["text"] for part in message["content"] if part["type"] == "text")


def turns_of(messages: Iterable[Message], with_steps: bool = False) -> HistoryType:
    """The turns that have a reply; a question that was stopped before the first word of its answer has none.

    Args:
        messages: of the page.
        with_steps: whether what led to an answer stands before it, as `run_tools` writes it.
    """
    turns: HistoryType = []
    query, steps = None, list[str]()
    for spoken in messages:
        text = text_of(spoken)
        if spoken["role"] == "user":
            query, steps = text, []
        elif is_step(spoken):
            steps.append(text)
        elif query is not None and text:
            turns.append((query, _exchange(steps, text) if with_steps else text))
            query = None
    return turns


def _exchange(steps: Sequence[str], answer: str) -> str:
    return "\n".join([*steps, ANSWERED_WITHOUT_TOOLS.format(answer)]) if steps else answer


def cut_at_query(messages: list[Message]) -> tuple[list[Message], str | None]:
    """The messages before the last question, and that question, None where there is none."""
    for index in reversed(range(len(messages))):
        if messages[index]["role"] == "user":
            return messages[:index], text_of(messages[index])
    return [], None
