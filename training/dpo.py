"""Direct preference optimisation by TRL's trainer, on pairs that this package has read and encoded.

Imported only where it is asked for, because TRL takes seconds to import and is an extra.
"""

from __future__ import annotations

import shutil
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from huggingface_hub import constants
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainingArguments
from trl import DPOConfig, DPOTrainer

from .checkpoints import checkpoint_to_resume
from .errors import TrainingError
from .examples import Example
from .loop import WatchedTrainer
from .plots import plotted

_REFERENCE = "ref"
"""TRL's name for the copy of an adapter that a policy is held against."""


class PreferenceTrainer(WatchedTrainer, DPOTrainer):
    """TRL's trainer of preferences, with what this package watches over, writes and says; see `WatchedTrainer`."""

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        """The pairs as they are: TRL's own encoding would read control tokens out of texts."""
        return dataset

    def compute_loss(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        """As TRL's, with the reference in the mode of the policy.

        Beyond the trained length attention is scaled in evaluation only, so two equal models in two modes differ.
        """
        if self.ref_model is not None:
            self.ref_model.train(self.model.training)
        return super().compute_loss(model, *args, **kwargs)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """None of TRL's, which would take the place of an author's; see `card.py`."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As `WatchedTrainer`'s, without the adapter that the trained one is compared with."""
        super().save_model(output_dir, _internal_call)
        if self.is_world_process_zero() and _REFERENCE in getattr(self.model, "peft_config", {}):
            folder = Path(str(self.args.output_dir) if output_dir is None else output_dir)
            shutil.rmtree(folder / _REFERENCE, ignore_errors=True)


def train_preferences(
    model: Any,
    reference: Any | None,
    tokenizer: PreTrainedTokenizerBase,
    train_pairs: Sequence[Example],
    eval_pairs: Sequence[Example] | None,
    args: TrainingArguments,
    *,
    callbacks: Iterable[TrainerCallback] = (),
    **options: Any,
) -> PreferenceTrainer:
    """Train a model on preference pairs and return the trainer; as `finetuning.train`.

    Args:
        options: `beta`, `loss` and `new_adapter` of `make_trainer`, as are the other arguments.

    Raises:
        TrainingError: no such checkpoint, or TRL can't train so.
    """
    checkpoint = checkpoint_to_resume(args)
    use_cache = model.config.use_cache
    trainer = make_trainer(model, reference, tokenizer, train_pairs, eval_pairs, args, callbacks=callbacks, **options)
    model.config.use_cache = use_cache  # transformers turns it off, and would save it so
    with plotted(trainer):
        trainer.train(None if checkpoint is None else str(checkpoint))
    return trainer


def make_trainer(
    model: Any,
    reference: Any | None,
    tokenizer: PreTrainedTokenizerBase,
    train_pairs: Sequence[Example],
    eval_pairs: Sequence[Example] | None,
    args: TrainingArguments,
    *,
    beta: float = 0.1,
    loss: str = "sigmoid",
    new_adapter: bool = False,
    callbacks: Iterable[TrainerCallback] = (),
) -> PreferenceTrainer:
    """A trainer of preferences; dropout is off in all models, for one loss compares two of them.

    Args:
        model: a QWen model, or peft's around one.
        reference: the model that `model` is held against. None for one with an adapter: the base where the adapter is
            new, else the adapter as it is now.
        train_pairs, eval_pairs: `prompt_ids`, `chosen_ids` and `rejected_ids`, none longer than it may be.
        beta: how closely the reference is kept to: the higher, the closer.
        loss: sigmoid, hinge or ipo.
        new_adapter: whether the adapter changes nothing yet.

    Raises:
        TrainingError: TRL can't train so.
    """
    weights = {name: weight.data for name, weight in model.named_parameters() if weight.requires_grad}
    try:
        with _no_telemetry():
            trainer = PreferenceTrainer(
                model=model,
                ref_model=reference,
                args=_config(args, beta=beta, loss=loss),
                train_dataset=_dataset(train_pairs),
                eval_dataset=_dataset(eval_pairs) if eval_pairs else None,
                processing_class=tokenizer,
                callbacks=list(callbacks),
            )
    except (NotImplementedError, TypeError, ValueError) as error:
        raise TrainingError(f"TRL can't train so: {error}") from error
    for name, weight in model.named_parameters():
        if name in weights and weight.dtype != weights[name].dtype:  # TRL rounds it where the base is in few bits
            weight.data = weights[name].to(weight.device)
        elif f".{_REFERENCE}." in name:
            weight.requires_grad_(False)
    if new_adapter and reference is None:
        model.delete_adapter(_REFERENCE)  # without it TRL turns the adapter off, which costs no memory
    return trainer


def _config(args: TrainingArguments, *, beta: float, loss: str) -> DPOConfig:
    """TRL's options beside transformers', which are taken as they are: they were read and checked before."""
    as_transformers: dict[str, Any] = {"bf16": False, "gradient_checkpointing": None}  # TRL turns both on
    config = DPOConfig(
        output_dir=args.output_dir,
        beta=beta,
        loss_type=[loss],
        max_length=None,  # the pairs fit
        use_cpu=args.use_cpu,
        report_to="none",
        **as_transformers,
    )
    vars(config).update(vars(args))
    config.remove_unused_columns = False  # the lengths, by which batches may be put together
    return config


def _dataset(pairs: Sequence[Example]) -> Dataset:
    columns: dict[str, list[Any]] = {key: [_list(pair[key]) for pair in pairs] for key in pairs[0]}
    columns["length"] = [len(p["prompt_ids"]) + max(len(p["chosen_ids"]), len(p["rejected_ids"])) for p in pairs]
    return Dataset.from_dict(columns)


def _list(ids: Sequence[int]) -> list[int]:
    return ids.tolist() if isinstance(ids, (array, torch.Tensor)) else list(ids)


@contextmanager
def _no_telemetry() -> Iterator[None]:
    """TRL tells its makers about each trainer; what is trained here is nobody else's business."""
    before = constants.HF_HUB_DISABLE_TELEMETRY
    constants.HF_HUB_DISABLE_TELEMETRY = True
    try:
        yield
    finally:
        constants.HF_HUB_DISABLE_TELEMETRY = before
