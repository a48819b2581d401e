"""What is said while a training runs: how long it will take, and whether it goes on as before."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState

_MEASURED = 3  # steps; the first of them, which prepares much, is left out where there is time for others
_TOO_LONG = 20.0  # seconds without a word


class Pace(TrainerCallback):
    """Says once, when the first steps are done, how long the rest will take.

    Args:
        clock: gives seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._begun = 0.0
        self._times: list[float] = []
        self._is_said = False

    def on_step_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """A step begins; what is between two of them, such as an evaluation, isn't counted."""
        self._begun = self._clock()

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """A step is done."""
        if self._is_said:
            return
        self._times.append(self._clock() - self._begun)
        if len(self._times) < _MEASURED and sum(self._times) < _TOO_LONG:
            return
        self._is_said = True
        left = state.max_steps - state.global_step
        if left > 0 and state.is_world_process_zero:
            tqdm.write(self._report(left, state.global_step), file=sys.stderr)

    def _report(self, left: int, step: int) -> str:
        measured = self._times[1:] or self._times
        pace = sum(measured) / len(measured)
        of = f"step {step}" if len(measured) == 1 else f"steps {step - len(measured) + 1} to {step}"
        first = ", the first, which is often the slowest" if len(self._times) == 1 else ""
        return (
            f"About {duration(pace * left)} for the {left:,} steps left: {pace:.3g} s a step, measured on {of}{first}. "
            "Evaluations and checkpoints come on top."
        )


def duration(seconds: float) -> str:
    """A time as people say it: `40 s`, `12 min`, `3 h 20 min`, `2 days 5 h`."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    return f"{hours // 24} days {hours % 24} h"


class UsedOptimizer(TrainerCallback, ExportableState):
    """Notes with each checkpoint what optimizer it has the state of, for `checkpoints.check_kind`.

    Args:
        optim: as the option says.
    """

    def __init__(self, optim: str = ""):
        self.optim = optim

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"args": {"optim": self.optim}, "attributes": {}}


class SameData(TrainerCallback, ExportableState):
    """Notes with each checkpoint what it was trained on, and warns where a run goes on with something else.

    Args:
        seen: what tells the data apart from others.
    """

    def __init__(self, seen: str = ""):
        self.seen = seen

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"args": {"seen": self.seen}, "attributes": {}}

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Compare what the checkpoint has with what there is."""
        kept = state.stateful_callbacks.get(type(self).__name__)
        if not state.global_step or kept is None or kept["args"]["seen"] == self.seen:
            return
        if state.is_world_process_zero:
            print(
                "Warning: the data, or their --data_weights, --model_max_length or --packing, aren't those that the "
                "checkpoint was trained on: the result is not that of a run without interruption.",
                file=sys.stderr,
            )


def settings_of(optimizer: Any) -> dict[str, list[Any]]:
    """Options that an optimizer holds, and with it each checkpoint -> their values in each of its groups."""
    found: dict[str, list[Any]] = {}
    for group in optimizer.param_groups:
        first, second, *_ = group.get("betas", (None, None))
        held = {"learning_rate": group.get("initial_lr"), "weight_decay": group.get("weight_decay")}
        held |= {"adam_beta1": first, "adam_beta2": second, "adam_epsilon": group.get("eps")}
        for option, value in held.items():
            found.setdefault(option, []).append(value)
    return found


def follow_settings(args: TrainingArguments, asked: dict[str, list[Any]], used: dict[str, list[Any]]) -> None:
    """Make options what a checkpoint goes on with, so that the card and later messages tell it, and say so.

    Args:
        asked, used: `settings_of` the optimizer before and after the checkpoint is loaded.
    """
    for option, values in asked.items():
        pairs = (pair for pair in zip(values, used[option], strict=True) if pair[0] != pair[1])
        wanted, held = next(pairs, (None, None))
        if held is None or wanted != getattr(args, option):
            continue
        setattr(args, option, held)
        if args.process_index == 0:
            print(
                f"Warning: --{option} {wanted:g} isn't used: the checkpoint goes on with its own, {held:g}. To change "
                "it, begin from the checkpoint's weights (--model_name_or_path, or --lora_weight_path).",
                file=sys.stderr,
            )
