"""Saving what FSDP2, an engine or a program has put a class of its own in the place of."""

import json
import os
import subprocess
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.fsdp import fully_shard

from qwen1 import QWenConfig, QWenForSequenceClassification, QWenLMHeadModel, QWenTokenizer, QWenTokenizerFast
from qwen1.saving_qwen import published_class, refuse_kernel_weights, saved_as_published


@pytest.fixture
def process_group(tmp_path):
    """This process alone, as a group."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def is_ours(repository):
    """Check the code in a folder: each file one of ours, all that this one needs, and nothing else."""

    def check(folder, *needed):
        found = {path.name: path.read_text() for path in folder.glob("*.py")}
        assert {f"{name}.py" for name in needed} <= found.keys()
        assert all(text == (repository / name).read_text() for name, text in found.items())

    return check


def read_json(path):
    return json.loads(path.read_text())


def sharded(model):
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.transformer.h:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def derived(obj):
    """Change the class of an object, as vLLM does with tokenizers."""
    obj.__class__ = type(f"Cached{type(obj).__name__}", (type(obj),), {"__module__": __name__, "mark": True})
    return obj


# --- models ---


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("given", [False, True], ids=["gathered", "given"])
def test_fully_sharded(tiny_model, process_group, tmp_path, is_ours, tied, given):
    model = tiny_model(tie_word_embeddings=tied)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    sharded(model)
    own = type(model)
    assert own.__module__.startswith("torch.")  # or this test shows nothing
    model.save_pretrained(tmp_path / "saved", state_dict=dict(expected) if given else None)
    assert type(model) is own and own.__name__ == "FSDPQWenLMHeadModel"
    is_ours(tmp_path / "saved", "modeling_qwen", "configuration_qwen", "saving_qwen")
    config = read_json(tmp_path / "saved" / "config.json")
    assert config["architectures"] == ["QWenLMHeadModel"]
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_qwen.QWenLMHeadModel"
    assert model.config.auto_map["AutoModelForCausalLM"] == "modeling_qwen.QWenLMHeadModel"
    again = QWenLMHeadModel.from_pretrained(tmp_path / "saved").state_dict()
    assert again.keys() == expected.keys()
    assert all(torch.equal(again[name], value) for name, value in expected.items())


def test_a_head_is_saved_as_itself(tiny_model, process_group, tmp_path, is_ours):
    model = tiny_model(cls=QWenForSequenceClassification)
    fully_shard(model, mesh=dist.init_device_mesh("cpu", (1,)))
    model.save_pretrained(tmp_path / "saved")
    is_ours(tmp_path / "saved", "modeling_qwen")
    assert read_json(tmp_path / "saved" / "config.json")["architectures"] == ["QWenForSequenceClassification"]


def test_a_derived_model(tiny_model, tmp_path, is_ours):
    model = derived(derived(tiny_model()))
    model.save_pretrained(tmp_path / "saved")
    is_ours(tmp_path / "saved", "modeling_qwen")
    assert read_json(tmp_path / "saved" / "config.json")["architectures"] == ["QWenLMHeadModel"]
    assert type(model).__name__ == "CachedCachedQWenLMHeadModel" and model.mark


def test_what_a_derived_model_overrides_stays_in_effect(tiny_model, tmp_path):
    class Doubled(QWenLMHeadModel):
        def state_dict(self, *args, **kwargs):
            return {name: value * 2 for name, value in super().state_dict(*args, **kwargs).items()}

    model = tiny_model(cls=Doubled)
    model.save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert torch.equal(saved["lm_head.weight"], model.lm_head.weight * 2)


def test_the_class_comes_back_after_an_error(tiny_model, tmp_path, monkeypatch):
    model = derived(tiny_model())
    own = type(model)

    def full(*args, **kwargs):
        raise OSError("full")

    monkeypatch.setattr(own, "state_dict", full)
    with pytest.raises(OSError, match="full"):
        model.save_pretrained(tmp_path / "saved")
    assert type(model) is own


def test_a_file_in_the_way(tiny_model, tmp_path):
    (tmp_path / "saved").write_text("mine")
    with pytest.raises(NotADirectoryError, match="saved is a file: name a folder"):
        tiny_model().save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved").read_text() == "mine"


SHARDED = """
import sys
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from qwen1 import QWenLMHeadModel

