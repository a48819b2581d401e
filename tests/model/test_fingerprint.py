"""The fingerprint of a model: another one after any change, the same one without."""

import functools

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.helpers import rescale_adapter_scale
from torch import nn
from transformers import Trainer, TrainingArguments

from qwen1.fingerprint_qwen import fingerprint
from qwen1.modeling_qwen import QWenMLP
from qwen1.translating_qwen import SWITCH

IDS = torch.arange(12)[None]


@pytest.fixture(autouse=True, params=["by-kernel", "by-torch"])
def way(request, monkeypatch):
    """Sums of weights by the kernel, where there is one, and by torch."""
    if request.param == "by-torch":
        monkeypatch.setenv(SWITCH, "0")


@pytest.fixture
def model(tiny_model):
    return tiny_model("sdpa")


def one_element(model, *_):
    model.transformer.wte.weight.detach().numpy()[3, 5] += 0.5


def add_to_data(model, *_):
    for weight in model.parameters():
        weight.data.add_(1e-3)


def swap_rows(model, *_):
    weight = model.transformer.h[0].mlp.w1.weight.data
    weight[[0, 1]] = weight[[1, 0]].clone()


def swap_columns(model, *_):
    weight = model.transformer.h[0].mlp.w1.weight.data
    weight[:, [0, 30]] = weight[:, [30, 0]].clone()


def fused_step(model, *_):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    with torch.enable_grad():
        model(IDS, labels=IDS).loss.backward()
    optimizer.step()


def train(model, _, tmp_path):
    arguments = TrainingArguments(tmp_path, max_steps=1, report_to="none", use_cpu=True, learning_rate=1e-3)
    rows = [{"input_ids": IDS[0], "labels": IDS[0]}] * 2
    with torch.enable_grad():
        Trainer(model, arguments, train_dataset=rows).train()
    model.eval()


def patch_class(model, monkeypatch, _):
    forward = QWenMLP.forward
    monkeypatch.setattr(QWenMLP, "forward", lambda mlp, states: 2 * forward(mlp, states))


