"""The rooms of ARCHITECTURE.md: every file has one, imports point one way, and nothing has outgrown its name."""

import ast
import re
from graphlib import TopologicalSorter

import pytest

from qwen1.modeling_qwen import QWenLMHeadModel

OTHERS = ("tests", "benchmarks", "examples", "qwen-tiny-chat", "build", "dist", "setup")
DATA = {"training.tiny.dialogues"}  # sentences
DOORS = {"app", "convert_checkpoint", "finetune"}  # three lines each, for who runs them by path
LIMITS = {"file": 600, "class": 250, "function": 50}
THE_HUB = "the Hub's files"


@pytest.fixture(scope="module")
def modules(repository):
    """Every module of the package by its name, as a syntax tree; packages end in `.__init__`."""
    names = {path: path.relative_to(repository).with_suffix("").parts for path in repository.rglob("*.py")}
    return {
        ".".join(parts): ast.parse(path.read_text(encoding="utf-8"))
        for path, parts in names.items()
        if parts[0] not in OTHERS and not any(part.startswith(".") for part in parts)
    }


def is_main(node):
    return isinstance(node, ast.If) and "__name__" in ast.unparse(node.test)


def imports_of(name, modules):
    """Modules of the package that a module imports, at its top or when one of its functions runs."""
    package = name.split(".")[:-1]
    tree = ast.Module([node for node in modules[name].body if not is_main(node)], [])
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            target = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                found = [f"{target}.{alias.name}".strip("."), target, f"{target}.__init__".strip(".")]
                yield next((module for module in found if module in modules), "__init__")


@pytest.fixture(scope="module")
def imports(modules):
    return {name: set(imports_of(name, modules)) - {name} for name in modules}


@pytest.fixture(scope="module")
def rooms(repository):
    """Room -> names of its files, names of the rooms that it may import; the first seven are the Hub's."""
    text = (repository / "ARCHITECTURE.md").read_text(encoding="utf-8").partition("## The way of a token")[0]
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    table = {}
    for names, files, allowed in ([cell.strip() for cell in line[1:-1].split("|")] for line in lines[1:]):
        for room in names.split(", "):
            table[room] = re.findall(r"`([\w.]+)`", files) or [room], allowed.split(", ")
    return table


def room_of(module, rooms):
    """The room with the longest name that a module's begins with."""
    fitting = {
        name: room for room, (names, _) in rooms.items() for name in names if f"{module}.".startswith(f"{name}.")
    }
    return fitting[max(fitting, key=len)] if fitting else None


def test_every_file_has_a_room(modules, rooms):
    homeless = {name for name in modules if room_of(name, rooms) is None}
    assert homeless == DOORS
    named = {name for names, _ in rooms.values() for name in names}
    assert {name for name in named if not any(f"{module}.".startswith(f"{name}.") for module in modules)} == set()


def test_rooms_import_those_of_their_row(imports, rooms):
    hub = ["values", "configuration", "state", "computing", "tokenizer", "conversation", "model"]
    strays = []
    for module, others in imports.items():
        room = room_of(module, rooms)
        if room is None:
            continue
        allowed = {room, *rooms[room][1], *(hub if THE_HUB in rooms[room][1] else ())}
        strays += [f"{module} ({room}) imports {other}" for other in others if room_of(other, rooms) not in allowed]
    assert strays == []


def test_no_file_leads_back_to_itself(imports):
    order = list(TopologicalSorter(imports).static_order())  # raises CycleError, which names the circle
    assert order.index("versions_qwen") < order.index("modeling_qwen") < order.index("__init__")


def test_nothing_has_outgrown_its_name(modules, repository):
    """Lines, docstrings included."""
    large = []
    for name, tree in modules.items():
        sizes = [("file", name, tree.body[-1].end_lineno)]
        for node in ast.walk(tree):
            kind = "class" if isinstance(node, ast.ClassDef) else "function"
            if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                sizes.append((kind, f"{name}.{node.name}", node.end_lineno - node.lineno + 1))
        large += [row for row in sizes if row[2] > LIMITS[row[0]] and name not in DATA]
    assert large == []
    assert len((repository / "modeling_qwen.py").read_text(encoding="utf-8").splitlines()) < 600


def test_the_way_of_a_token_names_what_there_is(repository, modules):
    text = (repository / "ARCHITECTURE.md").read_text(encoding="utf-8")
    named = set(re.findall(r"\b(\w+_qwen|qwen_generation_utils)\b", text))
    assert named <= set(modules)
    assert hasattr(QWenLMHeadModel, "chat") and named >= {"chat_qwen", "generation_qwen", "attention_qwen", "ntk_qwen"}
