"""What `qwen1-finetune` does: options, data, model, training. `commands.py` starts it."""

from __future__ import annotations

import importlib.util
import random
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    AwqConfig,
    BitsAndBytesConfig,
    GPTQConfig,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.training_args import ParallelMode

from ..peft_qwen import SETTINGS
from ..programs.failures import is_of_machine, told
from ..programs.models import check_model
from ..programs.packages import explain, require
from ..programs.version import add_version
from ..qwen_generation_utils import DEFAULT_WINDOW
from .card import describe, farewell, model_card
from .checkpoints import check_output, checkpoint_to_resume, save_trained
from .data import read_conversations, read_texts
from .errors import DataError, SavingError, TrainingError
from .examples import Encoded, Example, encode_all
from .loop import QWenTrainer, WatchedTrainer
from .options import LOOKS
from .packing import Collator, ExampleDataset, PackedDataset, pack
from .plots import PNG, plotted
from .preferences import load_pairs, require_trl

FAILED, INTERRUPTED = 1, 130
LESS_MEMORY = (
    "lower --per_device_train_batch_size or --model_max_length, pass --gradient_checkpointing, or train an adapter "
    "(--use_lora)"
)

_RENAMED = {"--evaluation_strategy": "--eval_strategy", "--warmup_ratio": "--warmup_steps"}


# --- options ---


def _option(help_text: str, default: Any = None) -> Any:
    return field(default=default, metadata={"help": help_text})


@dataclass
class ModelArguments:
    """Which model, and how it is loaded."""

    _argument_group_name = "model"

    model_name_or_path: str = field(metadata={"help": "Folder or Hub name of the QWen model to start from."})
    model_dtype: Literal["auto", "float32", "bfloat16", "float16"] = _option(
        "Dtype of the weights. auto: float32 where all of them are trained, because small steps get lost in 16 bits; "
        "with LoRA or DeepSpeed, which keep what is trained in float32 themselves, that of --bf16 or --fp16.",
        "auto",
    )
    attn_implementation: str | None = _option("eager, sdpa, flash_attention_2, flex_attention or qwen_varlen.")


@dataclass
class DataArguments:
    """What the model is trained on."""

    _argument_group_name = "data"

    data_path: str = field(metadata={"help": "Conversations: a JSON list or JSON Lines. With --plain_texts: texts."})
    eval_data_path: str | None = _option("Data of the same form to evaluate on.")
    eval_fraction: float = _option("Part of the data to evaluate on instead, such as 0.05; drawn by the seed.", 0.0)
    model_max_length: int = _option("Tokens of an example, and of a packed row.", 2048)
    packing: bool = _option("Lay several examples end to end in a row; none sees another. Saves padding.", False)
    plain_texts: bool = _option(
        "Continue pretraining on texts: .txt with blank lines between, or {'text': ...}.", False
    )
    dpo: bool = _option(
        "Learn from preference pairs: {'prompt': ..., 'chosen': ..., 'rejected': ...}; needs trl.", False
    )
    lazy_preprocess: bool = _option("Taken from published scripts, without effect.", False)


@dataclass
class LoraArguments:
    """Whether and how an adapter is trained in place of the weights."""

    _argument_group_name = "LoRA"

    use_lora: bool = _option("Train an adapter; needs peft.", False)
    q_lora: bool = _option("Hold the base in 4 bits (nf4); needs bitsandbytes, and --use_lora.", False)
    lora_r: int = _option("Rank of the adapter.", 64)
    lora_alpha: int = _option("Scale of the adapter: alpha / r.", 16)
    lora_dropout: float = _option("Dropout in front of the adapter.", 0.05)
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["c_attn", "c_proj", "w1", "w2"], metadata={"help": "Layers that get an adapter."}
    )
    lora_weight_path: str = _option("Folder of an adapter to go on training.", "")
    lora_bias: Literal["none", "all", "lora_only"] = _option("Biases to train.", "none")


@dataclass
class FinetuningArguments(TrainingArguments):
    """Transformers' options with defaults for this model."""

    _argument_group_name = "training (transformers' TrainingArguments)"

    output_dir: str = field(metadata={"help": "Folder for the trained model; checkpoints go there too."})
    overwrite_output_dir: bool = _option("Put the result in place of a model in the folder.", False)
    lr_scheduler_type: str = _option("Course of the learning rate.", "cosine")
    warmup_steps: float = _option("Steps in which the learning rate rises; below 1: part of all steps.", 0.03)
    weight_decay: float = _option("Decay of the weights.", 0.1)
    adam_beta2: float = _option("Second beta of AdamW.", 0.95)
    logging_steps: float = _option("Steps between lines of the log.", 10)
    report_to: list[str] = field(
        default_factory=lambda: ["none"],
        metadata={"help": "png (curves as a picture, beside the result), tensorboard, wandb ...; several, or none."},
    )
    dpo_beta: float = _option("With --dpo: how closely to keep to the model from before.", 0.1)
    dpo_loss: Literal["sigmoid", "hinge", "ipo"] = _option("With --dpo: the loss.", "sigmoid")

    plots = False  # no option: --report_to png


