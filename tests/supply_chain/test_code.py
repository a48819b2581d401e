"""What runs is what was installed: no code comes from files or the network, nor goes into what is written."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("browser", "conversion", "doctor", "programs", "qwen1_commands", "terminal", "training", "vocabulary")
SHIPPED = sorted({*ROOT.glob("*.py"), *(file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py"))})

RUNS_TEXT = {"eval", "exec", "compile", "__import__"}
UNPICKLES = {"torch.load", "pickle.load", "pickle.loads", "dill.load", "joblib.load", "yaml.load", "yaml.unsafe_load"}
PICKLES = {"torch.save", "pickle.dump", "pickle.dumps", "dill.dump", "joblib.dump"}
ASK = {"aiohttp", "ftplib", "http.client", "httpx", "requests", "socket.create_connection", "urllib.request", "urllib3"}
KEEP_CODE = {"cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}
CHATS = """
import socket, sys

def refuse(*arguments, **options):
    print("asked the network:", *arguments, file=sys.stderr)
    sys.exit(9)

socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = socket.create_connection = refuse
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
assert model.chat(tokenizer, "Hello")[0]
"""


def dotted(node: ast.expr) -> str:
    """`a.b.c` of an expression that is a name or an attribute of one."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def calls(path: Path) -> list[ast.Call]:
    return [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]


def called(names: set[str]) -> dict[str, list[ast.Call]]:
    """Calls of functions by their dotted names in the shipped code: file -> calls."""
    found = {}
    for path in SHIPPED:
        if matching := [call for call in calls(path) if dotted(call.func) in names]:
            found[path.relative_to(ROOT).as_posix()] = matching
    return found


def test_no_text_is_run():
    assert called(RUNS_TEXT) == {}


def test_one_place_unpickles_and_only_tensors():
    found = called(UNPICKLES)
    assert list(found) == ["conversion/files/pickles.py"]
    for call in found["conversion/files/pickles.py"]:
        assert {"weights_only"} <= {keyword.arg for keyword in call.keywords if ast.unparse(keyword.value) == "True"}


def test_nothing_is_pickled():
    assert called(PICKLES) == {}
    for path in SHIPPED:
        switches = [keyword for call in calls(path) for keyword in call.keywords if keyword.arg == "safe_serialization"]
        assert [path.name for switch in switches if ast.unparse(switch.value) != "True"] == []


def imported(path: Path) -> set[str]:
    """What a file imports, each name also by the modules that it is in."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names | {name.rsplit(".", count)[0] for name in names for count in range(1, name.count(".") + 1)}


def test_nothing_is_fetched_but_through_huggingface_hub():
    assert [path.name for path in SHIPPED if imported(path) & ASK] == []
    assert called({"socket.create_connection"}) == {}


def test_one_place_knows_pickles():
    assert [path.name for path in SHIPPED if imported(path) & KEEP_CODE] == ["pickles.py"]


def test_no_shell_gets_text_put_together():
    """The one shell runs a constant script that takes its names from the environment and its arguments."""
    for path in SHIPPED:
        for call in calls(path):
            assert "shell" not in {keyword.arg for keyword in call.keywords}, path
    assert called({"os.system", "os.popen", "subprocess.getoutput"}) == {}


@pytest.mark.slow
def test_a_chat_with_a_local_checkpoint_asks_nothing_of_the_network(repository):
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "COV_"))}
    command = [sys.executable, "-c", CHATS, str(repository / "qwen-tiny-chat")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
