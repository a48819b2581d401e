"""The commands that `interruptions.py` disturbs: what they read, what they write, and when that is whole."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from interrupting import command
from interruption_library import stand_in

Contents = dict[str, bytes]

MARKS = {".qwen1.job.json", ".qwen1.lock"}
"""What a complete result may hold besides until the next run takes it away."""
MEASURED = re.compile(r".*(runtime|per_second|flos)|train_loss")
"""Figures of a log that are others each time, and one that transformers takes from the steps since the last start."""
SUMMARY = "train_runtime"
"""What the last line of a log has, which a run lacks that was taken up behind its last step."""
MINUTES = re.compile(rb"\d+ minutes of training")
UNCOMPARED = re.compile(r"(.*/)?(training_args\.bin|losses\.png|checkpoint-\d+/.*|\.lock)")
"""A pickle and a picture, which hold such figures, and the state of the training, which only a rerun reads."""
LOGS = {"log.json", "trainer_state.json", "training_log.json"}
RECORDS = MARKS | {"trainer_state.json"}
"""What says something about the result, and may come behind it."""
MODULES = (
    "encodings.utf_8_sig",
    "gguf",
    "matplotlib.figure",
    "peft",
    "qwen1.browser.commands",
    "qwen1.browser.page",
    "qwen1.browser.serving",
    "qwen1.conversion.checking.models",
    "qwen1.conversion.command_line.merge_lora",
    "qwen1.conversion.planning.conversion",
    "qwen1.conversion.planning.dequantise",
    "qwen1.conversion.planning.merge",
    "qwen1.conversion.planning.quantise",
    "qwen1.conversion.planning.to_gguf",
    "qwen1.conversion.planning.upgrade",
    "qwen1.conversion.quantising.perplexity",
    "qwen1.conversion.writing.plans",
    "qwen1.terminal.session",
    "qwen1.training.finetuning",
    "qwen1.training.tiny.commands",
    "qwen1.training.tiny.report",
    "qwen1.vocabulary.learning",
    "transformers.models.auto.modeling_auto",
)
"""What the commands import when they run; forks have it."""


def import_all() -> None:
    """Import what the commands need, and compute nothing, for torch's threads don't live on in a fork."""
    import torch

    torch.set_num_threads(1)
    for name in MODULES:
        importlib.import_module(name)


def make_sources(folder: Path) -> None:
    """A small checkpoint as released in 2023, an adapter for it, conversations, words; in a fork, as it computes."""
    import torch
    from peft import LoraConfig, get_peft_model

    from qwen1 import QWenConfig, QWenLMHeadModel, QWenTokenizerFast
    from qwen1.programs.shipped import TINY_CHAT

    folder.mkdir()
    torch.manual_seed(0)
    tokenizer = QWenTokenizerFast.from_pretrained(TINY_CHAT)
    shape = {"n_embd": 64, "n_layer": 2, "n_head": 2, "kv_channels": 32, "ffn_hidden_size": 256, "seq_length": 128}
    config = QWenConfig(vocab_size=len(tokenizer), use_flash_attn=False, eos_token_id=tokenizer.eod_id, **shape)
    model = QWenLMHeadModel(config)
    model.generation_config.update(
        chat_format="chatml", eos_token_id=tokenizer.im_end_id, max_window_size=100, allow_custom_entries=True
    )
    for name in ("today", "release"):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    _as_in_2023(folder / "release", model)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["c_attn", "w1"], task_type="CAUSAL_LM"))
    for weight in adapted.parameters():
        if weight.requires_grad:
            torch.nn.init.normal_(weight, std=0.02)
    adapted.save_pretrained(folder / "adapter")
    lines = [
        {"messages": [{"role": "user", "content": f"{i}+1=?"}, {"role": "assistant", "content": f"It is {i + 1}."}]}
        for i in range(24)
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "words.txt").write_text("interruption\t5\nunterbrechung\t3\n")
    for path in folder.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)  # safetensors lets only the owner read


def _as_in_2023(folder: Path, model: Any) -> None:
    import torch

    for path in folder.glob("*.py"):
        path.write_text("raise ImportError('code of 2023')\n")
    (folder / "model.safetensors").unlink()
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    placed = {name: f"pytorch_model-{1 + i % 3:05d}-of-00003.bin" for i, name in enumerate(tensors)}
    for file in set(placed.values()):
        torch.save({name: tensors[name] for name in tensors if placed[name] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))


def contents(folder: Path) -> Contents:
    """All files below a folder that are compared, without the figures that are others each time."""
    names = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: _compared(path) for name, path in names.items() if not UNCOMPARED.fullmatch(name)}


def _compared(path: Path) -> bytes:
    if path.name in LOGS:
        return json.dumps(_without_measured(json.loads(path.read_bytes())), sort_keys=True).encode()
    return MINUTES.sub(b"", path.read_bytes()) if path.suffix == ".md" else path.read_bytes()


def _without_measured(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_measured(inner) for key, inner in value.items() if not MEASURED.fullmatch(key)}
    if isinstance(value, list):
        return [_without_measured(inner) for inner in value if not (isinstance(inner, dict) and SUMMARY in inner)]
    return value


def _is_aside(name: str) -> bool:
    """Whether a file is none of the result: a record of it, or what a second run is writing inside of its folder."""
    return Path(name).name in RECORDS or "/.partial/" in name


def difference(found: Contents, whole: Contents) -> str | None:
    """Which files differ, are missing or too many; None where none is."""
    names = sorted(name for name in found.keys() | whole.keys() if found.get(name) != whole.get(name))
    told = [
        f"{name} {'is missing' if name not in found else 'differs' if name in whole else 'is left'}" for name in names
    ]
    return "; ".join(told) or None


@dataclass
class Case:
    """A command.

    Attributes:
        name: of it, for the reader.
        words: (sources, work folder) -> what runs it there.
        result: what it writes, in the work folder.
        loadable: the file that makes the result one that a loader opens.
        copied: a folder of the sources that is the result before it is changed in place.
        old: a folder or file of the sources that is the result before it is replaced.
        killed: whether `kill` takes it; the others write at most one file, in the end.
        sources: what `make_sources` made.
    """

    name: str
    words: Callable[[Path, Path], Callable[[], object]]
    result: str = "result"
    loadable: str = "config.json"
    copied: str | None = None
    old: str | None = None
    killed: bool = True
    sources: Path = Path()
    _whole: Contents = field(default_factory=dict)

    def begin(self, work: Path) -> None:
        """Make the work folder as it is before the command."""
        work.mkdir(exist_ok=True)
        for path in work.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        if self.copied or self.old:
            before, result = self.sources / str(self.copied or self.old), work / self.result
            shutil.copytree(before, result) if before.is_dir() else shutil.copyfile(before, result)

    def program(self, work: Path) -> Callable[[], object]:
        """What runs the command."""
        return self.words(self.sources, work)

    def keep(self, work: Path) -> None:
        """Take what is there for what should always be."""
        self._whole = contents(work)

    def difference(self, work: Path) -> str | None:
        """What is otherwise than after the undisturbed run."""
        return difference(contents(work), self._whole)

    def half_written(self, work: Path) -> str | None:
        """What a loader would take for the result though it isn't whole; of what is changed in place, what is lost."""
        result = work / self.result
        if self.copied:
            return self._lost(result)
        if self.old and self.is_old(work):
            return None
        if not (result.is_file() or (result / self.loadable).is_file()):
            return None
        prefix = self.result if result.is_file() else f"{self.result}/"
        found, whole = (
            {name: files[name] for name in files if name.startswith(prefix) and not _is_aside(name)}
            for files in (contents(work), self._whole)
        )
        wrong = difference(found, whole)
        return wrong and f"half-written: {wrong}"

    def is_old(self, work: Path) -> bool:
        """Whether what was there before the command is there unchanged; other files may have come."""
        before, result = self.sources / str(self.old), work / self.result
        if before.is_file():
            return result.is_file() and result.read_bytes() == before.read_bytes()
        return contents(before).items() <= contents(result).items()

    def _lost(self, result: Path) -> str | None:
        found = contents(result)
        before = contents(self.sources / str(self.copied))
        lost = [name for name, data in before.items() if data not in (found.get(name), found.get(f"{name}.bak"))]
        return f"lost: {', '.join(lost)}" if lost else None


