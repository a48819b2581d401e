"""Models in folders, and several processes that load them."""

import runpy
from pathlib import Path

import pytest
import torch

from qwen1 import QWenConfig, QWenLMHeadModel


@pytest.fixture(scope="session")
def in_processes(tmp_path_factory):
    """Call a function of the test's file in several processes: (function, *arguments, count=2) -> their results."""
    run = runpy.run_path(str(Path(__file__).parent / "processes.py"))["run"]
    return lambda function, *arguments, **settings: run(
        function, *arguments, folder=tmp_path_factory.mktemp("processes"), **settings
    )


@pytest.fixture(scope="session")
def model_folders(tmp_path_factory):
    """Small models of four layers, "plain" and "tied", and "grouped" heads: name -> folder."""
    changes = {"plain": {}, "tied": {"tie_word_embeddings": True}, "grouped": {"num_key_value_heads": 2}}
    folders = {}
    for name, values in changes.items():
        torch.manual_seed(0)
        config = QWenConfig(
            vocab_size=464,
            n_embd=64,
            n_layer=4,
            n_head=4,
            kv_channels=16,
            ffn_hidden_size=192,
            seq_length=32,
            n_positions=2048,
            use_dynamic_ntk=True,
            use_logn_attn=True,
            use_flash_attn=False,
            eos_token_id=256,
            initializer_range=0.2,
            **values,
        )
        folders[name] = tmp_path_factory.mktemp(name)
        QWenLMHeadModel(config).save_pretrained(folders[name])
    return folders
