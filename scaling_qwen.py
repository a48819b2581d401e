"""Scaling of the rotary frequencies by `rope_parameters`: what a configuration says, resolved, and its arithmetic."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

ROPE_SPELLINGS = ("rope_parameters", "rope_scaling")
"""Names of the dictionary of rotary parameters: that of transformers 5, and the older one."""

_ROPE_KEYS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
}
"""What each kind of scaling reads, besides `_ROPE_COMMON`."""

ROPE_DEFAULTS = {"rope_theta": 10000, "partial_rotary_factor": 1.0}

_ROPE_EXAMPLE = '{"rope_type": "dynamic", "factor": 2.0}'

_ROPE_COMMON = ("rope_type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings")


@dataclass(frozen=True)
class RotaryScaling:
    """How the rotary frequencies are changed for long texts, resolved from `rope_parameters`.

    Attributes:
        kind: "default" (not at all), "linear", "dynamic" or "yarn".
        factor: how far texts are to be stretched.
        length: tokens beyond which "dynamic" begins; the trained length that "yarn" measures wavelengths by.
        attention_factor: "yarn" multiplies cosine and sine by it.
        beta_fast, beta_slow: "yarn" keeps frequencies that turn more often than the first within `length`, and divides
            those that turn less often than the second.
        truncate: "yarn" rounds the bounds between them to whole channels.

    Source: `ROPE_INIT_FUNCTIONS` of transformers, the same from 5.4 to 5.24.
    """

    kind: str
    factor: float
    length: int
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True


def take_rope(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The rotary parameters of both spellings, taken out of `kwargs`."""
    merged: dict[str, Any] = {}
    for spelling in ROPE_SPELLINGS:
        rope = plain_rope(kwargs.pop(spelling, None))
        for key, value in rope.items():
            if merged.setdefault(key, value) != value:
                raise contradiction(f"rope_parameters.{key}", merged[key], f"rope_scaling.{key}", value)
    return merged


def plain_rope(rope: Any) -> dict[str, Any]:
    """A copy of rotary parameters under today's names: `type` is `rope_type`, null means not given."""
    if not isinstance(rope or {}, Mapping):
        raise ValueError(f"rope_parameters={rope!r} is impossible: it must be a dictionary, as {_ROPE_EXAMPLE}.")
    plain = {key: value for key, value in (rope or {}).items() if value is not None}
    kind = plain.pop("type", None)
    if kind is not None and plain.setdefault("rope_type", kind) != kind:
        raise contradiction("rope_type", plain["rope_type"], "type", kind)
    whole = [key for key in _ROPE_KEYS["yarn"] if type(plain.get(key)) is int]
    return {**plain, **{key: float(plain[key]) for key in whole}}  # as the file of another program has them


def contradiction(name: str, value: Any, alias: str, given: Any) -> ValueError:
    return ValueError(
        f"{name}={value!r} and {alias}={given!r} are two spellings of one key and contradict each other: give one of "
        "them, or the same value to both."
    )


def resolve_rope(rope: dict[str, Any], longest: int, has_ntk: bool) -> RotaryScaling:
    kind = rope.get("rope_type", "default")
    if not isinstance(kind, str) or kind not in _ROPE_KEYS:
        known = ", ".join(repr(name) for name in _ROPE_KEYS)
        raise ValueError(f"rope_type={kind!r} in rope_parameters can't be computed here: use one of {known}.")
    for key, value in rope.items():
        if key not in (*_ROPE_COMMON, *_ROPE_KEYS[kind]):
            raise ValueError(
                f"{key}={value!r} in rope_parameters means nothing with rope_type={kind!r}: leave it out, or use "
                f"another rope_type, as {_ROPE_EXAMPLE}."
            )
    if kind == "default":
        return RotaryScaling(kind, 1.0, longest)
    if has_ntk:
        raise ValueError(
            f"use_dynamic_ntk=True and rope_parameters with rope_type={kind!r} would both stretch the rotary "
            "frequencies: set use_dynamic_ntk=False as well, which the published configurations have on, or leave the "
            "scaling out."
        )
    if "factor" not in rope:
        raise ValueError(f"rope_parameters with rope_type={kind!r} need a factor, as {_ROPE_EXAMPLE}.")
    factor = _rope_number(rope, "factor", 1.0)
    if kind != "yarn":
        return RotaryScaling(kind, factor, longest)
    return _resolve_yarn(rope, factor, _rope_number(rope, "original_max_position_embeddings", 1, longest))


