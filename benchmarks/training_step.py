"""A step of training, forward and backward: its time, that of its attention, and its memory beyond the weights."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import torch
import typer
from measuring import RESULTS, Comparison, Dtype, Results, Rounds, alone, compare, forget_peak, peak, report, resident
from models import VOCABULARY, build, build_one
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from qwen1.prompt_qwen import prompt_attention

ROWS, LENGTH = 2, 1024
HEADS, SIZE = 8, 128
PACKED = 128
"""Tokens of each text in a packed row."""


def step(model: Any, ids: torch.Tensor) -> None:
    """Loss and gradients of one batch; the gradients are dropped, as by `zero_grad` before the next step."""
    model(ids, labels=ids, use_cache=False).loss.backward()
    model.zero_grad(set_to_none=True)


def batch() -> torch.Tensor:
    """Random tokens, (ROWS, LENGTH)."""
    return torch.randint(0, VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(3))


def attention(rounds: int, dtype: torch.dtype, results: Path) -> None:
    """One layer's, forward and backward, of rows that are one text each, and of packed ones."""
    generator = torch.Generator().manual_seed(4)
    drawn = [torch.randn(ROWS, LENGTH, HEADS, SIZE, generator=generator).to(dtype) for _ in range(4)]
    query, key, value = (part.transpose(1, 2).requires_grad_() for part in drawn[:3])
    texts = torch.arange(LENGTH) // PACKED
    packed = (texts[:, None] == texts) & torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    module = SimpleNamespace(is_causal=True, num_key_value_groups=1, training=True)

    def learn(attend: Any, mask: torch.Tensor | None) -> None:
        output, _ = attend(module, query, key, value, mask)
        torch.autograd.grad(output, (query, key, value), drawn[3])

    for what, mask in (("", None), (f", texts of {PACKED} packed", packed.expand(ROWS, 1, -1, -1))):
        runs = (partial(learn, attend, mask) for attend in (prompt_attention, sdpa_attention_forward))
        name = f"attention of a layer in training, {ROWS} x {LENGTH} tokens{what}, {dtype} / torch's"
        report(compare(name, *runs, rounds), results)


def memory_of(side: str, dtype: str) -> None:
    """Print what a single step of one side adds to the memory of a process that holds the weights."""
    model, ids = build_one(side, getattr(torch, dtype)).train(), batch()
    before = resident()
    forget_peak()
    step(model, ids)
    weights = sum(weight.nbytes for weight in model.parameters())
    print(json.dumps({"step": peak() - before, "weights": weights}))


def training(
    rounds: Rounds = 5,
    dtype: Dtype = "bfloat16",
    results: Results = RESULTS,
    side: Annotated[str, typer.Option(hidden=True, help="Measure the memory of one side in this process.")] = "",
) -> None:
    """A step of 2 x 1024 tokens with a vocabulary of 151,936 words: time, and memory beyond the weights."""
    if side:
        memory_of(side, dtype)
        return
    ours, theirs = (model.train() for model in build(getattr(torch, dtype)))
    ids = batch()
    name = f"training step, {ROWS} x {LENGTH} tokens, {ours.dtype}"
    report(compare(name, partial(step, ours, ids), partial(step, theirs, ids), rounds, aim=1.0), results)
    attention(4 * rounds, ours.dtype, results)
    del ours, theirs
    script = Path(sys.argv[0])
    measured = {
        name: [alone(script, "training", "--dtype", dtype, "--side", name) for _ in range(2)]
        for name in ("ours", "theirs")
    }
    for what, plus in (("beyond the weights", 0), ("with the weights", 1)):
        mine, other = ([run["step"] + plus * run["weights"] for run in measured[side]] for side in ("ours", "theirs"))
        report(Comparison(f"peak memory of a {name}, {what}", mine, other, unit="B", aim=0.5), results)
