"""The whole way to qwen-tiny-chat: texts, vocabulary, pretraining, fine-tuning, four times of practice, export.

Every stage writes into a folder of its own below the work folder and is skipped if it is complete; a training that was
killed goes on from its last checkpoint, with the result of one that was not.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, Trainer, set_seed

from ...configuration_qwen import QWenConfig
from ...modeling_qwen import QWenLMHeadModel
from ...tokenization_qwen import QWenTokenizerFast
from ..examples import encode_all
from .dialogues import practice_dialogues, refinement_dialogues, training_dialogues
from .sharpening import equipping_dialogues, sharpening_dialogues
from .texts import training_texts
from .training import encode_dialogues, train
from .vocabulary import spelled, train_vocabulary, without_names, write_tiktoken


@dataclass(frozen=True)
class Size:
    """How much is done; the default gives the shipped model in under an hour on two processor cores with AVX-512."""

    texts: int = 16_000
    dialogues: int = 62_000
    tuning_steps: int = 1200
    practice: int = 30_000
    refinement: int = 100_000
    sharpening: int = 50_000
    equipping: int = 72_000
    vocabulary: int = 2000
    n_embd: int = 192
    n_layer: int = 6
    ffn_hidden_size: int = 1024
    tokens: int = 1536
    row_length: int = 512
    learning_rate: float = 6e-3
    save_steps: int = 300


LAST_SHARE = 0.75
"""Of the weights after the last part in those that are exported; the others are those before it."""

STAGES = ("pretrained", "tuned", "practised", "refined", "sharpened", "equipped")
"""Folders of the trainings, in their order."""

QUICK = Size(
    texts=700, dialogues=3000, tuning_steps=100, practice=800, refinement=300, sharpening=200, equipping=100,
    vocabulary=1200, n_embd=96, n_layer=3, ffn_hidden_size=384, tokens=1024, save_steps=25,
)  # fmt: skip
"""The same in two or three minutes, for tests: it shows that all parts work, not that the model is any good."""


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
    _stage(work / "practised", lambda folder: practise(tokenizer, work / "tuned", folder, seed, size))
    _stage(work / "refined", lambda folder: refine(tokenizer, work / "practised", folder, seed, size))
    _stage(work / "sharpened", lambda folder: sharpen(tokenizer, work / "refined", folder, seed, size))
    _stage(work / "equipped", lambda folder: equip(tokenizer, work / "refined", work / "sharpened", folder, seed, size))
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
    """Learnt from a third of the texts and as many conversations, without the rare characters of names."""
    count = size.texts // 3
    texts = [without_names(text) for text in training_texts(count, seed, rare=False)]
    dialogues = training_dialogues(count, seed, rare=False)
    texts += [without_names(m["content"]) for dialogue in dialogues for m in dialogue.messages()]
    texts += ["\n".join(("system", "user", "assistant", ""))] * count  # the words that stand before every turn
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
    """Train random weights on plain texts."""
    set_seed(seed)
    model = QWenLMHeadModel(configuration(tokenizer, size)).float()
    texts = encode_all(tokenizer, training_texts(size.texts, seed), size.row_length, description="Texts").examples
    return _train(model, tokenizer, texts, folder, seed, size, size.learning_rate)


def tune(tokenizer: QWenTokenizerFast, start: Path, folder: Path, seed: int, size: Size) -> Trainer:
    """Go on with conversations, the loss on the assistant's tokens only; ends while the rate is still high."""
    dialogues = training_dialogues(size.dialogues, seed)
    return _converse(tokenizer, start, dialogues, folder, seed, size, size.learning_rate * 0.75, size.tuning_steps)


def practise(tokenizer: QWenTokenizerFast, start: Path, folder: Path, seed: int, size: Size) -> Trainer:
    """Go on with other conversations, more of which are of the kinds that are hard."""
    dialogues = practice_dialogues(size.practice, seed)
    return _converse(tokenizer, start, dialogues, folder, seed, size, size.learning_rate * 0.4)


