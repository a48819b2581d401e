"""The training of qwen-tiny-chat: short examples in short rows, which saves attention, and Muon in place of AdamW."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import TrainerCallback, TrainingArguments

from ...products_qwen import multiplies
from ...tokenization_qwen import QWenTokenizerFast
from ...tools_qwen import OBSERVATION
from ..checkpoints import checkpoint_to_resume
from ..examples import IGNORED, Example, encode_all
from ..loop import QWenTrainer
from ..packing import Collator, PackedDataset, pack
from .dialogues import Dialogue
from .optimiser import MuonAdamW

SHORT = 192
"""Tokens of most rows; examples that are longer share rows of the full length."""
BATCHES_A_STEP = 2


def encode_dialogues(
    tokenizer: QWenTokenizerFast, dialogues: Sequence[Dialogue], max_length: int | None = None, progress: bool = True
) -> list[Example]:
    """Conversations as examples, with the loss on what the model is to say; as `encode_all`, but in another order."""
    plain = [dialogue.messages() for dialogue in dialogues if not dialogue.tools]
    examples = encode_all(tokenizer, plain, max_length, description="Conversations", progress=progress).examples
    called = [encode_call(tokenizer, dialogue) for dialogue in dialogues if dialogue.tools]
    return examples + [example for example in called if max_length is None or len(example["input_ids"]) <= max_length]


def encode_call(tokenizer: QWenTokenizerFast, dialogue: Dialogue) -> Example:
    """A conversation with tools, with the loss on its last reply: neither on what a tool gave nor on the turns before.

    Those turns stand there without the tools' description, and would teach to call what isn't there.
    """
    example = encode_all(tokenizer, [dialogue.messages()], progress=False).examples[0]
    labels = [IGNORED] * len(example["labels"])
    call, _, rest = dialogue.turns[-1][1].partition(OBSERVATION)
    result, thought, answer = rest.partition("\nThought:")
    parts = [call + OBSERVATION * bool(rest), result + thought, answer]
    lengths = [len(tokenizer.encode(part)) for part in parts]
    start = len(labels) - sum(lengths) - 1
    for place in (slice(start, start + lengths[0]), slice(len(labels) - lengths[2] - 1, len(labels))):
        labels[place] = example["input_ids"][place]
    return {"input_ids": example["input_ids"], "labels": labels}


class Batches(Dataset):
    """Batches of packed rows, each of one length.

    Args:
        examples: of at most `row_length` tokens.
        tokens: of a batch.
        row_length: of the long rows.
        pad_token_id: of the padding.
        seed: of the packing.
    """

    def __init__(self, examples: Sequence[Example], tokens: int, row_length: int, pad_token_id: int, seed: int):
        lengths = [len(example["input_ids"]) for example in examples]
        long = [i for i, length in enumerate(lengths) if length > SHORT]
        short = [i for i, length in enumerate(lengths) if length <= SHORT]
        self.examples = examples
        self.groups: list[list[list[int]]] = []
        for members, width in ((long + short[: len(long)], row_length), (short[len(long) :], SHORT)):
            rows = pack([examples[i] for i in members], width, seed)
            rows = [[members[i] for i in row] for row in rows]
            count = max(1, tokens // width)
            self.groups += [rows[i : i + count] for i in range(0, len(rows), count)]
        self.collate = Collator(pad_token_id, packed=True)

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """`input_ids`, `labels` and `position_ids`, (rows, length) each."""
        rows = PackedDataset(self.examples, self.groups[index])
        return self.collate([rows[i] for i in range(len(rows))])


class TinyTrainer(QWenTrainer):
    """The loop of `qwen1-finetune`, with batches that are ready and with another optimizer."""

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Muon for the matrices of the blocks, AdamW for embedding, head, biases and norms."""
        named = list(self.model.named_parameters())
        hidden = [weight for name, weight in named if weight.ndim == 2 and ".h." in name]
        decayed = [weight for name, weight in named if weight.ndim == 2 and ".h." not in name]
        free = [weight for _, weight in named if weight.ndim < 2]
        self.optimizer = MuonAdamW(hidden, decayed, free, self.args.learning_rate, self.args.weight_decay)
        return self.optimizer


class EndAt(TrainerCallback):
    """Ends a run at a step."""

    def __init__(self, step: int | None):
        self.step = step

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask the loop to stop."""
        if self.step is not None and state.global_step >= self.step:
            control.should_training_stop = True


def _arguments(folder: Path, seed: int, learning_rate: float, save_steps: int) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=1,
        per_device_train_batch_size=1,
        per_device_eval_batch_size=1,
        gradient_accumulation_steps=BATCHES_A_STEP,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.03,
        weight_decay=0.05,
        max_grad_norm=1.0,
        bf16=multiplies(torch.bfloat16),
        use_cpu=True,
        seed=seed,
        data_seed=seed,
        logging_steps=20,
        eval_strategy="steps",
        eval_steps=save_steps,
        save_steps=save_steps,
        save_total_limit=2,
        report_to="none",
        resume_from_checkpoint=True,  # type: ignore[arg-type]  # declared as a path, documented as either
    )


def train(
    model: Any,
    tokenizer: QWenTokenizerFast,
    examples: Sequence[Example],
    folder: Path,
    *,
    seed: int,
    tokens: int,
    row_length: int,
    learning_rate: float,
    save_steps: int,
    last_step: int | None = None,
    callbacks: Iterable[TrainerCallback] = (),
) -> QWenTrainer:
    """Train on examples once; taken up from the last checkpoint in the folder, if there is one.

    Args:
        model: in float32.
        tokens: of a batch; `BATCHES_A_STEP` of them make a step.
        last_step: end there, with the learning rate that the step has in a run over all examples.

    Raises:
        TrainingError: as `QWenTrainer`.
    """
    held_back = max(8, len(examples) // 400)
    pad = int(tokenizer.pad_token_id)
    arguments = _arguments(folder, seed, learning_rate, save_steps)
    use_cache = model.config.use_cache
    trainer = TinyTrainer(
        model=model,
        args=arguments,
        data_collator=lambda batches: batches[0],
        train_dataset=Batches(examples[held_back:], tokens, row_length, pad, seed),
        eval_dataset=Batches(examples[:held_back], tokens, row_length, pad, seed),
        processing_class=tokenizer,
        callbacks=[EndAt(last_step), *callbacks],
    )
    model.config.use_cache = use_cache  # transformers turns it off, and would save it so
    checkpoint = checkpoint_to_resume(arguments)
    trainer.train(None if checkpoint is None else str(checkpoint))
    return trainer
