"""Models in folders, and several processes that load them."""

import runpy
from pathlib import Path

import pytest
import torch

from qwen1 import QWenLMHeadModel


@pytest.fixture(scope="session")
def in_processes(tmp_path_factory, warm):
    """Call a function of the test's file in several processes: (function, *arguments, count=2) -> their results."""
    run = runpy.run_path(str(Path(__file__).parent / "processes.py"))["run"]
    return lambda function, *arguments, **settings: run(
        function, *arguments, folder=tmp_path_factory.mktemp("processes"), python=warm, **settings
    )


@pytest.fixture(scope="session")
def model_folders(tmp_path_factory, tiny_config):
    """Small models of four layers, "plain" and "tied", and "grouped" heads: name -> folder."""
    changes = {"plain": {}, "tied": {"tie_word_embeddings": True}, "grouped": {"num_key_value_heads": 2}}
    folders = {}
    for name, values in changes.items():
        torch.manual_seed(0)
        config = tiny_config(n_layer=4, initializer_range=0.2, **values)
        folders[name] = tmp_path_factory.mktemp(name)
        QWenLMHeadModel(config).save_pretrained(folders[name])
    return folders
