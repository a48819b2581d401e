"""What is recorded for a GPU, with a driver that notes what it is told; the real one is at work in `test_kernels`."""

import contextlib
import functools
import gc
import sys
import threading
import types

import pytest
import torch

from qwen1 import recording_qwen, warming_qwen
from qwen1.recording_qwen import record

OK, REFUSED = "CUDA_SUCCESS", "CUDA_ERROR_NOT_SUPPORTED"


class Driver(types.ModuleType):
    """NVIDIA's bindings: every function returns an error first. One of them may refuse."""

    CUresult = types.SimpleNamespace(CUDA_SUCCESS=OK)
    CUstreamCaptureMode = types.SimpleNamespace(CU_STREAM_CAPTURE_MODE_THREAD_LOCAL="thread")

    def __init__(self, refusing=""):
        super().__init__("driver")
        self.told = []
        for name, results in {
            "cuStreamBeginCapture": (),
            "cuStreamEndCapture": ("graph",),
            "cuGraphInstantiate": ("executable",),
            "cuGraphDestroy": (),
            "cuGraphLaunch": (),
            "cuGraphExecDestroy": (),
            "cuThreadExchangeStreamCaptureMode": ("global",),
        }.items():
            answer = (REFUSED, *[None for _ in results]) if name == refusing else (OK, *results)
            setattr(self, name, lambda *given, name=name, answer=answer: self.told.append((name, *given)) or answer)


class Stream:
    """A stream of a GPU that isn't there."""

    def __init__(self, device=None, number=7):
        self.cuda_stream, self.waited = number, []

    def wait_stream(self, other):
        self.waited.append(other)


class GPU:
    """What torch does on one that isn't there: the current stream, those made beside it, memory, what is at work."""

    def __init__(self):
        self.current, self.made, self.pools, self.inside = Stream(number=1), [], 0, []
        self.allocator = "native"

    def stream(self, device):
        self.made.append(Stream(number=7 + len(self.made)))
        return self.made[-1]

    def pool(self):
        self.pools += 1
        return f"pool {self.pools}"

    @contextlib.contextmanager
    def within(self, what, device=None):
        self.inside.append(what)
        yield
        self.inside.remove(what)


