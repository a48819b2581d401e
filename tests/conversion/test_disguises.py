"""Pickles that training leaves: what `inspect` says of them is what transformers does with them."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from qwen1 import QWenLMHeadModel
from qwen1.conversion import commands
from qwen1.conversion.inspecting.inspection import inspect
from qwen1.conversion.opening.sources import open_source
from qwen1.conversion.planning.upgrade import plan_upgrade
from qwen1.conversion.writing.plans import write_plan
from qwen1.conversion.writing.progress import Progress

DISGUISES = {
    "ddp": lambda tensors: {f"module.{name}": tensor for name, tensor in tensors.items()},
    "compiled": lambda tensors: {f"_orig_mod.{name}": tensor for name, tensor in tensors.items()},
    "compiled ddp": lambda tensors: {f"module._orig_mod.{name}": tensor for name, tensor in tensors.items()},
    "one name": lambda tensors: {
        f"module.{name}" if name == "lm_head.weight" else name: tensor for name, tensor in tensors.items()
    },
    **{
        f"under {key}": lambda tensors, key=key: {key: tensors, "epoch": 3}
        for key in ("state_dict", "model", "model_state_dict", "module")
    },
    "ddp under state_dict": lambda tensors: {"state_dict": {f"module.{name}": tensors[name] for name in tensors}},
}


@pytest.fixture
def folder(golden, tmp_path):
    """A folder of 2023 whose weights are a bare pickle, with code beside it."""
    source = shutil.copytree(golden / "model" / "aug_plain", tmp_path / "2023", copy_function=shutil.copyfile)
    tensors = load_file(source / "model.safetensors")
    for name in ("model.safetensors", "expected.safetensors"):
        (source / name).unlink()
    config = json.loads((source / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel"}
    (source / "config.json").write_text(json.dumps(config))
    (source / "modeling_qwen.py").write_text("raise ImportError('code of 2023')")
    torch.save(tensors, source / "pytorch_model.bin")
    return source


def loads(folder):
    """Whether transformers finds every weight and nothing else."""
    try:
        _, info = QWenLMHeadModel.from_pretrained(folder, output_loading_info=True)
    except Exception:  # AttributeError, as a wrapper is no tensor
        return False
    return not any(info.values())


def promises(folder):
    """Whether `inspect` says that the folder loads as it is."""
    report = inspect(folder)
    claims = any("loads the folder as it is" in text for text in report.remarks)
    assert claims == (not report.problems)
    return claims


def test_a_bare_state_dict_loads_as_it_is(folder):
    assert promises(folder) and loads(folder)


@pytest.mark.parametrize("disguise", DISGUISES.values(), ids=DISGUISES)
def test_a_disguise_is_told_and_mended(folder, tmp_path, disguise):
    tensors = torch.load(folder / "pytorch_model.bin", weights_only=True)
    torch.save(disguise(tensors), folder / "pytorch_model.bin")
    assert not loads(folder) and not promises(folder)
    (text,) = inspect(folder, scan=True).problems
    assert "pytorch_model.bin" in text and "does not load as it is; upgrade" in text
    done = CliRunner().invoke(commands.app, ["verify", str(folder), str(folder)])
    assert done.exit_code == 1 and "does not load as it is" in " ".join(done.output.split())
    source = open_source(folder)
    write_plan(plan_upgrade(source), tmp_path / "new", Progress())
    assert loads(tmp_path / "new") and inspect(tmp_path / "new", scan=True).problems == []
    written = load_file(tmp_path / "new" / "model.safetensors")
    assert written.keys() == tensors.keys() and all(torch.equal(written[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("listed", ["", "module."])
def test_shards_with_an_index_of_either_names(folder, tmp_path, listed):
    tensors = torch.load(folder / "pytorch_model.bin", weights_only=True)
    (folder / "pytorch_model.bin").unlink()
    places = {name: f"pytorch_model-{1 + i % 2:05d}-of-00002.bin" for i, name in enumerate(sorted(tensors))}
    for file in set(places.values()):
        part = {f"module.{name}": tensor for name, tensor in tensors.items() if places[name] == file}
        torch.save(part, folder / file)
    index = {"weight_map": {listed + name: file for name, file in places.items()}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    (text,) = inspect(folder).problems
    assert "has 'module.' before its names" in text and not loads(folder)
    source = open_source(folder)
    write_plan(plan_upgrade(source), tmp_path / "new", Progress())
    assert loads(tmp_path / "new")


def test_a_folder_with_any_problem_is_not_said_to_load(folder):
    tensors = torch.load(folder / "pytorch_model.bin", weights_only=True)
    del tensors["transformer.h.1.mlp.w1.weight"]
    torch.save(tensors, folder / "pytorch_model.bin")
    assert not promises(folder) and not loads(folder)


@pytest.mark.parametrize(("case", "remedy"), [("llama_gqa", "convert --to qwen"), ("qwen2_gqa_tied", "convert")])
def test_pickles_of_other_architectures(golden, tmp_path, case, remedy):
    folder = shutil.copytree(golden / "native" / case, tmp_path / "hf", copy_function=shutil.copyfile)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save({"state_dict": tensors}, folder / "pytorch_model.bin")
    (text,) = inspect(folder).problems
    assert "keeps its tensors under 'state_dict'" in text and remedy in text


def test_llamas_original_format_is_not_for_transformers_anyway(golden, tmp_path):
    folder = shutil.copytree(golden / "llama_meta" / "mp1", tmp_path / "meta", copy_function=shutil.copyfile)
    tensors = torch.load(folder / "consolidated.00.pth", weights_only=True)
    torch.save({f"_orig_mod.{name}": tensor for name, tensor in tensors.items()}, folder / "consolidated.00.pth")
    assert inspect(folder).problems == []
