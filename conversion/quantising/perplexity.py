"""How well a model foretells texts."""

from __future__ import annotations

import math

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel


@torch.inference_mode()
def perplexity(model: PreTrainedModel, rows: torch.Tensor, counted: torch.Tensor | None = None) -> float:
    """The mean number of tokens that a model wavers between.

    Args:
        rows: (rows, tokens) int64; the first token of each is only read.
        counted: (rows, tokens) bool, which tokens count; None for all.
    """
    counted = torch.ones_like(rows, dtype=torch.bool) if counted is None else counted
    total = 0.0
    for row, marks in zip(rows.to(model.device), counted.to(model.device), strict=True):
        logits = model(row[None], use_cache=False).logits[0].float()
        total += float(cross_entropy(logits[:-1], row[1:], reduction="none")[marks[1:]].sum())
    return math.exp(min(total / int(counted[:, 1:].sum()), 700.0))
