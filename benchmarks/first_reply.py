"""Time from the start of the installed command `qwen1-chat` to the first characters of the reply.

    python benchmarks/first_reply.py [--rounds 10]

The other side of the ratio is what no such program can avoid: a Python that imports torch and transformers' Auto
classes.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import transformers

IMPORTS = "import torch\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\nprint('done', flush=True)"
COMMAND = [str(Path(sys.executable).with_name("qwen1-chat")), "你好"]


def first_output(command: list[str]) -> float:
    """Seconds from the start of a program to its first byte on standard output."""
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        if process.stdout is None or not process.stdout.read(1):
            raise SystemExit(f"{command} printed nothing.")
        seconds = time.perf_counter() - start
        process.stdout.read()
    return seconds


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    rounds = parser.parse_args().rounds
    pairs = [(first_output(COMMAND), first_output([sys.executable, "-c", IMPORTS])) for _ in range(rounds)]
    ours, imports = (sorted(side) for side in zip(*pairs, strict=True))
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"{platform.machine()}, {os.cpu_count()} cores, {versions}")
    print(f"first characters of the reply: {statistics.median(ours):.2f} s ({ours[0]:.2f} to {ours[-1]:.2f})")
    print(f"imports alone: {statistics.median(imports):.2f} s ({imports[0]:.2f} to {imports[-1]:.2f})")
    print(f"median ratio: {statistics.median(a / b for a, b in pairs):.2f}, {rounds} alternating rounds")


if __name__ == "__main__":
    main()
