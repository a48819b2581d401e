"""What the tests run with is pinned, listed with its licence, and written down as a bill of materials."""

import json
import re
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
PIN = re.compile(r"([\w.-]+)==([\w.]+)(?:; (.+))?")
ELSEWHERE = {"audioop-lts", "coloredlogs", "decorator", "exceptiongroup", "humanfriendly", "six", "tomli"}
"""Pinned for other Pythons than the one that the bill is made on."""

COPYLEFT = re.compile(r"\b(?:A?GPL|GNU (?:Affero )?General)", re.IGNORECASE)
REMEDY = "run .ci/bill"


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pinned() -> dict[str, str]:
    """name -> version in constraints.txt on the Python that the bill is made on."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    found = [match.groups() for match in map(PIN.fullmatch, lines) if match]
    here = {"python_version": "3.11"}
    return {normal(name): version for name, version, marker in found if not marker or Marker(marker).evaluate(here)}


def needed_by(name: str, extras: frozenset[str], seen: set) -> set[str]:
    """The distributions that one needs here, with theirs; those that aren't installed are left out."""
    if (name, extras) in seen:
        return set()
    seen.add((name, extras))
    try:
        requirements = list(map(Requirement, distribution(name).requires or ()))
    except PackageNotFoundError:
        return set()
    names = {normal(name)}
    for needed in requirements:
        asked = [{"extra": extra} for extra in (*extras, "")]
        if not needed.marker or any(needed.marker.evaluate(environment) for environment in asked):
            names |= needed_by(normal(needed.name), frozenset(needed.extras), seen)
    return names


def rows() -> dict[str, tuple[str, str]]:
    """name -> version, licence in docs/licences.md."""
    text = (ROOT / "docs" / "licences.md").read_text(encoding="utf-8")
    table = re.findall(r"^\| ([a-z0-9-]+) \| ([0-9][\w.]*) \| (.+) \|$", text, re.MULTILINE)
    return {name: (version, licence) for name, version, licence in table}


def test_all_that_the_tests_need_is_pinned():
    """constraints.txt is the lock of CI: what it leaves open could be another release tomorrow."""
    needed = needed_by("qwen1", frozenset({"dev", "bits"}), set()) - {"qwen1", "setuptools"}
    assert len(needed) > 100
    assert needed - set(pinned()) == set()


@pytest.mark.parametrize("kind", ["sbom.cdx.json", "licences.md"])
def test_the_lists_are_of_these_pins(kind):
    if kind == "licences.md":
        listed = {name: version for name, (version, _) in rows().items()}
    else:
        bill = json.loads((ROOT / "docs" / kind).read_text(encoding="utf-8"))
        assert bill["bomFormat"] == "CycloneDX"
        listed = {normal(part["name"]): part["version"] for part in bill["components"]}
    assert {name: version for name, version in listed.items() if pinned().get(name) != version} == {}, REMEDY
    assert set(pinned()) - set(listed) <= ELSEWHERE, REMEDY


def test_every_licence_is_known_and_none_asks_for_our_source():
    licences = {name: licence for name, (_, licence) in rows().items()}
    assert {name for name, licence in licences.items() if licence.upper() == "UNKNOWN"} == set()
    assert {name for name, licence in licences.items() if COPYLEFT.search(licence)} == set()
    lesser = {name for name, licence in licences.items() if re.search("Lesser|LGPL", licence)}
    assert lesser == {"pyte"}, "which only tests of the terminal import"


def test_what_is_needed_without_extras_stands_first(pyproject):
    text = (ROOT / "docs" / "licences.md").read_text(encoding="utf-8")
    first = text.partition("## What its extras")[0]
    for requirement in map(Requirement, pyproject["project"]["dependencies"]):
        assert f"\n| {normal(requirement.name)} | " in first
