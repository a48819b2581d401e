"""Checkpoints in and out: look at them, bring them up to date, convert, compare, merge and publish them.

    python convert_checkpoint.py COMMAND ...

Installed, the same program is called `qwen1-checkpoint`. The commands are in `conversion/commands/`.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path


def main() -> None:
    """Run the program; ends the process with its exit status."""
    importlib.import_module(f"{__package__ or _make_package()}.conversion.commands").main()


def _make_package() -> str:
    """Make the folder of this file the package `qwen1`, as nobody has when it is run by its path."""
    location = Path(__file__).with_name("__init__.py")
    spec = importlib.util.spec_from_file_location("qwen1", location)
    if spec is None or spec.loader is None:
        raise ImportError(f"{location} can't be imported: run this program in its own repository.")
    package = sys.modules["qwen1"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(package)
    return "qwen1"


if __name__ == "__main__":
    main()
