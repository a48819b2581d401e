"""The curves of a training as a picture, drawn while it runs and however it ends."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback, TrainingArguments

PNG = "png"
"""What asks for pictures under `--report_to`."""

PICTURE = "training.png"

_PANELS: Mapping[str, Mapping[str, str]] = {
    "loss": {"loss": "training", "eval_loss": "evaluation"},
    "learning rate": {"learning_rate": ""},
    "margin of chosen over rejected": {"rewards/margins": "training", "eval_rewards/margins": "evaluation"},
    "share of pairs in the right order": {"rewards/accuracies": "training", "eval_rewards/accuracies": "evaluation"},
}
"""Title of a panel -> keys of the log and the names of their curves; a panel without any is left out."""


class Plots(TrainerCallback):
    """Draws what a training has logged when it saves, evaluates and ends."""

    def __init__(self) -> None:
        self._failed = False

    def on_save(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """A kill leaves the picture of the last checkpoint."""
        self.draw(args, state)

    def on_evaluate(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Evaluations also come behind the training."""
        self.draw(args, state)

    def draw(self, args: TrainingArguments, state: Any) -> None:
        """Write the picture, from one process; where it can't be written that is said once, and training goes on."""
        if not state.is_world_process_zero:
            return
        try:
            draw_curves(state.log_history, Path(str(args.output_dir)) / PICTURE)
        except Exception as error:  # whatever it is, it must not stand in the place of why a training has ended
            if not self._failed:
                reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
                print(f"Warning: {PICTURE} can't be written ({reason}).", file=sys.stderr)
            self._failed = True


@contextmanager
def plotted(trainer: Trainer) -> Iterator[None]:
    """Draw the curves of what happens inside, where the options ask for it, also where it fails or is interrupted."""
    if not getattr(trainer.args, "plots", False):
        yield
        return
    import matplotlib.figure  # noqa: F401  # now: an interruption would leave it half loaded for the last picture

    plots = Plots()
    trainer.add_callback(plots)
    try:
        yield
    finally:
        plots.draw(trainer.args, trainer.state)


def draw_curves(log: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw the loss, the learning rate and, of preferences, margins and accuracies; nothing where nothing was logged.

    Raises:
        OSError: the picture can't be written.
    """
    panels = {title: curves for title, keys in _PANELS.items() if (curves := _curves(log, keys))}
    if not panels:
        return
    from matplotlib.figure import Figure  # only those who ask for it need it

    rows = (len(panels) + 1) // 2
    figure = Figure(figsize=(10, 3.5 * rows), layout="constrained")
    for axes, (title, curves) in zip(figure.subplots(rows, 2, squeeze=False).flat, panels.items(), strict=False):
        for label, points in curves.items():
            marker = "o" if label == "evaluation" or len(points) == 1 else ""
            axes.plot(*zip(*points, strict=True), marker=marker, markersize=4, label=label)
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
        if any(curves):
            axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    figure.savefig(partial, format="png", dpi=110)
    os.replace(partial, path)


def _curves(log: Sequence[Mapping[str, Any]], keys: Mapping[str, str]) -> dict[str, list[tuple[int, float]]]:
    """Name of a curve -> its points (step, value)."""
    found = {name: [(entry["step"], entry[key]) for entry in log if key in entry] for key, name in keys.items()}
    return {name: points for name, points in found.items() if points}
