"""The private names of transformers and torch that the code leans on are those of the table in docs/transformers.md."""

import ast
import importlib
import inspect
import re

import pytest


@pytest.fixture(scope="module")
def code(repository):
    """The files of the Hub: path -> syntax tree."""
    return {path: ast.parse(path.read_text()) for path in repository.glob("*qwen*.py")}


@pytest.fixture(scope="module")
def table(repository):
    """Rows of the table: the names, and the test."""
    text = (repository / "docs" / "transformers.md").read_text().partition("## Private names")[2]
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("| `_")]
    return [(re.findall(r"`(_\w+)`", names), re.findall(r"`(tests/\S+)`", test)) for names, _, test in rows]


def is_private(name):
    return isinstance(name, str) and name.startswith("_") and not name.startswith("__") and name.isidentifier()


def own_names(tree):
    """What a file defines itself: functions, classes, variables, attributes of its objects."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if isinstance(node.value, ast.Name) and node.value.id in ("self", "other"):
                yield node.attr


def read_names(tree):
    """Attributes that a file reads, by name or through getattr."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            yield node.attr
        elif isinstance(node, ast.Constant) and is_private(node.value):
            yield node.value


def overridden_names(path):
    """Private attributes of our classes that a class of somebody else's has too."""
    module = importlib.import_module(f"qwen1.{path.stem}")
    classes = inspect.getmembers(module, inspect.isclass)
    for cls in (cls for _, cls in classes if cls.__module__ == module.__name__):
        strangers = [base for base in cls.__mro__[1:] if not base.__module__.startswith("qwen1")]
        yield from (name for name in vars(cls) if is_private(name) and any(name in vars(base) for base in strangers))


MADE_BY_PYTHON_AND_TORCH = {"_abc_impl", "_backward_cls"}
OF_REGISTRATION = {"_auto_class"}  # set by `register_for_auto_class`, which is public
OF_EARLY_RELEASES = {"_cache"}  # of transformers 5.4, and nowhere in the newest


def test_the_table_is_complete(code, table):
    own = {name for tree in code.values() for name in own_names(tree)}
    used = {name for tree in code.values() for name in read_names(tree)} - own
    overridden = {name for path in code for name in overridden_names(path)}
    documented = {name for names, _ in table for name in names}
    assert (used | overridden) - MADE_BY_PYTHON_AND_TORCH - OF_REGISTRATION | OF_EARLY_RELEASES == documented


def test_each_row_names_a_test(repository, table):
    for names, tests in table:
        assert tests, f"{names} has no test"
        for test in tests:
            assert (repository / test.partition("::")[0]).is_file(), f"{test} doesn't exist"
