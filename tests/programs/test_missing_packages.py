"""A package that isn't there: one sentence with the command that installs it, from the door of every command."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

import qwen1_commands
from qwen1.programs.packages import MissingPackage, explain, is_installed, require

RUN = """
import importlib, sys

hidden = {hidden!r}

class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == hidden:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.modules[hidden] = None  # for those who look it up, and for those who import it
sys.meta_path.insert(0, Hide())
sys.argv = {words!r}
getattr(importlib.import_module("qwen1_commands"), {door!r})()
"""
TRAIN = ["model", "--data_path", "data.json", "--output_dir", "out"]
AT_THE_DOOR = [
    ("browser", "typer", []),
    ("chat", "torch", ["Hello"]),
    ("chat", "transformers", ["Hello"]),
    ("checkpoint", "rich", ["inspect", "model"]),
    ("checkpoint", "torch", ["inspect", "model"]),
    ("extend_vocabulary", "transformers", ["a", "b", "c"]),
    ("finetune", "torch", TRAIN),
    ("tiny_chat", "typer", ["make", "new"]),
]
"""(command, package, words) where the import comes first: in a process of its own, which ends soon."""

ON_THE_WAY = [
    ("browser", "gradio", []),
    ("browser", "accelerate", ["model"]),
    ("browser", "peft", ["adapter"]),
    ("chat", "accelerate", ["model", "Hello"]),
    ("chat", "peft", ["adapter", "Hello"]),
    ("chat", "bitsandbytes", ["four-bits", "Hello"]),
    ("checkpoint", "peft", ["merge-lora", "model", "adapter", "new"]),
    ("checkpoint", "gguf", ["convert", "model", "new.gguf", "--to", "gguf"]),
    ("checkpoint", "gptqmodel", ["quantize", "model", "new", "--bits", "4", "--group-size", "32", "--length", "16"]),
    ("finetune", "peft", [*TRAIN, "--use_lora"]),
    ("finetune", "bitsandbytes", [*TRAIN, "--use_lora", "--q_lora"]),
    ("finetune", "trl", [*TRAIN, "--dpo"]),
    ("finetune", "matplotlib", [*TRAIN, "--report_to", "png"]),
    ("finetune", "tensorboard", [*TRAIN, "--report_to", "tensorboard"]),
    ("tiny_chat", "matplotlib", ["make", "new"]),
]


@pytest.fixture
def run_alone(repository, tmp_path):
    """Run a command in a process where a package is hidden: (door, hidden, words) -> exit status, standard error."""

    def run_door(door, hidden, words):
        done = subprocess.run(
            [sys.executable, "-c", RUN.format(hidden=hidden, words=[program(door), *words], door=door)],
            env={**os.environ, "PYTHONPATH": str(repository), "HF_HUB_OFFLINE": "1"},
            cwd=tmp_path,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        return done.returncode, done.stderr

    return run_door


@pytest.fixture
def run_here(monkeypatch, tmp_path, capsys):
    """The same in this process: (door, hidden, words) -> exit status, standard error."""

    def run_door(door, hidden, words):
        monkeypatch.setitem(sys.modules, hidden, None)
        if hidden == "tensorboard":
            monkeypatch.setitem(sys.modules, "tensorboardX", None)
        if hidden == "accelerate":  # transformers has looked for it long before
            monkeypatch.setattr("transformers.integrations.accelerate.is_accelerate_available", lambda: False)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [program(door), *words])
        with pytest.raises(SystemExit) as end:
            getattr(qwen1_commands, door)()
        said = capsys.readouterr().err
        return (1, said + str(end.value.code)) if isinstance(end.value.code, str) else (end.value.code, said)

    return run_door


def program(door):
    return f"qwen1-{door.replace('_', '-')}"


@pytest.fixture
def folders(checkpoint_folder, tmp_path):
    """A model, an adapter of it, one in four bits, and data, in the working directory."""
    checkpoint_folder.rename(tmp_path / "model")
    (tmp_path / "adapter").mkdir()
    adapter = {"base_model_name_or_path": "model", "peft_type": "LORA", "r": 2, "target_modules": ["c_attn"]}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(adapter))
    layer = "base_model.model.transformer.h.0.attn.c_attn"
    pair = {f"{layer}.lora_A.weight": torch.zeros(2, 64), f"{layer}.lora_B.weight": torch.zeros(192, 2)}
    save_file(pair, tmp_path / "adapter" / "adapter_model.safetensors")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    shutil.copytree(tmp_path / "model", tmp_path / "four-bits")
    (tmp_path / "four-bits" / "config.json").write_text(json.dumps(config))
    turns = [{"from": "user", "value": "Hello"}, {"from": "assistant", "value": "Hi"}]
    (tmp_path / "data.json").write_text(json.dumps([{"id": "1", "conversations": turns}]))


def check(door, hidden, status, said):
    assert status in (1, 2) and "Traceback" not in said, said
    last = said.strip().splitlines()[-1]
    assert last.startswith(f"{program(door)}: ")
    assert re.search(rf"pip install '?(qwen1\[gptq\]|{hidden})", last) or f"install {hidden}" in last, last


@pytest.mark.parametrize("door, hidden, words", AT_THE_DOOR, ids=[f"{case[0]}-{case[1]}" for case in AT_THE_DOOR])
def test_what_every_command_imports(run_alone, tmp_path, door, hidden, words):
    check(door, hidden, *run_alone(door, hidden, words))


@pytest.mark.parametrize("door, hidden, words", ON_THE_WAY, ids=[f"{case[0]}-{case[1]}" for case in ON_THE_WAY])
def test_what_is_needed_on_the_way(run_here, folders, tmp_path, door, hidden, words):
    before = sorted(tmp_path.iterdir())
    check(door, hidden, *run_here(door, hidden, words))
    assert [path.name for path in tmp_path.iterdir() if path not in before and path.name != "out"] == []


def test_every_command_has_a_case(pyproject):
    doors = {script.partition(":")[2] for script in pyproject["project"]["scripts"].values()}
    assert {case[0] for case in AT_THE_DOOR} == doors


# --- the sentence itself ---


def test_what_is_installed_is_required_without_a_word(monkeypatch):
    require("json", "this")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingPackage, match="^the plot needs matplotlib: pip install matplotlib$") as raised:
        require("matplotlib", "the plot")
    assert explain(raised.value) == str(raised.value)


def test_modules_are_told_by_the_name_that_pip_knows():
    error = ModuleNotFoundError("No module named 'yaml'", name="yaml")
    assert not is_installed("no_such_module_at_all.inner")
    assert "pip install --upgrade pyyaml" in explain(error), "yaml is here, so the copy lacks something"
    missing = ModuleNotFoundError("No module named 'no_such_module'", name="no_such_module")
    assert explain(missing) == "this needs no_such_module, which isn't installed: pip install no_such_module"


def test_the_import_that_failed_first_is_the_one_named():
    error = ImportError("Could not import module 'AutoModel'.\nAre its requirements there?", name="json")
    error.__cause__ = ModuleNotFoundError("No module named 'no_such_module'", name="no_such_module")
    assert "pip install no_such_module" in explain(error)
    assert explain(ImportError("libcuda.so.1: cannot open\nshared object")) == "libcuda.so.1: cannot open shared object"


def test_a_missing_part_of_this_package_is_no_missing_package(monkeypatch):
    def fail(name):
        raise ModuleNotFoundError("No module named 'qwen1.terminal'", name="qwen1.terminal")

    monkeypatch.setattr(qwen1_commands, "import_door", fail)
    with pytest.raises(ModuleNotFoundError, match="qwen1.terminal"):
        qwen1_commands.chat()
