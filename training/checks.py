"""What can be found out about a command line before a model is loaded, which takes minutes."""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..programs.models import check_weights
from .errors import DataError, TrainingError

_ADAPTER_CONFIG = "adapter_config.json"
_READ = (".txt", ".json", ".jsonl")
_NOT_READ = (".csv", ".tsv", ".xlsx", ".parquet", ".arrow", ".zip", ".gz", ".bz2", ".zst")
_PACKAGES = {
    "galore": "galore_torch",
    "lomo": "lomo_optim",
    "grokadamw": "grokadamw",
    "schedule_free": "schedulefree",
    "apollo": "apollo_torch",
    "stable_adamw": "optimi",
    "anyprecision": "torchdistx",
    "apex": "apex",
    "torch_8bit": "torchao",
    "torch_4bit": "torchao",
    "8bit": "bitsandbytes",
    "bnb": "bitsandbytes",
    "paged": "bitsandbytes",
    "ademamix": "bitsandbytes",
    "lion": "bitsandbytes",
}
"""Part of an optimizer's name -> the module that has it; the first that fits."""

_PIP = {"optimi": "torch-optimi"}
_MIN_RATES = dict.fromkeys(("cosine_with_min_lr", "cosine_warmup_with_min_lr"), ("min_lr", "min_lr_rate"))
_LEFT_OUT = ("flyte",)  # of the reports, by transformers' list of installed ones

LOWER_IS_BETTER = ("loss", "perplexity", "rewards/rejected", "logps/rejected")
"""Of the metrics of an evaluation, as `--metric_for_best_model` names them."""

_METRICS = ("loss", "perplexity")
_METRICS_OF_PAIRS = (
    "loss",
    *(f"rewards/{kind}" for kind in ("margins", "accuracies", "chosen", "rejected")),
    *(f"logps/{kind}" for kind in ("chosen", "rejected")),
    "mean_token_accuracy",
)


def problems_of_numbers(args: TrainingArguments) -> dict[str, bool]:
    """What is wrong with the numbers of a training, by what is to be said of it: whether it is so."""
    whole = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
    shares = ("adam_beta1", "adam_beta2", "label_smoothing_factor")
    needed = _MIN_RATES.get(str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)), ())
    return {
        f"--learning_rate {args.learning_rate} must be a number of at least 0": not 0 <= args.learning_rate < math.inf,
        **{f"--{name} {getattr(args, name)} must be at least 1": getattr(args, name) < 1 for name in whole},
        **{
            f"--{name} {getattr(args, name)} must be from 0 to below 1": not 0 <= getattr(args, name) < 1
            for name in shares
        },
        **{
            f"--{name} {getattr(args, name)} must be a number of at least 0": not 0 <= getattr(args, name) < math.inf
            for name in ("weight_decay", "adam_epsilon", "max_grad_norm", "warmup_steps")
        },
        f"--lr_scheduler_type {args.lr_scheduler_type} needs the least rate: --lr_scheduler_kwargs "
        """'{"min_lr_rate": 0.1}'""": bool(needed) and not {*needed} & {*(args.lr_scheduler_kwargs or {})},
        "--save_strategy best needs --metric_for_best_model, such as eval_loss": args.save_strategy == "best"
        and args.metric_for_best_model is None,
    }


def check_before_loading(model: Any, data: Any, lora: Any, args: TrainingArguments) -> None:
    """Refuse what would fail once the model is loaded, or after the training.

    Args:
        model, data, lora: the options of these groups.

    Raises:
        DataError: a file of data that isn't there, or is none.
        TrainingError: another value that can't be, or a missing package.
    """
    for option, paths in (("--data_path", data.data_path), ("--eval_data_path", data.eval_data_path or ())):
        for path in paths:
            _check_data_file(Path(path), option)
    if lora.use_lora:
        _require("peft", "--use_lora")
    if lora.q_lora:
        _require_for_bits(model.model_name_or_path)
    if lora.lora_weight_path:
        _check_adapter(Path(lora.lora_weight_path))
    _check_attention(model.attn_implementation)
    _check_optimizer(args)
    _check_folder(Path(str(args.output_dir)))
    _check_metric(args.metric_for_best_model, _METRICS_OF_PAIRS if data.dpo else _METRICS)
    check_reports(args)


def check_reports(args: TrainingArguments) -> None:
    """Refuse reports that nobody takes.

    Raises:
        TrainingError: a name that transformers doesn't know, or whose package is missing.
    """
    wanted = [args.report_to] if isinstance(args.report_to, str) else list(args.report_to or ())
    for name in wanted:
        if name in ("none", "all"):
            continue
        if name not in INTEGRATION_TO_CALLBACK:
            raise TrainingError(
                f"--report_to {name} is unknown{_meant(name, INTEGRATION_TO_CALLBACK)}: it is none, all, or of "
                f"{', '.join(INTEGRATION_TO_CALLBACK)}."
            )
        if name == "tensorboard":
            found = any(map(importlib.util.find_spec, ("tensorboard", "tensorboardX")))
        else:
            found = name in (*get_available_reporting_integrations(), *_LEFT_OUT)
        if not found:
            raise TrainingError(f"--report_to {name} needs {name}: pip install {name.replace('_', '-')}")


