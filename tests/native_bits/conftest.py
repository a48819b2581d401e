"""Folders whose models are loaded in few bits."""

import pytest
import torch

from qwen1 import QWenBitsConfig, QWenLMHeadModel


@pytest.fixture
def whole(tiny_model, tmp_path):
    """Save a small model: (dtype, **configuration) -> folder."""

    def save(dtype=torch.bfloat16, **changes):
        folder = tmp_path / "whole"
        tiny_model("sdpa", **changes).to(dtype).save_pretrained(folder)
        return folder

    return save


@pytest.fixture
def load():
    """Load a folder in few bits: (folder, bits, **settings) -> model."""

    def read(folder, bits=8, cls=QWenLMHeadModel, **settings):
        return cls.from_pretrained(folder, quantization_config=QWenBitsConfig(bits=bits, **settings)).eval()

    return read
