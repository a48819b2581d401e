"""Transformers' training loop, stopped before it does harm: NaN, a finished run, a full disk."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.training_args import OptimizerNames
from transformers.utils import logging

from ..products_qwen import multiplies
from .checkpoints import ADAPTER_CONFIG, is_of_writing, last_checkpoint, saving_error
from .errors import TrainingError
from .examples import IGNORED
from .mixing import WeightedRows
from .packing import PackedDataset
from .watching import UsedOptimizer, follow_settings, settings_of

logger = logging.get_logger(__name__)

_LARGEST_EXPONENT = 700.0  # of what a float can hold
_MOST_SKIPPED = 25  # steps in a row; a scale of fp16 that begins at 2**16 is far below 1 then


class RunIsFinished(Exception):
    """The checkpoint that is taken up has all steps of the run."""


class WatchedTrainer(Trainer):
    """Transformers' loop, in which nothing that is not finite gets into an optimizer or onto a disk, see `Watch`."""

    model: Any

    def __init__(self, *, args: TrainingArguments, callbacks: Iterable[TrainerCallback] = (), **kwargs: Any):
        noted = UsedOptimizer(OptimizerNames(args.optim).value)
        super().__init__(args=args, callbacks=[Watch(self), noted, *callbacks], **kwargs)
        self.losses: list[torch.Tensor] = []
        self.checkpoint_being_written: Path | None = None
        self.settings: dict[str, list[Any]] = {}

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """As transformers'; what the optimizer is set to is noted, before that of a checkpoint takes its place."""
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        self.settings = settings_of(self.optimizer if optimizer is None else optimizer)
        return scheduler

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As transformers'; the loss is looked at before the optimizer's step."""
        loss = super().training_step(*args, **kwargs)
        self.losses.append(loss.detach())
        return loss

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As transformers'; a checkpoint with all steps of the run is loaded, and nothing trained.

        Raises:
            TrainingError: loss, gradients or weights are not finite.
            SavingError: a checkpoint can't be written.
        """
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        except RunIsFinished:
            self.is_in_train = False
            return None
        except Exception as error:
            partial = self.checkpoint_being_written
            if partial is None or not is_of_writing(error):
                raise
            raise saving_error(error, partial, str(self.args.output_dir)) from error

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As transformers', which rounds the weights for `bf16_full_eval`, but not what is saved behind it.

        Raises:
            TrainingError: a loss is not finite, as after a step that was far too large.
        """
        rounded = (self.args.bf16_full_eval or self.args.fp16_full_eval) and not self.is_in_train
        with _kept(self.model) if rounded else nullcontext():
            metrics = super().evaluate(*args, **kwargs)
        for name, value in metrics.items():
            if name.endswith("loss") and not math.isfinite(value):
                step = self.state.global_step
                raise self.diverged(f"The loss of the evaluation is {value} after step {step}", step)
        return metrics

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As transformers', of finite weights only.

        Raises:
            TrainingError: a weight is NaN or infinite.
        """
        if self.is_anywhere(bad := self.bad_weight()):
            step = self.state.global_step
            raise self.diverged(f"The weights are not finite ({bad or 'in another process'}) after step {step}", step)
        if _internal_call and output_dir is not None:  # a checkpoint: transformers writes its state last
            self.checkpoint_being_written = Path(output_dir)
            if self.is_world_process_zero():
                (Path(output_dir) / TRAINER_STATE_NAME).unlink(missing_ok=True)  # of an earlier run over the same steps
        super().save_model(output_dir, _internal_call)

    def bad_weight(self) -> str | None:
        """Name of a weight that is not finite."""
        return next((name for name, weight in self.model.named_parameters() if not all_finite([weight])), None)

    def is_anywhere(self, found: Any) -> bool:
        """Whether any process has found something: all of them go on, or none does."""
        if self.args.world_size == 1 or not torch.distributed.is_initialized():
            return bool(found)
        flag = torch.tensor(float(bool(found)), device=self.args.device)
        torch.distributed.all_reduce(flag)
        return flag.item() > 0

    def diverged(self, what: str, bad_from: int) -> TrainingError:
        """What went wrong, what is left, and what to do with it; checkpoints are bad from that step on."""
        good = last_checkpoint(str(self.args.output_dir), before=bad_from)
        rest = "There is no good checkpoint" if good is None else f"The last good checkpoint is {good}"
        if good is None or not any(good.glob("*.safetensors")):  # FSDP's and DeepSpeed's are in shards
            rest += ". Begin again with another --output_dir"
        else:
            option = "--lora_weight_path" if (good / ADAPTER_CONFIG).is_file() else "--model_name_or_path"
            rest += f". Begin from it with {option} {good}, another --output_dir"
        lower = f"a lower --learning_rate than {self.args.learning_rate:g}"
        clip = "" if self.args.max_grad_norm > 0 else " and --max_grad_norm 1"
        half = " and --bf16 in place of --fp16" if self.args.fp16 else ""
        return TrainingError(f"{what}: training diverged, and nothing of it is saved. {rest} and {lower}{clip}{half}.")