Arguments = tuple[ModelArguments, DataArguments, LoraArguments, FinetuningArguments]


def make_parser() -> HfArgumentParser:
    """The parser of all options."""
    parser = HfArgumentParser(
        [ModelArguments, DataArguments, LoraArguments, FinetuningArguments],  # type: ignore[list-item]
        **LOOKS,
    )
    add_version(parser)
    return parser


def parse_arguments(argv: Sequence[str]) -> Arguments:
    """Read the command line; options that transformers has renamed since 2023 are understood.

    Raises:
        SystemExit: wrong usage, with status 2.
    """
    parser = make_parser()
    pairs = [(name, equals, value) for name, equals, value in (item.partition("=") for item in argv)]
    words = [_RENAMED.get(name, name) + equals + value for name, equals, value in pairs]
    try:
        model, data, lora, training = parser.parse_args_into_dataclasses(words)
    except (ValueError, ImportError) as error:  # combinations that TrainingArguments refuses
        parser.error(str(error))
    if all(name != "--learning_rate" for name, _, _ in pairs):
        rates = (1e-6, 1e-5) if data.dpo else (1e-5, 3e-4)  # TRL's, and as published
        training.learning_rate = rates[lora.use_lora]
    training.plots = PNG in training.report_to
    training.report_to = [name for name in training.report_to if name not in (PNG, "none")]
    if data.dpo and all(name != "--lora_dropout" for name, _, _ in pairs):
        lora.lora_dropout = 0.0
    if problem := _find_problem(model, data, lora, training):
        parser.error(problem)
    return model, data, lora, training


def _find_problem(
    model: ModelArguments, data: DataArguments, lora: LoraArguments, training: FinetuningArguments
) -> str | None:
    """What is wrong with the options together."""
    evaluated = data.eval_data_path is not None or data.eval_fraction > 0
    strategy = getattr(training.eval_strategy, "value", training.eval_strategy)
    output, source = Path(training.output_dir).resolve(), Path(model.model_name_or_path).resolve()
    problems = {
        "--q_lora needs --use_lora": lora.q_lora and not lora.use_lora,
        "--lora_weight_path needs --use_lora": bool(lora.lora_weight_path) and not lora.use_lora,
        "--q_lora works neither with FSDP nor with DeepSpeed's ZeRO 3: leave one of them out": lora.q_lora
        and (bool(training.fsdp) or is_deepspeed_zero3_enabled()),
        "--fsdp shards over several processes: start the program with accelerate launch, or leave --fsdp out": bool(
            training.fsdp
        )
        and training.parallel_mode != ParallelMode.DISTRIBUTED,
        f"--num_train_epochs {training.num_train_epochs} must be above 0": training.num_train_epochs <= 0
        and training.max_steps <= 0,
        "--dpo goes with neither --plain_texts nor --packing: leave them out": data.dpo
        and (data.plain_texts or data.packing),
        "--lora_dropout has no effect with --dpo, which compares two models: leave it out": data.dpo
        and lora.lora_dropout > 0,
        "--label_smoothing_factor has no effect with --dpo: leave it out": data.dpo
        and training.label_smoothing_factor != 0,
        f"--dpo_beta {training.dpo_beta} must be above 0": training.dpo_beta <= 0,
        "--dpo_beta and --dpo_loss need --dpo": not data.dpo
        and (training.dpo_beta, training.dpo_loss) != (0.1, "sigmoid"),
        f"--lora_r {lora.lora_r} must be at least 1": lora.lora_r < 1,
        f"--lora_dropout {lora.lora_dropout} must be from 0 to below 1": not 0 <= lora.lora_dropout < 1,
        f"--model_max_length {data.model_max_length} must be at least 2": data.model_max_length < 2,
        f"--eval_fraction {data.eval_fraction} must be from 0 to below 1": not 0 <= data.eval_fraction < 1,
        "--eval_data_path and --eval_fraction exclude each other": data.eval_data_path is not None
        and data.eval_fraction > 0,
        f"--eval_strategy {strategy} needs --eval_data_path or --eval_fraction": training.eval_strategy != "no"
        and not evaluated,
        f"--output_dir {training.output_dir} is the folder of the model: name another one": output == source,
    }
    return next((text for text, wrong in problems.items() if wrong), None)


