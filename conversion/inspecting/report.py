"""What `inspect` reports: its fields, and what they are collected in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from ..errors import CheckpointError
from ..sizing.devices import Sizing
from .memory import Memory

T = TypeVar("T")


@dataclass(frozen=True)
class FileReport:
    """One file of weights; `bytes` is None if it is missing, `tensors` if it can't be read."""

    name: str
    bytes: int | None
    tensors: int | None


@dataclass(frozen=True)
class Report:
    """What `inspect` found; plain numbers and texts, in the order in which they are printed.

    Attributes:
        path: what was inspected.
        kind: a name that stays: "qwen-2023-08", "qwen-2023-12", "qwen", "qwen2", "llama", "llama-original", "adapter",
            or None where it isn't any of these.
        description: the same for people.
        architecture: the attributes of `Architecture` without `settings`, and `ntk` and `logn`; None where it
            can't be read.
        quantization: method of quantised weights, as "gptq".
        parameters: "total" and "without_embeddings" (embedding and head). Those that the configuration asks for; where
            there is none, those that are stored, and None.
        dtypes: dtype -> stored parameters, most first; without tables, repeated slices and a tied head's second copy.
        files: those that make up the weights, also the missing ones.
        weights_bytes: size of all tensors in these files, each memory counted once.
        memory: precision -> bytes, see `memory_needs`; empty where the architecture isn't known.
        int8_cache_per_token: bytes of one token in `QWenInt8Cache`; None for other models.
        tokenizer: tokenizer files that are there.
        problems: what is missing or damaged, so that the checkpoint can't be used as it is.
        remarks: what is odd, although the checkpoint can be used.
        scanned: whether values were read.
        sizing: devices that are needed, where that was asked.
    """

    path: str
    kind: str | None
    description: str
    architecture: dict[str, Any] | None
    quantization: str | None
    parameters: dict[str, int | None]
    dtypes: dict[str, int]
    files: list[FileReport]
    weights_bytes: int
    memory: dict[str, Memory]
    int8_cache_per_token: int | None
    tokenizer: list[str]
    problems: list[str]
    remarks: list[str]
    scanned: bool
    sizing: Sizing | None = None

    def to_json(self) -> dict[str, Any]:
        """The same as dictionaries, lists, texts and numbers; `sizing` only where there is one."""
        values = asdict(self)
        if self.sizing is None:
            del values["sizing"]
        return values


@dataclass
class Findings:
    """Problems and remarks while they are collected."""

    problems: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    def attempt(self, read: Callable[..., T], *arguments: Any) -> T | None:
        """What a step gives, or None and a problem more."""
        try:
            return read(*arguments)
        except CheckpointError as error:
            self.problems.append(str(error))
        except Exception as error:  # there is no end to what damage can break, and the rest is still to be looked at
            self.problems.append(f"Something can't be read: {' '.join(str(error).split())} ({type(error).__name__}).")
        return None
