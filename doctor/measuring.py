"""Logits along the ways that they can take, and when two of them count as the same."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache

from ..arguments_qwen import CACHE_NAME
from .findings import Outcome, State
from .plain_model import plain_logits

UNITS = 64
"""Largest difference of two float32 logits, in units in the last place of the largest logit.

Both ways sum up the same products in another order. What rounding leaves of that is about the root of the number of
roundings, of which each layer adds some: 10 units for the 6 layers of the shipped model (1.5e-5 of the 1.1e-4 that this
allows, as its logits reach 14), so some tens for 80 layers.
"""
OWN_ERRORS = 4
"""The same in half precision, in multiples of that model's own largest error against float32 (two ways, each with an
error of its own, on other texts)."""
ROUNDINGS = 8
"""Roundings of the residual stream and what is added to it in each layer, each by half a unit; see `half_bound`."""


def float32_tolerance(logits: torch.Tensor) -> float:
    """What two float32 logits like these may differ by."""
    return UNITS * torch.finfo(torch.float32).eps * float(logits.abs().max())


def half_bound(dtype: torch.dtype, layers: int) -> float:
    """Error that rounding to a half precision may make, relative to the norm of the logits.

    Independent roundings add up as their root: 8 a layer, each of half a unit, and four times that for outliers.
    """
    return 4 * torch.finfo(dtype).eps / 2 * math.sqrt(ROUNDINGS * layers)


@dataclass(frozen=True)
class Ruler:
    """The largest difference that passes between two ways through one model."""

    tolerance: float

    def outcome(self, got: torch.Tensor, expected: torch.Tensor, what: str) -> Outcome:
        """Compare logits of the same shape."""
        if not bool(got.isfinite().all()):
            return Outcome(State.FAILED, f"{what}: there are NaN or infinite logits")
        largest = float((got - expected).abs().max())
        figures = {"largest": largest, "tolerance": self.tolerance}
        if largest <= self.tolerance:
            return Outcome(State.OK, f"{what}: largest difference {largest:.1e}, allowed {self.tolerance:.1e}", figures)
        same = float((got.argmax(-1) == expected.argmax(-1)).double().mean())
        return Outcome(
            State.FAILED,
            f"{what}: largest difference {largest:.1e}, allowed {self.tolerance:.1e}; same token first: {same:.0%}",
            {**figures, "agreement": same},
        )


def worst(outcomes: Iterable[Outcome]) -> Outcome:
    """The first that has failed, those behind it not being asked for; else the one that came closest to it."""
    passed = []
    for outcome in outcomes:
        if outcome.state is State.FAILED:
            return outcome
        passed.append(outcome)
    return max(passed, key=lambda outcome: outcome.figures["largest"])


def ruler_of(model: Any, ids: torch.Tensor) -> Ruler:
    """The ruler of a model, from its logits of a short text, (1, T) ids."""
    plain = plain_logits(model, ids[0])
    if model.dtype == torch.float32:
        return Ruler(float32_tolerance(plain))
    return Ruler(OWN_ERRORS * float((full_pass(model, ids)[0] - plain).abs().max()))


@torch.inference_mode()
def full_pass(model: Any, ids: torch.Tensor, alpha: float = 1.0, **arguments: Any) -> torch.Tensor:
    """Logits of a whole text at once and without a cache, (B, T) -> (B, T, V) float32."""
    if model.config.use_dynamic_ntk:
        arguments["ntk_alpha"] = torch.full((1, 1), alpha, device=ids.device)
    return model(input_ids=ids, use_cache=False, **arguments).logits.float()


@torch.inference_mode()
def in_chunks(model: Any, ids: torch.Tensor, lengths: list[int], cache: Cache) -> torch.Tensor:
    """Logits of a text read a piece after the other on top of a cache, (1, T) -> (1, T, V) float32."""
    pieces = ids.split(lengths, dim=1)
    return torch.cat([model(input_ids=piece, **{CACHE_NAME: cache}).logits.float() for piece in pieces], dim=1)


def generated(
    model: Any, ids: torch.Tensor, new: int, mask: torch.Tensor | None = None, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy text and the logits of each of its steps, (B, T) -> (B, T + new), (B, new, V) float32."""
    settings = {"do_sample": False, "num_beams": 1, "max_new_tokens": new, "min_new_tokens": new}
    output = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids) if mask is None else mask,
        return_dict_in_generate=True,
        output_logits=True,
        **settings,
        **options,
    )
    return output.sequences, torch.stack(output.logits, dim=1).float()