def _finetune(sources: Path, work: Path, *more: object) -> Callable[[], object]:
    options = ("--data_path", sources / "data.jsonl", "--output_dir", work / "result", "--model_max_length", 64)
    steps = ("--max_steps", 8, "--save_steps", 2, "--save_strategy", "steps", "--per_device_train_batch_size", 2)
    run = ("--use_cpu", "--learning_rate", 1e-3, "--disable_tqdm", "True", "--resume_from_checkpoint", "True")
    return command("finetune", sources / "today", *options, *steps, *run, *more)


def _page(sources: Path, work: Path) -> Callable[[], object]:
    """The page, all but its serving, which would not end."""

    def run() -> None:
        from qwen1.browser import serving

        serving.launch = lambda *arguments, **options: None
        command("browser", sources / "today", "--cpu-only")()

    return run


def _vocabulary(sources: Path, work: Path) -> Callable[[], object]:
    return command("extend_vocabulary", sources / "today" / "qwen.tiktoken", sources / "words.txt", work / "result")


def _tiny_chat(sources: Path, work: Path) -> Callable[[], object]:
    """`make --quick`, of a size that takes seconds."""

    def run() -> None:
        from qwen1.training.tiny import journey

        journey.QUICK = journey.Size(
            texts=60, dialogues=150, practice=60, refinement=60, sharpening=60, equipping=60, vocabulary=700, n_embd=32,
            n_layer=1, ffn_hidden_size=64, tokens=1024, row_length=256, save_steps=3,
        )  # fmt: skip
        command("tiny_chat", "make", work / "result", "--quick", "--per-kind", 1)()

    return run


