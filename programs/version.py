"""The version of the programs, told without importing the package, which takes seconds and needs torch."""

from __future__ import annotations

import argparse
import re
from pathlib import Path


def version() -> str:
    """`__version__` of the package, as its text says: a clone isn't installed, so no metadata would tell."""
    text = (Path(__file__).parents[1] / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE)
    if found is None:
        raise ValueError('__init__.py has no line `__version__ = "..."`.')
    return found[1]


def add_version(parser: argparse.ArgumentParser) -> None:
    """Give a parser `--version`, which prints `PROGRAM VERSION` and ends."""
    text = f"%(prog)s {version()}"
    parser.add_argument("--version", action="version", version=text, help="print the version and end")
