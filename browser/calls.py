"""Calls of tools as a page shows them, read from the text of a step, which may be any text."""

from __future__ import annotations

import re

import gradio as gr

from ..tools_qwen import OBSERVATION
from .messages import DONE, Message, state_of, text_of
from .words import word

LONGEST_TITLE, LONGEST_SHOWN = 60, 4000
"""Characters of the arguments in a title, and of arguments and results below; the model reads them whole."""
_CALL = re.compile(r"^Action:(?P<name>.*?)(^Action Input:(?P<arguments>.*))?\Z", re.MULTILINE | re.DOTALL)


def described(step: Message, request: gr.Request | None) -> tuple[str, str]:
    """A step's title, and below it in Markdown the thought, the arguments and the result."""
    head, observed, result = text_of(step).partition(OBSERVATION)
    call = _CALL.search(head)
    thought = head[: call.start() if call else None].strip().removeprefix("Thought:").strip()
    name, arguments = ("", "") if call is None else (call["name"].strip(), (call["arguments"] or "").strip())
    parts = [thought] if thought else []
    if arguments not in ("", "{}"):
        parts.append(f"{word('arguments', request)}:\n\n{_code(arguments)}")
    if observed:
        parts.append(f"{word('result', request)}:\n\n{_code(result.strip())}")
    title = f"{name}({_cut(' '.join(arguments.split()), LONGEST_TITLE)})" if name else word("thinking", request)
    if observed and result.strip().startswith("Error:"):
        title += f": {word('failed', request)}"
    elif not observed and state_of(step) == DONE:
        title += f": {word('stopped', request)}"
    return title, "\n\n".join(parts)


def _code(text: str) -> str:
    """As Markdown's code, in which nothing means anything else."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}\n{_cut(text, LONGEST_SHOWN)}\n{fence}"


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[:length]} …"
