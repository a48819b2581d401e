"""The generation settings of a conversation: what they are, what was changed, and whether it can be."""

from __future__ import annotations

import copy
import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    GenerationConfig,
    MinPLogitsWarper,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from ..qwen_generation_utils import DEFAULT_WINDOW
from .errors import CommandError


@dataclass(frozen=True)
class Setting:
    """One that makes sense where a single reply is shown while it is written.

    Attributes:
        kind: its type.
        check: raises ValueError where the value is out of range, as `generate` would.
        off: the value with which `generate` leaves `check` out.
    """

    kind: type[bool] | type[int] | type[float]
    check: Callable[[Any], Any] | None = None
    off: float | None = None


def _above_zero(value: float) -> None:
    if value <= 0:
        raise ValueError(f"it must be greater than 0, but is {value}")


def _not_negative(value: float) -> None:
    if value < 0:
        raise ValueError(f"it must not be negative, but is {value}")


SETTINGS = {
    "max_new_tokens": Setting(int, _above_zero),
    "min_new_tokens": Setting(int, _not_negative),
    "max_time": Setting(float, _above_zero),
    "max_window_size": Setting(int, _above_zero),
    "do_sample": Setting(bool),
    "temperature": Setting(float, TemperatureLogitsWarper),
    "top_k": Setting(int, TopKLogitsWarper, off=0),
    "top_p": Setting(float, TopPLogitsWarper),
    "min_p": Setting(float, MinPLogitsWarper),
    "typical_p": Setting(float, TypicalLogitsWarper, off=1),
    "epsilon_cutoff": Setting(float, EpsilonLogitsWarper, off=0),
    "eta_cutoff": Setting(float, EtaLogitsWarper, off=0),
    "repetition_penalty": Setting(float, RepetitionPenaltyLogitsProcessor),
    "no_repeat_ngram_size": Setting(int, NoRepeatNGramLogitsProcessor, off=0),
}
_WORDS = {bool: "true or false", int: "a whole number", float: "a number"}
_TRUTHS = {"true": True, "false": False}


class Settings:
    """Settings that differ from the checkpoint's.

    Args:
        model: whose generation configuration holds for all others.
        given: those to begin with, and to come back to.

    Attributes:
        changed: name -> value, arguments of `chat_stream`.

    Raises:
        CommandError: given ones that can't be.
    """

    def __init__(self, model: Any, given: Mapping[str, Any]):
        self._model = model
        self._given = dict(given)
        self.changed: dict[str, Any] = {}
        self._adopt(self._given)

    def change(self, assignments: Mapping[str, str]) -> None:
        """Set them all, or none if one of them can't be; `none` brings the checkpoint's own value back.

        Raises:
            CommandError: an unknown name, or a value of the wrong type, out of range, or without effect.
        """
        values = dict(self.changed)
        for name, text in assignments.items():
            if name not in SETTINGS:
                raise CommandError(_unknown(name))
            values.pop(name, None)
            if text.lower() != "none":
                values[name] = _parse(name, text)
        self._adopt(values)

    def reset(self) -> None:
        """Undo every change."""
        self.changed = dict(self._given)

    def effective(self) -> dict[str, Any]:
        """The value of every setting in the next reply; None for what is left out."""
        return self._effective(self.changed)

    def _effective(self, changed: Mapping[str, Any]) -> dict[str, Any]:
        config = copy.deepcopy(self._model.generation_config)
        for name, value in changed.items():
            setattr(config, name, value)
        merged, _ = self._model._prepare_generation_config(config)  # with what transformers puts in for open ones
        values = {name: getattr(merged, name, None) for name in SETTINGS}
        return {**values, "max_window_size": values["max_window_size"] or DEFAULT_WINDOW}

    def _adopt(self, values: dict[str, Any]) -> None:
        for name, value in values.items():
            setting = SETTINGS[name]
            try:
                if setting.check is not None and value != setting.off:
                    setting.check(value)
            except ValueError as error:
                raise CommandError(f"{name}={value} can't be set: {error}.") from error
        # Those of the user alone, beside the mode: what a checkpoint has for sampling may lie idle.
        config = GenerationConfig()
        for name, value in {"do_sample": self._effective(values)["do_sample"], **values}.items():
            setattr(config, name, value)
        try:
            config.validate(strict=True)
        except ValueError as error:
            issues = [line.removeprefix("- ") for line in str(error).splitlines() if line.startswith("- ")]
            raise CommandError("\n".join(issues) or str(error)) from error
        self.changed = values


def _parse(name: str, text: str) -> bool | int | float:
    kind = SETTINGS[name].kind
    try:
        value = _TRUTHS[text.lower()] if kind is bool else kind(text)
        if not math.isfinite(value):
            raise ValueError(text)
    except (KeyError, ValueError, OverflowError) as error:
        raise CommandError(
            f"{name}={text!r} must be {_WORDS[kind]}, or none for the checkpoint's own value."
        ) from error
    return value


def _unknown(name: str) -> str:
    if name == "seed":
        return "The seed is set by `:seed N`."
    near = difflib.get_close_matches(name, SETTINGS, n=1)
    guess = f" Did you mean {near[0]!r}?" if near else ""
    return f"{name!r} is no setting of a conversation.{guess} There are {', '.join(SETTINGS)}."
