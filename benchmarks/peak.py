"""What the processor multiplies and adds at best, apart from any library: a program that does nothing else.

torch's own product is no limit: in float32 it leaves half of some processors unused.
"""

from __future__ import annotations

import functools
import shutil
import subprocess
import tempfile
from functools import partial
from pathlib import Path

import torch
from measuring import seconds_of
from torch import nn

_TEXT = r"""
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <omp.h>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#ifdef __AVX512F__
const int LANES = 16, SUMS = 24;
#elif defined(__AVX2__)
const int LANES = 8, SUMS = 12;
#else
const int LANES = 4, SUMS = 12;
#endif
typedef float vec __attribute__((vector_size(4 * LANES)));
const long ROUNDS = 4000000;

template <bool HALF> double rate(int threads, double &sum) {
    const auto start = std::chrono::steady_clock::now();
    #pragma omp parallel num_threads(threads) reduction(+ : sum)
    {
        vec sums[SUMS], a = vec{} + 1e-3f * threads, b = a;
        for (int n = 0; n < SUMS; n++) sums[n] = vec{} + (float)n;
        for (long round = 0; round < ROUNDS; round++) {
            #pragma GCC unroll 24
            for (int n = 0; n < SUMS; n++) {
#ifdef __AVX512BF16__
                if (HALF)
                    sums[n] = (vec)_mm512_dpbf16_ps((__m512)sums[n], (__m512bh)a, (__m512bh)b);
                else
#endif
                    sums[n] = sums[n] * a + b;
            }
            asm volatile("" : "+v"(a), "+v"(b));  // which may have changed, so that none of it is left out
        }
        for (int n = 0; n < SUMS; n++) sum += sums[n][0];
    }
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    return (HALF ? 4.0 : 2.0) * LANES * SUMS * ROUNDS * threads / seconds.count();
}

int main(int, char **words) {
    const int threads = std::atoi(words[1]);
    double best = 0, sum = 0;
    for (int turn = 0; turn < 5; turn++)
        best = std::max(best, std::atoi(words[2]) ? rate<true>(threads, sum) : rate<false>(threads, sum));
    std::printf("%.6e %.1f\n", best, sum);
}
"""


@functools.lru_cache
def peak_rate(dtype: torch.dtype) -> float:
    """Multiplications and additions per second of all threads with numbers that registers hold, the best of five; 0
    where there is no compiler for x86-64. In bfloat16 those of its own instructions, or else of float32.
    """
    compiler = next(filter(None, map(shutil.which, ("g++", "clang++"))), None)
    if compiler is None:
        return 0.0
    with tempfile.TemporaryDirectory() as folder:
        source, program = Path(folder) / "peak.cpp", Path(folder) / "peak"
        source.write_text(_TEXT)
        flags = ["-std=c++17", "-O3", "-march=native", "-fopenmp", "-ffp-contract=fast"]
        made = subprocess.run([compiler, *flags, "-dM", "-E", source], capture_output=True, text=True, check=True)
        if "__x86_64__" not in made.stdout:
            return 0.0
        half = dtype == torch.bfloat16 and "__AVX512BF16__" in made.stdout
        subprocess.run([compiler, *flags, source, "-o", program], check=True, capture_output=True)
        words = [program, str(torch.get_num_threads()), str(int(half))]
        return float(subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()[0])


def matrix_rate(dtype: torch.dtype, rows: int, width: int) -> float:
    """Multiplications and additions per second at best: what registers give, or torch's product of these sizes, where a
    processor has instructions for whole matrices; the best of twenty.
    """
    left, right = torch.ones((rows, width), dtype=dtype), torch.ones((4 * width, width), dtype=dtype)
    seconds = min(seconds_of(partial(nn.functional.linear, left, right)) for _ in range(20))
    return max(peak_rate(dtype), 2 * rows * width * 4 * width / seconds)
