"""What Ctrl-C does, for a while."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def on_ctrl_c(action: Callable[[], object]) -> Iterator[None]:
    """Let Ctrl-C call this instead of tearing up whatever runs at that moment; for the main thread."""
    before = signal.signal(signal.SIGINT, lambda *_: action())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
