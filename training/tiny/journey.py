"""The whole way to qwen-tiny-chat: texts, vocabulary, pretraining, fine-tuning, export.

Every stage writes into a folder of its own below the work folder and is skipped if it is complete; a training that was
killed goes on from its last checkpoint, with the result of one that was not.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from transformers import GenerationConfig, Trainer, TrainingArguments, set_seed

from ...configuration_qwen import QWenConfig
from ...modeling_qwen import QWenLMHeadModel
from ...tokenization_qwen import QWenTokenizerFast
from ..examples import encode_all
from ..finetuning import train
from .dialogues import training_dialogues
from .texts import training_texts
from .vocabulary import spelled, train_vocabulary, without_names, write_tiktoken


@dataclass(frozen=True)
class Size:
    """How much is done; the default gives the shipped model in less than an hour on two processor cores."""

    texts: int = 30_000
    dialogues: int = 84_000
    vocabulary: int = 1840
    n_embd: int = 192
    n_layer: int = 6
    ffn_hidden_size: int = 1024
    rows: int = 3
    row_length: int = 512
    learning_rate: float = 1.5e-3
    save_steps: int = 500


QUICK = Size(
    texts=1500, dialogues=4000, vocabulary=1000, n_embd=96, n_layer=3, ffn_hidden_size=384, rows=4, row_length=256,
    save_steps=50,
)  # fmt: skip
"""The same in three minutes, for tests: it shows that all parts work, not that the model is any good."""


def run(work: Path, seed: int, size: Size) -> Path:
    """Go all the way.

    Args:
        work: folder of the stages, which may hold some of them already.
        seed: of the data, the first weights and the order of training.
        size: how much is done.

    Returns:
        The folder of the finished model, inside the work folder.

    Raises:
        ValueError: `work` was begun with another seed or size.
    """
    _claim(work, seed, size)
    vocabulary = work / "qwen.tiktoken"
    if not vocabulary.exists():
        write_tiktoken(_vocabulary(seed, size), vocabulary)
    tokenizer = QWenTokenizerFast(str(vocabulary), model_max_length=2048)
    _stage(work / "pretrained", lambda folder: pretrain(tokenizer, folder, seed, size))
    _stage(work / "tuned", lambda folder: tune(tokenizer, work / "pretrained", folder, seed, size))
    if not (work / "model").exists():
        export(work, tokenizer, work / "model")
    return work / "model"


def _claim(work: Path, seed: int, size: Size) -> None:
    """Keep stages of different seeds or sizes apart."""
    plan = {"seed": seed, **asdict(size)}
    note = work / "plan.json"
    if note.exists():
        if (found := _read_plan(note)) != plan:
            raise ValueError(f"{work} was begun with {found}, not with {plan}: name another work folder.")
        return
    work.mkdir(parents=True, exist_ok=True)
    partial = note.with_name("plan.json.partial")
    partial.write_text(json.dumps(plan))
    partial.replace(note)


def _read_plan(note: Path) -> dict[str, object]:
    try:
        return json.loads(note.read_text())
    except ValueError as error:
        raise ValueError(
            f"{note} is damaged ({error}): delete it if the folder was begun with this seed and size, or name another "
            "work folder."
        ) from error


def _stage(folder: Path, make: Callable[[Path], Trainer]) -> None:
    """Train into a folder beside it and rename that when complete; its log becomes `log.json`."""
    partial = folder.with_name(f"{folder.name}.partial")
    if folder.exists():
        shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed behind the renaming
        return
    trainer = make(partial)
    trainer.save_model(str(partial / "model"))
    (partial / "model" / "log.json").write_text(json.dumps(trainer.state.log_history))
    (partial / "model").rename(folder)
    shutil.rmtree(partial)


def _vocabulary(seed: int, size: Size) -> dict[bytes, int]:
    texts = [without_names(text) for text in training_texts(size.texts // 10, seed)]
    dialogues = training_dialogues(size.dialogues // 10, seed)
    texts += [without_names(m["content"]) for dialogue in dialogues for m in dialogue.messages()]
    return train_vocabulary(texts + spelled(texts), size.vocabulary)


def configuration(tokenizer: QWenTokenizerFast, size: Size) -> QWenConfig:
    """The shape of the model: heads of 32, trained to 512 positions, NTK and LogN beyond them."""
    return QWenConfig(
        vocab_size=len(tokenizer),
        n_embd=size.n_embd,
        n_layer=size.n_layer,
        n_head=size.n_embd // 32,
        kv_channels=32,
        ffn_hidden_size=size.ffn_hidden_size,
        seq_length=512,
        n_positions=2048,
        use_flash_attn=False,
        use_dynamic_ntk=True,
        use_logn_attn=True,
        initializer_range=0.04,
        resid_pdrop=0.0,
        eos_token_id=tokenizer.eod_id,
        bos_token_id=tokenizer.eod_id,
    )


def pretrain(tokenizer: QWenTokenizerFast, folder: Path, seed: int, size: Size) -> Trainer:
    """Train random weights on plain texts, which are short: twice the rows of half the length save attention."""
    set_seed(seed)
    model = QWenLMHeadModel(configuration(tokenizer, size)).float()
    rows = replace(size, rows=size.rows * 2, row_length=size.row_length // 2)
    texts = encode_all(tokenizer, training_texts(size.texts, seed), rows.row_length, description="Texts").examples
    return _train(model, tokenizer, texts, folder, seed, rows, size.learning_rate)


def tune(tokenizer: QWenTokenizerFast, start: Path, folder: Path, seed: int, size: Size) -> Trainer:
    """Go on with conversations, the loss on the assistant's tokens only."""
    set_seed(seed)
    model = QWenLMHeadModel.from_pretrained(start, dtype=torch.float32)
    said = [dialogue.messages() for dialogue in training_dialogues(size.dialogues, seed)]
    examples = encode_all(tokenizer, said, size.row_length, description="Conversations").examples
    return _train(model, tokenizer, examples, folder, seed, size, size.learning_rate * 0.75)


