"""How far the logits of two checkpoints are apart, and how far they may be."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

TOLERANCE = 1e-3
"""Largest difference of logits in float32 that a faithful conversion may have, absolute.

A conversion only renames, cuts, joins and reorders weights, so all that differs is the order in which products are
summed up. That made 1e-5 for the tiny models of the tests and 1.4e-5 for 8 layers of the width of QWen-7B (random
weights, standard deviation of the logits 1.3), which leaves room for 80 layers and for trained weights with their
outliers. In the same 8 layers a single matrix rounded to bfloat16 made 7e-3. A wrong weight or wrong order of channels
is off by about the standard deviation. In half precision no tolerance tells these apart: compare in float32, with
`rounded` if need be.
"""


@dataclass(frozen=True)
class Comparison:
    """How far the logits of two checkpoints are apart.

    Attributes:
        largest, mean: of the absolute differences; NaN where either model gave a NaN or infinite logit.
        std: standard deviation of the first one's logits.
        agreement: share of the positions at which both put the same token first.
        tokens: number of positions compared.
        vocabulary: number of logits compared at each position.
        tolerance: what `largest` may be at most.
        remarks: what to know about this comparison.
    """

    largest: float
    mean: float
    std: float
    agreement: float
    tokens: int
    vocabulary: int
    tolerance: float
    remarks: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether no difference is beyond the tolerance, and all logits are finite."""
        return self.largest <= self.tolerance

    def to_json(self) -> dict[str, Any]:
        """The same and `passed`, as plain values; NaN and infinity become None, as JSON has no words for them."""
        values = {**asdict(self), "passed": self.passed, "remarks": list(self.remarks)}
        return {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in values.items()
        }

    def __str__(self) -> str:
        lines = [
            f"Largest difference  {self.largest:.3g} (tolerance {self.tolerance:.3g})",
            f"Mean difference     {self.mean:.3g} (standard deviation of the logits {self.std:.3g})",
            f"Same greedy token   {self.agreement:.2%} of {self.tokens:,} positions",
            *self.remarks,
            "Passed." if self.passed else "Failed.",
        ]
        return "\n".join(lines)
