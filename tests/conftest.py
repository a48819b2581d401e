"""Fixtures that several folders share: golden data, vocabularies, tiny models."""

import base64
import functools
import gc
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: tests run several at a time
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # likewise: kernels for a GPU are tried without one
# As Gradio does when it shows a page, after which `warm.py` would start anew.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "True")

import pytest  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers import (  # noqa: E402
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2ForQuestionAnswering,
    Qwen2ForSequenceClassification,
    Qwen2ForTokenClassification,
)

from qwen1 import (  # noqa: E402
    QWenConfig,
    QWenForQuestionAnswering,
    QWenForSequenceClassification,
    QWenForTokenClassification,
    QWenLMHeadModel,
    QWenTokenizer,
    native_qwen,
    translating_qwen,
)
from qwen1.native_tokens_qwen import TOKENS  # noqa: E402

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # which pytest brings

ROOT = Path(__file__).parent.parent

TWINS = {
    QWenLMHeadModel: Qwen2ForCausalLM,
    QWenForSequenceClassification: Qwen2ForSequenceClassification,
    QWenForTokenClassification: Qwen2ForTokenClassification,
    QWenForQuestionAnswering: Qwen2ForQuestionAnswering,
}
NAMES = {
    "wte": "embed_tokens",
    ".h.": ".layers.",
    "ln_f": "norm",
    "ln_1": "input_layernorm",
    "ln_2": "post_attention_layernorm",
    "attn.c_proj": "self_attn.o_proj",
    "mlp.c_proj": "mlp.down_proj",
    "w1": "up_proj",
    "w2": "gate_proj",
}


CASES_COUNTED = 3
"""Cases of a test in which coverage counts lines."""


def pytest_configure(config):
    """Have the libraries made before the first test.

    Some tests compare, bit for bit, what two processes compute: a process that began while the compiler was at work
    computes through torch, and one that began later by the kernels. And options of CI's are for these tests, not for
    those that a test runs, once the workers have read them.
    """
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        os.environ.pop("PYTEST_ADDOPTS", None)
    if not hasattr(config, "workerinput"):  # once, before pytest-xdist starts its workers
        native_qwen.wait()
        translating_qwen.wait_for(TOKENS)


def pytest_collection_finish():
    """Spare the garbage collector the libraries: looking through all that they brought takes it half a second each time
    that a command asks for it.
    """
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    """Have each test, and the fixtures made for it, draw the same numbers in every run and in any order."""
    torch.manual_seed(0)


