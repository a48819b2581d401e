"""Which kernels for a GPU are there: those that aren't are compiled in the background, and torch does without them.

Triton keeps what it has compiled, so that this happens once on a machine; a file in the user's cache says that it has.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from .recording_qwen import apart
from .translating_qwen import SWITCH, cache_folder

logger = logging.get_logger(__name__)

Key = tuple[Any, ...]
"""A kernel, and what it is compiled for."""

_ready: set[Key] = set()
_begun: set[Key] = set()
_ended: set[Key] = set()
_threads: list[threading.Thread] = []


def is_ready(*key: Any) -> bool:
    """Whether a kernel is there."""
    return key in _ready


def may_come(key: Key, *kernel: Any) -> bool:
    """Whether a kernel is there, or those that depend on `key` are still to be compiled."""
    return is_ready(*kernel) or key not in _ended


def begin(key: Key, device: torch.device, warm: Callable[[], Iterable[Key]]) -> None:
    """Have kernels compiled, once in a process: at once where they have been on this machine, else in the background.

    Args:
        key: what they depend on.
        warm: starts one kernel after another, and tells which.
    """
    if key in _begun:
        return
    _begun.add(key)
    mark = _mark(key, device)
    if mark is not None and mark.exists():
        _warm(key, warm, device, mark)
        return
    logger.warning(
        f"Compiling QWen's kernels for this GPU, once, in the background ({SWITCH}=0 in the environment does without)."
    )
    # No daemon: Python would end it inside of the compiler, and with it the whole process by SIGABRT.
    _threads.append(threading.Thread(target=_warm, args=(key, warm, device, mark), name="qwen1-kernels"))
    _threads[-1].start()


def wait() -> None:
    """Until all kernels are there whose compiling has begun."""
    for thread in list(_threads):
        thread.join()


def _mark(key: Key, device: torch.device) -> Path | None:
    """The file that says that these kernels have been compiled here; None where there can't be one."""
    source = Path(__file__).with_name("triton_qwen.py").read_text(encoding="utf-8")
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else "a processor"
    parts = repr((*key, card, version("triton"), torch.__version__, source))
    try:
        return cache_folder() / f"gpu-{hashlib.sha256(parts.encode()).hexdigest()[:32]}.compiled"
    except OSError as error:
        logger.info(f"It can't be noted that kernels for the GPU are compiled: {error}")
        return None


def _warm(key: Key, warm: Callable[[], Iterable[Key]], device: torch.device, mark: Path | None) -> None:
    try:
        with torch.no_grad(), _stream_of_its_own(device):
            for kernel in warm():
                if not threading.main_thread().is_alive():  # the process ends, and waits for this thread
                    return
                if device.type == "cuda":
                    torch.cuda.current_stream(device).synchronize()
                _ready.add(kernel)
        if mark is not None:
            mark.touch()
    except Exception as error:  # whatever it is, torch does without
        logger.warning(f"No kernels for the GPU, which torch does without: {type(error).__name__}: {error}")
    finally:
        _ended.add(key)


@contextmanager
def _stream_of_its_own(device: torch.device) -> Iterator[None]:
    """What is compiled is tried beside what the GPU is doing, and what others record of it."""
    if device.type != "cuda":
        yield
        return
    with torch.cuda.device(device), apart(), torch.cuda.stream(torch.cuda.Stream(device)):
        yield
