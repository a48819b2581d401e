"""The library of kernels: made once, kept, told about; and whatever is in its way leaves everything to torch."""

import shutil
import stat
import subprocess
import sys

import pytest

from qwen1 import native_qwen, translating_qwen
from qwen1.native_tokens_qwen import TOKENS

COMPILER = """#!/bin/sh
if [ "$1" = --version ]; then echo "compiler 1.0"; exit; fi
echo called >> "$CALLS"
for last; do :; done
{then}
"""


@pytest.fixture
def home(tmp_path, monkeypatch, forget_libraries):
    """A cache of one's own, and no library yet in this process."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    monkeypatch.delenv(translating_qwen.SWITCH, raising=False)
    forget_libraries()
    return tmp_path


def compiler(home, monkeypatch, then):
    """A compiler that does as it is told, and nothing else."""
    file = home / "compiler"
    file.write_text(COMPILER.replace("{then}", then))
    file.chmod(0o755)
    monkeypatch.setenv("CXX", str(file))


def calls(home):
    file = home / "calls"
    return len(file.read_text().splitlines()) if file.exists() else 0


needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="kernels are made on Linux only")


@needs_linux
def test_a_compiler_that_fails_is_asked_once(home, monkeypatch, forget_libraries):
    compiler(home, monkeypatch, "echo 'no such flag' >&2; exit 1")
    assert native_qwen.wait() is None
    (failure,) = (home / "cache" / "qwen1").iterdir()
    assert failure.suffix == ".failed" and "no such flag" in failure.read_text()
    forget_libraries()
    assert native_qwen.wait() is None
    assert calls(home) == 1


@needs_linux
def test_what_the_compiler_makes_of_a_broken_kind_is_left_alone(home, monkeypatch):
    compiler(home, monkeypatch, 'echo "no library" > "$last"')
    assert native_qwen.wait() is None


def test_without_a_compiler(home, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(home))
    assert native_qwen.wait() is None
    assert not (home / "cache").exists()


@needs_linux
def test_a_folder_that_others_write_to_is_not_trusted(home, monkeypatch):
    compiler(home, monkeypatch, "exit 1")
    folder = home / "cache" / "qwen1"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    assert native_qwen.wait() is None
    assert calls(home) == 0 and stat.S_IMODE(folder.stat().st_mode) == 0o777


def test_the_switch(home, monkeypatch):
    monkeypatch.setenv(translating_qwen.SWITCH, "0")
    assert native_qwen.wait() is None and native_qwen.library() is None
    assert not (home / "cache").exists()


@needs_linux
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs a compiler")
def test_a_compiler_of_c_will_do(home, monkeypatch):
    """Some libraries set CC and CXX to `gcc`, which links nothing that C++ needs."""
    monkeypatch.setenv("CXX", "gcc")
    assert translating_qwen.wait_for(TOKENS) is not None


@needs_linux
@pytest.mark.slow
@pytest.mark.skipif(native_qwen.wait() is None, reason="needs g++ or clang++")
def test_a_process_that_ends_soon_leaves_the_library_behind(home):
    """A reply of two seconds ends before the compiler does; the next process finds what it made."""
    script = "from qwen1 import native_qwen; native_qwen.library(); import time; time.sleep(0.5)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert translating_qwen.SWITCH in done.stderr and "cache" in done.stderr
    folder = home / "cache" / "qwen1"
    for _ in range(600):
        made = list(folder.glob("native-*.so"))
        if made and len(list(folder.iterdir())) == 1:
            break
        subprocess.run(["sleep", "0.2"], check=True)
    assert [file.suffix for file in folder.iterdir()] == [".so"]
    script = "from qwen1 import native_qwen; assert native_qwen.wait() is not None"
    again = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (again.returncode, again.stderr) == (0, "")