def pytest_collection_modifyitems(config, items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
    # The longest first: last in the order of the folders, they left one of two workers without work for minutes.
    items.sort(key=lambda item: item.path.name != "test_tiny_journey.py")
    if config.pluginmanager.hasplugin("_cov"):
        leave_out_of_coverage(items)


def leave_out_of_coverage(items):
    """Of tests with many cases all but the first few: a program whose lines are counted takes nearly twice as long, and
    the later cases reach few lines more. What coverage tells is the least that the tests reach.
    """
    cases = Counter()
    for item in items:
        test = item.nodeid.partition("[")[0]
        cases[test] += 1
        if cases[test] > CASES_COUNTED:
            item.add_marker("no_cover")


@pytest.fixture(scope="session")
def repository() -> Path:
    """The top level, which is what is pushed to the Hub."""
    return ROOT


@pytest.fixture(scope="session")
def code_of():
    """What transformers takes out of a folder along with a module: name -> its file and those that it names itself."""

    def files(module: str) -> list[Path]:
        named = re.findall(r"^from \.(\w+) import", (ROOT / f"{module}.py").read_text(), flags=re.MULTILINE)
        return [ROOT / f"{name}.py" for name in dict.fromkeys([module, *named])]

    return files


@pytest.fixture(scope="session")
def warm_with():
    """As `warm`, for other variables or with torch alone: (variables, "all" or "torch") -> first words of a command."""
    program, started = Path(__file__).with_name("warm.py"), {}
    read_at_loading = runpy.run_path(str(program))["read_at_loading"]

    def words(variables, loaded="all") -> list[str]:
        read = (loaded, *sorted(read_at_loading(variables, loaded).items()))
        if read not in started:
            address = Path(folder) / str(len(started))
            command = [sys.executable, str(program), "serve", str(address), loaded]
            server = subprocess.Popen(command, stdin=subprocess.PIPE, env=dict(variables))
            started[read] = server, [sys.executable, "-I", "-S", str(program), "run", str(address)]
            subprocess.run([*started[read][1], "-c", ""], env=dict(variables), check=True)  # when all is loaded
        return started[read][1]

    with tempfile.TemporaryDirectory() as folder:
        yield words if hasattr(os, "fork") else lambda *asked: [sys.executable]
        for server, _ in started.values():
            server.stdin.close()
            server.wait()


@pytest.fixture(scope="session")
def warm(warm_with) -> list[str]:
    """What stands for `sys.executable` in a command, to find torch and transformers loaded; see `warm.py`."""
    return warm_with(os.environ)


@pytest.fixture(scope="session")
def pyproject() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def golden() -> Path:
    return Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def golden_model(golden):
    """Load a golden checkpoint: (case, **from_pretrained arguments) -> model in eval mode."""

    def load(case: str, cls=QWenLMHeadModel, **kwargs):
        kwargs.setdefault("attn_implementation", "eager")
        return cls.from_pretrained(golden / "model" / case, **kwargs).eval()

    return load


@pytest.fixture(scope="session")
def golden_tensors(golden):
    """Load golden tensors: (case, file stem) -> dict of tensors."""
    return lambda case, name="expected": load_file(golden / "model" / case / f"{name}.safetensors")


@pytest.fixture(scope="session")
def published_vocabulary() -> Path:
    """The published qwen.tiktoken, which is too large to commit."""
    path = Path(os.environ.get("QWEN_TIKTOKEN", ROOT.parent / "shared" / "data" / "qwen.tiktoken"))
    if not path.is_file():
        pytest.skip(f"the published vocabulary is not at {path}")
    return path


@pytest.fixture(scope="session")
def byte_vocabulary(tmp_path_factory) -> Path:
    """A vocabulary of the 256 single bytes, so that every text encodes; special tokens begin at 256."""
    path = tmp_path_factory.mktemp("vocabulary") / "qwen.tiktoken"
    path.write_bytes(b"".join(base64.b64encode(bytes([byte])) + b" %d\n" % byte for byte in range(256)))
    return path


@pytest.fixture(scope="session")
def byte_tokenizer(byte_vocabulary) -> QWenTokenizer:
    return QWenTokenizer(str(byte_vocabulary))


@pytest.fixture(scope="session")
def tiny_config():
    """Make a small configuration, with NTK and LogN from 32 tokens on unless told otherwise."""

    def make(**changes) -> QWenConfig:
        values = dict(
            vocab_size=464,
            n_embd=64,
            n_layer=2,
            n_head=4,
            kv_channels=16,
            ffn_hidden_size=192,
            seq_length=32,
            n_positions=2048,
            use_dynamic_ntk=True,
            use_logn_attn=True,
            use_flash_attn=False,
            eos_token_id=256,
        )
        return QWenConfig(**{**values, **changes})

    return make


@pytest.fixture
def tiny_model(tiny_config):
    """Make a small model with random weights, in eval mode: (attention implementation, **configuration)."""

    def make(attn_implementation: str = "eager", cls=QWenLMHeadModel, seed: int = 0, **changes):
        torch.manual_seed(seed)
        config = tiny_config(**{"initializer_range": 0.2, **changes})
        config._attn_implementation = attn_implementation
        return cls(config).eval()

    return make


@pytest.fixture
def forget_libraries(monkeypatch):
    """Have libraries of C++ looked for again from here on; the tests behind go on with those that were found."""
    look = translating_qwen.translation.__wrapped__
    return lambda: monkeypatch.setattr(translating_qwen, "translation", functools.cache(look))


@pytest.fixture(scope="session")
def somebodys_own():
    """A class of module around one of ours, with none of its attributes."""

    class Wrapped(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, *args, **kwargs):
            return self.inner(*args, **kwargs)

    return Wrapped


@pytest.fixture
def each_read(monkeypatch):
    """Watch what a model is given from now on: model -> list of the number of tokens of each call, which grows."""

    def watch(model):
        counted = []
        embedding = torch.nn.functional.embedding

        def count(ids, weight, *args, **kwargs):
            if weight is model.transformer.wte.weight:
                counted.append(ids.numel())
            return embedding(ids, weight, *args, **kwargs)

        monkeypatch.setattr(torch.nn.functional, "embedding", count)  # a hook would end what is kept of conversations
        return counted

    return watch


@pytest.fixture
def count_read(each_read):
    """Count what a model is given from now on: model -> a function that tells how many tokens since its last call."""

    def watch(model):
        counted = each_read(model)

        def since():
            total = sum(counted)
            counted.clear()
            return total

        return since

    return watch


@pytest.fixture
def checkpoint_folder(tmp_path, repository, tiny_model, byte_vocabulary):
    """A folder as on the Hub: our code, a tiny random chat checkpoint and the byte vocabulary."""
    folder = tmp_path / "checkpoint"
    model = tiny_model()
    settings = {"chat_format": "chatml", "max_window_size": 6144, "max_new_tokens": 16, "pad_token_id": 256}
    model.generation_config.update(**settings, allow_custom_entries=True)
    model.save_pretrained(folder)
    shutil.copy(byte_vocabulary, folder)
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(repository / name, folder)
    for code in repository.glob("*_qwen*.py"):
        shutil.copy(code, folder)
    shutil.copy(repository / "qwen_generation_utils.py", folder)
    assert json.loads((folder / "config.json").read_text())["model_type"] == "qwen"
    return folder


@pytest.fixture
def qwen2_twin():
    """Make a Qwen2 with the weights, attention and labels of a model of ours without NTK and LogN."""

    def make(model):
        ours = model.config
        config = Qwen2Config(
            vocab_size=ours.vocab_size,
            hidden_size=ours.n_embd,
            num_hidden_layers=ours.n_layer,
            num_attention_heads=ours.n_head,
            num_key_value_heads=ours.n_head,
            intermediate_size=ours.ffn_hidden_size // 2,
            rms_norm_eps=ours.layer_norm_epsilon,
            max_position_embeddings=ours.n_positions,
            num_labels=ours.num_labels,
            pad_token_id=ours.pad_token_id,
        )
        config._attn_implementation = ours._attn_implementation
        twin = TWINS[type(model)](config)
        weights = {}
        for name, weight in model.state_dict().items():
            name = name.replace("transformer.", f"{twin.base_model_prefix}.")
            for ours_name, theirs_name in NAMES.items():
                name = name.replace(ours_name, theirs_name)
            parts = zip("qkv", weight.chunk(3), strict=True) if "c_attn" in name else [("", weight)]
            for part, rows in parts:
                weights[name.replace("attn.c_attn", f"self_attn.{part}_proj")] = rows
        twin.load_state_dict(weights)
        return twin.eval()

    return make
