"""Logits of some tokens behind a prompt, and the calls of the kernel that computes them."""

import pytest
import torch

from qwen1 import steps_qwen
from qwen1.cache_qwen import new_cache
from qwen1.translating_qwen import SWITCH

LENGTH = 23


@pytest.fixture
def steps(monkeypatch):
    """The calls of the kernel."""
    counted = []
    step = steps_qwen._steps

    def count(*args):
        counted.append(args)
        return step(*args)

    monkeypatch.setattr(steps_qwen, "_steps", count)
    return counted


def logits_of(model, rows=1, tokens=3, padded=False, cache=None, at_once=1, **arguments):
    """Logits of some tokens, so many at once, behind a prompt, (rows, tokens, V)."""
    ids = torch.randint(0, model.config.vocab_size, (rows, LENGTH + tokens), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if padded:
        mask[:, :5] = (torch.arange(5) >= torch.arange(rows)[:, None]).long()
    cache = new_cache(model.transformer) if cache is None else cache
    with torch.no_grad():
        model(ids[:, :LENGTH], attention_mask=mask[:, :LENGTH] if padded else None, cache=cache)
        return torch.cat(
            [
                model(
                    ids[:, end - at_once : end],
                    attention_mask=mask[:, :end] if padded else None,
                    cache=cache,
                    **arguments,
                ).logits
                for end in range(LENGTH + at_once, LENGTH + tokens + 1, at_once)
            ],
            dim=1,
        )


def without(monkeypatch, run):
    """What a function gives by the modules."""
    with monkeypatch.context() as context:
        context.setenv(SWITCH, "0")
        return run()
