"""The products of a prompt: those of our kernels beside torch's, on weights that no cache holds."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from measuring import RESULTS, Dtype, Results, Rounds, compare, report
from models import WIDTH, build
from peak import matrix_rate
from torch import nn

from qwen1.native_qwen import wait
from qwen1.steps_qwen import projected

LENGTHS = (8, 20, 100, 512)


def through(layers: list[nn.Linear], inputs: dict[int, torch.Tensor], multiply: Callable) -> None:
    """Multiply each layer with the input of its width."""
    for layer in layers:
        multiply(layer, inputs[layer.in_features])


@torch.inference_mode()
def products(rounds: Rounds = 20, dtype: Dtype = "bfloat16", results: Results = RESULTS) -> None:
    """All linear layers of all blocks with 8 to 512 tokens, and beside what the processor multiplies at best."""
    wait()
    model, _ = build(getattr(torch, dtype))
    layers = [module for module in model.transformer.h.modules() if isinstance(module, nn.Linear)]
    weights = sum(layer.weight.numel() for layer in layers)
    generator = torch.Generator().manual_seed(5)
    for length in LENGTHS:
        widths = {layer.in_features for layer in layers}
        inputs = {width: torch.randn((length, width), generator=generator).to(model.dtype) for width in sorted(widths)}
        runs = (partial(through, layers, inputs, multiply) for multiply in (projected, lambda layer, x: layer(x)))
        found = compare(f"products of all blocks, {length} tokens, {model.dtype} / torch's", *runs, rounds)
        found.limit = 2 * length * weights / matrix_rate(model.dtype, length, WIDTH)
        report(found, results)
