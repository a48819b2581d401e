"""Several processes of one group (gloo) that run a function of a test file, each with its own result.

Started as a program this file is one of them: `processes.py FILE FUNCTION FOLDER`, with the variables of torchrun.
"""

import gc
import importlib.util
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import torch

TIME_LIMIT = 300.0
"""Seconds for all that the processes do."""


def run(function, *arguments, folder, python, count=2, environment=None):
    """Call a function of the top level of a file in several processes: the results, in the order of the ranks.

    Args:
        function: found again by its file and its name; imports of its file are made in each process.
        arguments: for all of them, as `torch.save` writes them.
        folder: for what the processes read and write here.
        python: first words of a command that runs a file.
        environment: variables beside those of this process.
    """
    folder = Path(folder)
    torch.save(arguments, folder / "arguments.pt")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    shared |= {"OMP_NUM_THREADS": 1, "GLOO_SOCKET_IFNAME": "lo", **(environment or {})}
    command = [*python, __file__, function.__code__.co_filename, function.__name__, folder]
    started = []
    for rank in range(count):
        own = {**shared, "RANK": rank, "LOCAL_RANK": rank}
        with (folder / f"{rank}.log").open("wb") as log:
            started.append(
                subprocess.Popen(
                    [str(word) for word in command],
                    env={**os.environ, **{name: str(value) for name, value in own.items()}},
                    stdout=log,
                    stderr=log,
                    cwd=folder,
                )
            )
    _wait(started, folder)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(count)]


def _wait(started, folder):
    """Until all have ended; as soon as one has failed, or all have taken too long, the others are ended."""
    end = time.monotonic() + TIME_LIMIT
    try:
        while any(process.poll() is None for process in started):
            failed = any(process.poll() not in (None, 0) for process in started)
            if failed or time.monotonic() > end:
                break
            time.sleep(0.02)
        states = [process.poll() for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()
    logs = "\n".join(f"--- {rank}\n{(folder / f'{rank}.log').read_text()[-3000:]}" for rank in range(len(started)))
    assert states == [0] * len(started), f"ended with {states} (None: took too long, or another had failed)\n{logs}"


def _main(file, name, folder):
    import torch.distributed as dist

    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    dist.init_process_group("gloo")
    result = getattr(module, name)(*torch.load(Path(folder) / "arguments.pt", weights_only=False))
    torch.save(result, Path(folder) / f"{dist.get_rank()}.pt")
    dist.barrier()
    gc.collect()  # what still holds the group: its threads are to end before the interpreter does
    dist.destroy_process_group()


if __name__ == "__main__":
    _main(*sys.argv[1:])