class QWenTrainer(WatchedTrainer):
    """The loop for conversations and texts: without a cache of keys and values, with the perplexity of evaluations.

    The loss of an evaluation is the mean over all its tokens that are learnt, as that of a step is; transformers' is
    the mean over its batches, which depends on their size and on the number of processes.
    """

    def __init__(self, *, args: TrainingArguments, **kwargs: Any):
        if args.label_smoothing_factor:
            kwargs["compute_loss_func"] = SmoothedLoss(args.label_smoothing_factor)
        super().__init__(args=args, **kwargs)
        self._evaluated: list[torch.Tensor] = []
        """Of each batch of an evaluation the sum of its losses and the number of its tokens."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """As transformers'; not by `config.use_cache`, which would be saved with the model."""
        result: Any = super().compute_loss(model, {**inputs, "use_cache": False}, return_outputs, num_items_in_batch)
        if not model.training:
            loss, count = (result[0] if return_outputs else result).detach().mean(), num_items_in_batch.float().mean()
            self._evaluated.append(torch.stack([torch.where(count > 0, loss * count, 0.0), count]))
        return result

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """As transformers'; rows that come again, to fill up the last batch of several processes, count for nothing."""
        loader = self.accelerator.gradient_state
        if self.args.world_size > 1 and loader.end_of_dataloader and loader.remainder > 0:
            labels = inputs["labels"].clone()
            labels[max(0, loader.remainder - self.args.process_index * len(labels)) :] = IGNORED
            inputs = {**inputs, "labels": labels}
        return super().prediction_step(model, inputs, *args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers', with the loss of all tokens of all processes."""
        self._evaluated = []
        output: Any = super().evaluation_loop(*args, **kwargs)
        sums = torch.stack(self._evaluated).cpu().double().sum(0)
        if self.args.world_size > 1:
            sums = self.accelerator.reduce(sums.to(self.args.device))
        output.metrics[f"{kwargs.get('metric_key_prefix', 'eval')}_loss"] = (sums[0] / sums[1]).item()
        return output

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As transformers', with `eval_perplexity` beside `eval_loss`."""
        if "eval_loss" in logs:
            logs["eval_perplexity"] = math.exp(min(logs["eval_loss"], _LARGEST_EXPONENT))
        super().log(logs, *args, **kwargs)


@dataclass(frozen=True)
class SmoothedLoss:
    """Cross entropy of each next token with a target that is in part all words alike.

    Transformers' `LabelSmoother` adds up the same, but is given unshifted labels for models that are not its own, and
    in 5.4 no number of tokens to divide by.

    Attributes:
        factor: that part, from 0 to 1.
    """

    factor: float

    def __call__(
        self, outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """The sum over the tokens that count, divided by their number in the whole step where that is given."""
        wanted = labels[:, 1:]
        counted = wanted != IGNORED
        logits = outputs["logits"][:, :-1][counted].float()
        loss = torch.nn.functional.cross_entropy(logits, wanted[counted], label_smoothing=self.factor, reduction="sum")
        return loss / (counted.sum() if num_items_in_batch is None else num_items_in_batch)


class Watch(TrainerCallback):
    """Looks at each step before it is made."""

    def __init__(self, trainer: WatchedTrainer):
        self.trainer = trainer
        self._skipped = 0

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Say what will be done; stop where nothing is left to do, or the weights are no good from the start."""
        trainer = self.trainer
        if trainer.is_anywhere(bad := trainer.bad_weight()):
            raise TrainingError(
                f"The weights hold NaN or infinity before the first step ({bad or 'in another process'}): take another "
                "copy of the model, or an earlier checkpoint."
            )
        if args.fsdp and not trainer.is_fsdp_enabled and state.is_world_process_zero:
            print(f"Warning: --fsdp shards nothing on {args.device}.", file=sys.stderr)
        if state.is_world_process_zero and (option := _slow_option(args)):
            print(
                f"Warning: this processor can't multiply what {option} asks for, and torch does it number by number: a "
                f"step takes many times as long as in float32. Leave {option} out, or train on a GPU.",
                file=sys.stderr,
            )
        if state.global_step:
            follow_settings(args, trainer.settings, settings_of(trainer.optimizer))
        finished = state.global_step >= state.max_steps
        if state.is_world_process_zero:
            print(_finished(state) if finished else _plan(trainer.train_dataset, args, state), file=sys.stderr)
        if finished:
            raise RunIsFinished

    def on_pre_optimizer_step(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop before weights become NaN: gradients that are not finite would make them so."""
        trainer, step = self.trainer, state.global_step + 1
        losses, trainer.losses = trainer.losses, []
        bad_loss = not all_finite(losses)
        gradients = (weight.grad for weight in trainer.model.parameters() if weight.grad is not None)
        if not trainer.is_anywhere(bad_loss or not all_finite(gradients)):
            self._skipped = 0
            return
        self._skipped += 1
        scaler = trainer.accelerator.scaler
        if scaler is not None and scaler.is_enabled() and self._skipped < _MOST_SKIPPED:
            return  # it skips the step and lowers its scale, as is usual in the first steps of fp16
        shown = next((float(loss) for loss in losses if not all_finite([loss])), math.nan)
        what = f"The loss is {shown}" if bad_loss else "The gradients are not finite (NaN or infinity)"
        # The weights that give no finite loss are those of the step before.
        raise trainer.diverged(f"{what} at step {step}", step - 1 if bad_loss else step)

    def on_save(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """A checkpoint is complete."""
        self.trainer.checkpoint_being_written = None


@contextmanager
def _kept(model: torch.nn.Module) -> Iterator[None]:
    """Put a model's numbers back that are rounded inside; they take the place that the gradients of a step had."""
    weights = [(weight, weight.data) for weight in model.parameters()]
    buffers = [(part, *named) for part in model.modules() for named in part.named_buffers(recurse=False)]
    try:
        yield
    finally:
        for weight, data in weights:
            weight.data = data
        for part, name, buffer in buffers:
            setattr(part, name, buffer)


def all_finite(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether no value is NaN or infinite; of tensors in shards, those of this process."""
    flags: dict[torch.device, list[torch.Tensor]] = {}
    for tensor in tensors:
        local: torch.Tensor = tensor.detach().to_local() if hasattr(tensor, "to_local") else tensor.detach()  # type: ignore[attr-defined]
        if local.is_floating_point() and local.numel() and not local.is_meta and local.itemsize > 1:
            # Not isfinite, which makes a copy of the size of the largest weight; either bound is NaN where a value is.
            flags.setdefault(local.device, []).append(torch.stack(torch.aminmax(local)).isfinite().all())
    return all(bool(torch.stack(found).all()) for found in flags.values())


def _finished(state: Any) -> str:
    return (
        f"The run is finished: the checkpoint has {state.global_step} steps of {state.max_steps}, nothing is trained. "
        "Raise --max_steps or --num_train_epochs to go on."
    )


def _slow_option(args: TrainingArguments) -> str | None:
    """The option that asks for numbers which the processor doesn't multiply, where the training is on it."""
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
    if args.device.type != "cpu" or multiplies(dtype):
        return None
    return "--bf16" if args.bf16 else "--fp16"


def _plan(dataset: Any, args: TrainingArguments, state: Any) -> str:
    """What will be done, for the user."""
    rows, batch = len(dataset), args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    packed = f" of {len(dataset.examples)} packed examples" if isinstance(dataset, PackedDataset) else ""
    begun = f", from step {state.global_step + 1} on" if state.global_step else ""
    epochs = state.max_steps / max(1, math.ceil(rows / batch))
    plan = f"Training: {rows} rows{packed}, {batch} a step, {state.max_steps} steps{begun}. Epochs: {epochs:.3g}."
    if isinstance(dataset, WeightedRows):
        plan = f"{dataset.report()}\n{plan}"
        packed = packed or (" packed" if isinstance(dataset.rows, PackedDataset) else "")
    if packed and rows < batch:
        plan += (
            f"\nWarning: packing leaves fewer rows ({rows}) than a step takes ({batch}): an epoch is one step, and "
            "little is learnt. Leave --packing out, lower --per_device_train_batch_size, --gradient_accumulation_steps "
            "or --model_max_length, or raise --num_train_epochs."
        )
    return plan
