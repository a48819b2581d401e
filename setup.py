"""What pyproject.toml can't say: which folders are packages, and a README that can be read away from the repository."""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
_FRONT_MATTER = re.compile(r"\A---\n.*?\n---\n\s*", re.DOTALL)
_LINK = re.compile(r"\[([^\]]*)\]\((?![a-z]+:|#)([^)\s]+)\)")


def readme(text: str, source: str | None) -> str:
    """The README for the page of a package index, where paths lead nowhere and the Hub's front matter is text.

    Args:
        text: of README.md.
        source: address of the repository, on GitHub or the Hub; without one the links to its files become plain words.
    """
    replacement = r"\1" if source is None else rf"[\1]({source.rstrip('/')}/blob/main/\2)"
    return _LINK.sub(replacement, _FRONT_MATTER.sub("", text))


def source_address(pyproject: str) -> str | None:
    """`Source` of [project.urls] in pyproject.toml, None where it isn't there."""
    found = re.search(r'^Source = "(.+)"$', pyproject, re.MULTILINE)
    return None if found is None else found[1]


if __name__ == "__main__":
    address = source_address((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    setup(
        script_name="setup.py",  # by which setuptools knows that this file is no module of qwen1
        packages=[
            "qwen1",
            *(f"qwen1.{name}" for name in sorted(find_packages(str(ROOT), exclude=["qwen1_commands"]))),
            "qwen1_commands",
        ],
        long_description=readme((ROOT / "README.md").read_text(encoding="utf-8"), address),
        long_description_content_type="text/markdown",
    )
