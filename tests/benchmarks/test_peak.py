"""`benchmarks/peak.py`: the limit of a processor's products, measured apart from any library."""

import platform
import runpy
import shutil

import pytest
import torch
from torch import nn


@pytest.fixture
def peak(repository, monkeypatch):
    monkeypatch.syspath_prepend(repository / "benchmarks")
    return runpy.run_path(str(repository / "benchmarks" / "peak.py"))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None or platform.machine() != "x86_64", reason="needs g++ on x86-64")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_product_is_faster(peak, dtype):
    """Measured in turn, for other tests run beside; with AMX torch's products in bfloat16 are."""
    if dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported():
        pytest.skip("AMX has instructions for whole matrices")
    left, right = torch.ones((512, 512), dtype=dtype), torch.ones((2048, 512), dtype=dtype)
    rates = []
    for _ in range(3):
        seconds = min(peak["seconds_of"](lambda: nn.functional.linear(left, right)) for _ in range(5))
        peak["peak_rate"].cache_clear()
        rates.append((peak["peak_rate"](dtype), 2 * left.numel() * len(right) / seconds))
    assert max(ours for ours, _ in rates) > min(others for _, others in rates) > 0


def test_without_a_compiler_torchs_product_is_all_there_is(peak, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert peak["peak_rate"](torch.float32) == 0 and peak["matrix_rate"](torch.float32, 16, 64) > 0
