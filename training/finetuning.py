"""What `qwen1-finetune` does: options, data, model, training. `commands.py` starts it."""

from __future__ import annotations

import gc
import math
import shutil
import sys
from collections.abc import Iterable, Sequence, Set
from contextlib import closing
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import (
    AutoModelForCausalLM,
    HfArgumentParser,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.training_args import ParallelMode

from ..programs.failures import is_of_machine, told
from ..programs.models import check_model
from ..programs.packages import explain, require
from ..programs.starting import INTERRUPTED
from ..programs.version import add_version
from .card import describe, farewell, model_card
from .checkpoints import check_kind, check_output, checkpoint_to_resume, save_trained
from .checks import LOWER_IS_BETTER, check_before_loading, check_layers, check_reports, problems_of_numbers
from .errors import DataError, SavingError, TrainingError
from .examples import Example
from .loop import QWenTrainer, WatchedTrainer
from .mixing import EpochOfRows, WeightedRows, make_rows
from .models import load_model, load_tokenizer, teach_settings
from .noise import no_bars_of_files, no_monitor_of_bars, quiet
from .options import LOOKS
from .packing import Collator
from .plots import PNG, plotted
from .preferences import load_pairs, require_trl
from .sources import Part, TrainingData, read_data
from .watching import Pace, SameData

FAILED = 1
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

    data_path: list[str] = field(
        metadata={"help": "Files of conversations: JSON lists or JSON Lines. With --plain_texts: of texts."}
    )
    data_weights: list[float] | None = _option("How often the data of each file come in an epoch, such as 2 or 0.5.")
    eval_data_path: list[str] | None = _option("Files of the same forms to evaluate on.")
    eval_fraction: float = _option("Part of each file to evaluate on instead, such as 0.05; drawn by the seed.", 0.0)
    streaming: bool = _option(
        "Hold the data in a file of --output_dir as they are trained on, not in memory, however large they are.", False
    )
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
    include_num_input_tokens_seen: Literal["no", "all", "non_padding"] = _option(
        "Count the tokens that are read.", "no"
    )
    ddp_find_unused_parameters: bool | None = _option(
        "Look in every step for weights without a gradient; every step uses all.", False
    )
    dpo_beta: float = _option("With --dpo: how closely to keep to the model from before.", 0.1)
    dpo_loss: Literal["sigmoid", "hinge", "ipo"] = _option("With --dpo: the loss.", "sigmoid")

    plots = False  # no option: --report_to png

    def __post_init__(self) -> None:
        """As transformers', which takes the best to be the highest of all metrics but losses."""
        if self.greater_is_better is None and self.metric_for_best_model is not None:
            self.greater_is_better = self.metric_for_best_model.removeprefix("eval_") not in LOWER_IS_BETTER
        super().__post_init__()


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
    pairs = [(_option_of(word), equals, value) for word, equals, value in (item.partition("=") for item in argv)]
    words = [_RENAMED.get(name, name) + equals + value for name, equals, value in pairs]
    given = {name for name, _, _ in pairs}
    try:
        model, data, lora, training = parser.parse_args_into_dataclasses(words)
    except (ValueError, ImportError) as error:  # combinations that TrainingArguments refuses
        parser.error(str(error))
    if "--learning_rate" not in given:
        rates = (1e-6, 1e-5) if data.dpo else (1e-5, 3e-4)  # TRL's, and as published
        training.learning_rate = rates[lora.use_lora]
    training.plots = PNG in training.report_to
    training.report_to = [name for name in training.report_to if name not in (PNG, "none")]
    if data.dpo and "--lora_dropout" not in given:
        lora.lora_dropout = 0.0
    if problem := _find_problem(model, data, lora, training, given):
        parser.error(problem)
    return model, data, lora, training


def _option_of(word: str) -> str:
    """The name of an option, which may be written with dashes; any other word as it is."""
    return "--" + word[2:].replace("-", "_") if word.startswith("--") else word


def _find_problem(
    model: ModelArguments, data: DataArguments, lora: LoraArguments, training: FinetuningArguments, given: Set[str]
) -> str | None:
    """What is wrong with the options together, of which these were given."""
    evaluated = data.eval_data_path is not None or data.eval_fraction > 0
    strategy = getattr(training.eval_strategy, "value", training.eval_strategy)
    output, source = Path(training.output_dir).resolve(), Path(model.model_name_or_path).resolve()
    problems = {
        **_problems_of_lora(lora, given),
        "--output_dir is empty, as a variable that isn't set: name a folder": not training.output_dir,
        "--q_lora works neither with FSDP nor with DeepSpeed's ZeRO 3: leave one of them out": lora.q_lora
        and (bool(training.fsdp) or is_deepspeed_zero3_enabled()),
        "--bf16_full_eval and --fp16_full_eval round what FSDP and DeepSpeed have in shards: leave them out": (
            (training.bf16_full_eval or training.fp16_full_eval)
            and bool(training.fsdp or training.deepspeed)
            and (evaluated and training.eval_strategy == "no")
        ),
        "--fsdp shards over several processes: start the program with accelerate launch, or leave --fsdp out": bool(
            training.fsdp
        )
        and training.parallel_mode != ParallelMode.DISTRIBUTED,
        f"--num_train_epochs {training.num_train_epochs} must be above 0": training.num_train_epochs <= 0
        and training.max_steps <= 0,
        "--dpo goes with none of --plain_texts, --packing, --streaming and --data_weights: leave them out": data.dpo
        and (data.plain_texts or data.packing or data.streaming or bool(data.data_weights)),
        "--lora_dropout has no effect with --dpo, which compares two models: leave it out": data.dpo
        and lora.lora_dropout > 0,
        "--label_smoothing_factor has no effect with --dpo: leave it out": data.dpo
        and training.label_smoothing_factor != 0,
        f"--dpo_beta {training.dpo_beta} must be above 0": training.dpo_beta <= 0,
        "--dpo_beta and --dpo_loss need --dpo": not data.dpo
        and (training.dpo_beta, training.dpo_loss) != (0.1, "sigmoid"),
        f"--warmup_ratio {training.warmup_steps:g} must be below 1; --warmup_steps takes a number of steps": (
            "--warmup_ratio" in given and training.warmup_steps >= 1
        ),
        **problems_of_numbers(training),
        f"--model_max_length {data.model_max_length} must be at least 2": data.model_max_length < 2,
        f"--eval_fraction {data.eval_fraction} must be from 0 to below 1": not 0 <= data.eval_fraction < 1,
        **_problems_of_weights(data),
        "--eval_data_path and --eval_fraction exclude each other": data.eval_data_path is not None
        and data.eval_fraction > 0,
        f"--eval_strategy {strategy} needs --eval_data_path or --eval_fraction": training.eval_strategy != "no"
        and not evaluated,
        f"--output_dir {training.output_dir} is the folder of the model: name another one": output == source,
    }
    return next((text for text, wrong in problems.items() if wrong), None)


def _problems_of_lora(lora: LoraArguments, given: Set[str]) -> dict[str, bool]:
    own = [f"--{one.name}" for one in fields(LoraArguments) if one.name != "use_lora" and f"--{one.name}" in given]
    kept = [name for name in own if name not in ("--q_lora", "--lora_weight_path")]
    return {
        f"{own[0] if own else ''} needs --use_lora: without it all weights are trained": bool(own)
        and not lora.use_lora,
        f"{kept[0] if kept else ''} has no effect with --lora_weight_path, whose adapter goes on as it is: leave it "
        "out": bool(kept) and bool(lora.lora_weight_path),
        f"--lora_r {lora.lora_r} must be at least 1": lora.lora_r < 1,
        f"--lora_alpha {lora.lora_alpha} must be above 0": lora.lora_alpha <= 0,
        f"--lora_dropout {lora.lora_dropout} must be from 0 to below 1": not 0 <= lora.lora_dropout < 1,
    }


def _problems_of_weights(data: DataArguments) -> dict[str, bool]:
    weights, files = data.data_weights or [], data.data_path
    shown = " ".join(f"{weight:g}" for weight in weights)
    return {
        f"--data_weights {shown} must be one for each of the {len(files)} files of --data_path": bool(weights)
        and len(weights) != len(files),
        f"--data_weights {shown} must be numbers above 0": not all(0 < weight < math.inf for weight in weights),
        "--data_path names a file twice: give it a weight of 2 with --data_weights": len(set(files)) < len(files),
    }


# --- data ---


def load_examples(tokenizer: PreTrainedTokenizerBase, data: DataArguments, args: TrainingArguments) -> TrainingData:
    """Read and encode the data; the first process says what was read.

    Raises:
        DataError: bad data, or none of it left.
        OSError: a file can't be read, or none be written.
    """
    folder = Path(str(args.output_dir)) / f".data-{args.process_index}"
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
    if data.streaming:
        folder.mkdir(parents=True)
    return read_data(
        tokenizer,
        data.data_path,
        weights=data.data_weights,
        eval_paths=data.eval_data_path or (),
        eval_fraction=data.eval_fraction,
        plain_texts=data.plain_texts,
        max_length=data.model_max_length,
        seed=args.seed,
        folder=folder if data.streaming else None,
        say=_say if args.process_index == 0 else None,
    )


def _say(text: str) -> None:
    print(text, file=sys.stderr)


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
    parts: Sequence[Part] = (),
    checksum: int | None = None,
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
        parts: the examples of each file, with their weights, see `WeightedRows`; none for examples that all weigh 1.
        checksum: of the data, by which a run that is taken up knows them again.

    Raises:
        TrainingError: nothing to train on, no such checkpoint, or tensorboard is asked for and missing.
        ValueError: an example is longer than `max_length`.
    """
    checkpoint = checkpoint_to_resume(args)
    seed = args.seed if args.data_seed is None else args.data_seed
    dataset = partial(make_rows, packing=packing, max_length=max_length, seed=seed)
    rows = dataset(train_examples, parts)
    _check_run(args, len(rows))
    use_cache = model.config.use_cache
    trainer = QWenTrainer(
        model=model,
        args=args,
        data_collator=Collator(int(tokenizer.pad_token_id), packing),
        train_dataset=rows,
        eval_dataset=dataset(eval_examples, ()) if eval_examples else None,
        processing_class=tokenizer,
        callbacks=[*_watching(rows, checksum), *callbacks],
    )
    model.config.use_cache = use_cache  # transformers turns it off, and would save it so
    with no_bars_of_files(), plotted(trainer):
        trainer.train(None if checkpoint is None else str(checkpoint))
    return trainer


def _watching(rows: Any, checksum: int | None) -> list[TrainerCallback]:
    """What looks at a training of these rows, beside the trainer's own."""
    watching: list[TrainerCallback] = [Pace()]
    if isinstance(rows, WeightedRows):
        watching.append(EpochOfRows(rows))
    if checksum is not None:
        watching.append(SameData(f"{checksum:08x} {len(rows)}"))
    return watching


def _check_run(args: TrainingArguments, rows: int) -> None:
    """Refuse what would fail only after the training, or train nothing."""
    if not rows:
        raise TrainingError("There are no examples to train on.")
    batch = args.train_batch_size * args.world_size
    if args.dataloader_drop_last and rows < batch:
        raise TrainingError(
            f"The {rows} rows are fewer than a batch ({batch}), which --dataloader_drop_last leaves out: take it away, "
            "or lower --per_device_train_batch_size."
        )
    check_reports(args)


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
    name = model_arguments.model_name_or_path
    check_model(name, adapters=False)
    check_before_loading(model_arguments, data, lora, args)
    check_kind(args, lora, name)
    tokenizer = load_tokenizer(name)
    if lora.use_lora and not lora.lora_weight_path:
        check_layers(name, lora.lora_target_modules)
    if data.dpo:
        pairs, held_out = load_pairs(tokenizer, data, args.seed, progress=first)
        reports = {", ".join(Path(path).name for path in data.data_path): pairs.report()}
        if held_out:
            reports["(evaluation)"] = held_out.report()
        return _run_on(pairs.examples, held_out.examples if held_out else None, tokenizer, arguments, reports)
    with closing(load_examples(tokenizer, data, args)) as read:
        ours = {"parts": read.parts, "checksum": read.checksum}
        return _run_on(read.examples, read.held_out, tokenizer, arguments, read.reports, **ours)


def _run_on(
    examples: Sequence[Any],
    held_out: Sequence[Any] | None,
    tokenizer: Any,
    arguments: Arguments,
    reports: dict[str, str],
    **about: Any,
) -> WatchedTrainer:
    """Load the model, now that the data are known to be good, train it and save it; `about` is for `train`."""
    model_arguments, data, lora, args = arguments
    first = args.process_index == 0
    model, tokenizer = load_model(model_arguments, lora, args, tokenizer)
    if lora.use_lora and first:
        trained, all_of_them = model.get_nb_trainable_parameters()
        _say(f"LoRA trains {trained:,} parameters, {trained / all_of_them:.2%} of {all_of_them:,}.")
    if not data.plain_texts:
        teach_settings(model, tokenizer)  # now, for the checkpoints
    given = (model, tokenizer, examples, held_out, args)
    trainer: WatchedTrainer
    if data.dpo:
        trainer = _train_preferences(model_arguments, lora, *given)
    else:
        trainer = train(*given, packing=data.packing, max_length=data.model_max_length, **about)
    if held_out and args.eval_strategy == "no":
        trainer.evaluate()
    if not data.plain_texts:
        teach_settings(model, tokenizer)  # again, because transformers puts the tokenizer's ends in front
    told = describe(arguments, trainer, reports)
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


@quiet()
@no_monitor_of_bars()
def main(argv: Sequence[str] | None = None) -> None:
    """Run the program; ends the process with its exit status where it isn't 0.

    Args:
        argv: words of the command line; None for those of this process.
    """
    arguments = parse_arguments(sys.argv[1:] if argv is None else argv)
    try:
        status = _attempt(arguments)
    finally:
        _leave_group()
    if status:
        sys.exit(status)


def _attempt(arguments: Arguments) -> int:
    """Run the program, and tell its exit status; what nobody foresaw is raised."""
    try:
        run(arguments)
    except Exception as error:
        if not isinstance(error, (DataError, TrainingError, ImportError, OSError)) and not is_of_machine(error):
            raise
        if arguments[-1].process_index == 0 or isinstance(error, SavingError):
            said = explain(error) if isinstance(error, ImportError) else told(error, LESS_MEMORY)
            print(f"qwen1-finetune: {said}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("Interrupted. --resume_from_checkpoint True goes on from the last checkpoint.", file=sys.stderr)
        return INTERRUPTED
    return 0


def _leave_group() -> None:
    """End this process's part in the group of all, and the threads that worked for it.

    The trainer and its model refer to each other and to the group, whose threads would outlive the interpreter: one
    that lets go of a tensor then ends the process with SIGABRT, behind a training that succeeded.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        gc.collect()
        torch.distributed.destroy_process_group()
