"""Pickles are data: in every door, one that would run code is refused and leaves no trace."""

import os
import re

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from qwen1 import QWenForSequenceClassification, QWenLMHeadModel, QWenTokenizer
from qwen1.conversion.commands import app
from qwen1.programs.models import open_model


class Marker:
    """Unpickles as a call that makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture
def marker(tmp_path):
    return tmp_path / "code-ran"


@pytest.fixture(params=["zip", "legacy"])
def poison(request, marker):
    """Write a file that would run code: (path) -> None; some of it are tensors, as a reader expects."""

    def write(path):
        path.unlink(missing_ok=True)
        content = {"transformer.wte.weight": torch.ones(2, 2), "state": {}, "extra": Marker(marker)}
        torch.save(content, path, _use_new_zipfile_serialization=request.param == "zip")

    return write


@pytest.fixture
def unharmed(marker, capsys):
    """Assert that a door refuses a file that would have run code, for this reason: (path, call) -> None."""

    def check(path, call):
        with pytest.raises((Exception, SystemExit)) as refusal:
            call()
        assert not marker.exists(), "code of the file ran"
        said = re.sub(r"\s", "", f"{refusal.value}{''.join(capsys.readouterr())}")  # long paths are wrapped
        assert path.name in said or "Weightsonlyloadfailed" in said
        assert getattr(refusal.value, "code", 1) in (1, 3), "refused, or found wanting"
        torch.load(path, weights_only=False)
        assert marker.exists(), "the file was no threat, so the test showed nothing"

    return check


@pytest.fixture
def poisoned_folder(checkpoint_folder, poison):
    """A checkpoint whose weights are such a file: (name of the file) -> folder, file."""

    def make(name="pytorch_model.bin"):
        (checkpoint_folder / "model.safetensors").unlink()
        poison(checkpoint_folder / name)
        return checkpoint_folder, checkpoint_folder / name

    return make


@pytest.mark.parametrize(
    "load",
    [
        QWenLMHeadModel.from_pretrained,
        QWenForSequenceClassification.from_pretrained,
        lambda folder: AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True),
        lambda folder: open_model(str(folder)),
    ],
    ids=["class", "classifier", "remote-code", "programs"],
)
def test_models(poisoned_folder, unharmed, load):
    folder, file = poisoned_folder()
    unharmed(file, lambda: load(folder))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth"])
@pytest.mark.parametrize(
    "words",
    [
        ("inspect", "SRC"),
        ("upgrade", "SRC", "DST"),
        ("upgrade", "SRC", "--in-place"),
        ("convert", "SRC", "DST", "--to", "qwen2"),
        ("verify", "SRC", "SRC"),
        ("quantize", "SRC", "DST", "--bits", "8"),
        ("push", "SRC", "me/it", "--dry-run"),
    ],
    ids=lambda words: " ".join(words[:1] + words[2:]),
)
def test_commands_on_checkpoints(poisoned_folder, unharmed, tmp_path, words, name):
    folder, file = poisoned_folder(name)
    places = {"SRC": str(folder), "DST": str(tmp_path / "result")}

    def call():
        app([places.get(word, word) for word in words])

    unharmed(file, call)
    assert not (tmp_path / "result").exists()


@pytest.mark.parametrize("door", ["merge-lora", "peft"])
def test_adapters(checkpoint_folder, poison, unharmed, tmp_path, door):
    adapter = tmp_path / "adapter"
    lora = LoraConfig(target_modules=["c_attn"], task_type="CAUSAL_LM")
    model = QWenLMHeadModel.from_pretrained(checkpoint_folder)
    get_peft_model(model, lora).save_pretrained(adapter)
    (adapter / "adapter_model.safetensors").unlink()
    file = adapter / "adapter_model.bin"
    poison(file)
    doors = {
        "merge-lora": lambda: app(["merge-lora", str(checkpoint_folder), str(adapter), str(tmp_path / "merged")]),
        "peft": lambda: PeftModel.from_pretrained(model, adapter),
    }
    unharmed(file, doors[door])


@pytest.mark.parametrize(
    "load, name",
    [(QWenTokenizer, "qwen.tiktoken"), (AutoTokenizer, "qwen.tiktoken"), (AutoTokenizer, "tokenizer.json")],
)
def test_vocabularies(checkpoint_folder, poison, unharmed, load, name):
    file = checkpoint_folder / name
    poison(file)
    options = {"trust_remote_code": True} if load is AutoTokenizer else {}
    unharmed(file, lambda: load.from_pretrained(checkpoint_folder, **options))