def _checkpoint(*words: object) -> Callable[[Path, Path], Callable[[], object]]:
    """A command of `qwen1-checkpoint`; words with `{source}` and `{work}` are paths there."""

    def make(sources: Path, work: Path) -> Callable[[], object]:
        return command("checkpoint", *(str(word).format(source=sources, work=work) for word in words))

    return make


def _quantize(sources: Path, work: Path) -> Callable[[], object]:
    """`quantize`, with gptqmodel where it is installed."""

    def run() -> None:
        if importlib.util.find_spec("gptqmodel") is None:
            sys.modules["gptqmodel"] = stand_in()
        rounding = ("--bits", 4, "--group-size", 64, "--samples", 16)
        command("checkpoint", "quantize", sources / "today", work / "result", *rounding)()

    return run


_SHARD = ("--max-shard-size", "200KB")
CASES = {
    case.name: case
    for case in (
        Case("upgrade", _checkpoint("upgrade", "{source}/release", "{work}/result", *_SHARD)),
        Case("upgrade in place", _checkpoint("upgrade", "{work}/result", "--in-place", *_SHARD), copied="release"),
        Case("convert", _checkpoint("convert", "{source}/release", "{work}/result", "--to", "qwen2", *_SHARD)),
        Case("gguf", _checkpoint("convert", "{source}/release", "{work}/result", "--to", "gguf")),
        Case("merge-lora", _checkpoint("merge-lora", "{source}/today", "{source}/adapter", "{work}/result", *_SHARD)),
        Case("quantize", _quantize),
        Case("finetune", _finetune),
        Case(
            "finetune lora",
            lambda sources, work: _finetune(sources, work, "--use_lora", "--lora_r", 2),
            loadable="adapter_config.json",
        ),
        Case("tiny-chat", _tiny_chat),
        Case(
            "finetune over an old model",
            lambda sources, work: _finetune(sources, work, "--overwrite_output_dir"),
            old="today",
            killed=False,
        ),
        Case("extend-vocabulary", _vocabulary, killed=False),
        Case("extend-vocabulary over an old file", _vocabulary, old="words.txt", killed=False),
        Case("chat", lambda sources, work: command("chat", sources / "today", "12+34=?"), killed=False),
        Case("browser", _page, killed=False),
    )
}
