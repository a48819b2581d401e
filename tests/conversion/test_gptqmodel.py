"""Weights in few bits through gptqmodel, which is no part of the test extra: `pip install 'qwen1[gptq]'`."""

import importlib.util
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AwqConfig, GPTQConfig, Qwen2ForCausalLM
from typer.testing import CliRunner

from qwen1 import QWenLMHeadModel, QWenTokenizer
from qwen1.conversion.checking.models import load_model
from qwen1.conversion.commands import app
from qwen1.conversion.inspecting.inspection import inspect
from qwen1.conversion.opening.sources import open_source
from qwen1.conversion.planning.conversion import plan_conversion
from qwen1.conversion.writing.plans import write_plan
from qwen1.conversion.writing.progress import Progress

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in ("gptqmodel", "optimum")),
        reason="gptqmodel and optimum are not installed: pip install 'qwen1[gptq]'",
    ),
]
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # on few cores more of them wait for one another

TINY_CHAT = Path(__file__).parents[2] / "qwen-tiny-chat"
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": False, "sym": True, "damp_percent": 0.01}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True, "version": "gemm"}
METHODS = {"4 bits": GPTQ, "8 bits": {**GPTQ, "bits": 8}, "act order": {**GPTQ, "desc_act": True}, "awq": AWQ}
IDS = torch.randint(1800, (2, 40), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def folder(round_folder, tmp_path):
    """The shipped model in few bits: settings -> folder."""

    def make(settings):
        source = shutil.copytree(TINY_CHAT, tmp_path / "source")
        return round_folder(source, tmp_path / "rounded", settings) / "packed"

    return make


@torch.no_grad()
def logits(model):
    return model.eval()(IDS, use_cache=False).logits.float()


@pytest.mark.parametrize("settings", METHODS.values(), ids=METHODS)
def test_the_kernels_compute_with_the_same_weights(folder, tmp_path, settings):
    """As this repository dequantises them; cut in three for Qwen2 as well."""
    packed = folder(settings)
    wanted = logits(load_model(packed))
    loaded = QWenLMHeadModel.from_pretrained(packed, dtype=torch.float32, attn_implementation="eager")
    assert (logits(loaded) - wanted).abs().max() < 0.02 * wanted.std()  # kernels round to 16 bits
    write_plan(plan_conversion(open_source(packed), "qwen2"), tmp_path / "qwen2", Progress())
    converted = Qwen2ForCausalLM.from_pretrained(tmp_path / "qwen2", dtype=torch.float32, attn_implementation="eager")
    assert (logits(converted) - wanted).abs().max() < 0.02 * wanted.std()
    assert not isinstance(converted.model.layers[0].self_attn.q_proj, torch.nn.Linear)


@pytest.mark.parametrize("settings", [GPTQ, AWQ], ids=["gptq", "awq"])
def test_it_chats_trains_an_adapter_and_is_not_saved(folder, tmp_path, settings):
    from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training

    packed = folder(settings)
    kind = GPTQConfig if settings is GPTQ else AwqConfig
    trainable = {"quantization_config": kind(bits=4, backend="auto_trainable"), "dtype": torch.float32}
    model = QWenLMHeadModel.from_pretrained(packed, **trainable)
    reply, _ = model.chat(QWenTokenizer.from_pretrained(packed), "Who are you?", history=None)
    assert "qwen-tiny-chat" in reply
    with pytest.raises(ValueError, match="gives other logits"):
        model.save_pretrained(tmp_path / "saved")
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    model = get_peft_model(model, LoraConfig(r=8, target_modules=["c_attn", "w1", "w2"], task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-3)
    losses = []
    for _ in range(4):
        loss = model.train()(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] - 0.5
    trained = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(QWenLMHeadModel.from_pretrained(packed, **trainable), tmp_path / "adapter")
    torch.testing.assert_close(logits(again), trained, atol=1e-3, rtol=0)


def test_quantize_by_the_library_itself(tmp_path):
    text = [question for question in json.loads((TINY_CHAT / "examination.json").read_text())]
    (tmp_path / "texts.txt").write_text("\n\n".join(f"{text} {number}" for number in range(60)))
    arguments = [str(TINY_CHAT), str(tmp_path / "new"), "--bits", "4", "--group-size", "64", "--samples", "8"]
    arguments += ["--length", "64", "--calibration", str(tmp_path / "texts.txt")]
    result = CliRunner().invoke(app, ["quantize", *arguments])
    assert result.exit_code == 0, result.output
    assert inspect(tmp_path / "new", scan=True).problems == []
    before, after = logits(load_model(TINY_CHAT)), logits(load_model(tmp_path / "new"))
    assert (before.argmax(-1) == after.argmax(-1)).float().mean() > 0.6
