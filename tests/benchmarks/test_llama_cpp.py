"""`benchmarks/llama_cpp.py`: what it says where llama.cpp isn't there, and what it asks of llama-bench where it is."""

import json
import subprocess
import sys

import pytest

BENCH = """#!{python}
import json, sys

asked = sys.argv[1:]
open({log!r}, "a").write(json.dumps(asked) + "\\n")
print(json.dumps([{{"avg_ns": 5e8}}]))
"""


@pytest.mark.slow
def test_without_llama_cpp_it_says_so(repository, warm, tmp_path):
    command = [*warm, "speed.py", "llama-cpp", "--bench", str(tmp_path / "nothing")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=repository / "benchmarks")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "llama.cpp is left out: name its llama-bench by --bench or QWEN_LLAMA_BENCH.\n"


@pytest.mark.skipif(sys.platform == "win32", reason="the stub is a script with a first line that names its interpreter")
def test_what_llama_bench_is_asked(repository, warm, tmp_path):
    program, log = tmp_path / "llama-bench", tmp_path / "log"
    program.write_text(BENCH.format(python=sys.executable, log=str(log)))
    program.chmod(0o755)
    script = "import sys; from llama_cpp import bench; print(bench(sys.argv[1], 'model.gguf', 0, 16, 512))"
    command = [*warm, "-c", script, str(program)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=repository / "benchmarks")
    assert done.stdout == "0.5\n", done.stderr
    (asked,) = map(json.loads, log.read_text().splitlines())
    options = dict(zip(asked[::2], asked[1::2], strict=True))
    assert options["-m"] == "model.gguf" and options["-o"] == "json"
    assert (options["-p"], options["-n"], options["-d"]) == ("0", "16", "512")
