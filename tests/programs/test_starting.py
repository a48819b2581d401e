"""Imports of a program that has just begun."""

import gc
import importlib.machinery
import subprocess
import sys

import pytest

from qwen1.programs import starting

PROGRAM = """
from qwen1_commands import import_door
heavy_imports = import_door("programs.starting").heavy_imports
import gc, sys, threading
try:
    with heavy_imports():
        print(gc.isenabled())
        for thread in threading.enumerate()[1:]:
            thread.join()
        raise ImportError
except ImportError:
    print(gc.isenabled(), gc.get_freeze_count() > 0)
maps = open("/proc/self/maps").read() if sys.platform == "linux" else ""
import torch
print("libtorch_cpu" in maps or sys.platform != "linux" or torch.version.cuda or torch.version.hip or "no")
"""


@pytest.mark.slow
def test_nothing_is_collected_while_a_program_imports():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    first, second, third = done.stdout.splitlines()
    assert (first, second) == ("False", "True True")
    assert third != "no"


def test_nothing_changes_where_torch_is_there_already():
    frozen = gc.get_freeze_count()
    with starting.heavy_imports():
        assert gc.isenabled()
    assert gc.get_freeze_count() == frozen


@pytest.mark.parametrize("files", [[], ["libtorch_cpu.so", "libtorch_cuda.so"]], ids=["no library", "CUDA"])
def test_other_builds_of_torch_load_their_libraries_themselves(tmp_path, monkeypatch, files):
    (tmp_path / "lib").mkdir()
    for name in files:
        (tmp_path / "lib" / name).touch()
    spec = importlib.machinery.ModuleSpec("torch", None, origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(starting.importlib.util, "find_spec", lambda _: spec)
    monkeypatch.setattr(starting.ctypes, "CDLL", None)
    starting._load_torch_library()
