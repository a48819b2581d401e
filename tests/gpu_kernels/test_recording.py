"""What is recorded for a GPU, with a driver that notes what it is told; the real one is at work in `test_kernels`."""

import contextlib
import gc
import sys
import types

import pytest
import torch

from qwen1 import recording_qwen
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
        }.items():
            answer = (REFUSED, *[None for _ in results]) if name == refusing else (OK, *results)
            setattr(self, name, lambda *given, name=name, answer=answer: self.told.append((name, *given)) or answer)


class Stream:
    """A stream of a GPU that isn't there."""

    cuda_stream = 7

    def __init__(self, device=None):
        self.waited = []

    def wait_stream(self, other):
        self.waited.append(other)


@pytest.fixture
def recorded(monkeypatch):
    """Record a function with a driver: returns the recording, what the driver was told, how often the function ran."""

    def run(driver):
        ran = []
        for name, value in {
            "Stream": Stream,
            "current_stream": lambda device=None: Stream(),
            "stream": lambda stream: contextlib.nullcontext(),
            "is_current_stream_capturing": lambda: False,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
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
        ("cuGraphLaunch", "executable", 7),
        ("cuGraphLaunch", "executable", 7),
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


def test_a_replay_that_fails_says_so(recorded):
    recording, _ = recorded(Driver(refusing="cuGraphLaunch"))
    with pytest.raises(RuntimeError, match=REFUSED):
        recording.replay()


def test_without_the_bindings(monkeypatch, recorded):
    said = []
    monkeypatch.setattr(recording_qwen.logger, "warning_once", said.append)
    recording, ran = recorded(None)  # which is how Python notes that there is no such module
    assert recording is None and ran == [] and "cuda" in said[0]


def test_nothing_is_recorded_elsewhere():
    assert record(lambda: None, torch.device("cpu")) is None
