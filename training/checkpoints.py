"""The folder of a training: which checkpoints in it are complete, what may be put there, how the result gets there."""

from __future__ import annotations

import json
import os
import re
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, Trainer, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.training_args import OptimizerNames
from transformers.utils import GENERATION_CONFIG_NAME, logging

from ..programs.failures import TORCH_WRITING
from .card import CARD, is_replaceable
from .errors import SavingError, TrainingError
from .watching import UsedOptimizer

logger = logging.get_logger(__name__)

ADAPTER_CONFIG = "adapter_config.json"

_MAKING_A_MODEL = ("config.json", ADAPTER_CONFIG)
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_WEIGHTS = ("model*.safetensors", "adapter_model.*", "*/adapter_model.*", "pytorch_model*", "global_step*")
"""Where a checkpoint has its weights: whole or in files, adapters, FSDP's shards, DeepSpeed's."""

_OPTIMIZER = ("*optimizer*", "global_step*")
_FUSED = "_fused"
"""What the name of an optimizer ends with that keeps the same state and computes it in one kernel."""

_ZIPPED = {".pt", ".pth", ".bin"}  # what torch.save writes
_FULL = re.compile(r"no space left|quota exceeded", re.IGNORECASE)
_WRITING = re.compile(rf"{_FULL.pattern}|os error \d+|{TORCH_WRITING.pattern}", re.IGNORECASE)
"""What torch and safetensors say, in errors of no kind of their own, where a file can't be written."""

_HARDLY_ANY = 2**20  # bytes; torch's error doesn't say that the disk is full


# --- which are complete ---


def checkpoints_in(folder: str | os.PathLike) -> list[Path]:
    """All checkpoints in a folder, complete or not, the newest first."""
    found = [path for path in Path(folder).glob("checkpoint-*") if _CHECKPOINT.fullmatch(path.name)]
    return sorted(found, key=_step, reverse=True)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.partition("-")[2])


def last_checkpoint(folder: str | os.PathLike, before: int | None = None) -> Path | None:
    """The newest complete checkpoint in a folder, of a step before another; those half-written are passed over."""
    for path in checkpoints_in(folder):
        if before is not None and _step(path) >= before:
            continue
        missing = what_is_missing(path)
        if missing is None:
            return path
        logger.warning_once(f"{path} is incomplete and passed over: {missing}.")
    return None


def what_is_missing(checkpoint: Path) -> str | None:
    """Why a training can't be taken up from a checkpoint; None where it can."""
    try:
        state = json.loads((checkpoint / TRAINER_STATE_NAME).read_bytes())  # transformers writes it last
    except (OSError, ValueError):
        return f"{TRAINER_STATE_NAME} is missing or cut short"
    if not isinstance(state, dict) or not isinstance(state.get("global_step"), int):
        return f"{TRAINER_STATE_NAME} has no global_step"
    for what, patterns in {"weights": _WEIGHTS, "state of the optimizer": _OPTIMIZER}.items():
        if not any(any(checkpoint.glob(pattern)) for pattern in patterns):
            return f"it has no {what}"
    damaged = next((path for path in sorted(checkpoint.iterdir()) if not _is_whole(path)), None)
    return None if damaged is None else f"{damaged.name} is cut short, or lacks parts"