@pytest.fixture
def gpu(monkeypatch):
    made = GPU()
    for name, value in {
        "Stream": made.stream,
        "current_stream": lambda device=None: made.current,
        "stream": made.within,
        "device": made.within,
        "MemPool": made.pool,
        "use_mem_pool": made.within,
        "get_allocator_backend": lambda: made.allocator,
        "is_current_stream_capturing": lambda: False,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(recording_qwen, "_beside", functools.cache(recording_qwen._beside.__wrapped__))
    return made


@pytest.fixture
def recorded(monkeypatch, gpu):
    """Record a function with a driver: returns the recording, what the driver was told, how often the function ran."""

    def run(driver):
        ran = []
        monkeypatch.setitem(sys.modules, "cuda.bindings.driver", driver)
        found = record(lambda: ran.append(len(driver.told) if driver else 0), torch.device("cuda"))
        return found, ran

    return run


def test_recorded_started_and_given_up(recorded):
    driver = Driver()
    recording, ran = recorded(driver)
    assert ran == [0, 1]  # once for its own sake, once while the driver records
    recording.replay()
    recording.replay()
    del recording
    gc.collect()
    assert driver.told == [
        ("cuStreamBeginCapture", 7, "thread"),
        ("cuStreamEndCapture", 7),
        ("cuGraphInstantiate", "graph", 0),
        ("cuGraphDestroy", "graph"),
        ("cuGraphLaunch", "executable", 1),
        ("cuGraphLaunch", "executable", 1),
        ("cuGraphExecDestroy", "executable"),
    ]


@pytest.mark.parametrize("function", ["cuStreamBeginCapture", "cuStreamEndCapture", "cuGraphInstantiate"])
def test_a_driver_that_refuses_is_done_without(monkeypatch, recorded, function):
    said = []
    monkeypatch.setattr(recording_qwen.logger, "warning_once", said.append)
    driver = Driver(refusing=function)
    recording, _ = recorded(driver)
    assert recording is None and len(said) == 1 and REFUSED in said[0] and "QWEN_NATIVE=0" in said[0]
    begun = sum(name == "cuStreamBeginCapture" for name, *_ in driver.told)
    ended = sum(name == "cuStreamEndCapture" for name, *_ in driver.told)
    assert ended == (begun if function != "cuStreamBeginCapture" else 0)


@pytest.mark.parametrize("function", ["", "cuStreamBeginCapture", "cuStreamEndCapture", "cuGraphInstantiate"])
def test_what_was_started_beside_is_waited_for(gpu, recorded, function):
    """Also where the driver refuses: it writes over what the current stream goes on with."""
    recorded(Driver(refusing=function))
    (stream,) = gpu.made
    assert stream.waited == [gpu.current] and gpu.current.waited == [stream]


def test_recordings_beside_a_stream_share_one_and_its_memory(gpu, recorded):
    """Torch keeps 32 MB for products on each stream on which there was one, as large as the cards are now."""
    for _ in range(3):
        recorded(Driver())
    assert (len(gpu.made), gpu.pools) == (1, 1)
    gpu.current = Stream(number=2)
    recorded(Driver())
    assert (len(gpu.made), gpu.pools) == (2, 2), "what runs at once may not write into the same memory"


def test_what_products_need_beside_their_results_is_kept(monkeypatch, gpu):
    """Recordings go on writing there, while torch gives it to others, or back."""
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", Driver())
    found = []
    record(lambda: found.append(list(gpu.inside)), torch.device("cuda"))
    assert ["pool 1" in inside and gpu.made[0] in inside for inside in found] == [True, True]


@pytest.mark.parametrize("allocator", ["cudaMallocAsync", "pluggable"])
def test_allocators_that_know_no_pools(monkeypatch, gpu, recorded, allocator):
    gpu.allocator = allocator
    monkeypatch.setattr(torch.cuda, "MemPool", lambda: pytest.fail("it has none"))
    recording, ran = recorded(Driver())
    assert recording is not None and len(ran) == 2


def test_one_recording_at_a_time(monkeypatch, gpu):
    """What another thread starts on a stream that is recorded would be recorded too."""
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", Driver())
    at_once, most = [], []

    def run():
        at_once.append(1)
        most.append(len(at_once))
        threading.Event().wait(0.05)
        at_once.pop()

    threads = [threading.Thread(target=record, args=(run, torch.device("cuda"))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1, 1, 1, 1]


def test_a_replay_that_fails_says_so(recorded):
    recording, _ = recorded(Driver(refusing="cuGraphLaunch"))
    with pytest.raises(RuntimeError, match=REFUSED):
        recording.replay()


@pytest.mark.parametrize("driver", [Driver(), None], ids=["with bindings", "without"])
def test_compiling_does_not_end_what_another_thread_records(monkeypatch, gpu, driver):
    """By default it would: no thread may wait for the GPU, nor take memory from it, while another one records."""
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", driver)
    monkeypatch.setattr(warming_qwen, "_begun", set())
    monkeypatch.setattr(warming_qwen, "_mark", lambda key, device: None)
    gpu.current.synchronize, told = lambda: None, []

    def warm():
        told.extend(driver.told if driver else [])
        yield "apart", driver is None

    warming_qwen.begin(("apart", driver is None), torch.device("cuda"), warm)
    warming_qwen.wait()
    assert warming_qwen.is_ready("apart", driver is None)
    if driver:
        assert told == [("cuThreadExchangeStreamCaptureMode", "thread")]
        assert driver.told[1:] == [("cuThreadExchangeStreamCaptureMode", "global")]


def test_without_the_bindings(monkeypatch, recorded):
    said = []
    monkeypatch.setattr(recording_qwen.logger, "warning_once", said.append)
    recording, ran = recorded(None)  # which is how Python notes that there is no such module
    assert recording is None and ran == [] and "cuda" in said[0]


def test_nothing_is_recorded_elsewhere():
    assert record(lambda: None, torch.device("cpu")) is None
