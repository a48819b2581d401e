"""Work for a GPU that is recorded once and started as a whole: CUDA graphs, by NVIDIA's own bindings.

Torch's recorder also seizes the generator of random numbers, so that other threads can't sample meanwhile.
"""

from __future__ import annotations

import functools
import importlib
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.util import find_spec
from typing import Any

import torch
from transformers.utils import logging

logger = logging.get_logger(__name__)

_DRIVER = "cuda.bindings.driver"


class Recording:
    """A graph that can be started again; it holds nothing of the memory that it reads and writes."""

    def __init__(self, driver: Any, graph: Any, device: torch.device):
        self._driver, self._device = driver, device
        self._graph = _done(driver, driver.cuGraphInstantiate(graph, 0))

    def replay(self) -> None:
        """Start it on the current stream."""
        stream = torch.cuda.current_stream(self._device).cuda_stream
        _done(self._driver, self._driver.cuGraphLaunch(self._graph, stream))

    def __del__(self) -> None:
        if hasattr(self, "_graph"):
            self._driver.cuGraphExecDestroy(self._graph)


def is_recorded(device: torch.device) -> bool:
    """Whether what is started now is being recorded, by whomever."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def can_record(device: torch.device) -> bool:
    """Whether there is what it takes; on a processor nothing is recorded, for nothing is gained."""
    if device.type != "cuda":
        return device.type == "cpu"
    try:
        return find_spec(_DRIVER) is not None
    except ModuleNotFoundError:  # nor the package that it would be in
        return False


def record(run: Callable[[], None], device: torch.device) -> Recording | None:
    """Record what a function starts on a GPU, of which nothing may allocate memory or wait; None where that can't be.

    The function is also run for its own sake, so that all that it needs is there when it is recorded.
    """
    if device.type != "cuda" or is_recorded(device):
        return None
    try:
        driver = importlib.import_module(_DRIVER)
        return _recorded(run, device, driver)
    except (ImportError, RuntimeError) as error:  # slower, and as right
        logger.warning_once(f"Steps on the GPU aren't recorded, but started one by one: {error}")
        return None


@contextmanager
def apart() -> Iterator[None]:
    """Let this thread take memory and wait for the GPU while another one records, which else ends what it records."""
    try:
        driver: Any = importlib.import_module(_DRIVER)
    except ImportError:
        yield
        return
    mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
    before = _done(driver, driver.cuThreadExchangeStreamCaptureMode(mode))
    try:
        yield
    finally:
        driver.cuThreadExchangeStreamCaptureMode(before)


def _recorded(run: Callable[[], None], device: torch.device, driver: Any) -> Recording:
    current = torch.cuda.current_stream(device)
    stream, memory, alone = _beside(device, current.cuda_stream)
    with alone:
        stream.wait_stream(current)
        try:
            with torch.cuda.stream(stream), memory():
                run()
                graph = _captured(run, stream, driver)
        finally:
            current.wait_stream(stream)  # whatever was refused: `run` writes over what is read next
    try:
        return Recording(driver, graph, device)
    finally:
        driver.cuGraphDestroy(graph)


@functools.cache
def _beside(
    device: torch.device, current: int
) -> tuple[Any, Callable[[], AbstractContextManager[object]], threading.Lock]:
    """The stream on which is recorded what the current one will start; memory that recordings keep, to be entered; and
    what is held meanwhile, for what another thread starts on that stream would be recorded too.

    There products put what they need beside their results: some releases of torch take it for each product, others
    for each stream, 32 MB on the larger cards, and give it back while recordings still write to it.
    """
    with torch.cuda.device(device):
        stream = torch.cuda.Stream(device)
        if torch.cuda.get_allocator_backend() != "native":  # others know no pools, and CUDA's records what it takes
            return stream, nullcontext, threading.Lock()
        memory = functools.partial(torch.cuda.use_mem_pool, torch.cuda.MemPool(), device)
        return stream, memory, threading.Lock()


def _captured(run: Callable[[], None], stream: Any, driver: Any) -> Any:
    mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
    _done(driver, driver.cuStreamBeginCapture(stream.cuda_stream, mode))
    try:
        run()
    finally:
        ended = driver.cuStreamEndCapture(stream.cuda_stream)
    return _done(driver, ended)


def _done(driver: Any, answer: tuple[Any, ...]) -> Any:
    """The result of a call of the driver.

    Raises:
        RuntimeError: it failed, which says how.
    """
    error, *results = answer
    if error != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"the driver answers {error!r}. QWEN_NATIVE=0 in the environment does without.")
    return results[0] if results else None
