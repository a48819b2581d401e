"""Every command from its door on: --help and --version at once, and the whole package for whatever it does."""

import json
import os
import re
import signal
import subprocess
import sys

import pytest

from qwen1.conversion.command_line import terminal as checkpoint_terminal
from qwen1.programs.version import version
from qwen1.terminal import commands as chat_commands
from qwen1.terminal import session
from qwen1.training import commands, finetuning, options
from qwen1.training.tiny import commands as tiny_chat_commands

COMMANDS = (
    "qwen1-browser",
    "qwen1-chat",
    "qwen1-checkpoint",
    "qwen1-extend-vocabulary",
    "qwen1-finetune",
    "qwen1-tiny-chat",
)
HEAVY = ("gradio", "numpy", "peft", "tokenizers", "torch", "transformers")
FORBID = """
import importlib, sys

class Forbidden:
    def find_spec(self, name, path=None, target=None):
        if name in {heavy}:
            raise AssertionError(f"{{name}} is imported")

sys.meta_path.insert(0, Forbidden())
sys.argv = {words}
getattr(importlib.import_module({module!r}), {function!r})()
"""
OTHER_RELEASES = json.loads(options.TABLE.read_text(encoding="utf-8"))["of"] != options.versions()


@pytest.fixture
def run_python(repository):
    """Run code in a process that finds the packages of this clone: (code) -> what it printed."""

    def run(code):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONPATH": str(repository), "COLUMNS": "200"},
            capture_output=True,
            text=True,
            encoding="utf-8",
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.fixture
def run_light(run_python, pyproject):
    """Run a command where importing anything heavy is an error: (command, *words) -> what it printed."""

    def run(command, *words):
        module, _, function = pyproject["project"]["scripts"][command].partition(":")
        return run_python(FORBID.format(heavy=HEAVY, words=[command, *words], module=module, function=function))

    return run