# --- data ---


def load_examples(
    tokenizer: PreTrainedTokenizerBase, data: DataArguments, seed: int, *, progress: bool = True
) -> tuple[Encoded, Encoded | None]:
    """Read and encode the data: (to train on, to evaluate on or None).

    Raises:
        DataError: bad data, or none of it left.
        OSError: a file can't be read.
    """
    read: Any = read_texts if data.plain_texts else read_conversations
    items = read(data.data_path)
    held_out = read(data.eval_data_path) if data.eval_data_path else []
    if data.eval_fraction:
        random.Random(seed).shuffle(items)
        count = max(1, round(len(items) * data.eval_fraction))
        held_out, items = items[:count], items[count:]
        if not items:
            raise DataError(f"{data.data_path}: --eval_fraction {data.eval_fraction} leaves nothing to train on.")
    sets = []
    for name, part in (("Training data", items), ("Evaluation data", held_out)):
        encoded = encode_all(tokenizer, part, data.model_max_length, description=name, progress=progress)
        if part and not encoded.examples:
            raise DataError(f"{name}: none fits into --model_max_length {data.model_max_length}; raise it.")
        if part and progress:
            print(f"{name}: {encoded.report()}", file=sys.stderr)
        sets.append(encoded)
    return sets[0], sets[1] if held_out else None


# --- model ---


def load_model(model: ModelArguments, lora: LoraArguments, training: TrainingArguments) -> tuple[Any, Any]:
    """Load (model, tokenizer), with an adapter around the model's layers if asked for.

    Raises:
        TrainingError: no model that can be trained here, or a package is missing.
        OSError: nothing to train under that name, or files are missing.
    """
    check_model(model.model_name_or_path, adapters=False)
    if lora.use_lora:
        _require("peft", "--use_lora")
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
        _require("bitsandbytes", "--q_lora")
        options |= {"quantization_config": _four_bits(training), "device_map": {"": training.device}}
    if model.attn_implementation:
        options["attn_implementation"] = model.attn_implementation
    tokenizer = AutoTokenizer.from_pretrained(model.model_name_or_path)
    loaded = AutoModelForCausalLM.from_pretrained(model.model_name_or_path, **options)
    embedding: Any = loaded.get_input_embeddings()
    rows = embedding.weight.shape[0]
    if not hasattr(tokenizer, "im_start_id") or len(tokenizer) > rows:
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


def add_adapter(model: Any, lora: LoraArguments, training: TrainingArguments, *, is_chat: bool) -> Any:
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


def _choose_dtype(model: ModelArguments, lora: LoraArguments, training: TrainingArguments) -> torch.dtype:
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


