"""`transformers serve` as a program of its own, and the shipped model to compare its replies with."""

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from qwen1 import QWenLMHeadModel, QWenTokenizerFast

STARTS_WITHIN = 180  # seconds, on a machine with other work


@pytest.fixture(scope="session")
def transformers_command() -> str:
    """Transformers' own command, as installed with this Python."""
    path = Path(sys.executable).with_name("transformers")
    if not path.is_file():
        pytest.skip(f"transformers' command is not at {path}")
    return str(path)


@pytest.fixture(scope="session")
def offline_environment(tmp_path_factory) -> dict[str, str]:
    """Environment for programs: no Hub, an empty cache, no proxy between them, plain terminals."""
    home = tmp_path_factory.mktemp("hf")
    (home / "hub").mkdir()  # without which listing the models is an error
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "COV_"))}
    return {
        **kept,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "1",
        "NO_PROXY": "127.0.0.1",
        "PYTHONIOENCODING": "utf-8",
        "TERM": "dumb",
        "COLUMNS": "200",
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_until_healthy(url: str, process: subprocess.Popen, log: Path) -> None:
    end = time.monotonic() + STARTS_WITHIN
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while process.poll() is None and time.monotonic() < end:
        try:
            opener.open(f"{url}/health", timeout=5).close()
            return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.2)
    raise AssertionError(f"the server doesn't answer:\n{log.read_text()[-4000:]}")


@pytest.fixture(scope="session")
def serve(transformers_command, offline_environment, tmp_path_factory):
    """Run `transformers serve` while a block runs: (folder, *options) -> its address, client and log."""
    for module in ("fastapi", "openai", "uvicorn"):
        pytest.importorskip(module, reason=f"transformers serve needs {module}")
    from openai import DefaultHttpxClient, OpenAI

    @contextmanager
    def run(folder: Path, *options: str) -> Iterator[SimpleNamespace]:
        port, log = free_port(), tmp_path_factory.mktemp("server") / "log"
        command = [transformers_command, "serve", str(folder), "--trust-remote-code", "--host", "127.0.0.1"]
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*command, "--port", str(port), *options], stdout=output, stderr=output, env=offline_environment
            )
        url = f"http://127.0.0.1:{port}"
        try:
            wait_until_healthy(url, process, log)
            with DefaultHttpxClient(trust_env=False, timeout=120) as connection:
                client = OpenAI(base_url=f"{url}/v1", api_key="none", http_client=connection, max_retries=0)
                yield SimpleNamespace(url=url, port=port, client=client, log=log, folder=str(folder))
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    return run


@pytest.fixture(scope="session")
def shipped(repository) -> SimpleNamespace:
    """The model that ships: its folder, model and tokenizer."""
    folder = repository / "qwen-tiny-chat"
    model = QWenLMHeadModel.from_pretrained(folder).eval()
    return SimpleNamespace(folder=folder, model=model, tokenizer=QWenTokenizerFast.from_pretrained(folder))
