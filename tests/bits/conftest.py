"""Models in few bits: each way that `benchmarks/few_bits.py` knows, where its package is installed."""

import importlib.util
import logging
import sys
from pathlib import Path

import pytest
import torch

from qwen1 import QWenLMHeadModel

_PATH = Path(__file__).parents[2] / "benchmarks" / "few_bits.py"


def _read_ways():
    spec = importlib.util.spec_from_file_location("few_bits", _PATH)
    module = sys.modules["few_bits"] = importlib.util.module_from_spec(spec)  # its dataclass looks itself up there
    spec.loader.exec_module(module)
    return module


few_bits = _read_ways()


@pytest.fixture(autouse=True)
def quiet():
    """Bitsandbytes says at each product that it casts."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    yield
    logging.getLogger("bitsandbytes").setLevel(logging.NOTSET)


SLOW = {"quanto int4"}  # compiles its kernel at first


@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in few_bits.WAYS])
def way(request):
    found = few_bits.WAYS[request.param]
    if found.missing is not None:
        pytest.skip(found.missing)
    return found


@pytest.fixture
def whole(tiny_model, tmp_path):
    """A folder with a small model, every row of whose weights divides into groups of 64."""

    def save(**changes):
        tiny_model("sdpa", **{"n_embd": 128, "kv_channels": 32, "ffn_hidden_size": 256, **changes}).save_pretrained(
            tmp_path / "whole"
        )
        return tmp_path / "whole"

    return save


@pytest.fixture
def in_few_bits(way, whole, tmp_path):
    """Load a small model in few bits: (**configuration) -> model."""

    def load(**changes):
        folder = whole(**changes)
        return way.load(QWenLMHeadModel, folder, tmp_path / "work", dtype=torch.bfloat16, device_map="cpu")

    return load
