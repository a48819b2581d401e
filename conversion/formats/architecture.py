"""What the configurations of all formats have in common: the shape of a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from math import isfinite
from typing import Any

from ..errors import CheckpointError

MOST_LAYERS = 10_000
_LARGEST = 2**31 - 1


def short(value: Any) -> str:
    """A value for a message, which may have any number of digits."""
    text = hex(value) if isinstance(value, int) and abs(value) > 2**128 else repr(value)
    return text if len(text) <= 40 else f"{text[:20]}… ({len(text):,} characters)"


@dataclass(frozen=True)
class Architecture:
    """What the configurations of all formats have in common.

    Attributes:
        rows: rows of the embedding, padding included.
        mlp: width of the gate, which in QWen's configuration is half of `ffn_hidden_size`.
        length: tokens that the model was trained on at once.
        rope: rotary scaling in transformers' keys (`rope_type`, `factor` …), None where there is none.
        positions: `max_position_embeddings`, which is part of the scaling; None without one.
        qkv_bias, output_bias, mlp_bias: which projections have a bias.
        settings: what converters carry over as it is: token ids, `initializer_range`.

    Raises:
        CheckpointError: a value that no model can have, or heads that don't divide into groups.
    """

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    rows: int
    norm_eps: float
    rope_theta: float
    length: int
    tied: bool = False
    qkv_bias: bool = True
    output_bias: bool = False
    mlp_bias: bool = False
    rope: Mapping[str, Any] | None = None
    positions: int | None = None
    settings: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            whole, real = field.type == "int", field.type == "float"
            if (whole or real) and not (type(value) is int or real and type(value) is float and isfinite(value)):
                raise CheckpointError(f"The configuration can't be used: {field.name}={value!r} is not a number.")
            if (whole or real) and value <= 0:
                raise CheckpointError(f"The configuration can't be used: {field.name}={short(value)} is not positive.")
            most = MOST_LAYERS if field.name == "layers" else _LARGEST if whole else 2**63
            if (whole or real) and value > most:
                raise CheckpointError(
                    f"The configuration can't be used: {field.name}={short(value)} is more than {most:,}, the most."
                )
        if self.heads % self.kv_heads:
            raise CheckpointError(
                f"The configuration can't be used: heads={self.heads} don't divide into kv_heads={self.kv_heads}."
            )

    @property
    def queries(self) -> int:
        """Rows of the query projection."""
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        """Rows of the key projection, and of the value projection."""
        return self.kv_heads * self.head_dim

    def shape(self, dimensions: Sequence[str]) -> tuple[int, ...]:
        """Sizes of named dimensions."""
        return tuple(getattr(self, dimension) for dimension in dimensions)