CHANGES = {
    "one element, by numpy": one_element,
    "all, by data": add_to_data,
    "every sign": lambda model, *_: model.transformer.wte.weight.data.neg_(),
    "order of rows": swap_rows,
    "order of columns": swap_columns,
    "a bias": lambda model, *_: model.transformer.h[1].attn.c_attn.bias.data[:1].add_(1),
    "a fused optimizer": fused_step,
    "the Trainer": train,
    "a buffer": lambda model, *_: model.transformer.program_alpha.mul_(2),
    "precision": lambda model, *_: model.bfloat16(),
    "another module": lambda model, *_: setattr(model.transformer.h[0], "mlp", nn.Identity()),
    "order of layers": lambda model, *_: model.transformer.h.insert(0, model.transformer.h.pop(1)),
    "a setting of a module": lambda model, *_: setattr(model.transformer.ln_f, "eps", 0.1),
    "the configuration": lambda model, *_: setattr(model.config, "use_logn_attn", False),
    "training mode": lambda model, *_: model.train(),
    "the code of a class": patch_class,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_any_change_tells(model, change, dtype, monkeypatch, tmp_path):
    model.to(dtype)
    before = fingerprint(model)
    change(model, monkeypatch, tmp_path)
    assert None is not before != fingerprint(model) is not None


@torch.no_grad()
def test_use_changes_nothing(model):
    model(IDS, output_hidden_states=True)  # from then on transformers has hooks in place, which collect
    before = fingerprint(model)
    assert before is not None
    model.generate(IDS, max_new_tokens=3)
    model.generate(IDS, max_new_tokens=3, num_beams=2)
    model.transformer(IDS, use_cache=True)
    assert fingerprint(model) == before
    model.gradient_checkpointing_enable()
    model.gradient_checkpointing_disable()
    model.enable_input_require_grads()  # a hook that changes no value
    assert fingerprint(model) is not None


@pytest.mark.parametrize("odd", [0, 1, 3, 8, 255 * 8 + 3, 2 * 255 * 8 + 9])
def test_every_byte_is_read(odd):
    holder = nn.Module()
    noise = torch.randint(0, 256, (odd + 1,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    holder.register_buffer("bytes", noise[1:])  # no word begins where its storage does
    before = fingerprint(holder)
    for i in range(0, odd, max(1, odd // 97)):
        holder.bytes[i] += 1
        assert fingerprint(holder) != before
        holder.bytes[i] -= 1
    assert fingerprint(holder) == before


HOOKS = {
    "hook": lambda model: model.transformer.h[0].register_forward_hook(lambda *_: None),
    "hook before": lambda model: model.transformer.h[0].register_forward_pre_hook(lambda *_: None),
    "hook on everything": lambda model: nn.modules.module.register_module_forward_hook(lambda *_: None),
    "hook with arguments": lambda model: model.transformer.register_forward_hook(functools.partial(print, end="")),
}


@pytest.mark.parametrize("hook", HOOKS.values(), ids=HOOKS)
def test_functions_of_somebody_else_are_not_vouched_for(model, hook):
    before = fingerprint(model)
    handle = hook(model)
    try:
        assert fingerprint(model) is None
    finally:
        handle.remove()
    assert fingerprint(model) == before


def test_a_replaced_forward_is_not_vouched_for(model):
    before = fingerprint(model)
    mlp = model.transformer.h[0].mlp
    own = mlp.forward
    mlp.forward = lambda states: 2 * own(states)
    assert fingerprint(model) is None
    mlp.forward = torch.compile(own)
    assert fingerprint(model) == before
    mlp.forward = torch.compile(lambda states: 2 * own(states))
    assert fingerprint(model) is None


def test_adapters_tell(model):
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["c_attn"], init_lora_weights=False))
    before = fingerprint(model)
    assert before is not None
    with rescale_adapter_scale(adapted, 0.5):
        assert fingerprint(model) != before
    assert fingerprint(model) == before
    with adapted.disable_adapter():
        assert fingerprint(model) != before
    assert fingerprint(model) == before
    adapted.merge_adapter()
    merged = fingerprint(model)
    adapted.unmerge_adapter()
    assert merged != before
    adapted.add_adapter("other", LoraConfig(r=2, target_modules=["c_attn"], init_lora_weights=False))
    adapted.set_adapter("other")
    assert len({before, merged, fingerprint(model)}) == 3


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_offloaded_weights_are_read_where_they_lie(tiny_model, tmp_path, place):
    from accelerate import cpu_offload, disk_offload

    models = [tiny_model("sdpa", seed=seed) for seed in (0, 0, 1)]
    for i, model in enumerate(models):
        cpu_offload(model) if place == "cpu" else disk_offload(model, tmp_path / str(i))
    assert models[0].transformer.wte.weight.device.type == "meta"
    first, same, other = map(fingerprint, models)
    assert None is not first == same != other
    if place == "cpu":
        weights = models[0].transformer.ln_f._hf_hook.weights_map
        weights["weight"].add_(1)
        assert fingerprint(models[0]) != first


def test_what_can_not_be_read_is_not_vouched_for(model):
    assert fingerprint(model.to("meta")) is None
    holder = nn.Module()
    holder.register_buffer("sparse", torch.eye(4).to_sparse())
    assert fingerprint(holder) is None


def test_tensors_made_of_tensors():
    """As those of torchao, or of DTensor."""
    from torch.testing._internal.two_tensor import TwoTensor

    holder = nn.Module()
    holder.register_buffer("pair", TwoTensor(torch.ones(3), torch.zeros(3)))
    before = fingerprint(holder)
    holder.pair.b.add_(1)
    assert None is not before != fingerprint(holder)
