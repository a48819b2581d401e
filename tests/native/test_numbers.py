"""Numbers of half precision, as torch reads and rounds them: each, and what lies between, on every processor."""

import ctypes
import platform
import shutil
import subprocess

import pytest
import torch

from qwen1.native_vectors_qwen import VECTORS

COMPILER = shutil.which("g++") or shutil.which("clang++")
PROCESSORS = {
    "this one": ["-march=native"],
    "AVX2": ["-march=haswell"],
    "AVX2 without conversions": ["-march=haswell", "-mno-f16c"],
    "none": ["-march=x86-64"],
}
LOOPS = """
extern "C" void read_NAME(const TYPE *x, float *y, int64_t n) { for (int64_t i = 0; i < n; i++) y[i] = up(x[i]); }
extern "C" void round_NAME(const float *x, TYPE *y, int64_t n) { for (int64_t i = 0; i < n; i++) put(y + i, x[i]); }
extern "C" void reads_NAME(const TYPE *x, float *y, int64_t n) {
    for (int64_t i = 0; i < n; i += LANES) store(y + i, load(x + i));
}
extern "C" void rounds_NAME(const float *x, TYPE *y, int64_t n) {
    for (int64_t i = 0; i < n; i += LANES) store(y + i, load(x + i));
}
"""


def has_avx2():
    return torch.backends.cpu.get_cpu_capability().startswith("AVX")


@pytest.fixture(params=PROCESSORS)
def compiled(request, tmp_path):
    if COMPILER is None:
        pytest.skip("needs g++ or clang++ on Linux")
    if request.param != "this one" and platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("needs an x86-64")
    if "haswell" in PROCESSORS[request.param][0] and not has_avx2():
        pytest.skip("needs AVX2")
    text = VECTORS + LOOPS.replace("NAME", "bf16").replace("TYPE", "bf16")
    text += LOOPS.replace("NAME", "f16").replace("TYPE", "f16")
    (tmp_path / "numbers.cpp").write_text(text)
    flags = ["-std=c++17", "-O3", *PROCESSORS[request.param], "-fopenmp", "-shared", "-fPIC", "-Wno-psabi"]
    subprocess.run([COMPILER, *flags, "-o", tmp_path / "numbers.so", tmp_path / "numbers.cpp"], check=True)
    return ctypes.CDLL(str(tmp_path / "numbers.so"))


def called(function, given, dtype):
    result = torch.empty(given.shape, dtype=dtype)
    function(ctypes.c_void_p(given.data_ptr()), ctypes.c_void_p(result.data_ptr()), ctypes.c_int64(len(given)))
    return result


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_every_number_and_what_lies_between(compiled, name, dtype):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    wide = every.float()
    between = ((wide[:-1].double() + wide[1:].double()) / 2).float()
    beside = [torch.nextafter(between, torch.tensor(end)) for end in (torch.inf, -torch.inf)]
    bits = torch.randint(-(2**31), 2**31, (2**20,), generator=torch.Generator().manual_seed(0), dtype=torch.int64)
    floats = torch.cat([wide, between, *beside, bits.int().view(torch.float32)])
    floats = floats[: len(floats) // 16 * 16]
    for way in ("read", "reads"):
        found = called(getattr(compiled, f"{way}_{name}"), every, torch.float32)
        assert torch.equal(found.nan_to_num(nan=-1.5), wide.nan_to_num(nan=-1.5))
    for way in ("round", "rounds"):
        found = called(getattr(compiled, f"{way}_{name}"), floats, dtype)
        expected = floats.to(dtype)
        assert torch.equal(found.isnan(), expected.isnan())
        assert torch.equal(found[~found.isnan()], expected[~expected.isnan()])