def _train(model, tokenizer, examples, folder: Path, seed: int, size: Size, learning_rate: float) -> Trainer:
    held_back = max(8, len(examples) // 200)
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=1,
        per_device_train_batch_size=size.rows,
        per_device_eval_batch_size=size.rows,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=100,
        weight_decay=0.05,
        adam_beta2=0.99,
        max_grad_norm=1.0,
        bf16=True,
        use_cpu=True,
        seed=seed,
        data_seed=seed,
        logging_steps=50,
        eval_strategy="steps",
        eval_steps=size.save_steps,
        save_steps=size.save_steps,
        save_total_limit=2,
        report_to="none",
        resume_from_checkpoint=True,  # type: ignore[arg-type]  # declared as a path, documented as either
    )
    return train(
        model,
        tokenizer,
        examples[held_back:],
        examples[:held_back],
        arguments,
        packing=True,
        max_length=size.row_length,
    )


def export(work: Path, tokenizer: QWenTokenizerFast, output: Path) -> None:
    """Write the model in bfloat16 with its tokenizer, settings and log; the folder appears when complete."""
    partial = output.with_name(f"{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model = QWenLMHeadModel.from_pretrained(work / "tuned", dtype=torch.bfloat16)
    model.config.use_flash_attn = "auto"
    model.generation_config = GenerationConfig(
        chat_format="chatml",
        do_sample=False,
        eos_token_id=[tokenizer.im_end_id, tokenizer.eod_id],
        pad_token_id=tokenizer.eod_id,
        max_new_tokens=64,
        max_window_size=448,
    )
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    log = {"plan": json.loads((work / "plan.json").read_text())}
    for stage in ("pretrained", "tuned"):
        log[stage] = json.loads((work / stage / "log.json").read_text())
    (partial / "training_log.json").write_text(json.dumps(log, indent=None))
    partial.rename(output)
