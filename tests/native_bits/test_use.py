"""A model in 8 and 4 bits in use: chats, caches, adapters, training, compiling, the loss, other processes."""

import copy
import os
import subprocess

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import Trainer, TrainingArguments

from qwen1 import QWenLMHeadModel
from qwen1.bits_qwen import QWenBitsEmbedding, QWenBitsLinear
from qwen1.fingerprint_qwen import fingerprint
from qwen1.loss_qwen import gives_its_weight
from qwen1.translating_qwen import SWITCH

IDS = torch.randint(0, 256, (2, 60), generator=torch.Generator().manual_seed(0))

pytestmark = pytest.mark.parametrize("bits", [8, 4])


@torch.no_grad()
def logits_of(model):
    return model(IDS, use_cache=False).logits.float()


def relative_error(got, expected):
    return ((got.float() - expected.float()).norm() / expected.float().norm()).item()


@torch.no_grad()
def test_a_cache_gives_the_logits_of_the_whole_text(whole, load, bits, monkeypatch):
    monkeypatch.setenv(SWITCH, "0")  # whose kernels round the activations of a token, and not those of a prompt
    model = load(whole(torch.float32), bits)
    output = model(IDS[:, :40], use_cache=True)
    steps = [output.logits]
    for index in range(40, 60):
        steps.append(model(IDS[:, index : index + 1], past_key_values=output.past_key_values).logits)
    torch.testing.assert_close(torch.cat(steps, 1), logits_of(model), rtol=1e-4, atol=1e-4)


@pytest.fixture
def tokens_read(monkeypatch):
    """Numbers of tokens that embeddings in few bits have looked up."""
    counted, look_up = [], QWenBitsEmbedding.forward
    monkeypatch.setattr(
        QWenBitsEmbedding, "forward", lambda self, ids: counted.append(ids.numel()) or look_up(self, ids)
    )
    return counted


def test_chats_go_on_with_what_they_keep(whole, load, bits, byte_tokenizer, tokens_read):
    model = load(whole(seq_length=2048), bits)
    model.generation_config.update(chat_format="chatml", pad_token_id=256, do_sample=False, allow_custom_entries=True)
    _, history = model.chat(byte_tokenizer, "What?", None, max_new_tokens=4)
    tokens_read.clear()
    _, kept = model.chat(byte_tokenizer, "Why?", history, max_new_tokens=4)
    new = sum(tokens_read)
    model.chat(byte_tokenizer, "Why?", list(history), max_new_tokens=4, reuse_cache=False)
    assert 0 < new < sum(tokens_read) - new and kept.kept is not None
    assert len(model.batch_chat(byte_tokenizer, ["a", "b"], [None, kept], max_new_tokens=4)[0]) == 2
    assert list(model.chat_stream(byte_tokenizer, "c", kept, max_new_tokens=4)) is not None


def test_a_change_of_codes_or_scales_ends_what_is_kept(whole, load, bits):
    model = load(whole(), bits)
    first = fingerprint(model)
    assert fingerprint(model) == first
    for part in (model.transformer.h[1].mlp.w2.codes, model.transformer.h[1].mlp.w2.scales, model.lm_head.codes):
        before = part.data.clone()
        part.data.view(-1)[0] += 1
        assert fingerprint(model) != first
        part.data.copy_(before)


def test_the_loss_is_that_of_logits(whole, load, bits):
    model = load(whole(torch.float32), bits)
    assert not gives_its_weight(model.lm_head)
    output = model.train()(IDS, labels=IDS)
    expected = torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    torch.testing.assert_close(output.loss, expected)


