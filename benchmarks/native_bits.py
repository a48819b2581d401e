"""Weights in 8 and 4 bits of our own beside llama.cpp's Q8_0 and Q4_0, on the model that ships: errors and examination.

Run: `python benchmarks/native_bits.py [--per-kind N]`; needs the package gguf, whose arithmetic is llama.cpp's.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import nn

from qwen1 import QWenBitsConfig, QWenLMHeadModel, QWenTokenizer
from qwen1.bits_qwen import QWenBitsEmbedding, QWenBitsLinear
from qwen1.programs.shipped import TINY_CHAT
from qwen1.training.tiny.examination import examine, held_out_dialogues

FORMS = {"8 bits": (8, None, "Q8_0"), "4 bits": (4, None, "Q4_0"), "4 bits, head and embedding 8": (4, 8, None)}


def relative(got: torch.Tensor, exact: torch.Tensor) -> float:
    """Error relative to the norm."""
    return ((got.float() - exact).norm() / exact.norm()).item()


def of_llama(kind: str) -> QWenLMHeadModel:
    """The model in float32 with the weights that we round, rounded by llama.cpp's arithmetic."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize, quantize

    model = QWenLMHeadModel.from_pretrained(TINY_CHAT, dtype=torch.float32).eval()
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            form = GGMLQuantizationType[kind]
            module.weight.data = torch.from_numpy(dequantize(quantize(module.weight.data.numpy(), form), form))
    return model


def error_of_weights(model: Any, whole: Any) -> float:
    """Of all weights together, relative to their norm."""
    square, total = 0.0, 0.0
    for name, module in model.named_modules():
        if not isinstance(module, (nn.Linear, nn.Embedding, QWenBitsLinear, QWenBitsEmbedding)):
            continue
        few = isinstance(module, (QWenBitsLinear, QWenBitsEmbedding))
        numbers, exact = module.dequantised() if few else module.weight, whole.get_submodule(name).weight
        square += (numbers - exact).square().sum().item()
        total += exact.square().sum().item()
    return (square / total) ** 0.5


@torch.no_grad()
def main() -> None:
    """Print a line for each form."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--per-kind", type=int, default=20, help="questions of each kind in the examination")
    per_kind = parser.parse_args().per_kind
    tokenizer = QWenTokenizer.from_pretrained(TINY_CHAT)
    whole = QWenLMHeadModel.from_pretrained(TINY_CHAT, dtype=torch.float32).eval()
    turns = [turn for dialogue in held_out_dialogues(TINY_CHAT, 5, seed=2) for turn in dialogue.turns]
    ids = torch.tensor([tokenizer("".join(f"{query}\n{reply}\n" for query, reply in turns)).input_ids[:256]])
    exact = whole(ids).logits
    print("| | error of weights | of logits | llama.cpp's | of weights | of logits |")
    print("|---|---|---|---|---|---|")
    for name, (bits, head_bits, theirs) in FORMS.items():
        settings = QWenBitsConfig(bits=bits, head_bits=head_bits)
        ours = QWenLMHeadModel.from_pretrained(TINY_CHAT, dtype=torch.float32, quantization_config=settings).eval()
        line = f"| {name} | {error_of_weights(ours, whole):.4f} | {relative(ours(ids).logits, exact):.4f} |"
        if theirs is not None:
            other = of_llama(theirs)
            line += f" {theirs} | {error_of_weights(other, whole):.4f} | {relative(other(ids).logits, exact):.4f} |"
        print(line, flush=True)
        if per_kind:
            half = QWenLMHeadModel.from_pretrained(TINY_CHAT, dtype=torch.bfloat16, quantization_config=settings).eval()
            result = examine(half, tokenizer, held_out_dialogues(TINY_CHAT, per_kind, seed=1))
            memory = f"{half.get_memory_footprint() / 1e6:.2f} MB"
            print(f"  {memory}, {100 * result.share:.1f}%, perplexity {result.perplexity:.3f}", flush=True)


if __name__ == "__main__":
    main()
