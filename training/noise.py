"""What libraries say and start that nobody who trains can do anything about, left out."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_ABOUT_CODE = (FutureWarning, DeprecationWarning, PendingDeprecationWarning)
"""What these say is for those who wrote the code: that names will change in releases to come."""

_UNASKED = (
    ("bitsandbytes.backends.cpu.ops", "Failed to load CPU gemm_4bit_forward"),  # whether or not 4 bits are wanted
    ("transformers.trainer_utils", "The tokenizer has new PAD/BOS/EOS tokens"),  # what is saved is set here, not there
    ("transformers.tokenization_utils_base", "Token indices sequence length is longer"),  # it is cut here
)
"""(logger, how what it says begins)."""


@contextmanager
def quiet() -> Iterator[None]:
    """Leave out warnings about the code, and what is said about packages that nobody asked for."""
    filters = [(logging.getLogger(name), _LeaveOut(text)) for name, text in _UNASKED]
    for logger, left_out in filters:
        logger.addFilter(left_out)
    try:
        with warnings.catch_warnings():
            for category in _ABOUT_CODE:
                warnings.simplefilter("ignore", category)
            yield
    finally:
        for logger, left_out in filters:
            logger.removeFilter(left_out)


class _LeaveOut(logging.Filter):
    """Lets all pass that doesn't begin with a text."""

    def __init__(self, beginning: str):
        super().__init__()
        self._beginning = beginning

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(self._beginning)


@contextmanager
def no_bars_of_files() -> Iterator[None]:
    """Leave out the bars of files that are written: in the middle of that of the training they tear it apart."""
    from transformers.utils import logging as transformers_logging

    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


@contextmanager
def no_monitor_of_bars() -> Iterator[None]:
    """Let tqdm's bars do without the thread that draws a bar anew which stands still.

    Python waits without end for a thread that finds no memory to begin with: a training would hang in place of saying
    that memory is short.
    """
    from tqdm import tqdm

    interval = tqdm.monitor_interval
    tqdm.monitor_interval = 0
    try:
        yield
    finally:
        tqdm.monitor_interval = interval
