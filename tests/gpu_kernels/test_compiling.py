"""The kernels for a GPU through Triton's own compiler and NVIDIA's assembler, for cards that aren't there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

KERNELS = {"attend_parts", "gate_states", "merge_parts", "multiply", "multiply_gated", "norm_rows", "turn_heads"}
REGISTERS = 168
"""That a thread may take: with eight warps of a program, one program and a half is at once on a multiprocessor."""


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 120])
def test_all_kernels_compile_and_keep_their_numbers_in_registers(capability, tmp_path):
    pytest.importorskip("triton", reason="needs Triton, which there is for Linux alone")
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    program = Path(__file__).with_name("compile_for.py")
    run = subprocess.run(
        [sys.executable, program, str(capability)],
        env=kept | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert {one["kernel"] for one in found} == KERNELS
    assert {one["shape"] for one in found} == {"7B", "odd"} and len({one["dtype"] for one in found}) == 3
    published = [one for one in found if one["shape"] == "7B"]
    assert not [one for one in published if one["spilt_stores"] or one["spilt_loads"] or one["registers"] > REGISTERS]
