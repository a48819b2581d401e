"""The rooms of `conversion/`: what each may import, so that a checkpoint goes one way through them."""

import ast
from pathlib import Path

import pytest

ORDER = (
    "errors",
    "files",
    "formats",
    "opening",
    "writing",
    "merging",
    "quantising",
    "planning",
    "sizing",
    "inspecting",
    "checking",
    "publishing",
    "command_line",
)
"""Each room knows those before it. `writing` holds what plans are made of, so it comes before `planning`."""

APART = {"merging", "quantising", "planning", "sizing", "inspecting", "checking", "publishing"}
"""Rooms that only the commands bring together."""

TOGETHER = {("planning", "merging"), ("planning", "quantising"), ("inspecting", "sizing")}
"""But for these: planning reads what was merged or quantised, and `inspect` tells how many devices a model needs."""


def module_of(path: Path, root: Path) -> str:
    return ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path, root: Path) -> set[str]:
    """Modules below `conversion/` that a file imports, functions included."""
    package = path.relative_to(root).parent.parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and 0 < node.level <= len(package) + 1:
            parts = (*package[: len(package) - node.level + 1], *(node.module or "").split("."))
            found.add(".".join(part for part in parts if part))
    return found


@pytest.fixture(scope="module")
def graph(repository):
    root = repository / "conversion"
    return {module_of(path, root): imports(path, root) for path in root.rglob("*.py") if path.parent != root}


def test_every_room_has_its_place(repository):
    rooms = {path.parent.name for path in (repository / "conversion").glob("*/__init__.py")}
    assert rooms | {"errors"} == set(ORDER)
    files = {path.name for path in (repository / "conversion").glob("*.py")}
    assert files == {"__init__.py", "commands.py", "errors.py"}


def test_rooms_know_only_those_before_them(graph):
    wrong = []
    for module, known in graph.items():
        here = module.partition(".")[0]
        for other in (name.partition(".")[0] for name in known):
            early = ORDER.index(other) <= ORDER.index(here)
            apart = {here, other} <= APART and here != other and (here, other) not in TOGETHER
            if not early or apart:
                wrong.append(f"{module} imports {other}")
    assert wrong == []


def test_no_module_leads_back_to_itself(graph):
    def leads(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path, module))
        if module not in seen:
            for other in graph.get(module, ()):
                leads(other, (*path, module))
            seen.add(module)

    seen: set[str] = set()
    for module in graph:
        leads(module, ())
