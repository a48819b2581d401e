"""The model that is trained: loaded as the options say, with an adapter around it, and with the settings of a chat."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoTokenizer,
    AwqConfig,
    BitsAndBytesConfig,
    GPTQConfig,
    PreTrainedModel,
    TrainingArguments,
)

from ..peft_qwen import SETTINGS
from ..programs.models import check_model, check_vocabulary, load_complete
from ..qwen_generation_utils import DEFAULT_WINDOW
from .errors import TrainingError


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a model.

    Raises:
        TrainingError: it is none of QWen's.
        OSError: there is none, or files are missing.
    """
    check_model(name, adapters=False)
    tokenizer = AutoTokenizer.from_pretrained(name)
    if not hasattr(tokenizer, "im_start_id"):
        raise TrainingError(
            f"{name} has a {type(tokenizer).__name__}: it must be a QWen model, with its own tokenizer."
        )
    check_vocabulary(name, tokenizer, AutoConfig.from_pretrained(name))
    return tokenizer


def load_model(model: Any, lora: Any, training: TrainingArguments, tokenizer: Any = None) -> tuple[Any, Any]:
    """Load (model, tokenizer), with an adapter around the model's layers if asked for.

    Args:
        model, lora: the options of these groups.
        tokenizer: that of the model, where it is loaded already.

    Raises:
        TrainingError: no model that can be trained here, or a package is missing.
        OSError: nothing to train under that name, or files are missing.
    """
    tokenizer = load_tokenizer(model.model_name_or_path) if tokenizer is None else tokenizer
    options: dict[str, Any] = {"dtype": _choose_dtype(model, lora, training)}
    packed = _packed(model.model_name_or_path)
    if packed is not None and not lora.use_lora:
        raise TrainingError(
            f"The weights of {model.model_name_or_path} are quantised, so they can't be trained themselves: train an "
            "adapter (--use_lora True), or full weights (qwen1-checkpoint convert --dequantize)."
        )
    if packed is not None:  # as published, --q_lora means the bits that are there
        options |= {"quantization_config": packed, "device_map": {"": training.device}}
    elif lora.q_lora:
        options |= {"quantization_config": _four_bits(training), "device_map": {"": training.device}}
    if model.attn_implementation:
        options["attn_implementation"] = model.attn_implementation
    loaded = load_complete(model.model_name_or_path, **options)
    embedding: Any = loaded.get_input_embeddings()
    rows = embedding.weight.shape[0]
    if len(tokenizer) > rows:
        raise TrainingError(
            f"{model.model_name_or_path} has a {type(tokenizer).__name__} of {len(tokenizer)} tokens and {rows} rows "
            "in its embedding: it must be a QWen model, with a row for each token (model.resize_token_embeddings)."
        )
    if lora.use_lora:
        is_chat = is_chat_model(loaded, model.model_name_or_path)
        if lora.q_lora and not is_chat and training.process_index == 0:
            print(
                f"Warning: {model.model_name_or_path} is a base model, whose embeddings of <|im_start|> and <|im_end|> "
                "were never trained and are not with --q_lora: to chat, start from a chat model or leave --q_lora out.",
                file=sys.stderr,
            )
        loaded = add_adapter(loaded, lora, training, is_chat=is_chat)
    return loaded, tokenizer


def is_chat_model(model: PreTrainedModel, name: str) -> bool:
    """Whether a model was taught to chat: by its generation settings, else by its name, as published."""
    chat_format = getattr(model.generation_config, "chat_format", None)
    return "chat" in Path(name).name.lower() if chat_format is None else chat_format == "chatml"


def add_adapter(model: Any, lora: Any, training: TrainingArguments, *, is_chat: bool) -> Any:
    """Put peft's LoRA around the layers of a model, whose own weights are frozen.

    A base model has hardly seen the control tokens of a chat, so its embedding and head are trained in full, unless
    the base is in few bits; as published.

    Raises:
        TrainingError: the layers or the adapter don't fit the model.
    """
    from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training

    in_few_bits = lora.q_lora or getattr(model, "is_quantized", False)
    if in_few_bits:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=training.gradient_checkpointing)
    if training.gradient_checkpointing:
        model.enable_input_require_grads()  # else nothing in front of the first adapter asks for a gradient
    try:
        if lora.lora_weight_path:
            return PeftModel.from_pretrained(model, lora.lora_weight_path, is_trainable=True)
        config = LoraConfig(
            r=lora.lora_r,
            lora_alpha=lora.lora_alpha,
            target_modules=lora.lora_target_modules,
            lora_dropout=lora.lora_dropout,
            bias=lora.lora_bias,
            task_type="CAUSAL_LM",
            modules_to_save=None if is_chat or in_few_bits else ["wte", "lm_head"],
        )
        return get_peft_model(model, config)
    except (ValueError, RuntimeError) as error:
        raise TrainingError(f"No adapter can be put on this model: {error}") from error


def teach_settings(model: Any, tokenizer: Any) -> None:
    """Give a model the generation settings of a chat, which a base model lacks, and its adapters a copy of them."""
    generation = model.generation_config
    ends, pad = generation.eos_token_id, generation.pad_token_id
    window = getattr(generation, "max_window_size", None)
    ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
    settings = {
        "chat_format": "chatml",
        "eos_token_id": list(dict.fromkeys([tokenizer.im_end_id, *ends, tokenizer.eod_id])),
        "pad_token_id": tokenizer.eod_id if pad is None else pad,
        "max_window_size": min(DEFAULT_WINDOW, model.config.n_positions) if window is None else window,
    }
    generation.update(**settings, allow_custom_entries=True)
    generation._from_model_config = False  # else transformers makes it anew when the model is loaded
    for adapter in getattr(model, "peft_config", {}).values():
        adapter.auto_mapping = {"base_model_class": "QWenLMHeadModel", "parent_library": "qwen1", SETTINGS: settings}


def _choose_dtype(model: Any, lora: Any, training: TrainingArguments) -> torch.dtype:
    if model.model_dtype != "auto":
        return getattr(torch, model.model_dtype)
    if lora.use_lora or training.deepspeed:
        return torch.bfloat16 if training.bf16 else torch.float16 if training.fp16 else torch.float32
    return torch.float32


def _packed(name: str) -> Any:
    """How to load a model that is stored in few bits, so that adapters around it are trained; None for a full one.

    Raises:
        TrainingError: stored by a method that nothing here can train on.
    """
    config = AutoConfig.from_pretrained(name)
    settings = getattr(config, "quantization_config", None)
    if not settings or settings.get("quant_method") == "bitsandbytes":  # which transformers loads as it is
        return None
    method = settings.get("quant_method")
    if method not in ("gptq", "awq"):
        raise TrainingError(
            f"The weights of {name} are quantised ({method}), on which no adapter can be trained here: take full ones, "
            "or those of GPTQ or AWQ."
        )
    # The kernels that are chosen without a word are for inference only.
    kind: Any = GPTQConfig if method == "gptq" else AwqConfig
    return kind(bits=settings.get("bits", 4), backend="auto_trainable")


def _four_bits(training: TrainingArguments) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if training.bf16 else torch.float16 if training.fp16 else torch.float32,
    )
