"""Replies as they are written, for pipes, single questions and simple terminals."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from ..programs.printing import printable


class PlainDisplay:
    """Prints replies to standard output while they grow, and errors to standard error."""

    def show(self, texts: Iterable[str]) -> None:
        """Print a reply from its texts, each of which begins with the one before."""
        shown = 0
        try:
            for text in texts:
                print(printable(text[shown:]), end="", flush=True)
                shown = len(text)
        finally:
            print(flush=True)

    def note(self, text: str) -> None:
        """Print what a command says."""
        if text:
            print(printable(text), flush=True)

    def error(self, text: str) -> None:
        """Print what went wrong."""
        print(f"qwen1-chat: {printable(text)}", file=sys.stderr, flush=True)