def _resolve_yarn(rope: dict[str, Any], factor: float, length: int) -> RotaryScaling:
    def magnitude(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0

    attention_factor = magnitude(1.0)
    scale, scale_all = _rope_number(rope, "mscale", 0, 0), _rope_number(rope, "mscale_all_dim", 0, 0)
    if scale and scale_all:
        attention_factor = magnitude(scale) / magnitude(scale_all)
    fast, slow = _rope_number(rope, "beta_fast", 0, 32.0) or 32.0, _rope_number(rope, "beta_slow", 0, 1.0) or 1.0
    if fast < slow:
        raise ValueError(f"beta_fast={fast} in rope_parameters is less than beta_slow={slow}: it must not be.")
    if not isinstance(truncate := rope.get("truncate", True), bool):
        raise ValueError(f"truncate={truncate!r} in rope_parameters is impossible: it must be true or false.")
    if _rope_number(rope, "rope_theta", 0) <= 1:
        raise ValueError(f"rope_theta={rope['rope_theta']} is impossible with rope_type='yarn': it must be above 1.")
    return RotaryScaling(
        kind="yarn",
        factor=factor,
        length=length,
        attention_factor=_rope_number(rope, "attention_factor", 0, attention_factor),
        beta_fast=fast,
        beta_slow=slow,
        truncate=truncate,
    )


def _rope_number(rope: dict[str, Any], key: str, least: float, default: Any = None) -> Any:
    value = rope.get(key, default)
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not number or value < least:
        raise ValueError(f"{key}={value!r} in rope_parameters is impossible: it must be a number, {least} or more.")
    return value


def _rope_value(key: str, doc: str) -> property:
    def read(config: RopeParameters) -> Any:
        return config.rope_parameters[key]

    def write(config: RopeParameters, value: Any) -> None:
        config.__dict__["rope_parameters"] = {**config.rope_parameters, key: value}  # not in shallow copies as well

    return property(read, write, doc=doc)


class RopeParameters:
    """The rotary part of a configuration, a mixin of `QWenConfig`: both of its spellings, of today and before."""

    n_positions: int
    use_dynamic_ntk: bool
    rotary_emb_base = _rope_value("rope_theta", "Base of the rotary frequencies.")
    rotary_pct = _rope_value("partial_rotary_factor", "Share of each head that is rotated, in (0, 1].")

    @property
    def rope_parameters(self) -> dict[str, Any]:
        """Rotary parameters as transformers 5 spells them; what is written into this dictionary counts.

        `rope_theta` is `rotary_emb_base` and `partial_rotary_factor` is `rotary_pct`; a dictionary that is set without
        them leaves both as they are, and replaces the rest.
        """
        return self.__dict__.setdefault("rope_parameters", {"rope_type": "default", **ROPE_DEFAULTS})

    @rope_parameters.setter
    def rope_parameters(self, value: Mapping[str, Any] | None) -> None:
        kept = {name: self.rope_parameters.get(name, default) for name, default in ROPE_DEFAULTS.items()}
        self.__dict__["rope_parameters"] = {"rope_type": "default", **kept, **plain_rope(value)}

    @property
    def rope_scaling(self) -> dict[str, Any] | None:
        """`rope_parameters` where they scale, else None: the spelling before transformers 5."""
        return None if self.rope_parameters.get("rope_type") == "default" else self.rope_parameters

    @rope_scaling.setter
    def rope_scaling(self, value: Mapping[str, Any] | None) -> None:
        self.rope_parameters = value

    def convert_rope_params_to_dict(self, **kwargs: Any) -> dict[str, Any]:
        """Called by transformers to take rotary parameters out of `kwargs`: the constructor has done so."""
        return kwargs

    def standardize_rope_params(self) -> None:
        """Complete `rope_parameters` as transformers does, for programs that read them."""
        self.rope_parameters = dict(self.rope_parameters)
        if self.rope_parameters["rope_type"] == "yarn":
            self.rope_parameters.setdefault("original_max_position_embeddings", self.n_positions)

    @property
    def rotary_scaling(self) -> RotaryScaling:
        """What `rope_parameters` ask for.

        Raises:
            ValueError: a kind of scaling, a key or a value that can't be computed, or `use_dynamic_ntk` beside it.
        """
        return resolve_rope(plain_rope(self.rope_parameters), self.n_positions, bool(self.use_dynamic_ntk))


def dynamic_alpha(lengths: torch.Tensor, scaling: RotaryScaling) -> torch.Tensor:
    """Stretch of the rotary base by transformers' "dynamic" scaling for texts of the given lengths, float32.

    alpha = factor * length / L - (factor - 1) beyond L = `scaling.length`, else 1. It agrees with `ntk_alpha` where
    factor is 2 and length / L a power of two, and has no steps between.
    """
    alpha = scaling.factor * lengths.float() / scaling.length - (scaling.factor - 1.0)
    return torch.where(lengths > scaling.length, alpha, 1.0)


def scaled_frequencies(periods: torch.Tensor, base: float, scaling: RotaryScaling) -> torch.Tensor:
    """Frequencies of the rotated channels, float32 of the shape of `periods`, which are base^(2 i / R)."""
    if scaling.kind == "yarn":
        return yarn_frequencies(periods, base, scaling)
    frequencies = 1.0 / periods
    return frequencies / scaling.factor if scaling.kind == "linear" else frequencies


def yarn_frequencies(periods: torch.Tensor, base: float, scaling: RotaryScaling) -> torch.Tensor:
    """Frequencies under YaRN, (R / 2,) -> (R / 2,) float32; `periods` are base^(2 i / R).

    Channels that turn often within the trained length keep their frequency, slow ones have it divided by the factor,
    and a ramp lies between.
    """
    dim = 2 * periods.shape[-1]

    def channel(turns: float) -> float:
        return dim * math.log(scaling.length / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = channel(scaling.beta_fast), channel(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # as transformers does
    channels = torch.arange(dim // 2, device=periods.device, dtype=torch.float32)
    kept = 1.0 - ((channels - low) / (high - low)).clamp(0, 1)
    return 1.0 / (scaling.factor * periods) * (1.0 - kept) + 1.0 / periods * kept