def test_these_are_all(pyproject):
    assert sorted(pyproject["project"]["scripts"]) == list(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_version_at_once(run_light, command):
    assert run_light(command, "--version") == f"{command} {version()}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_at_once(run_light, command):
    if command == "qwen1-finetune" and OTHER_RELEASES:
        pytest.skip("the table of options is of other releases of torch and transformers")
    said = run_light(command, "--help")
    assert command in said and "--version" in said


@pytest.mark.parametrize("command", ["inspect", "upgrade", "convert", "verify", "merge-lora", "push", "doctor"])
def test_help_of_one_command_at_once(run_light, command):
    assert f"qwen1-checkpoint {command}" in run_light("qwen1-checkpoint", command, "--help")


@pytest.mark.slow
def test_what_is_done_finds_the_whole_package(run_python):
    code = "import sys, qwen1_commands; sys.argv = ['qwen1-chat', '12+34=?']; qwen1_commands.chat()"
    assert run_python(code) == "2+4=6, 1+3=4. 12+34=46\n"


@pytest.mark.slow
def test_a_door_leaves_the_import_to_others(run_python):
    code = """
import sys, qwen1_commands
door = qwen1_commands.import_door("training.tiny.commands")
print(sorted(name for name in sys.modules if name.startswith("qwen1") and hasattr(sys.modules[name], "__path__")))
import qwen1, transformers
from qwen1.training.errors import DataError
assert type(transformers.AutoConfig.for_model("qwen")) is qwen1.QWenConfig
assert door.DataError is DataError
"""
    assert run_python(code) == "['qwen1_commands']\n"


@pytest.mark.slow
def test_a_door_of_a_package_that_is_imported_already(run_python):
    code = """
import qwen1, qwen1_commands, sys
door = qwen1_commands.import_door("terminal.commands")
assert sys.modules["qwen1"] is qwen1 and qwen1.terminal.commands is door
"""
    assert run_python(code) == ""


INTERRUPTED = """
import signal, sys
from importlib.abc import MetaPathFinder

class Interrupt(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            try:
                signal.raise_signal(signal.SIGINT)
            except KeyboardInterrupt:  # as torch does in places
                if {passed_over}:
                    return
                raise

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background processes begin with ignoring it
sys.meta_path.insert(0, Interrupt())
sys.argv = {words}
import qwen1_commands
qwen1_commands.{function}()
"""


@pytest.mark.parametrize(
    "words",
    [
        *(["qwen1-browser", "--tool", "clock"], ["qwen1-chat", "hello"], ["qwen1-checkpoint", "doctor"]),
        *(["qwen1-finetune", "model"], ["qwen1-tiny-chat", "examine", "model"]),
        ["qwen1-extend-vocabulary", "qwen.tiktoken", "words", "new"],
    ],
    ids=lambda words: words[0],
)
@pytest.mark.parametrize("passed_over", [False, True])
def test_ctrl_c_while_a_program_imports_ends_it_with_130(repository, words, passed_over, tmp_path):
    function = words[0].removeprefix("qwen1-").replace("-", "_")
    code = INTERRUPTED.format(words=words, function=function, passed_over=passed_over)
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 130 and done.stdout == "" and "Traceback" not in done.stderr


# --- standard streams that aren't there ---

DOOR = """
import sys
import qwen1_commands

class Door:
    @staticmethod
    def main():
        {main}

door = qwen1_commands.import_door
qwen1_commands.import_door = lambda name: Door if name.endswith("commands") else door(name)
qwen1_commands.{program}()
"""


@pytest.fixture
def run_door(repository):
    """Run a door with another program behind it: (statement, what the shell does with its streams) -> the process."""

    def run(main, streams, program="chat"):
        code = DOOR.format(main=main, program=program)
        words = ["sh", "-c", f'"$0" -c "$1" {streams}; exit $?', sys.executable, code]
        return subprocess.run(
            words, env={**os.environ, "PYTHONPATH": str(repository)}, capture_output=True, text=True, stdin=None
        )

    return run


@pytest.mark.skipif(sys.platform == "win32", reason="the streams are those of a shell")
def test_a_program_without_standard_input_reads_nothing(run_door):
    done = run_door("print([*sys.stdin], sys.stdin.isatty())", "<&-")
    assert (done.returncode, done.stdout, done.stderr) == (0, "[] False\n", "")


@pytest.mark.skipif(sys.platform == "win32", reason="the streams are those of a shell")
def test_a_program_without_standard_error_says_nothing(run_door):
    done = run_door("print('lost', file=sys.stderr)", "2>&-")
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.skipif(sys.platform == "win32", reason="the streams are those of a shell")
def test_a_result_that_goes_nowhere_is_refused(run_door):
    done = run_door("print('lost')", ">&-")
    assert done.returncode == 1 and done.stderr.startswith("qwen1-chat: standard output is closed")
    done = run_door("sys.stderr.write('served')", ">&-", "browser")
    assert (done.returncode, done.stderr) == (0, "served")


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGPIPE")
def test_a_pipe_that_nobody_reads_ends_a_program_without_a_word(run_door):
    done = run_door("raise BrokenPipeError", "")
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


def test_a_program_that_catches_errors_leaves_those_of_a_pipe_alone(monkeypatch):
    class Ended(Exception):
        pass

    def end():
        raise Ended

    def broken(*arguments):
        raise BrokenPipeError

    for module in (chat_commands, checkpoint_terminal, tiny_chat_commands):
        monkeypatch.setattr(module, "end_with_reader", end)
    monkeypatch.setattr(session, "run", broken)
    with pytest.raises(Ended):
        chat_commands.main(["hello"])
    with pytest.raises(Ended):
        checkpoint_terminal.reported(broken)()
    with pytest.raises(Ended):
        checkpoint_terminal.out.on_broken_pipe()
    with pytest.raises(Ended), tiny_chat_commands._failures():
        broken()


def test_no_package_is_said(tmp_path, repository):
    """As where somebody copied the doors alone."""
    (tmp_path / "qwen1_commands.py").write_bytes((repository / "qwen1_commands" / "__init__.py").read_bytes())
    code = "import importlib.util as util, qwen1_commands; util.find_spec = lambda name: None; qwen1_commands.chat()"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and "qwen1 isn't installed: run `pip install .`" in done.stderr


# --- the options of qwen1-finetune ---


@pytest.mark.skipif(OTHER_RELEASES, reason="the table of options is of other releases of torch and transformers")
def test_the_table_of_options_is_that_of_the_parser():
    table = json.loads(options.TABLE.read_text(encoding="utf-8"))
    assert table["groups"] == options.describe(finetuning.make_parser()), (
        "run `python -m qwen1.training.options > training/options.json`"
    )


@pytest.mark.skipif(OTHER_RELEASES, reason="the table of options is of other releases of torch and transformers")
@pytest.mark.parametrize("columns", ["40", "80", "200"])
def test_help_by_the_table_is_that_of_the_parser(monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns)
    assert options.help_at_once() == finetuning.make_parser().format_help()


def test_other_releases_are_asked_for_their_options(monkeypatch, capsys):
    monkeypatch.setattr(options, "versions", lambda: {"torch": "2.7.0", "transformers": "5.4.0"})
    assert options.help_at_once() is None
    with pytest.raises(SystemExit) as end:
        commands.main(["--help"])
    assert not end.value.code and "--model_name_or_path" in capsys.readouterr().out


def test_the_table_is_of_the_pins(repository):
    pins = (repository / "constraints.txt").read_text(encoding="utf-8")
    for name, release in json.loads(options.TABLE.read_text(encoding="utf-8"))["of"].items():
        assert re.search(rf"^{name}=={re.escape(release)}\b", pins, re.MULTILINE), f"{name} {release} is no pin"
