"""The command qwen1-browser, app.py as a program, and the Space that is made of it."""

import os
import re
import shutil
import subprocess
import sys

import gradio as gr
import pytest
import yaml
from typer.testing import CliRunner

from qwen1.browser import commands


@pytest.fixture
def launched(monkeypatch):
    """What would have been served: page and options of each launch."""
    pages = []
    monkeypatch.setattr(gr.Blocks, "launch", lambda page, **options: pages.append((page, options)))
    monkeypatch.setattr(gr.Blocks, "block_thread", lambda page: None)
    return pages


@pytest.fixture
def run(monkeypatch):
    monkeypatch.delenv("QWEN_CHECKPOINT", raising=False)
    return lambda *arguments, **kwargs: CliRunner().invoke(commands.app, arguments, **kwargs)


def test_the_shipped_model_for_this_machine_alone(run, launched):
    assert run().exit_code == 0
    ((page, options),) = launched
    assert page.title == "qwen-tiny-chat"
    assert options["share"] is False and options["inbrowser"] is False
    assert options["server_name"] is None and options["server_port"] is None


def test_options(run, launched, checkpoint_folder):
    done = run(
        "-c", str(checkpoint_folder), "--share", "--inbrowser", "--cpu-only", "--server-name", "0.0.0.0",
        "--server-port", "8000", "--concurrency-limit", "2", "--queue-size", "3", "--carried", "100",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    ((page, options),) = launched
    assert page.title == "checkpoint" and page._queue.max_size == 3
    assert (options["share"], options["inbrowser"]) == (True, True)
    assert (options["server_name"], options["server_port"]) == ("0.0.0.0", 8000)
    assert options["state_session_capacity"] == 100


def test_a_checkpoint_is_named_as_in_the_terminal(run, launched, checkpoint_folder):
    assert run(str(checkpoint_folder)).exit_code == run("--checkpoint-path", str(checkpoint_folder)).exit_code == 0
    assert run(str(checkpoint_folder), env={"QWEN_CHECKPOINT": "a/b"}).exit_code == 0
    assert [page.title for page, _ in launched] == ["checkpoint"] * 3
    twice = run(str(checkpoint_folder), "-c", "another")
    assert twice.exit_code == 2 and "two checkpoints" in twice.stderr


def test_a_space_names_its_checkpoint_by_a_variable(run, launched, checkpoint_folder):
    assert run(env={"QWEN_CHECKPOINT": str(checkpoint_folder)}).exit_code == 0
    assert launched[0][0].title == "checkpoint"


def test_tools_are_named_as_in_the_terminal(run, launched, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text('def look() -> str:\n    """Look"""\n    return "x"\n')
    done = run("--tool", "calculator", "--tool", f"{file}:look")
    assert done.exit_code == 0, done.output
    (switch,) = [block for block in launched[0][0].blocks.values() if getattr(block, "elem_id", None) == "tools"]
    assert switch.visible and switch.info == "calculator, look"


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["abacus"], "There is no tool 'abacus': choose calculator, clock, or name a function as FILE.py:FUNCTION"),
        (["none.py:look"], "There is no file none.py with the tool 'look'"),
        (["clock", "clock"], "Two tools have the name 'clock'"),
    ],
)
def test_what_is_no_tool_is_told_before_a_model_is_loaded(run, launched, names, said):
    failed = run("no/model", *[word for name in names for word in ("--tool", name)])
    assert failed.exit_code == 1 and failed.stderr.startswith(f"qwen1-browser: {said}") and launched == []


def test_a_missing_checkpoint_is_an_error(run, tmp_path):
    failed = run("--checkpoint", str(tmp_path / "none"))
    assert failed.exit_code == 1 and failed.stderr.startswith("qwen1-browser: ") and "none" in failed.stderr


def test_the_space_has_what_the_package_needs(repository, pyproject):
    space = repository / "docs" / "space"
    matter = yaml.safe_load((space / "README.md").read_text(encoding="utf-8").split("---")[1])
    assert matter["sdk"] == "gradio" and (repository / matter["app_file"]).is_file()
    assert f"gradio=={matter['sdk_version']}" in (repository / "constraints.txt").read_text().splitlines()
    lines = (space / "requirements.txt").read_text().splitlines()
    assert [line for line in lines if not line.startswith("#")] == pyproject["project"]["dependencies"]


@pytest.mark.slow
def test_what_the_guide_uploads_runs_by_itself(repository, tmp_path):
    """The files that docs/browser.md names, without the package installed beside them."""
    guide = (repository / "docs" / "browser.md").read_text(encoding="utf-8")
    patterns = re.findall(r'--include "([^"]+)"', guide)
    assert "*.py" in patterns
    for pattern in patterns:
        for path in repository.glob(pattern):
            copy = tmp_path / "space" / path.relative_to(repository)
            copy.parent.mkdir(parents=True, exist_ok=True)
            if path.is_file():
                shutil.copy(path, copy)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    script = "import runpy, sys, gradio; gradio.Blocks.launch = lambda page, **o: sys.exit(f'serves {page.title}'); "
    script += "sys.argv = ['app.py']; runpy.run_path('app.py', run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path / "space", env=environment, capture_output=True, text=True
    )
    assert done.stderr.splitlines()[-1] == "serves qwen-tiny-chat", done.stderr
