"""What the memory of a model follows from: its matrices, and how they are cut among devices.

Letters of the formulas here and beside: E width of the residual stream, Q rows of all query heads, K rows of all key
heads, M width of the MLP's gate, V rows of the vocabulary, L layers, H heads; n tokens that are computed at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import gcd, isqrt

from ..errors import CheckpointError
from ..formats.architecture import Architecture


@dataclass(frozen=True)
class Linear:
    """A matrix of a layer.

    Attributes:
        bias: whether it has one.
        by_inputs: cut along its inputs where several devices share it, so that its bias stays whole; else its outputs.
    """

    inputs: int
    outputs: int
    bias: bool
    by_inputs: bool = False

    @property
    def weights(self) -> int:
        """Without the bias."""
        return self.inputs * self.outputs

    def share(self, devices: int) -> Linear:
        """The part of one of so many devices that share it."""
        if self.by_inputs:
            return Linear(self.inputs // devices, self.outputs, self.bias, True)
        return Linear(self.inputs, self.outputs // devices, self.bias)


@dataclass(frozen=True)
class Shape:
    """A model as far as its memory goes.

    Attributes:
        fused: query, key and value are one matrix, as in QWen.
    """

    architecture: Architecture
    fused: bool

    @cached_property
    def linears(self) -> tuple[Linear, ...]:
        """The matrices of a layer."""
        a = self.architecture
        into = (a.queries + 2 * a.keys,) if self.fused else (a.queries, a.keys, a.keys)
        return (
            *(Linear(a.width, rows, a.qkv_bias) for rows in into),
            Linear(a.queries, a.width, a.output_bias, by_inputs=True),
            Linear(a.width, a.mlp, a.mlp_bias),
            Linear(a.width, a.mlp, a.mlp_bias),
            Linear(a.mlp, a.width, a.mlp_bias, by_inputs=True),
        )

    @property
    def matrix(self) -> int:
        """Numbers of the embedding, and of the head."""
        return self.architecture.rows * self.architecture.width

    @property
    def matrices(self) -> int:
        """How many of the two are there: 1 where the head is the embedding."""
        return 1 if self.architecture.tied else 2

    @cached_property
    def layer(self) -> int:
        """Parameters of a layer: matrices, biases and both norms."""
        return sum(x.weights + x.bias * x.outputs for x in self.linears) + 2 * self.architecture.width

    @cached_property
    def in_linears(self) -> int:
        """Numbers of the matrices of all layers."""
        return self.architecture.layers * sum(x.weights for x in self.linears)

    @cached_property
    def parameters(self) -> int:
        """Of the whole model."""
        return self.matrices * self.matrix + self.architecture.layers * self.layer + self.architecture.width

    @property
    def divisors(self) -> list[int]:
        """Numbers of devices among which heads and MLP can be divided, ascending."""
        a = self.architecture
        common = gcd(a.heads, a.kv_heads, a.mlp)
        low = [count for count in range(1, isqrt(common) + 1) if common % count == 0]
        return sorted({*low, *(common // count for count in low)})

    def can_share(self, devices: int, group: int | None = None) -> bool:
        """Whether groups of a quantisation come out even on so many of `divisors`."""
        if group is None or devices == 1:
            return True
        return all(x.share(devices).inputs % group == 0 for x in self.linears if x.by_inputs)


@dataclass(frozen=True)
class Load:
    """What a model is to do.

    Attributes:
        context: tokens of a text, those that are written included.
        batch: texts at once, on all devices together.

    Raises:
        CheckpointError: impossible values.
    """

    context: int
    batch: int

    def __post_init__(self) -> None:
        for name, value, most in (("--context", self.context, 2**30), ("--batch", self.batch, 2**24)):
            if not 0 < value <= most:
                raise CheckpointError(f"{name} {value:,} can't be: choose a number from 1 to {most:,}.")
