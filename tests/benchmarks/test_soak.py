"""`benchmarks/soak.py` with few replies: each as without the others, nothing left behind."""

import importlib.util
import os
import re
import subprocess
import sys

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="what a process holds is read from Linux's /proc"),
]
NEEDED = {"chat": (), "serve": ("fastapi", "openai", "uvicorn"), "page": ("gradio", "httpx")}
FEW = {
    "chat": ["--replies", "64", "--threads", "8", "--rounds", "2"],
    "serve": ["--replies", "32", "--clients", "8", "--rounds", "2"],
    "page": ["--visitors", "5", "--turns", "2", "--rounds", "2"],
}


@pytest.mark.parametrize("part", FEW)
def test_replies_are_those_of_a_quiet_machine(repository, part):
    for module in NEEDED[part]:
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"soak.py {part} needs {module}: pip install '.[test]'")
    done = subprocess.run(
        [sys.executable, repository / "benchmarks" / "soak.py", part, *FEW[part]],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    found = re.search(r"(\d+) of (\d+) replies equal to their twins, (\d+) streams abandoned", done.stdout)
    assert found, done.stderr[-2000:]
    assert found[1] == found[2] and int(found[2]) >= 14 and int(found[3]) >= 2, done.stdout
    # Two rounds are too few to tell growth from warming up, which the long mode does.
