"""What goes to standard output: text of others, made safe for a terminal, and what becomes of a pipe nobody reads."""

from __future__ import annotations

import os
import signal
import unicodedata
from typing import NoReturn

_OVERRIDES = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")


def printable(text: str) -> str:
    """The text without what could drive the terminal: control characters and changes of the writing direction."""
    return "".join("\N{REPLACEMENT CHARACTER}" if _drives_terminal(c) else c for c in text)


def _drives_terminal(character: str) -> bool:
    if character in "\n\t":
        return False
    return unicodedata.category(character) in ("Cc", "Cs") or unicodedata.bidirectional(character) in _OVERRIDES


def end_with_reader() -> NoReturn:
    """End the process without a word, as the system does where the reader of a pipe has gone, after BrokenPipeError."""
    if hasattr(signal, "SIGPIPE"):  # not on Windows
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        signal.raise_signal(signal.SIGPIPE)
    os._exit(1)