def check_layers(name: str, layers: Iterable[str]) -> None:
    """Refuse layers for an adapter that the model doesn't have.

    Args:
        name: of the model; its configuration is enough.

    Raises:
        TrainingError: names the layer.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(name))
    names = {part for path, _ in model.named_modules() for part in (path, path.rpartition(".")[2])}
    known = sorted({path.rpartition(".")[2] for path, module in model.named_modules() if hasattr(module, "weight")})
    for layer in layers:
        if layer not in names and not any(path.endswith(f".{layer}") for path in names):
            raise TrainingError(
                f"--lora_target_modules {layer} is no layer of {name}{_meant(layer, known)}: its layers are "
                f"{', '.join(known)}."
            )


def _check_data_file(path: Path, option: str) -> None:
    try:
        found = path.exists()
    except (OSError, ValueError) as error:
        raise DataError(f"{option} {path} can't be a file: {error}.") from error
    if not found:
        beside = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        near = get_close_matches(path.name, beside, n=1, cutoff=0.7)
        hint = f" (did you mean {path.parent / near[0]}?)" if near else ""
        raise DataError(f"{option} {path} doesn't exist{hint}.")
    if path.is_dir():
        inside = sorted(str(entry) for entry in path.iterdir() if entry.suffix.lower() in _READ)
        hint = f", such as {inside[0]}" if inside else ""
        raise DataError(f"{option} {path} is a folder: name the files in it{hint}.")
    if path.suffix.lower() in _NOT_READ:
        raise DataError(f"{option} {path} can't be read: write its rows as JSON Lines, one object a line.")
    if not os.access(path, os.R_OK):
        raise DataError(f"{option} {path} can't be read: it isn't permitted.")


def _check_adapter(folder: Path) -> None:
    if folder.exists() and not (folder / _ADAPTER_CONFIG).is_file():
        raise TrainingError(f"--lora_weight_path {folder} has no {_ADAPTER_CONFIG}: name the folder of an adapter.")
    if not folder.exists() and len(folder.parts) != 2:  # an id on the Hub is organisation/name
        raise TrainingError(f"--lora_weight_path {folder} doesn't exist: name the folder of an adapter.")
    if folder.exists():
        check_weights(folder)


def _check_attention(name: str | None) -> None:
    known = ["eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()]
    if name is None or name in known or "/" in name:  # kernels of the Hub
        return
    raise TrainingError(
        f"--attn_implementation {name} is unknown{_meant(name, known)}: it is one of {', '.join(known)}."
    )


def _check_optimizer(args: TrainingArguments) -> None:
    name = str(getattr(args.optim, "value", args.optim))
    for part, package in _PACKAGES.items():
        if part in name:
            _require(package, f"--optim {name}")
            break
    if name.startswith(("galore", "apollo")) and not args.optim_target_modules:
        raise TrainingError(f"--optim {name} needs --optim_target_modules, such as c_attn c_proj w1 w2.")
    if args.use_liger_kernel:
        raise TrainingError(
            "--use_liger_kernel has no kernels for QWen models: leave it out. Their losses need no logits as they are."
        )


def _check_metric(name: str | None, known: Sequence[str]) -> None:
    if name is not None and (short := name.removeprefix("eval_")) not in known:
        raise TrainingError(
            f"--metric_for_best_model {name} is no metric of these evaluations{_meant(short, known)}: they have "
            f"{', '.join(known)}."
        )


def _check_folder(folder: Path) -> None:
    place = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not place.is_dir():
        raise TrainingError(f"--output_dir {folder} can't be a folder: {place} is a file. Name another one.")
    if not os.access(place, os.W_OK):
        raise TrainingError(f"--output_dir {folder}: nothing may be written to {place}. Name another one.")


def _require_for_bits(name: str) -> None:
    settings = getattr(AutoConfig.from_pretrained(name), "quantization_config", None)
    if not settings:  # with bits of its own, --q_lora means these
        _require("bitsandbytes", "--q_lora")


def _require(package: str, option: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise TrainingError(f"{option} needs {package}: pip install {_PIP.get(package, package)}")


def _meant(name: str, known: Iterable[str]) -> str:
    near = get_close_matches(name, list(known), n=1, cutoff=0.7)
    return f" (did you mean {near[0]}?)" if near else ""