@pytest.mark.parametrize("kbit", [False, True], ids=["plain", "prepared for k-bit training"])
def test_lora_trains_saves_and_loads_around_the_codes(whole, load, bits, tmp_path, kbit):
    folder = whole()
    model = load(folder, bits)
    plain = logits_of(model)
    codes = copy.deepcopy(model.transformer.h[0].mlp.w1.codes)
    if kbit:
        model = prepare_model_for_kbit_training(model)
    peft_model = get_peft_model(model, LoraConfig(r=4, target_modules=["c_attn", "c_proj", "w1", "w2"]))
    torch.manual_seed(0)
    peft_model.train()
    optimizer = torch.optim.AdamW((p for p in peft_model.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    for _ in range(4):
        loss = peft_model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert torch.equal(codes, model.transformer.h[0].mlp.w1.base_layer.codes)
    peft_model.eval()
    trained = logits_of(peft_model)
    assert relative_error(trained, plain) > 0.01
    peft_model.save_pretrained(tmp_path / "adapter")
    again = load(folder, bits)
    if kbit:
        again = prepare_model_for_kbit_training(again)
    assert relative_error(logits_of(PeftModel.from_pretrained(again, tmp_path / "adapter").eval()), trained) < 0.01


def test_adapters_are_not_merged_into_codes(whole, load, bits):
    peft_model = get_peft_model(load(whole(), bits), LoraConfig(r=4, target_modules=["c_attn"]))
    with pytest.raises(RuntimeError, match="size of tensor|can't be cast"):
        peft_model.merge_and_unload()


def test_the_trainer_trains_adapters_and_refuses_codes(whole, load, bits, tmp_path):
    model = load(whole(), bits)
    data = [{"input_ids": row, "labels": row} for row in IDS]
    arguments = TrainingArguments(tmp_path / "out", max_steps=2, report_to=[], use_cpu=True, save_strategy="no")
    with pytest.raises(ValueError, match="purely quantized"):
        Trainer(model, arguments, train_dataset=data)
    peft_model = get_peft_model(model, LoraConfig(r=4, target_modules=["c_attn"]))
    assert Trainer(peft_model, arguments, train_dataset=data).train().training_loss > 0


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.no_cover
def test_compiled_it_gives_the_same(whole, load, bits):
    model = load(whole(torch.float32), bits)
    expected = logits_of(model)
    torch.compiler.reset()  # what other tests compiled counts towards the limit of programs for one function
    model.forward = torch.compile(model.forward, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(logits_of(model), expected)


@torch.no_grad()
def test_under_autocast_and_inference_mode(whole, load, bits):
    model = load(whole(torch.float32), bits)
    expected = logits_of(model)
    with torch.inference_mode():
        assert torch.equal(model(IDS, use_cache=False).logits, expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = model(IDS, use_cache=False).logits
    assert relative_error(got, expected) < 0.03


FRESH = """
import sys, torch
from transformers import AutoModelForCausalLM
folder, saved, bits = sys.argv[1], sys.argv[2], int(sys.argv[3])
settings = {"quant_method": "qwen_bits", "bits": bits}
model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings, trust_remote_code=True).eval()
model.save_pretrained(saved)
again = AutoModelForCausalLM.from_pretrained(saved, trust_remote_code=True).eval()
assert "qwen1" not in sys.modules
ids = torch.arange(40)[None]
with torch.no_grad():
    assert torch.equal(model(ids).logits, again(ids).logits)
import qwen1
mine = qwen1.QWenLMHeadModel.from_pretrained(folder, quantization_config=qwen1.QWenBitsConfig(bits=bits)).eval()
third = AutoModelForCausalLM.from_pretrained(saved, trust_remote_code=True).eval()
with torch.no_grad():
    assert torch.equal(mine(ids).logits, again(ids).logits) and torch.equal(third(ids).logits, again(ids).logits)
kind = type(model.transformer.wte)
model = type(model).from_pretrained(saved, quantization_config=qwen1.QWenBitsConfig(bits=bits))
assert isinstance(model.transformer.wte, kind) and not isinstance(mine.transformer.wte, kind)
"""


@pytest.mark.slow
def test_remote_code_alone_quantises_saves_and_loads(whole, bits, warm_with, tmp_path):
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [*warm_with(environment, "torch"), "-c", FRESH, whole(), tmp_path / "saved", str(bits)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "saved" / "few_bits_qwen.py").is_file()


def test_kinds_are_those_that_wrappers_look_for(whole, load, bits):
    model = load(whole(), bits)
    assert isinstance(model.transformer.h[0].mlp.w1, torch.nn.Linear)
    assert model.get_memory_footprint() < 0.7 * QWenLMHeadModel.from_pretrained(whole()).get_memory_footprint()
    assert isinstance(model.get_output_embeddings(), QWenBitsLinear)
    assert f"bits={bits}, group_size=32" in repr(model)
