"""`benchmarks/memory.py`: the calculator beside what processes take, in small shapes."""

import json
import os
import re
import subprocess
import sys

import pytest


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="peaks are read from Linux's /proc")
def test_small_models_take_what_is_calculated(repository, tmp_path):
    results = tmp_path / "memory.json"
    done = subprocess.run(
        [sys.executable, repository / "benchmarks" / "memory.py", "measure", "--quick", "--results", results],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    ratios = re.findall(r"\*\*([0-9.]+)\*\*", done.stdout)
    assert len(ratios) == len(json.loads(results.read_text())["cases"]) == 3
    assert all(0.9 <= float(ratio) <= 1.1 for ratio in ratios), done.stdout
