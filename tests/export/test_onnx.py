"""Programs of ONNX, run by ONNX Runtime: keys, values and the NTK alpha are their inputs and outputs."""

import pytest
import torch
from torch.export import Dim
from transformers import DynamicCache

from qwen1.arguments_qwen import CACHE_NAME

from .conftest import SEQ_LENGTH

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

CLOSE = {"atol": 1e-4, "rtol": 1e-4}


class Prompt(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, ntk_alpha):
        outputs = self.model(input_ids, ntk_alpha=ntk_alpha, use_cache=True)
        return outputs.logits, *(states for layer in outputs.cache.layers for states in (layer.keys, layer.values))


class Step(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, position_ids, ntk_alpha, states):
        cache = DynamicCache(config=self.model.config)
        for layer in range(self.model.config.n_layer):
            cache.update(*states[2 * layer : 2 * layer + 2], layer)
        arguments = {"position_ids": position_ids, "ntk_alpha": ntk_alpha, CACHE_NAME: cache}
        logits = self.model(input_ids, use_cache=True, **arguments).logits
        return logits, *(states for layer in cache.layers for states in (layer.keys, layer.values))


def session(module, inputs, shapes, path):
    """Export a module and open what was written."""
    torch.onnx.export(module, (), path, kwargs=inputs, dynamic_shapes=shapes, dynamo=True, verbose=False)
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def call(program, *tensors):
    names = [given.name for given in program.get_inputs()]
    feed = {name: tensor.numpy() for name, tensor in zip(names, tensors, strict=True)}
    return [torch.from_numpy(array) for array in program.run(None, feed)]


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.no_cover
def test_prompt_and_steps_over_every_edge(tiny_model, text, tmp_path):
    model = tiny_model("sdpa", num_key_value_heads=2)
    one = torch.ones(1, 1)
    sample = {"input_ids": text[:, :20], "ntk_alpha": one}
    prompt = session(Prompt(model), sample, {"input_ids": {1: Dim("length")}, "ntk_alpha": None}, tmp_path / "a.onnx")
    states = Prompt(model)(**sample)[1:]
    sample = {"input_ids": text[:, :1], "position_ids": torch.tensor([[20]]), "ntk_alpha": one, "states": states}
    shapes = {**dict.fromkeys(sample), "states": ({2: Dim("held")},) * len(states)}
    step = session(Step(model), sample, shapes, tmp_path / "b.onnx")

    for length in (1, 2, SEQ_LENGTH - 2, 2 * SEQ_LENGTH - 1, 4 * SEQ_LENGTH + 1):
        ids = text[:, :length]
        alpha = model.transformer.choose_alpha(torch.arange(length)[None])[:, -1:]
        logits, *states = call(prompt, ids, alpha)
        expected = model(ids, use_cache=True)
        torch.testing.assert_close(logits, expected.logits, **CLOSE)
        for position in range(length, length + 4):
            token = text[:, position : position + 1]
            logits, *states = call(step, token, torch.tensor([[position]]), alpha, *states)
            expected = model(token, **{CACHE_NAME: expected.cache})
            torch.testing.assert_close(logits, expected.logits, **CLOSE)