def _is_whole(path: Path) -> bool:
    """Whether a file has its end, which a crash takes; of files with an index of parts, whether all are there."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt"):
                return True
        if path.name.endswith(".index.json"):
            parts = json.loads(path.read_bytes())["weight_map"].values()
            return all((path.parent / part).is_file() for part in set(parts))
        return path.suffix not in _ZIPPED or zipfile.is_zipfile(path)
    except (OSError, ValueError, KeyError, AttributeError, TypeError, SafetensorError):
        return False


def checkpoint_to_resume(args: TrainingArguments) -> Path | None:
    """The checkpoint that `args.resume_from_checkpoint` asks for; None to begin anew.

    Raises:
        TrainingError: a checkpoint is named that can't be taken up.
    """
    wanted = str(args.resume_from_checkpoint or "")
    if wanted.lower() in ("", "false", "no", "0"):
        return None
    if _is_any(args):
        return last_checkpoint(str(args.output_dir))
    if missing := what_is_missing(Path(wanted)):
        raise TrainingError(
            f"--resume_from_checkpoint {wanted} is no complete checkpoint: pass True for the last one. Here {missing}."
        )
    return Path(wanted)


def check_kind(args: TrainingArguments, lora: Any, base: str) -> None:
    """Refuse to take up a checkpoint whose weights, or whose optimizer, are others than those that will be trained.

    Args:
        lora: the options of an adapter.
        base: name of the model.

    Raises:
        TrainingError: names what the checkpoint has and what is asked for.
    """
    checkpoint = checkpoint_to_resume(args)
    if checkpoint is None:
        return
    is_adapter = (checkpoint / ADAPTER_CONFIG).is_file()
    if is_adapter and not lora.use_lora:
        raise TrainingError(
            f"{checkpoint} has an adapter, but without --use_lora all weights are trained: pass --use_lora to go on "
            "with it, or begin anew in another --output_dir."
        )
    is_whole = not is_adapter and any(checkpoint.glob("model*.safetensors"))  # FSDP's shards may be either
    if is_whole and lora.use_lora:
        raise TrainingError(
            f"{checkpoint} has all weights of a model, but --use_lora trains an adapter: leave --use_lora out to go on "
            f"with them, or begin an adapter of it with --model_name_or_path {checkpoint} and another --output_dir."
        )
    if is_adapter:
        _check_same_adapter(checkpoint, lora)
    elif is_whole:
        _check_same_sizes(checkpoint, base)
    _check_same_optimizer(checkpoint, OptimizerNames(args.optim).value)


def _check_same_optimizer(checkpoint: Path, wanted: str) -> None:
    kept = json.loads((checkpoint / TRAINER_STATE_NAME).read_bytes()).get("stateful_callbacks", {})
    held = kept.get(UsedOptimizer.__name__, {"args": {"optim": wanted}})["args"]["optim"]  # earlier releases note none
    if held.removesuffix(_FUSED) != wanted.removesuffix(_FUSED):
        raise TrainingError(
            f"{checkpoint} has the state of --optim {held}, of which --optim {wanted} can make nothing: go on with "
            f"--optim {held}, or begin from the checkpoint's weights (--model_name_or_path, or --lora_weight_path) in "
            "another --output_dir."
        )


def _check_same_sizes(checkpoint: Path, base: str) -> None:
    begun, asked = AutoConfig.from_pretrained(checkpoint), AutoConfig.from_pretrained(base)
    for size in ("num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size"):
        if (held := getattr(begun, size)) != (wanted := getattr(asked, size)):
            raise TrainingError(
                f"{checkpoint} has a model with {size} {held}, but --model_name_or_path {base} has {wanted}: name the "
                "model that it was begun with, or begin anew in another --output_dir."
            )


def _check_same_adapter(checkpoint: Path, lora: Any) -> None:
    from peft import PeftConfig  # an extra
    from peft.utils.constants import MIN_TARGET_MODULES_FOR_OPTIMIZATION

    held = PeftConfig.from_pretrained(str(checkpoint))
    further = PeftConfig.from_pretrained(lora.lora_weight_path) if lora.lora_weight_path else None
    for option, name in {"lora_r": "r", "lora_target_modules": "target_modules", "lora_bias": "bias"}.items():
        wanted = getattr(lora, option) if further is None else getattr(further, name, None)
        if isinstance(wanted, (list, set)) and len(set(wanted)) >= MIN_TARGET_MODULES_FOR_OPTIMIZATION:
            continue  # peft has written down shorter names
        if (begun := _words(getattr(held, name, None))) != (wanted := _words(wanted)):
            by = "the options ask for" if further is None else f"the adapter {lora.lora_weight_path} has"
            raise TrainingError(
                f"{checkpoint} has an adapter with --{option} {begun}, but {by} --{option} {wanted}: go on with the "
                "options that it was begun with, or begin anew in another --output_dir."
            )


def _words(value: Any) -> str:
    return " ".join(sorted(set(value))) if isinstance(value, (list, set)) else str(value)


def _is_any(args: TrainingArguments) -> bool:
    """Whether the last checkpoint is to be taken up, whichever that is."""
    return str(args.resume_from_checkpoint).lower() in ("true", "yes", "1")


# --- the folder of the result ---


def check_output(args: TrainingArguments, *, overwrite: bool) -> None:
    """Refuse a folder with another model, or make room in it.

    Raises:
        TrainingError: there is a model or a checkpoint, and the run neither takes it up nor may overwrite it.
    """
    folder = Path(str(args.output_dir))
    checkpoints = checkpoints_in(folder)
    models = [path for name in ("config.json", ADAPTER_CONFIG, "*.safetensors") for path in folder.glob(name)]
    if checkpoint_to_resume(args) is not None or not (checkpoints or models):
        return
    if _is_any(args) and not models and not overwrite:  # a run that was killed before its first one was complete
        names = ", ".join(path.name for path in checkpoints)
        logger.warning_once(f"{folder} has no complete checkpoint ({names}): training begins anew.")
        return
    if not overwrite:
        resumable = not models or last_checkpoint(folder) is not None
        ways = ["name another --output_dir", *["go on with --resume_from_checkpoint True"] * resumable]
        none = "" if resumable else " It has no complete checkpoint to go on from."
        raise TrainingError(
            f"{folder} holds {(models or checkpoints)[0].name} of an earlier run: {', '.join(ways)}, or pass "
            f"--overwrite_output_dir.{none}"
        )
    for path in checkpoints:  # or a later run would resume from them
        shutil.rmtree(path)


def save_trained(trainer: Trainer, folder: str | os.PathLike, card: str | None = None) -> None:
    """Save model or adapter, with the tokenizer; the file that makes the folder a model appears last.

    All processes call it; one writes.

    Args:
        card: what README.md becomes, where no author has written one.

    Raises:
        SavingError: no space is left, or the weights were not put together.
        TrainingError: weights that are not finite; see `QWenTrainer.save_model`.
    """
    folder = Path(folder)
    partial = folder / ".partial"
    with writing(partial, folder):
        if trainer.is_world_process_zero():
            shutil.rmtree(partial, ignore_errors=True)
        trainer.accelerator.wait_for_everyone()
        if (sharding := getattr(trainer.accelerator.state, "fsdp_plugin", None)) is not None:
            sharding.state_dict_config = sharding.optim_state_dict_config = None
            sharding.set_state_dict_type("FULL_STATE_DICT")  # checkpoints may be in shards, a model may not
        trainer.save_model(str(partial))
        trainer.accelerator.wait_for_everyone()
        if trainer.is_world_process_zero():
            if (partial / ADAPTER_CONFIG).is_file():  # peft saves none
                settings = trainer.accelerator.unwrap_model(trainer.model).generation_config
                (partial / GENERATION_CONFIG_NAME).write_text(settings.to_json_string(use_diff=True))
            (partial / CARD).unlink(missing_ok=True)  # peft's empty form
            if card is not None and is_replaceable(folder / CARD):
                (partial / CARD).write_text(card, encoding="utf-8")
            _put_in_place(partial, folder)
            trainer.save_state()
        trainer.accelerator.wait_for_everyone()


def _put_in_place(partial: Path, folder: Path) -> None:
    if not any(partial.glob("*.safetensors")):
        raise SavingError(
            f"{folder} has got no weights: {partial} holds them in shards. Put them together from there, and next time "
            "let DeepSpeed do so: stage3_gather_16bit_weights_on_model_save."
        )
    written = sorted(partial.iterdir(), key=lambda path: path.name in _MAKING_A_MODEL)
    for name in _MAKING_A_MODEL:  # of an earlier model, first: one of both together would pass for a whole one
        (folder / name).unlink(missing_ok=True)
    for stale in folder.glob("*.safetensors*"):  # shards of a model that had more of them
        stale.unlink()
    for path in written:
        os.replace(path, folder / path.name)
    partial.rmdir()


# --- no space left ---


@contextmanager
def writing(partial: Path, folder: str | os.PathLike) -> Iterator[None]:
    """Turn an error of writing `partial` into a sentence, and take away what is there of it.

    Raises:
        SavingError: names the last good checkpoint in `folder`.
    """
    try:
        yield
    except Exception as error:
        if not is_of_writing(error):
            raise
        raise saving_error(error, partial, folder) from error


def is_of_writing(error: BaseException) -> bool:
    """Whether a file couldn't be written."""
    if isinstance(error, OSError):
        return True
    chain: Any = error
    while chain is not None:
        if isinstance(chain, (OSError, RuntimeError, SafetensorError)) and _WRITING.search(str(chain)):
            return True
        chain = chain.__cause__ or chain.__context__
    return False


def saving_error(error: BaseException, partial: Path, folder: str | os.PathLike) -> SavingError:
    """Take away what was written of a folder, and say what is left to go on from."""
    reason, free = next(iter(str(error).splitlines()), type(error).__name__), _free_space(partial)
    if _FULL.search(reason) or free < _HARDLY_ANY:
        reason = f"no space left on its disk ({free} bytes free)"
    elif TORCH_WRITING.search(reason):
        reason = "torch couldn't write a file to its end, as where a disk is full for a moment"
    shutil.rmtree(partial, ignore_errors=True)
    good = last_checkpoint(folder)
    rest = "there is no complete checkpoint" if good is None else f"the last good checkpoint is {good}"
    return SavingError(
        f"{partial} can't be written: {reason}. What was there of it is taken away; {rest}. Make room, then go on with "
        "--resume_from_checkpoint True."
    )


def _free_space(path: Path) -> int:
    place = next(place for place in (path, *path.absolute().parents) if place.exists())
    return shutil.disk_usage(place).free