def _require(package: str, option: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise TrainingError(f"{option} needs {package}: pip install {package}")


# --- the loop ---


def train(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    train_examples: Sequence[Example],
    eval_examples: Sequence[Example] | None,
    args: TrainingArguments,
    *,
    packing: bool,
    max_length: int,
    callbacks: Iterable[TrainerCallback] = (),
) -> QWenTrainer:
    """Train a model on encoded examples and return the trainer, whose `state.log_history` has the losses.

    With `args.resume_from_checkpoint` True, the last complete checkpoint in `args.output_dir` is taken up, if there is
    one, and the result is that of a training without interruption; a path takes up that checkpoint. The final model is
    not saved here, see `save_trained`.

    Args:
        model: a QWen model, or peft's around one; its tokenizer is saved with each checkpoint.
        train_examples, eval_examples: `input_ids` and `labels`; no evaluation with None.
        packing: lay examples end to end in rows of `max_length` tokens.

    Raises:
        TrainingError: nothing to train on, no such checkpoint, or tensorboard is asked for and missing.
        ValueError: an example is longer than `max_length`.
    """
    if not train_examples:
        raise TrainingError("There are no examples to train on.")
    checkpoint = checkpoint_to_resume(args)
    seed = args.seed if args.data_seed is None else args.data_seed

    def dataset(examples: Sequence[Example]) -> Any:
        return PackedDataset(examples, pack(examples, max_length, seed)) if packing else ExampleDataset(examples)

    rows = dataset(train_examples)
    _check_run(args, len(rows))
    use_cache = model.config.use_cache
    trainer = QWenTrainer(
        model=model,
        args=args,
        data_collator=Collator(int(tokenizer.pad_token_id), packing),
        train_dataset=rows,
        eval_dataset=dataset(eval_examples) if eval_examples else None,
        processing_class=tokenizer,
        callbacks=list(callbacks),
    )
    model.config.use_cache = use_cache  # transformers turns it off, and would save it so
    with plotted(trainer):
        trainer.train(None if checkpoint is None else str(checkpoint))
    return trainer


def _check_run(args: TrainingArguments, rows: int) -> None:
    """Refuse what would fail only after the training, or train nothing."""
    batch = args.train_batch_size * args.world_size
    if args.dataloader_drop_last and rows < batch:
        raise TrainingError(
            f"The {rows} rows are fewer than a batch ({batch}), which --dataloader_drop_last leaves out: take it away, "
            "or lower --per_device_train_batch_size."
        )
    if "tensorboard" in (args.report_to or ()) and not any(
        map(importlib.util.find_spec, ("tensorboard", "tensorboardX"))
    ):
        raise TrainingError("--report_to tensorboard needs tensorboard: pip install tensorboard")


# --- the program ---


def run(arguments: Arguments) -> WatchedTrainer:
    """Train as the options say, and save the result.

    Raises:
        DataError, TrainingError, OSError: see `load_examples`, `load_model`, `check_output` and `train`.
        MissingPackage: what the options ask for isn't installed.
    """
    model_arguments, data, lora, args = arguments
    first = args.process_index == 0
    if data.dpo:
        require_trl()
    if args.plots:
        require("matplotlib", "--report_to png")
    if first:
        check_output(args, overwrite=args.overwrite_output_dir)
    set_seed(args.seed)  # transformers' loop does so too, but after an adapter has drawn its first weights
    model, tokenizer = load_model(model_arguments, lora, args)
    load: Any = load_pairs if data.dpo else load_examples
    examples, held_out = load(tokenizer, data, args.seed, progress=first)
    if lora.use_lora and first:
        model.print_trainable_parameters()
    if not data.plain_texts:
        teach_settings(model, tokenizer)  # now, for the checkpoints
    parts = (model, tokenizer, examples.examples, held_out.examples if held_out else None, args)
    if data.dpo:
        trainer = _train_preferences(model_arguments, lora, *parts)
    else:
        trainer = train(*parts, packing=data.packing, max_length=data.model_max_length)
    if held_out and args.eval_strategy == "no":
        trainer.evaluate()
    if not data.plain_texts:
        teach_settings(model, tokenizer)  # again, because transformers puts the tokenizer's ends in front
    read = {Path(data.data_path).name: examples.report()}
    if held_out:
        read[f"{Path(data.eval_data_path or data.data_path).name} (evaluation)"] = held_out.report()
    told = describe(arguments, trainer, read)
    save_trained(trainer, args.output_dir, model_card(told))
    if first:
        print(farewell(told), file=sys.stderr)
    return trainer


def _train_preferences(model_arguments: ModelArguments, lora: LoraArguments, model: Any, *parts: Any) -> WatchedTrainer:
    """Train on pairs, held against the adapter's base, the adapter that goes on, or a second copy of the weights."""
    from .dpo import train_preferences  # here, for TRL is an extra, and takes seconds

    args = parts[-1]
    _check_run(args, len(parts[1]))
    reference = None
    if not lora.use_lora:
        options = {"attn_implementation": model_arguments.attn_implementation}
        reference = AutoModelForCausalLM.from_pretrained(
            model_arguments.model_name_or_path,
            dtype=model.dtype,
            **{name: value for name, value in options.items() if value},
        )
    return train_preferences(
        model,
        reference,
        *parts,
        beta=args.dpo_beta,
        loss=args.dpo_loss,
        new_adapter=not lora.lora_weight_path,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run the program; ends the process with its exit status where it isn't 0.

    Args:
        argv: words of the command line; None for those of this process.
    """
    arguments = parse_arguments(sys.argv[1:] if argv is None else argv)
    try:
        run(arguments)
    except Exception as error:
        if not isinstance(error, (DataError, TrainingError, ImportError, OSError)) and not is_of_machine(error):
            raise
        if arguments[-1].process_index == 0 or isinstance(error, SavingError):
            said = explain(error) if isinstance(error, ImportError) else told(error, LESS_MEMORY)
            print(f"qwen1-finetune: {said}", file=sys.stderr)
        sys.exit(FAILED)
    except KeyboardInterrupt:
        print("Interrupted. --resume_from_checkpoint True goes on from the last checkpoint.", file=sys.stderr)
        sys.exit(INTERRUPTED)
    finally:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
