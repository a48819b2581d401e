"""Speed and memory of conversions against copying the same files, on a random checkpoint of about 6 GB.

    python benchmarks/conversion.py [--folder FOLDER] [--rounds 5] [--layers 9]

The checkpoint has the shape of the 7B model with fewer layers, in bfloat16. Each round copies it and converts it, each
in a process of its own, in changing order; memory is the peak of resident memory of the whole process, as Linux counts
it, pages of mapped files included. Needs about four times the checkpoint's size on disk.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

from qwen1 import QWenConfig
from qwen1.conversion.formats.qwen import qwen_shapes, read_qwen
from qwen1.conversion.opening.sources import open_source
from qwen1.conversion.planning.conversion import plan_conversion
from qwen1.conversion.planning.upgrade import plan_upgrade
from qwen1.conversion.writing.plans import write_plan
from qwen1.conversion.writing.progress import Progress

SHARD_SIZE = 10**9
ALLOWED = SHARD_SIZE + 700 * 10**6
ENTRIES = 16 * 2**20


def make_checkpoint(folder: Path, layers: int, pickled: bool) -> int:
    """Write a random checkpoint in files of about 2 GB; returns its size in bytes."""
    folder.mkdir()
    config = QWenConfig(vocab_size=151936, n_layer=layers, bf16=True)
    (folder / "config.json").write_text(config.to_json_string())
    noise = torch.randn(ENTRIES).mul_(0.02).bfloat16()
    files: list[dict[str, torch.Tensor]] = [{}]
    held, total = 0, 0
    for name, shape in qwen_shapes(read_qwen(config.to_dict())).items():
        count = torch.Size(shape).numel()
        files[-1][name] = noise.repeat(-(-count // ENTRIES))[:count].view(shape).clone()
        held, total = held + 2 * count, total + 2 * count
        if held > 2 * 10**9:
            _save(folder, len(files), files[-1], pickled)
            files[-1] = dict.fromkeys(files[-1])
            files.append({})
            held = 0
    _save(folder, len(files), files[-1], pickled)
    listed = {name: _file_name(number, pickled) for number, names in enumerate(files, 1) for name in names}
    index = "pytorch_model.bin" if pickled else "model.safetensors"
    (folder / f"{index}.index.json").write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": listed}))
    return total


def _file_name(number: int, pickled: bool) -> str:
    return f"pytorch_model-{number:05d}.bin" if pickled else f"model-{number:05d}.safetensors"


def _save(folder: Path, number: int, tensors: dict[str, torch.Tensor], pickled: bool) -> None:
    path = folder / _file_name(number, pickled)
    if pickled:
        torch.save(tensors, path)
    else:
        save_file(tensors, path, metadata={"format": "pt"})


def work(task: str, source: Path, target: Path) -> float:
    """Do a task in this process; returns seconds."""
    start = time.perf_counter()
    if task == "copy":
        shutil.copytree(source, target)
        return time.perf_counter() - start
    origin = open_source(source)
    if task == "convert":
        plan = plan_conversion(origin, "qwen2", max_shard_size=f"{SHARD_SIZE // 10**6}MB")
    else:
        plan = plan_upgrade(origin, max_shard_size=f"{SHARD_SIZE // 10**6}MB")
    write_plan(plan, target, Progress())
    return time.perf_counter() - start


def measure(task: str, source: Path, target: Path) -> tuple[float, int]:
    """Seconds that a task takes, and the peak of resident memory of its process in bytes."""
    command = [sys.executable, __file__, "--task", task, str(source), str(target)]
    printed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    shutil.rmtree(target)
    seconds, peak = printed.split()
    return float(seconds), int(peak)


def peak_memory() -> int:
    """Peak of resident memory of this process in bytes; unlike that of getrusage, it begins anew at exec."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def compare(task: str, source: Path, size: int, rounds: int) -> dict[str, object]:
    """Alternate a task with copying its source; print and return the figures."""
    copies, tasks, peaks = [], [], []
    target = source.with_name("target")
    for number in range(rounds):
        for name in ("copy", task) if number % 2 == 0 else (task, "copy"):
            seconds, peak = measure(name, source, target)
            (copies if name == "copy" else tasks).append(seconds)
            if name == task:
                peaks.append(peak)
    shares = [copied / done for copied, done in zip(copies, tasks, strict=True)]
    result = {
        "task": task,
        "size_gb": round(size / 1e9, 2),
        "copy_gb_per_s": round(size / 1e9 / statistics.median(copies), 2),
        "task_gb_per_s": round(size / 1e9 / statistics.median(tasks), 2),
        "speed_of_copying": round(statistics.median(shares), 2),
        "speed_of_copying_each_round": [round(share, 2) for share in shares],
        "peak_memory_mb": round(max(peaks) / 1e6),
        "allowed_memory_mb": ALLOWED // 10**6,
    }
    print(json.dumps(result))
    return result


def main() -> None:
    """Make the checkpoints, print the machine and every figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to write (default: the system's temporary folder)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=9)
    parser.add_argument("--task", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.task:
        print(work(options.task[0], *map(Path, options.task[1:])), peak_memory())
        return
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, ", end="")
    print(f"transformers {transformers.__version__}, files of at most {SHARD_SIZE // 10**6} MB are written")
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        for task, pickled in (("convert", False), ("upgrade", True)):
            source = Path(scratch) / task
            size = make_checkpoint(source, options.layers, pickled)
            compare(task, source, size, options.rounds)
            shutil.rmtree(source)


if __name__ == "__main__":
    main()