def refine(tokenizer: QWenTokenizerFast, start: Path, folder: Path, seed: int, size: Size) -> Trainer:
    """Go on with more of them, in more forms, with a rate that rises once more and ends at nothing."""
    dialogues = refinement_dialogues(size.refinement, seed)
    return _converse(tokenizer, start, dialogues, folder, seed, size, size.learning_rate * 0.5)


def sharpen(tokenizer: QWenTokenizerFast, start: Path, folder: Path, seed: int, size: Size) -> Trainer:
    """Go on with what is still wrong at times, with a low rate that ends at nothing."""
    dialogues = sharpening_dialogues(size.sharpening, seed)
    return _converse(tokenizer, start, dialogues, folder, seed, size, size.learning_rate * 0.25)


def equip(tokenizer: QWenTokenizerFast, first: Path, second: Path, folder: Path, seed: int, size: Size) -> Trainer:
    """Go on with more that have tools, from the mean of two stages, which is right more often than either.

    What the second of them learnt stays there, and what it forgot comes back.
    """
    dialogues = equipping_dialogues(size.equipping, seed)
    return _converse(tokenizer, averaged(first, second), dialogues, folder, seed, size, size.learning_rate * 0.12)


def _converse(
    tokenizer,
    start: Path | QWenLMHeadModel,
    dialogues,
    folder: Path,
    seed: int,
    size: Size,
    rate: float,
    steps: int | None = None,
) -> Trainer:
    set_seed(seed)
    model = QWenLMHeadModel.from_pretrained(start, dtype=torch.float32) if isinstance(start, Path) else start
    examples = encode_dialogues(tokenizer, dialogues, size.row_length)
    random.Random(seed).shuffle(examples)
    return _train(model, tokenizer, examples, folder, seed, size, rate, steps)


def _train(
    model, tokenizer, examples, folder: Path, seed: int, size: Size, learning_rate: float, steps: int | None = None
) -> Trainer:
    return train(
        model,
        tokenizer,
        examples,
        folder,
        seed=seed,
        tokens=size.tokens,
        row_length=size.row_length,
        learning_rate=learning_rate,
        save_steps=size.save_steps,
        last_step=steps,
    )


def averaged(first: Path, second: Path) -> QWenLMHeadModel:
    """A model with the mean of the weights of two, in float32."""
    return _mixed(QWenLMHeadModel.from_pretrained(first, dtype=torch.float32), second, 0.5)


@torch.no_grad()
def _mixed(model: QWenLMHeadModel, folder: Path, share: float) -> QWenLMHeadModel:
    """The model, with so large a share of the weights of another."""
    other = QWenLMHeadModel.from_pretrained(folder, dtype=torch.float32)
    for weight, beside in zip(model.parameters(), other.parameters(), strict=True):
        weight.lerp_(beside, share)
    return model


def export(work: Path, tokenizer: QWenTokenizerFast, output: Path) -> None:
    """Write the model in bfloat16 with its tokenizer, settings and log; the folder appears when complete.

    Its weights lie between those before and after the last part, nearer to the latter.
    """
    partial = output.with_name(f"{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model: Any = _mixed(averaged(work / STAGES[-3], work / STAGES[-2]), work / STAGES[-1], LAST_SHARE)
    model = model.to(torch.bfloat16)
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
    for stage in STAGES:
        steps = json.loads((work / stage / "log.json").read_text(), parse_float=_short)
        log[stage] = [{name: value for name, value in step.items() if name != "epoch"} for step in steps]
    (partial / "training_log.json").write_text(json.dumps(log, separators=(",", ":")))
    partial.rename(output)


def _short(number: str) -> float:
    """Five digits of a number: all of them would take more room in the model's folder than its vocabulary."""
    return float(f"{float(number):.5g}")
