"""What a check found, and how a check is kept from ending the others."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any


class State(str, Enum):
    """What became of a check; the value is what people and programs are told."""

    OK = "ok"
    FAILED = "FAILED"
    NOTE = "note"
    ABSENT = "absent"


@dataclass(frozen=True)
class Outcome:
    """The result of a check.

    Attributes:
        state: FAILED is wrong; NOTE is worth knowing; ABSENT can't be had here, or isn't meant for this model.
        detail: one line for people.
        figures: what was measured.
    """

    state: State
    detail: str
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Check:
    """Something that can be wrong: a function without arguments, and under which heading and name it is reported."""

    group: str
    name: str
    run: Callable[[], Outcome]


@dataclass(frozen=True)
class Finding:
    """What a check found, and in how many seconds."""

    group: str
    name: str
    outcome: Outcome
    seconds: float

    @property
    def failed(self) -> bool:
        """Whether something is wrong."""
        return self.outcome.state is State.FAILED

    def to_json(self) -> dict[str, Any]:
        """The same as plain values; NaN and infinity become None, as JSON has no words for them."""
        figures = {name: plain_value(value) for name, value in self.outcome.figures.items()}
        return {
            "group": self.group,
            "name": self.name,
            "state": self.outcome.state.value,
            "detail": self.outcome.detail,
            "figures": figures,
            "seconds": round(self.seconds, 3),
        }


def plain_value(value: Any) -> Any:
    """A value that JSON can hold."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def perform(check: Check) -> Finding:
    """Run a check; one that raises has failed, and the line that it raised is its detail."""
    begin = time.perf_counter()
    try:
        outcome = check.run()
    except Exception as error:  # there is no end to what an environment can break, and the others are still to be run
        outcome = Outcome(State.FAILED, one_line(error))
    return Finding(check.group, check.name, outcome, time.perf_counter() - begin)


def one_line(error: BaseException) -> str:
    """An error as a single line with its kind, of at most 300 characters."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text:.280}" if text else type(error).__name__
