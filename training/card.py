"""The model card of a result, and what is said at the end of a training."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from ..programs.packages import is_installed
from ..programs.version import version as own_version
from .plots import PICTURE

CARD = "README.md"

_MARK = "<!-- Written by qwen1-finetune. A text of your own without this line is kept. -->"
_TEMPLATE = "# Model Card for Model ID"
"""The heading of peft's empty form."""

_ROWS = 10
_CURVES = {
    "loss": "training loss",
    "eval_loss": "evaluation loss",
    "rewards/margins": "margin",
    "eval_rewards/margins": "evaluation margin",
    "eval_rewards/accuracies": "evaluation accuracy",
}

_WHOLE = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({name}, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained({name}, trust_remote_code=True).eval()
"""
_ADAPTER = """\
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({name}, trust_remote_code=True)
base = AutoModelForCausalLM.from_pretrained({base}, trust_remote_code=True)
model = PeftModel.from_pretrained(base, {name}).eval()
"""
_CHAT = """
response, history = model.chat(tokenizer, "你好", history=None)
print(response)
"""
_CONTINUE = """
inputs = tokenizer("Once upon a time", return_tensors="pt").to(model.device)
output = model.generate(**inputs, max_new_tokens=64)
print(tokenizer.decode(output[0], skip_special_tokens=True))
"""


@dataclass
class Training:
    """What a card tells of a training.

    Attributes:
        folder: where the result lies.
        base: folder or Hub id of the model that it began with.
        method: "sft", "dpo" or "texts".
        adapter: whether the result is one.
        chats: whether it was taught to.
        data: name of a file of data -> what was read of it.
        settings: name -> value.
        log: the trainer's `log_history`.
    """

    folder: Path
    base: str
    method: str
    adapter: bool
    chats: bool
    data: Mapping[str, str]
    settings: Mapping[str, Any] = field(default_factory=dict)
    log: Sequence[Mapping[str, Any]] = ()


def describe(arguments: Sequence[Any], trainer: Any, read: Mapping[str, str]) -> Training:
    """What a card tells of a training with these options of `qwen1-finetune`.

    Args:
        read: name of a file of data -> what was read of it.
    """
    model, data, lora, args = arguments
    return Training(
        folder=Path(args.output_dir),
        base=model.model_name_or_path,
        method="dpo" if data.dpo else "texts" if data.plain_texts else "sft",
        adapter=lora.use_lora,
        chats=getattr(trainer.model.generation_config, "chat_format", None) == "chatml",
        data=read,
        settings={**_trained(trainer.model, data, lora), **_settings(data, trainer.args, trainer.state.global_step)},
        log=trainer.state.log_history,
    )


def _trained(model: Any, data: Any, lora: Any) -> dict[str, Any]:
    """Which weights: of an adapter as it is, which may be one that went on, with settings of its own."""
    if not lora.use_lora:
        return {"weights that are trained": "all"}
    config = model.peft_config[model.active_adapter]
    dropout = 0.0 if data.dpo else config.lora_dropout
    whole = {"layers trained whole": ", ".join(config.modules_to_save)} if config.modules_to_save else {}
    return {
        "weights that are trained": "an adapter" + " on a base in few bits" * getattr(model, "is_quantized", False),
        "rank, alpha, dropout": f"{config.r}, {config.lora_alpha}, {dropout:g}",
        "layers with an adapter": ", ".join(sorted(config.target_modules)),
        **whole,
    }


def _settings(data: Any, args: Any, steps: int) -> dict[str, Any]:
    return {
        **({"beta": args.dpo_beta, "loss": args.dpo_loss} if data.dpo else {}),
        "steps": steps,
        "examples in a step": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "tokens of an example at most": data.model_max_length,
        "learning rate": args.learning_rate,
        "course of the learning rate": getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type),
        "weight decay": args.weight_decay,
        "computed in": "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32",
        "seed": args.seed,
    }


def model_card(training: Training) -> str:
    """README.md of a result: base, data, settings, losses, how to load it."""
    name = training.folder.resolve().name
    base = Path(training.base).name if Path(training.base).exists() else training.base
    what = f"An adapter (LoRA) of {base}, trained" if training.adapter else f"{base}, trained further"
    taught = {"sft": "conversations", "dpo": "preferences between answers (DPO)", "texts": "texts"}[training.method]
    code = (_ADAPTER if training.adapter else _WHOLE).format(
        **{key: json.dumps(value, ensure_ascii=False) for key, value in (("name", name), ("base", base))}
    )
    code += _CHAT if training.chats else _CONTINUE
    packages = '"transformers>=5.4" accelerate tiktoken' + " peft" * training.adapter
    picture = f"\n![curves]({PICTURE})\n" if (training.folder / PICTURE).is_file() else ""
    settings = "\n".join(f"| {key} | {_shown(value)} |" for key, value in training.settings.items())
    data = "\n".join(f"- `{file}`: {read}" for file, read in training.data.items())
    return (
        f"---\n{_front_matter(training).to_yaml()}\n---\n{_MARK}\n\n# {name}\n\n"
        f"{what} on {taught}.\n\n"
        f"## Use\n\n```bash\npip install {packages}\n```\n\n```python\n{code}```\n\n"
        f"## Data\n\n{data}\n\n"
        f"## Training\n\n| setting | value |\n|---|---|\n{settings}\n\n{_losses(training.log)}{picture}\n"
        f"Trained with {_versions(training)}.\n\n"
        "## Licence\n\nThat of the base holds for what was made of it.\n"
    )


def _front_matter(training: Training) -> ModelCardData:
    tags = ["qwen", "custom_code", *["lora"] * training.adapter, *["dpo"] * (training.method == "dpo")]
    relation = "adapter" if training.adapter else "finetune"
    is_here = Path(training.base).exists()  # a folder, of which the Hub knows nothing
    named: dict[str, Any] = {} if is_here else {"base_model": training.base, "base_model_relation": relation}
    library = "peft" if training.adapter else "transformers"
    return ModelCardData(library_name=library, pipeline_tag="text-generation", tags=tags, **named)


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value).replace("|", "\\|")


def _losses(log: Sequence[Mapping[str, Any]]) -> str:
    """A table of what was logged, of many steps some and the last."""
    columns = [key for key in _CURVES if any(key in entry for entry in log)]
    steps: dict[int, dict[str, float]] = {}
    for entry in log:
        found = {key: entry[key] for key in columns if key in entry}
        if found:
            steps.setdefault(entry["step"], {}).update(found)
    if not steps:
        return ""
    every = -(-len(steps) // _ROWS)
    numbers = sorted(steps)
    shown = sorted({*numbers[::every], numbers[-1]})
    rows = [
        [str(step), *(f"{steps[step][key]:.4g}" if key in steps[step] else "" for key in columns)] for step in shown
    ]
    head = ["step", *(_CURVES[key] for key in columns)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)) + "\n"


def _versions(training: Training) -> str:
    names = ["transformers", "torch", *["peft"] * training.adapter, *["trl"] * (training.method == "dpo")]
    return ", ".join([f"qwen1 {own_version()}", *(f"{name} {version(name)}" for name in names if is_installed(name))])


def is_replaceable(card: Path) -> bool:
    """Whether there is no text of an author: none, one of an earlier training, or a library's empty form."""
    if not card.is_file():
        return True
    text = card.read_text(encoding="utf-8", errors="replace")
    return _MARK in text or _TEMPLATE in text


# --- the end ---


def farewell(training: Training) -> str:
    """Where the result lies, and the command that chats with it."""
    what = f"The adapter of {training.base}" if training.adapter else "The model"
    if not training.chats:
        return f"{what} is in {training.folder}. It continues texts, and was not taught to chat."
    said = f"{what} is in {training.folder}. Chat with it:\n  {chat_command(training.folder)}"
    if not training.adapter:
        return said
    merge = shlex.join([*_program("qwen1-checkpoint"), "merge-lora", training.base, str(training.folder), "NEW"])
    return f"{said}\nJoin it to its base:\n  {merge}"


def chat_command(folder: Path) -> str:
    """The words that chat with the model in a folder, for a shell in the working directory."""
    name = str(folder)
    return shlex.join([*_program("qwen1-chat"), f"./{name}" if name.startswith("-") else name])


def _program(name: str) -> list[str]:
    """A program as it is called here: by its name where the shell finds it, else by its path beside Python."""
    if shutil.which(name):
        return [name]
    beside = shutil.which(name, path=str(Path(sys.executable).parent))
    if beside is None:
        return [name]
    here = Path.cwd()
    return [str(Path(beside).relative_to(here)) if Path(beside).is_relative_to(here) else beside]
