"""What `tests/warm.py` runs is what Python would run."""

import os
import signal
import subprocess
import sys
import time

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="runs in forks")

SAID = """
import os, sys
print(sys.argv, os.getcwd(), os.environ.get("SAID"), __name__, sys.stdin.read())
print(sys.modules["__main__"].__dict__ is globals())
print(os.path.basename(sys.path[0]), file=sys.stderr)
"""


@pytest.fixture
def both(warm, tmp_path):
    """Run a command in Python and in a copy of a process that has the libraries loaded: what each gave."""

    def run(*words, **settings):
        settings = {"capture_output": True, "text": True, "cwd": tmp_path, "input": "typed", **settings}
        return [subprocess.run([*python, *words], **settings) for python in ([sys.executable], warm)]

    return run


@pytest.mark.parametrize("way", [("-c", SAID), ("said.py",), ("-m", "said")], ids=lambda way: way[0])
def test_input_output_and_arguments(both, tmp_path, way):
    (tmp_path / "said.py").write_text(SAID)
    cold, warm = both(*way, "--a", "b c", env={**os.environ, "SAID": "你好"})
    assert (warm.returncode, warm.stdout, warm.stderr) == (cold.returncode, cold.stdout, cold.stderr)
    assert "你好" in warm.stdout and "typed" in warm.stdout and "b c" in warm.stdout


@pytest.mark.parametrize(
    "code, status",
    [
        ("raise SystemExit(3)", 3),
        ("1 / 0", 1),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL),
        ("import atexit; atexit.register(print, 'the end')", 0),
    ],
)
def test_ends(both, code, status):
    cold, warm = both("-c", code)
    assert warm.returncode == cold.returncode == status and warm.stdout == cold.stdout
    assert warm.stderr.splitlines()[-1:] == cold.stderr.splitlines()[-1:]


LOADED = "import sys; print('transformers' in sys.modules)"


def test_libraries_are_loaded(both):
    assert [done.stdout for done in both("-c", LOADED)] == ["False\n", "True\n"]


def test_torch_alone(warm_with, tmp_path):
    """Whatever the variables are that other libraries read."""
    code = "import os, sys; print(*sorted({'torch', 'transformers', 'qwen1', 'huggingface_hub'} & sys.modules.keys()))"
    for home in ("one", "another"):
        command = [*warm_with({**os.environ, "HF_HOME": home}, "torch"), "-c", f"{code}; print(os.environ['HF_HOME'])"]
        done = subprocess.run(command, env={**os.environ, "HF_HOME": home}, capture_output=True, text=True)
        assert done.stdout == f"torch\n{home}\n", done.stderr


@pytest.mark.parametrize("changed", [{"HF_HUB_OFFLINE": "no"}, {"PYTHONHASHSEED": "7"}])
def test_what_is_read_at_loading_has_them_loaded_anew(both, changed):
    code = f"{LOADED}; import os; print(os.environ[{next(iter(changed))!r}])"
    cold, warm = both("-c", code, env={**os.environ, **changed})
    assert warm.stdout == cold.stdout and warm.stdout.startswith("False")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a pseudo-terminal as Linux has it")
def test_a_terminal(both):
    """Streams can't seek there, though those of the process that has the libraries loaded may."""
    import pty

    terminal, inner = pty.openpty()
    code = "import sys; [print(s.isatty(), s.seekable()) for s in (sys.stdin, sys.stdout, sys.stderr)]"
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), inner)
    both("-c", code, **streams, capture_output=False, input=None)
    said = os.read(terminal, 1000).decode().split()
    assert said == ["True", "False"] * 6
    os.close(terminal)
    os.close(inner)


SENT = [signal.SIGTERM, signal.SIGKILL]
if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # what runs in the background may have to live through it
    SENT.append(signal.SIGINT)


@pytest.mark.parametrize("number", SENT)
def test_a_signal_reaches_the_program(warm, tmp_path, number):
    code = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    process = subprocess.Popen([*warm, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    program = int(process.stdout.readline())
    process.send_signal(number)
    assert process.wait(30) == -number
    process.stdout.close()
    end = time.monotonic() + 30
    while os.path.exists(f"/proc/{program}") and time.monotonic() < end:
        time.sleep(0.01)
    assert not os.path.exists(f"/proc/{program}")
