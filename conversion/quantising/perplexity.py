"""How well a model foretells texts."""

from __future__ import annotations

import math

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel


@torch.inference_mode()
def perplexity(model: PreTrainedModel, rows: torch.Tensor) -> float:
    """The mean number of tokens that a model wavers between, of all but the first of each row.

    Args:
        rows: (rows, tokens) int64.
    """
    total = 0.0
    for row in rows.to(model.device):
        logits = model(row[None], use_cache=False).logits[0].float()
        total += float(cross_entropy(logits[:-1], row[1:], reduction="sum"))
    return math.exp(min(total / (rows.shape[0] * (rows.shape[1] - 1)), 700.0))
