"""Small models whose kernels for a GPU run on one where there is one, else as Triton interprets them."""

import inspect
import warnings

import pytest
import torch

from qwen1 import QWenConfig, QWenLMHeadModel, modeling_qwen, passes_qwen, preparing_qwen, rotary_qwen, warming_qwen

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
BOUNDS = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
PROMPT = 12


@pytest.fixture
def kernels(monkeypatch):
    """Kernels wherever the tests run, compiled at once; prompts are torch's, if a test doesn't say otherwise."""
    if not ON_GPU:
        monkeypatch.setattr(passes_qwen, "DEVICE", "cpu")
        monkeypatch.setattr("qwen1.gpu_steps_qwen.PARTS", 2)
        monkeypatch.setattr("qwen1.gpu_steps_qwen._TILES", {"ROWS": 64, "BLOCK": 64})
        monkeypatch.setattr(modeling_qwen, "normed", lambda *given: None)
        for name in ("turned_on_gpu", "both_turned_on_gpu"):
            monkeypatch.setattr(rotary_qwen, name, lambda *given: None)
    monkeypatch.setattr(preparing_qwen, "LEAST_TOKENS", 2)
    monkeypatch.setattr(warming_qwen, "_mark", lambda key, device: None)
    begin = warming_qwen.begin
    monkeypatch.setattr(preparing_qwen, "begin", lambda *arguments: (begin(*arguments), warming_qwen.wait()))


def torch_alone(monkeypatch, run):
    """What comes out without the kernels."""
    with monkeypatch.context() as patch:
        patch.setenv("QWEN_NATIVE", "0")
        return run()


def model_of(dtype=torch.float32, **changes):
    torch.manual_seed(1)
    shape = dict(vocab_size=64, hidden_size=48, num_hidden_layers=2, num_attention_heads=3, kv_channels=16)
    other = dict(ffn_hidden_size=128, seq_length=64, eos_token_id=63, use_flash_attn=False)
    model = QWenLMHeadModel(QWenConfig(**shape | other | changes)).to(DEVICE, dtype).eval()
    for name, weight in model.named_parameters():
        if name.endswith("bias") or "ln_" in name:
            weight.data.add_(torch.randn_like(weight) / 4)
    return model


def ids_of(rows=1, length=PROMPT, seed=3):
    return torch.randint(0, 60, (rows, length), generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def error(got, expected):
    return float((got.float() - expected.float()).norm() / expected.float().norm())


@pytest.fixture
def waits():
    """Lines of code at which the processor waited for the GPU in a call: (model that writes, call) -> list."""

    def count(model, call):
        if "cache" not in inspect.signature(model.prepare_inputs_for_generation).parameters:
            pytest.skip("before transformers 5.24 the mask of each token is asked whether it hides anything")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as found:
                warnings.simplefilter("always")
                call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return [f"{one.filename}:{one.lineno}" for one in found if "synchroniz" in str(one.message)]

    return count
