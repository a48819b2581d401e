"""The model under examination: which folders are taken, and how they are loaded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import psutil
import torch
from transformers import PreTrainedTokenizerBase

from ..conversion.errors import CheckpointError
from ..conversion.files.access import read_json
from ..conversion.files.weights import ADAPTER_CONFIG
from ..conversion.formats.kinds import Kind, detect_kind
from ..conversion.inspecting.inspection import inspect
from ..modeling_qwen import QWenLMHeadModel
from ..programs.shipped import TINY_CHAT
from ..tokenization_qwen import QWenTokenizer, QWenTokenizerFast
from .findings import one_line
from .measuring import Ruler, ruler_of

VOCABULARIES = ("qwen.tiktoken", "tokenizer.json")
_FLOAT32_SHARE = 0.5  # of the free memory, that weights may take to be examined in float32


class Patient:
    """A model with its tokenizers, which are loaded when a check first asks for them.

    Args:
        folder: where it was loaded from.
        model: in eval mode.
    """

    def __init__(self, folder: Path, model: QWenLMHeadModel):
        self.folder = folder
        self.model = model

    @property
    def is_shipped(self) -> bool:
        """Whether this is the model that comes with the package, whose replies are known."""
        return is_shipped(self.folder)

    @cached_property
    def slow(self) -> QWenTokenizer:
        """The tokenizer on tiktoken."""
        return QWenTokenizer.from_pretrained(self.folder, local_files_only=True)

    @cached_property
    def fast(self) -> QWenTokenizerFast:
        """The tokenizer on tokenizers."""
        return QWenTokenizerFast.from_pretrained(self.folder, local_files_only=True)

    @property
    def tokenizers(self) -> dict[str, PreTrainedTokenizerBase]:
        """Both, by the name of what they stand on."""
        return {"tiktoken": self.slow, "tokenizers": self.fast}

    @property
    def chat_format(self) -> str:
        """The `chat_format` that `chat` goes by."""
        return str(getattr(self.model.generation_config, "chat_format", None) or "chatml")

    @cached_property
    def ruler(self) -> Ruler:
        """How far apart the logits of two ways may be."""
        return ruler_of(self.model, self.ids(48))

    @property
    def stretches(self) -> list[str]:
        """What the configuration has for texts longer than the trained length."""
        config = self.model.config
        return [name for name, on in (("NTK", config.use_dynamic_ntk), ("LogN", config.use_logn_attn)) if on]

    @property
    def is_half(self) -> bool:
        """Whether it computes in half precision."""
        return self.model.dtype in (torch.float16, torch.bfloat16)

    def ids(self, length: int, seed: int = 0) -> torch.Tensor:
        """Random ordinary tokens, (1, length) int64, the same for the same seed."""
        rows = self.model.config.vocab_size
        ordinary = min(rows, self.model.config.eos_token_id or rows)
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(ordinary, (1, length), generator=generator).to(self.model.device)

    @contextmanager
    def trained_for(self, length: int) -> Iterator[None]:
        """Have NTK and LogN begin beyond so many tokens, so that what they do shows in a short text."""
        before = self.model.config.seq_length
        try:
            self.model.config.seq_length = length
            yield
        finally:
            self.model.config.seq_length = before

    @contextmanager
    def attending_by(self, implementation: str) -> Iterator[None]:
        """Use an attention implementation for a while."""
        before = self.model.config._attn_implementation
        try:
            self.model.set_attn_implementation(implementation)
            yield
        finally:
            self.model.set_attn_implementation(before)


def is_shipped(folder: Path) -> bool:
    """Whether a folder is that of the model that comes with the package."""
    return folder.resolve() == TINY_CHAT.resolve()


def open_patient(folder: Path, device: str) -> Patient:
    """Load a folder as it is, without the code beside its weights; nothing is downloaded.

    On a CPU in float32, where half of the free memory holds that; otherwise in the dtype of the weights.

    Raises:
        CheckpointError: it can't be examined; the message is a sentence with the remedy.
    """
    nbytes = _refuse_others(folder)
    free = psutil.virtual_memory().available
    exact = is_shipped(folder) or (device == "cpu" and 2 * nbytes <= _FLOAT32_SHARE * free)
    try:
        model = QWenLMHeadModel.from_pretrained(folder, dtype=torch.float32 if exact else "auto", local_files_only=True)
        model = model.to(device).eval()
    except Exception as error:  # whatever is wrong with it, a traceback helps nobody
        raise CheckpointError(
            f"{folder} can't be loaded ({one_line(error)}): qwen1-checkpoint inspect {folder} looks closer."
        ) from error
    return Patient(folder, model)


def _refuse_others(folder: Path) -> int:
    """Refuse what can't be examined; gives the size of the weights in bytes."""
    if not folder.is_dir():
        reason = "is a file" if folder.exists() else "doesn't exist"
        raise CheckpointError(f"{folder} {reason}: name the folder of a checkpoint.")
    if (folder / ADAPTER_CONFIG).is_file():
        raise CheckpointError(f"{folder} holds an adapter: qwen1-checkpoint merge-lora joins it to its model first.")
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} has no config.json: download it, or name the folder of a checkpoint.")
    config = read_json(folder / "config.json")
    _refuse_kind(folder, detect_kind(config))
    if config.get("quantization_config"):
        raise CheckpointError(
            f"{folder} is quantised, so nothing tells a fault from its rounding: examine the full weights, or the "
            "model that ships, by qwen1-checkpoint doctor."
        )
    report = inspect(folder)
    if report.problems:
        more = f" ({len(report.problems) - 1} more: qwen1-checkpoint inspect)" if len(report.problems) > 1 else ""
        raise CheckpointError(f"{folder}: {report.problems[0]}{more}")
    if not any((folder / name).is_file() for name in VOCABULARIES):
        raise CheckpointError(
            f"{folder} has no {VOCABULARIES[0]}, so it can't read or write texts: download it from where the weights "
            "came from."
        )
    return report.weights_bytes


def _refuse_kind(folder: Path, kind: Kind) -> None:
    if kind in (Kind.QWEN_2023_08, Kind.QWEN_2023_12):
        raise CheckpointError(
            f"{folder} is {kind.value}, whose code loads on no current transformers: bring it up to date by "
            f"qwen1-checkpoint upgrade {folder} NEW."
        )
    if not kind.is_qwen:
        raise CheckpointError(
            f"{folder} is {kind.value}, which transformers runs by itself: name a QWen folder, or make one by "
            f"qwen1-checkpoint convert {folder} NEW --to qwen."
        )
