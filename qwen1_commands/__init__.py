"""The doors of the programs, installed beside `qwen1`, whose `--help` and `--version` answer at once.

`import qwen1` imports torch and transformers and registers its classes with them, which takes seconds. A command line
is read before that: its module is imported from a bare package, in which `qwen1/__init__.py` hasn't run and which is
forgotten again. Whatever the command then imports brings the whole of `qwen1` along, as everywhere.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

_INTERRUPTED = 130
_AROUND = Path(__file__).resolve().parents[1]


class _Clone(MetaPathFinder):
    """Finds `qwen1` in the clone that this folder lies in, whatever the clone's name and whatever is installed."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname != "qwen1":
            return None
        return importlib.util.spec_from_file_location(fullname, _AROUND / "__init__.py")


if (_AROUND / "modeling_qwen.py").is_file():
    sys.meta_path.insert(0, _Clone())


def import_door(name: str) -> ModuleType:
    """Import a module of `qwen1` that imports nothing heavy, and nothing else of `qwen1`.

    Raises:
        ModuleNotFoundError: `qwen1` is neither installed nor around this folder.
    """
    if "qwen1" in sys.modules:
        return importlib.import_module(f"qwen1.{name}")
    spec = importlib.util.find_spec("qwen1")
    if spec is None:
        raise ModuleNotFoundError("qwen1 isn't installed: run `pip install .` in its repository.", name="qwen1")
    sys.modules["qwen1"] = importlib.util.module_from_spec(spec)
    try:
        return importlib.import_module(f"qwen1.{name}")
    finally:  # the packages, not their modules: the next import from one of them begins with `import qwen1`
        for found in [name for name in sys.modules if name.partition(".")[0] == "qwen1"]:
            if hasattr(sys.modules[found], "__path__"):
                del sys.modules[found]


def _open_streams(program: str, prints: bool) -> None:
    """Give a program that was started without standard input or standard error, as by a daemon, empty ones."""
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - for the whole process
    if sys.stdin is None:
        sys.stdin = open(os.devnull)  # noqa: SIM115
    if sys.stdout is None and prints:
        sys.exit(f"{program}: standard output is closed, where the result goes: send it to a file (> FILE).")


def _run(name: str, program: str, prints: bool = False) -> NoReturn:
    """Run a program.

    Args:
        prints: whether its result goes to standard output.

    A package that it misses is a sentence with the command that installs it; space, rights or memory that the machine
    refuses, one with what helps. Ctrl-C before the program has begun, which takes seconds of imports, ends it as later.
    """
    _open_streams(program, prints)
    try:
        sys.exit(import_door(name).main())
    except KeyboardInterrupt:
        sys.exit(_INTERRUPTED)
    except BrokenPipeError:
        sys.exit(import_door("programs.printing").end_with_reader())
    except ImportError as error:
        if (error.name or "").partition(".")[0] in ("qwen1", "qwen1_commands"):
            raise  # no package is missing, but a part of this one
        sys.exit(f"{program}: {import_door('programs.packages').explain(error)}")
    except Exception as error:
        failures = import_door("programs.failures")
        if not failures.is_of_machine(error):
            raise
        sys.exit(f"{program}: {failures.told(error)}")


def browser() -> NoReturn:
    """Run `qwen1-browser`; ends the process, as all of these do."""
    _run("browser.commands", "qwen1-browser")


def chat() -> NoReturn:
    """Run `qwen1-chat`."""
    _run("terminal.commands", "qwen1-chat", prints=True)


def checkpoint() -> NoReturn:
    """Run `qwen1-checkpoint`."""
    _run("conversion.commands", "qwen1-checkpoint", prints=True)


def extend_vocabulary() -> NoReturn:
    """Run `qwen1-extend-vocabulary`."""
    _run("vocabulary.commands", "qwen1-extend-vocabulary")


def finetune() -> NoReturn:
    """Run `qwen1-finetune`."""
    _run("training.commands", "qwen1-finetune")


def tiny_chat() -> NoReturn:
    """Run `qwen1-tiny-chat`."""
    _run("training.tiny.commands", "qwen1-tiny-chat", prints=True)
