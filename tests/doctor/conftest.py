"""The shipped model as a patient, unharmed; tests make it ill by `monkeypatch` or in a copy of its folder."""

import shutil

import pytest
import torch

from qwen1.doctor.patient import open_patient
from qwen1.programs.shipped import TINY_CHAT


@pytest.fixture(scope="session")
def loaded():
    return open_patient(TINY_CHAT, "cpu")


@pytest.fixture
def patient(loaded):
    """Well when a test begins, whatever the one before did to its configuration or its tokenizers."""
    yield loaded
    assert loaded.model.config.seq_length == 512 and loaded.model.config._attn_implementation == "sdpa"
    for name in ("slow", "fast", "ruler"):
        vars(loaded).pop(name, None)


@pytest.fixture
def folder(tmp_path):
    """A copy of the shipped folder that may be changed."""
    copied = tmp_path / "model"
    shutil.copytree(TINY_CHAT, copied, ignore=shutil.ignore_patterns("*.png", "training_log.json"))
    return copied


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
