"""Folders that other engines are given, and their environments."""

import json
import os
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from qwen1 import QWenLMHeadModel, QWenTokenizerFast
from qwen1.conversion.commands import app

QUESTIONS = ["你好", "12+34=?", "What is the capital of France?", "法国的首都是哪里？"]


@pytest.fixture(scope="session")
def shipped(repository, tmp_path_factory) -> SimpleNamespace:
    """The model that ships: its folder, upgraded and as Qwen2, and what it says."""
    folder, work = repository / "qwen-tiny-chat", tmp_path_factory.mktemp("engines")
    app(["upgrade", str(folder), str(work / "upgraded"), "--copy"], standalone_mode=False)
    app(["convert", str(folder), str(work / "qwen2"), "--to", "qwen2"], standalone_mode=False)
    model = QWenLMHeadModel.from_pretrained(folder, fp32=True).eval()
    tokenizer = QWenTokenizerFast.from_pretrained(folder)
    replies = {text: model.chat(tokenizer, text, do_sample=False)[0] for text in QUESTIONS}
    return SimpleNamespace(upgraded=work / "upgraded", qwen2=work / "qwen2", tokenizer=tokenizer, replies=replies)


@pytest.fixture
def published_chat(checkpoint_folder, published_vocabulary, tiny_model):
    """A tiny random chat checkpoint with the vocabulary of all published ones, as QWen and as Qwen2."""
    model = tiny_model(vocab_size=151936, eos_token_id=151643, pad_token_id=None)
    settings = {"chat_format": "chatml", "max_window_size": 6144, "eos_token_id": [151645, 151643]}
    model.generation_config.update(**settings, allow_custom_entries=True)
    model.save_pretrained(checkpoint_folder)
    shutil.copy(published_vocabulary, checkpoint_folder / "qwen.tiktoken")
    target = checkpoint_folder.parent / "published-qwen2"
    app(["convert", str(checkpoint_folder), str(target), "--to", "qwen2"], standalone_mode=False)
    return SimpleNamespace(qwen=checkpoint_folder, qwen2=target)


@pytest.fixture(scope="session")
def interpreter():
    """The Python of an environment that an environment variable names: (variable, what is in it) -> path."""

    def find(variable: str, contents: str) -> Path:
        path = os.environ.get(variable)
        if not path:
            pytest.skip(f"{variable} names no Python of an environment with {contents} (docs/serve.md)")
        assert Path(path).is_file(), f"{variable}={path} doesn't exist"
        return Path(path)

    return find


@pytest.fixture(scope="session")
def run_in(tmp_path_factory):
    """Run a script in another environment, offline: (program, arguments) -> the JSON object that it prints."""

    def run(command: Path | str, *arguments: Path | str, timeout: int = 1200):
        left_out = ("HF_", "COV_", "PYTHONPATH")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(left_out)}
        path = f"{Path(command).parent}{os.pathsep}{os.environ['PATH']}"
        environment = {**kept, "HF_HOME": str(tmp_path_factory.mktemp("hf")), "HF_HUB_OFFLINE": "1", "PATH": path}
        environment.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; by itself it takes most of the memory
        done = subprocess.run(
            [str(command), *map(str, arguments)],
            env=environment,
            capture_output=True,
            encoding="utf-8",
            timeout=timeout,
        )
        assert done.returncode == 0, done.stderr[-6000:]
        return next((json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")), None)

    return run
