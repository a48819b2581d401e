"""The versions that pyproject.toml allows, those that constraints pin, and what `.ci/run` makes of them."""

import os
import platform
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
PYTHONS = re.findall(r":: Python :: (3\.\d+)\"", (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
CONSTRAINTS = {"constraints.txt": PYTHONS, "constraints-oldest.txt": ["3.11"]}
"""file -> the Pythons that it is for."""

PIN = re.compile(r'([A-Za-z0-9._-]+)==([0-9][0-9a-z.]*)(?:; (python_version (?:<|>=) "3\.\d+"))?')
README_COMMAND = re.compile(r"^python3 -m venv \.venv && .*\.venv/bin/pytest(?: .*)?$", re.MULTILINE)


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def lines_of(file: str) -> list[str]:
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    return [line for line in lines if not line.startswith("#")]


def pins(file: str, python: str) -> dict[str, list[str]]:
    """The versions that a file pins on a Python, which should be one of each."""
    found: dict[str, list[str]] = {}
    for name, version, marker in (PIN.fullmatch(line).groups() for line in lines_of(file)):
        if marker is None or Marker(marker).evaluate({"python_version": python}):
            found.setdefault(normal(name), []).append(version)
    return found


@pytest.fixture
def requirements(pyproject):
    """What the package needs with an extra, and with those that the extra names in turn."""
    project = pyproject["project"]

    def collect(extra: str) -> list[Requirement]:
        needed = []
        for requirement in map(Requirement, [*project["dependencies"], *project["optional-dependencies"][extra]]):
            if requirement.name == project["name"]:
                needed += [inner for other in sorted(requirement.extras) for inner in collect(other)]
            else:
                needed.append(requirement)
        return needed

    return collect


@pytest.mark.parametrize("file", CONSTRAINTS)
def test_constraints_are_exact_public_versions(file):
    """A local suffix such as +cpu, a URL or a range would not resolve, or not to the tested version, elsewhere."""
    assert [line for line in lines_of(file) if not PIN.fullmatch(line)] == []


@pytest.mark.parametrize("file, python", [(file, python) for file in CONSTRAINTS for python in CONSTRAINTS[file]])
def test_constraints_pin_a_name_once_on_each_python(file, python):
    assert {name: versions for name, versions in pins(file, python).items() if len(versions) != 1} == {}


@pytest.mark.parametrize("file, extra", [("constraints.txt", "dev"), ("constraints-oldest.txt", "test")])
def test_constraints_pin_what_is_allowed(requirements, file, extra):
    for python in CONSTRAINTS[file]:
        pinned = pins(file, python)
        for requirement in requirements(extra):
            (version,) = pinned[normal(requirement.name)]
            assert requirement.specifier.contains(version), f"{requirement} on Python {python}, pinned to {version}"


def test_the_oldest_versions_are_the_lower_bounds(requirements):
    """A bound that CI doesn't install is a guess. No package index has builds of torch for a CPU alone."""
    pinned = pins("constraints-oldest.txt", "3.11")
    bounds = {normal(needed.name): str(needed.specifier).removeprefix(">=") for needed in requirements("test")}
    wrong = {
        name: (bound, pinned[name])
        for name, bound in bounds.items()
        if name != "torch" and [Version(bound)] != [*map(Version, pinned[name])]
    }
    assert wrong == {} and {"transformers", "safetensors", "typer", "gradio"} <= bounds.keys()


def test_the_pythons_begin_where_the_package_does(pyproject):
    assert f">={PYTHONS[0]}" == pyproject["project"]["requires-python"]
    assert PYTHONS == sorted(PYTHONS, key=lambda version: int(version.partition(".")[2]))


def test_the_readme_has_one_command_for_ci():
    (command,) = README_COMMAND.findall((ROOT / "README.md").read_text(encoding="utf-8"))
    assert "-c constraints.txt" in command


def test_ci_names_folders_of_tests():
    folders = set(re.findall(r"\btests/\w+", (ROOT / ".ci" / "run").read_text(encoding="utf-8")))
    assert folders >= {f"tests/{name}" for name in ("cache", "chat", "config", "conversion", "model", "tokenizer")}
    assert [folder for folder in folders if not (ROOT / folder).is_dir()] == []


STUB = """#!/usr/bin/env bash
# Stands for every program of an environment: each says what it was asked.
here=$(cd "$(dirname "$0")" && pwd)
environment=$(basename "$(dirname "$here")")
case "$(basename "$0") $*" in
"python3 -m venv "*)
    mkdir -p "$3/bin"
    for name in npm pip pytest pre-commit python uv; do cp "$0" "$3/bin/$name"; done ;;
"python3 -m pip index versions transformers") echo "transformers ($NEWEST)" ;;
"python3 -m pip index versions torch") [[ -z "$TORCH" ]] || echo "torch ($TORCH)" ;;
"python -") echo "$environment: $("$PYTHON" -)" ;; # what it is asked on standard input runs
"pytest "*)
    [[ "$*" != *tests/bits* ]] || environment=bits
    [[ "$*" != *"slow and "* || "$*" == *"not slow"* ]] || environment=slow
    echo "$environment: pytest $*" >>"$LOG"
    [[ -z "$PYTEST_ADDOPTS" ]] || echo "$environment: $PYTEST_ADDOPTS" >>"$LOG.options"
    [[ "$*" != *--cov-append* ]] || echo "TOTAL      21000    400    97%"
    [[ -z "$SKIP" || "$environment" != "$SKIPPER" ]] || echo "SKIPPED [2] tests/model/test_it.py:7: $SKIP"
    [[ " $FAIL " != *" $environment "* ]] && echo "=== 5 passed in $environment ===" && echo a last word && exit
    echo "FAILED tests/model/test_$environment.py::test_it"
    echo "=== 1 failed in $environment ===" && exit 1 ;;
"npm install "*) [[ " $FAIL " != *" engines "* ]] || { echo no answer; exit 1; } ;;
"uv pip compile "*) echo transformers==5.0.0 ;;
"uv pip install "*)
    echo "uv, with links $UV_FIND_LINKS: $*" >>"$LOG.made"
    [[ " $FAIL " != *" uv "* ]] ;;
"pip install "*) echo "$environment: $*" >>"$LOG.made" ;;
"pre-commit "*) [[ " $FAIL " != *" linters "* ]] ;;
esac
"""


@pytest.fixture
def ci(tmp_path):
    """Run `.ci/run` in a repository where stubs stand for Python: (newest transformers, what fails) -> done."""
    repository, programs = tmp_path / "repository", tmp_path / "programs"
    (repository / ".ci").mkdir(parents=True)
    programs.mkdir()
    for name in (".ci/run", ".ci/skips", "README.md", "constraints.txt", "constraints-oldest.txt", "pyproject.toml"):
        (repository / name).write_bytes((ROOT / name).read_bytes())
    for name in ("python3", "chromium", "g++"):
        (programs / name).write_text(STUB)
        (programs / name).chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "LOG": str(tmp_path / "log"),
        "PYTHON": sys.executable,
        "TMPDIR": str(tmp_path),
        **{f"GIT_{role}_{what}": "a@b" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")},
    }
    commit = "git init -q && git add -A && git commit -q -m all"
    subprocess.run(["bash", "-c", commit], cwd=repository, env=environment, check=True)

    def run(newest: str, fail: str = "", **changes: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            ["bash", str(repository / ".ci" / "run")],
            env={**environment, "NEWEST": newest, "TORCH": "", "FAIL": fail, "SKIP": "", "SKIPPER": ".venv", **changes},
            capture_output=True,
            text=True,
        )

    return run


@pytest.fixture
def pin():
    (version,) = pins("constraints.txt", PYTHONS[-1])["transformers"]
    return version


def test_ci_ends_with_the_summary_of_the_command_of_the_readme(ci, pin):
    done = ci(pin)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "=== 5 passed in .venv ==="
    assert f"CI: the newest transformers is the pin, {pin}: not run twice" in done.stdout.splitlines()
    told = f"torch {metadata.version('torch')}, transformers {metadata.version('transformers')}"
    lines = done.stdout.splitlines()
    assert f"CI: the README's command on .venv: Python {platform.python_version()}, {told}: 5 passed in .venv" in lines
    assert "CI: what is slow: 5 passed in slow" in lines and "CI: lines reached by both: 97%" in lines


def test_ci_runs_the_command_of_the_readme_and_the_core_on_the_oldest(ci, pin, tmp_path):
    ci(pin)
    quick, slow, core, bits = (tmp_path / "log").read_text().splitlines()
    (command,) = README_COMMAND.findall((ROOT / "README.md").read_text(encoding="utf-8"))
    assert quick == f".venv: pytest {command.partition('.venv/bin/pytest ')[2]}"
    assert slow.startswith("slow: pytest ") and slow.endswith("--cov --cov-append")
    assert (tmp_path / "log.options").read_text() == ".venv: --cov --cov-report= --cov-fail-under=0\n"
    assert core.startswith("oldest: pytest ") and "tests/conversion" in core and "tests/model" in core
    assert bits.startswith("bits: pytest ") and "tests/bits" in bits


def test_ci_makes_environments_with_uv(ci, pin, tmp_path):
    assert ci(pin, PIP_FIND_LINKS="/here /there").returncode == 0
    made = (tmp_path / "log.made").read_text().splitlines()
    assert made.count("uv: install -q -c constraints.txt uv") == 1
    begin = "uv, with links /here,/there: pip install -q --python "
    words = [line.partition("/bin/python ")[2] for line in made if line.startswith(begin)]
    assert words == [
        "-c constraints-oldest.txt -e .[test]",
        "-c constraints.txt -e .[dev]",
        "-c constraints.txt -e .[bits]",
    ]
    assert not [line for line in made if line.startswith("oldest: ")]


def test_ci_makes_environments_with_pip_where_uv_finds_no_way(ci, pin, tmp_path):
    assert ci(pin, fail="uv").returncode == 0
    made = (tmp_path / "log.made").read_text().splitlines()
    asked = [line.partition("/bin/python ")[2] for line in made if line.startswith("uv, ")]
    assert len(asked) == 3 and all(any(line.endswith(f": install -q {words}") for line in made) for words in asked)


@pytest.mark.parametrize(
    "part, name", [(".venv", "tests"), ("slow", "slow"), ("oldest", "oldest"), ("linters", "linters"), ("bits", "bits")]
)
def test_ci_fails_where_a_part_does(ci, pin, part, name):
    done = ci(pin, fail=part)
    assert done.returncode == 1
    end, last = done.stdout[done.stdout.index("CI: failed:") :].splitlines()[:-1], done.stdout.splitlines()[-1]
    assert end == [f"CI: failed: {name}"] + [f"FAILED tests/model/test_{part}.py::test_it"] * (name != "linters")
    assert "in .venv" in last


def test_ci_fails_where_tests_would_skip_for_want_of_a_program(ci, pin, tmp_path):
    programs = tmp_path / "programs"
    for name in (
        "bash",
        "basename",
        "cat",
        "cp",
        "dirname",
        "env",
        "git",
        "grep",
        "id",
        "ln",
        "mkdir",
        "mktemp",
        "paste",
        "rm",
    ):
        (programs / name).symlink_to(shutil.which(name))
    for name in ("sed", "sort", "tail", "tee", "wc"):
        (programs / name).symlink_to(shutil.which(name))
    (programs / "g++").unlink()
    done = ci(pin, PATH=str(programs))
    assert done.returncode == 1
    assert "CI: no g++, and it can't be installed here: tests that need it are skipped" in done.stdout.splitlines()
    assert "CI: failed: outside" in done.stdout.splitlines()


def test_ci_fails_where_llama_cpp_cannot_be_had(ci, pin):
    done = ci(pin, fail="engines")
    assert done.returncode == 1
    assert "CI: llama.cpp can't be installed: no answer" in done.stdout.splitlines()
    assert "CI: failed: engines" in done.stdout.splitlines()


WANTED = ["could not import 'peft'", "needs a compiler", "chromium is not installed", "QWEN_LLAMA_CPP names no Python"]


@pytest.mark.parametrize(("reason", "part"), [*((reason, ".venv") for reason in WANTED), (WANTED[0], "slow")])
def test_ci_fails_where_a_test_skips_that_should_run(ci, pin, reason, part):
    done = ci(pin, SKIP=reason, SKIPPER=part)
    assert done.returncode == 1
    assert f"CI: tests that should have run skipped:\nCI: {reason}\n" in done.stdout
    assert "CI: failed: skipped" in done.stdout.splitlines()


@pytest.mark.parametrize("reason", ["needs a CUDA device", "for Qwen2 as well: skipped: test requires MPS"])
def test_ci_lets_tests_skip_for_what_it_cannot_have(ci, pin, reason):
    done = ci(pin, SKIP=reason)
    assert done.returncode == 0 and "should have run" not in done.stdout


def test_what_needs_a_gpu_is_marked_so():
    """A reason of its own would fail CI, which lets tests skip for the mark's reason."""
    own = re.compile(r"skipif\(\s*not (?:ON_GPU|torch\.cuda\.is_available)")
    assert own.search("@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')")
    tests = ROOT.joinpath("tests").rglob("*.py")
    assert not [path for path in tests if own.search(path.read_text(encoding="utf-8")) and path != Path(__file__)]


def test_ci_tells_of_a_newer_release_that_holds(ci):
    done = ci("99.1.0")
    assert done.returncode == 0
    assert "CI: the newest transformers, 99.1.0, held: 5 passed in newest" in done.stdout.splitlines()


def test_ci_does_not_fail_where_a_newer_release_does_not_hold(ci):
    done = ci("99.1.0", fail="newest")
    assert done.returncode == 0
    line = "CI: the newest transformers, 99.1.0, DID NOT HOLD (which fails nothing here): 1 failed in newest"
    assert line in done.stdout.splitlines()


def test_ci_runs_what_computes_on_the_newest_torch(ci, pin, tmp_path):
    done = ci(pin, TORCH="99.2.0")
    assert done.returncode == 0
    assert "CI: the newest torch, 99.2.0, held: 5 passed in newest_torch" in done.stdout.splitlines()
    made = (tmp_path / "log.made").read_text().splitlines()
    (words,) = [line for line in made if "torch==99.2.0" in line]
    assert words.endswith("/beside_torch.txt torch==99.2.0 -e .[test]") and words.startswith("uv, ")
    (ran,) = [line for line in (tmp_path / "log").read_text().splitlines() if line.startswith("newest_torch: ")]
    assert "tests/model" in ran and "tests/native" in ran


def test_ci_does_not_fail_where_the_newest_torch_does_not_hold(ci, pin):
    done = ci(pin, TORCH="99.2.0", fail="newest_torch")
    assert done.returncode == 0
    line = "CI: the newest torch, 99.2.0, DID NOT HOLD (which fails nothing here): 1 failed in newest_torch"
    assert line in done.stdout.splitlines()


def test_ci_tells_where_the_index_or_the_pin_leaves_nothing_to_try(ci, pin):
    (torch,) = pins("constraints.txt", PYTHONS[-1])["torch"]
    assert "CI: the newest torch: the index doesn't tell, not tried" in ci(pin).stdout.splitlines()
    assert f"CI: the newest torch is the pin, {torch}: not run twice" in ci(pin, TORCH=torch).stdout.splitlines()
