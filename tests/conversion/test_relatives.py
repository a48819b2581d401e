"""Qwen-VL and Qwen-Audio share QWen's model type; every command refuses them by name."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from qwen1 import QWenConfig
from qwen1.conversion import commands
from qwen1.conversion.errors import CheckpointError
from qwen1.conversion.formats.relatives import refuse_relative, relative_of
from qwen1.conversion.inspecting.inspection import inspect
from qwen1.conversion.opening.sources import open_source

VISUAL = {"heads": 16, "image_size": 448, "image_start_id": 151857, "layers": 48, "patch_size": 14, "width": 1664}
AUDIO = {"add_audio_bos_eos_token": True, "audio_start_id": 155163, "n_layer": 32, "n_state": 1280}
RELATIVES = {"Qwen-VL": {"visual": VISUAL}, "Qwen-Audio": {"audio": AUDIO}}


@pytest.fixture
def folder(checkpoint_folder):
    """(changes of config.json) -> folder."""

    def make(**changes):
        config = json.loads((checkpoint_folder / "config.json").read_text())
        (checkpoint_folder / "config.json").write_text(json.dumps({**config, **changes}))
        return checkpoint_folder

    return make


def run(*arguments):
    return CliRunner().invoke(commands.app, [str(argument) for argument in arguments], env={"COLUMNS": "1000"})


@pytest.mark.parametrize("name", RELATIVES)
@pytest.mark.parametrize(
    ("command", "code"),
    [
        ("inspect {0}", 3),
        ("inspect {0} --scan", 3),
        ("upgrade {0} {1}", 1),
        ("upgrade {0} --in-place", 1),
        ("convert {0} {1} --to qwen2", 1),
        ("verify {0} {0}", 1),
        ("push {0} someone/model --dry-run", 1),
        ("push {0} someone/model", 1),
    ],
)
def test_every_command_refuses_it_with_the_remedy(folder, tmp_path, name, command, code):
    source = folder(**RELATIVES[name])
    before = sorted(source.rglob("*"))
    done = run(*command.format(source, tmp_path / "new").split())
    assert done.exit_code == code, done.output
    text = " ".join(done.output.split())
    assert f"This is {name}" in text and "transformers 4.32" in text and "without qwen1" in text
    assert sorted(source.rglob("*")) == before and not (tmp_path / "new").exists()


@pytest.mark.parametrize("key", ["visual", "audio"])
def test_the_model_refuses_it_in_the_same_words(key):
    config = {"model_type": "qwen", key: {"layers": 2}}
    with pytest.raises(CheckpointError) as here:
        refuse_relative(config)
    with pytest.raises(ValueError) as there:
        QWenConfig.from_dict(config)
    assert str(there.value).replace("its configuration has", "config.json has") == str(here.value)


def test_it_is_no_base_of_an_adapter(folder, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "task_type": "CAUSAL_LM"}))
    save_file({"a": torch.zeros(1)}, adapter / "adapter_model.safetensors")
    done = run("merge-lora", folder(visual=VISUAL), adapter, tmp_path / "new")
    assert done.exit_code == 1 and "This is Qwen-VL" in " ".join(done.output.split())


@pytest.mark.parametrize("nothing", [None, {}, [], "", False, 0])
@pytest.mark.parametrize("key", ["visual", "audio"])
def test_a_key_without_content_makes_it_none(folder, key, nothing):
    source = folder(**{key: nothing})
    assert inspect(source).problems == [] and open_source(source).kind.is_qwen


@pytest.mark.parametrize("content", [{"layers": None}, "vit", [1], True, 7])
def test_a_damaged_part_is_still_one(content):
    assert relative_of({"model_type": "qwen", "visual": content}) == "visual"


@pytest.mark.parametrize(("key", "name"), [("visual", "Qwen-VL"), ("audio", "Qwen-Audio")])
def test_weights_tell_where_the_configuration_does_not(folder, key, name):
    source = folder(**{key: None})
    tensors = load_file(source / "model.safetensors")
    save_file({**tensors, f"transformer.{key}.conv1.weight": torch.zeros(2)}, source / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"This is {name}.*transformer.{key}"):
        open_source(source)
    assert any(f"This is {name}" in text for text in inspect(source).problems)


@pytest.mark.parametrize("model_type", ["qwen2", "llama", "qwen2_vl", None])
def test_other_model_types_are_none_of_them(model_type):
    refuse_relative({"model_type": model_type, "visual": VISUAL}, ["transformer.visual.conv1.weight"])


def test_without_its_weights_it_is_named_all_the_same(folder):
    source = folder(visual=VISUAL)
    (source / "model.safetensors").unlink()
    assert any("This is Qwen-VL" in text for text in inspect(source).problems)
    with pytest.raises(CheckpointError, match="This is Qwen-VL"):
        open_source(source)