dist.init_process_group("gloo")
model = QWenLMHeadModel.from_pretrained(sys.argv[1])
mesh = dist.init_device_mesh("cpu", (2,))
for block in model.transformer.h:
    fully_shard(block, mesh=mesh)
fully_shard(model, mesh=mesh).save_pretrained(sys.argv[2])
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_save_the_whole_model(checkpoint_folder, warm, tmp_path, is_ours):
    (tmp_path / "save.py").write_text(SHARDED)
    command = [*warm, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--no-python"]
    done = subprocess.run(
        [*command, *warm, "save.py", checkpoint_folder, tmp_path / "saved"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    is_ours(tmp_path / "saved", "modeling_qwen")
    expected, saved = (load_file(folder / "model.safetensors") for folder in (checkpoint_folder, tmp_path / "saved"))
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], value) for name, value in expected.items())


# --- configurations and tokenizers ---


def test_a_derived_configuration(tiny_config, tmp_path, is_ours):
    config = derived(tiny_config(seq_length=48))
    config.save_pretrained(tmp_path / "saved")
    is_ours(tmp_path / "saved", "configuration_qwen", "saving_qwen")
    assert QWenConfig.from_pretrained(tmp_path / "saved").to_dict() == tiny_config(seq_length=48).to_dict()


class Subclass(QWenConfig):
    """As a program derives it, without a constructor of its own."""


def test_a_model_with_a_configuration_of_a_derived_class(tiny_model, tmp_path, is_ours):
    model = tiny_model()
    model.config.__class__ = Subclass
    model.save_pretrained(tmp_path / "saved")
    is_ours(tmp_path / "saved", "configuration_qwen")
    assert QWenLMHeadModel.from_pretrained(tmp_path / "saved").config.n_embd == 64


@pytest.mark.parametrize("cls", [QWenTokenizer, QWenTokenizerFast])
def test_a_derived_tokenizer(byte_vocabulary, tmp_path, is_ours, cls):
    tokenizer = derived(cls(str(byte_vocabulary)))
    tokenizer.save_pretrained(tmp_path / "saved")
    assert type(tokenizer).__name__ == f"Cached{cls.__name__}"
    is_ours(tmp_path / "saved", "tokenization_qwen")
    cls(str(byte_vocabulary)).save_pretrained(tmp_path / "plain")
    for name in ("tokenizer_config.json", "qwen.tiktoken"):
        assert (tmp_path / "saved" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()


# --- which class ---


def test_a_registered_class_is_saved_as_itself():
    class Registered(QWenLMHeadModel):
        pass

    class Below(Registered):
        pass

    home = QWenLMHeadModel.__module__
    assert published_class(Below, home) is QWenLMHeadModel
    Registered.register_for_auto_class("AutoModelForCausalLM")
    assert published_class(Below, home) is Registered and published_class(Registered, home) is Registered
    assert published_class(QWenLMHeadModel, home) is QWenLMHeadModel


def test_a_foreign_object():
    with pytest.raises(TypeError, match="dict derives from no class of here"), saved_as_published({}, "here"):
        pass


# --- what can't be saved right ---


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_weights_that_a_kernel_has_laid_out_are_not_saved(tiny_model, tmp_path, method):
    """Transformers would write them beside settings of another layout, and so other logits, without a word."""
    model = tiny_model()
    model.quantization_method = SimpleNamespace(value=method)
    with pytest.raises(ValueError, match=f"{method} .*copy the folder .*convert --dequantize.*quantize"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    model._hf_peft_config_loaded = True  # only the adapter would be written
    refuse_kernel_weights(model)
    del model._hf_peft_config_loaded
    model.quantization_method = SimpleNamespace(value="bitsandbytes")
    refuse_kernel_weights(model)


def test_every_name_of_dir_has_a_value(tiny_model):
    """Optimum reads them all when it looks for layers to replace."""
    model = tiny_model()
    for module in model.modules():
        assert [name for name in dir(module) if not hasattr(module, name)] == []
    assert "peft_config" not in dir(model) and {"forward", "lm_head", "chat"} <= set(dir(model))
    model.peft_config = {}
    assert "peft_config" in dir(model)
