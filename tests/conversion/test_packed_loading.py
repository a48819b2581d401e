"""Folders of GPTQ and AWQ loaded as they are, without the packages that write them: bit for bit."""

import importlib.util
import json
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qwen1 import QWenBitsConfig, QWenLMHeadModel
from qwen1.bits_qwen import QWenBitsLinear
from qwen1.loading_qwen import check_packages

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True, "damp_percent": 0.01}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
METHODS = {
    "gptq, 4 bits": GPTQ,
    "gptq, 8 bits": {**GPTQ, "bits": 8},
    "gptq, groups of 64": {**GPTQ, "group_size": 64},
    "gptq, zeros of its own": {**GPTQ, "sym": False},
    "gptq v2, zeros of its own": {**GPTQ, "sym": False, "checkpoint_format": "gptq_v2"},
    "awq": AWQ,
}
IDS = torch.arange(2, 42)[None]


@pytest.fixture(autouse=True)
def without_packages(monkeypatch):
    """As where neither gptqmodel nor optimum is installed."""
    find = importlib.util.find_spec
    hidden = ("gptqmodel", "optimum")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in hidden else find(name, *rest))


@pytest.fixture
def rounded(tiny_model, round_folder, tmp_path):
    """Write a small model twice, packed and as the same numbers in full: settings -> folder."""

    def make(settings=GPTQ):
        tiny_model("sdpa", ffn_hidden_size=256).save_pretrained(tmp_path / "whole")
        return round_folder(tmp_path / "whole", tmp_path / "rounded", settings)

    return make


def edit(folder, change):
    values = load_file(folder / "model.safetensors")
    change(values)
    save_file(values, folder / "model.safetensors", {"format": "pt"})


def set_config(folder, **changes):
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, **changes}))


@torch.no_grad()
def logits_of(model):
    return model.eval()(IDS, use_cache=False).logits


@pytest.mark.parametrize("settings", METHODS.values(), ids=METHODS)
@pytest.mark.no_cover
def test_numbers_are_those_of_the_folder(rounded, settings, tmp_path):
    folder = rounded(settings)
    model = QWenLMHeadModel.from_pretrained(folder / "packed", dtype=torch.float32)
    full = load_file(folder / "full" / "model.safetensors")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QWenBitsLinear)}
    assert len(layers) == 10
    for name, layer in layers.items():
        assert torch.equal(layer.dequantised(), full[f"{name}.weight"]), name
        assert (layer.bits, layer.group_size) == (settings["bits"], settings["group_size"])
    assert torch.equal(model.lm_head.weight, full["lm_head.weight"].float())

    expected = logits_of(QWenLMHeadModel.from_pretrained(folder / "full", dtype=torch.float32))
    torch.testing.assert_close(logits_of(model), expected)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits_of(QWenLMHeadModel.from_pretrained(tmp_path / "saved")), logits_of(model))
    assert torch.equal(
        logits_of(AutoModelForCausalLM.from_pretrained(folder / "packed", dtype="float32")), logits_of(model)
    )


def test_head_and_embedding_are_rounded_where_it_is_asked_for(rounded):
    folder = rounded()
    settings = QWenBitsConfig(bits=4, head_bits=8)
    model = QWenLMHeadModel.from_pretrained(folder / "packed", quantization_config=settings, use_cache=False)
    assert (model.lm_head.bits, model.transformer.wte.bits, model.transformer.h[0].mlp.w1.bits) == (8, 8, 4)
    assert model.config.use_cache is False
    numbers = load_file(folder / "full" / "model.safetensors")
    assert torch.equal(model.transformer.h[0].mlp.w1.dequantised(), numbers["transformer.h.0.mlp.w1.weight"])


def test_layers_that_a_folder_has_in_few_bits_only_cannot_stay_whole(rounded):
    settings = QWenBitsConfig(bits=4, modules_to_not_convert=["transformer.h.1"])
    with pytest.raises(ValueError, match=r"h\.1\.attn\.c_attn can't stay whole, as this folder has it in 4"):
        QWenLMHeadModel.from_pretrained(rounded() / "packed", quantization_config=settings)


def test_a_middle_zero_in_one_layer_only_is_kept_with_the_others(rounded, tmp_path):
    folder = rounded()
    edit(folder / "packed", lambda values: values["transformer.h.1.mlp.w2.qzeros"].fill_(0x33333333))
    model = QWenLMHeadModel.from_pretrained(folder / "packed")
    assert (model.transformer.h[1].mlp.w2.zeros == 4).all() and (model.transformer.h[0].mlp.w2.zeros == 8).all()
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits_of(QWenLMHeadModel.from_pretrained(tmp_path / "saved")), logits_of(model))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"desc_act": True}, "desc_act=True"),
        ({"bits": 3}, "bits=3"),
        ({"group_size": -1}, "group_size=-1"),
        ({"dynamic": {"-:.*w1": {}}}, "rules for single layers"),
        ({"lm_head": True}, "a head in few bits"),
        ({"modules_in_block_to_quantize": [["attn.c_attn"]]}, "only some layers"),
        ({"checkpoint_format": "marlin"}, "layout 'marlin'"),
    ],
)
def test_what_is_not_read_is_refused_with_the_remedy(rounded, changes, words):
    folder = rounded()
    set_config(folder / "packed", quantization_config={**GPTQ, **changes})
    with pytest.raises(ValueError, match=f"(?s){words}.*--dequantize"):
        QWenLMHeadModel.from_pretrained(folder / "packed")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda values: values["transformer.h.0.mlp.w1.g_idx"].copy_(torch.arange(63, -1, -1) // 32),
            "g_idx has its inputs",
        ),
        (lambda values: values["transformer.h.0.mlp.w1.scales"].fill_(torch.inf), "scales aren't numbers"),
        (lambda values: values.pop("transformer.h.0.mlp.w1.qzeros"), "has no qzeros"),
    ],
)
def test_tensors_that_can_not_be_taken_are_named(rounded, change, words, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    folder = rounded()
    edit(folder / "packed", change)
    with pytest.raises(RuntimeError, match="conversion"):
        QWenLMHeadModel.from_pretrained(folder / "packed")
    assert words in caplog.text


def test_8_bits_with_zeros_of_their_own_are_refused(rounded, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    folder = rounded({**GPTQ, "bits": 8, "sym": False})
    with pytest.raises(RuntimeError, match="conversion"):
        QWenLMHeadModel.from_pretrained(folder / "packed")
    assert (
        "aren't all 128, and 8 bits have no other zero here: use `qwen1-checkpoint convert --dequantize`" in caplog.text
    )


def test_other_bits_than_those_of_the_folder_are_refused(rounded):
    folder = rounded()
    with pytest.raises(ValueError, match="bits=8, but the weights of this folder have 4"):
        QWenLMHeadModel.from_pretrained(folder / "packed", quantization_config=QWenBitsConfig())


def test_on_a_gpu_their_own_packages_are_asked_for(rounded, monkeypatch):
    folder = rounded()
    with pytest.raises(ImportError, match=r"gptqmodel and optimum.*device_map='cpu'"):
        QWenLMHeadModel.from_pretrained(folder / "packed", device_map="cuda")
    with pytest.raises(ImportError, match="gptqmodel"):
        check_packages(GPTQ)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ImportError, match="gptqmodel"):
        QWenLMHeadModel.from_pretrained(folder / "packed")
