"""A step of training, forward and backward: its time, and the memory that it needs beyond the weights."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from measuring import RESULTS, Comparison, Dtype, Results, Rounds, alone, compare, forget_peak, peak, report, resident
from models import VOCABULARY, build, build_one

ROWS, LENGTH = 2, 1024


def step(model: Any, ids: torch.Tensor) -> None:
    """Loss and gradients of one batch; the gradients are dropped, as by `zero_grad` before the next step."""
    model(ids, labels=ids, use_cache=False).loss.backward()
    model.zero_grad(set_to_none=True)


def batch() -> torch.Tensor:
    """Random tokens, (ROWS, LENGTH)."""
    return torch.randint(0, VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(3))


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
    del ours, theirs
    script = Path(sys.argv[0])
    measured = {
        name: [alone(script, "training", "--dtype", dtype, "--side", name) for _ in range(2)]
        for name in ("ours", "theirs")
    }
    for what, plus in (("beyond the weights", 0), ("with the weights", 1)):
        mine, other = ([run["step"] + plus * run["weights"] for run in measured[side]] for side in ("ours", "theirs"))
        report(Comparison(f"peak memory of a {name}, {what}", mine, other, unit="B", aim=0.5), results)
