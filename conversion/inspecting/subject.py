"""What is known so far of a checkpoint that is inspected."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from ..files.tensors import TensorInfo
from ..formats.architecture import Architecture
from ..formats.expected import Expected
from ..formats.kinds import Kind
from ..formats.names import IGNORED, TABLE
from ..formats.quantised import Packing, expect_packed, read_packing
from ..formats.registry import FORMATS
from .memory import numel
from .report import Findings
from .stored import StoredWeights


def share_memory(infos: Mapping[str, TensorInfo], first: str, second: str) -> bool:
    """Whether two names stand for the same memory."""
    return first in infos and second in infos and infos[first].memory == infos[second].memory


class Subject:
    """A checkpoint that is inspected.

    Args:
        path: folder, single file of weights, or a `config.json` alone.
        without_weights: none need be there.

    Attributes:
        kind: format, None while it is unknown.
        config: `config.json` or `params.json`, as far as there is one.
        architecture: None where it can't be read.
    """

    def __init__(self, path: Path, params: Path | None, without_weights: bool = False):
        self.path = path
        self.is_config = path.is_file() and path.suffix == ".json"
        self.folder = path if path.is_dir() else path.parent
        self.params = params
        self.findings = Findings()
        self.stored = StoredWeights(path, self.findings, without_weights or self.is_config)
        self.kind: Kind | None = None
        self.config: dict[str, Any] = {}
        self.architecture: Architecture | None = None

    @property
    def is_qwen(self) -> bool:
        """Whether it is QWen, of whatever release."""
        return self.kind is not None and self.kind.is_qwen

    @property
    def positions(self) -> int | None:
        """Tokens that the configuration makes room for; None where it doesn't say so."""
        found = (self.config.get(name) for name in ("max_position_embeddings", "n_positions"))
        return next((value for value in found if type(value) is int), None)

    @cached_property
    def quantization(self) -> str | None:
        """How the weights are quantised."""
        found = self.config.get("quantization_config")
        if not isinstance(found, dict):
            return None if found is None else str(found)
        bits = found.get("bits")
        return f"{found.get('quant_method', 'unknown')}{f', {bits} bits' if bits else ''}"

    @cached_property
    def packing(self) -> Packing | None:
        """How quantised weights are packed; None where it isn't known here."""
        return self.findings.attempt(read_packing, self.config.get("quantization_config"))

    @property
    def stretch(self) -> dict[str, bool]:
        """Which of QWen's own ways to stretch long texts are switched on."""
        names = {"NTK": "use_dynamic_ntk", "LogN": "use_logn_attn"}
        return {word: self.is_qwen and bool(self.config.get(name)) for word, name in names.items()}

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every tensor that the configuration asks for."""
        if self.architecture is None or self.kind is None:
            return {}
        return FORMATS[self.kind].shapes(self.architecture, self.stored.infos, len(self.stored.parts))

    @cached_property
    def expected(self) -> Expected:
        """What is to be stored, quantised or not; nothing where that can't be known."""
        if self.quantization is None:
            return Expected(self.shapes)
        return expect_packed(self.shapes, self.packing) if self.packing else Expected({})

    @cached_property
    def weights(self) -> dict[str, TensorInfo]:
        """Stored tensors but those that can be left out: tables, and the head where it is tied to the embedding."""
        heads = {"output.weight", "lm_head.weight"} if self.architecture and self.architecture.tied else set()
        return {
            name: info
            for name, info in self.stored.infos.items()
            if not IGNORED.fullmatch(name) and name.split("/")[-1] not in heads
        }

    @property
    def dtypes(self) -> dict[str, int]:
        """dtype -> stored parameters, most first."""
        counts: dict[str, int] = {}
        memories = set()
        for name, info in self.weights.items():
            repeated = self.stored.is_llama_original and len(info.shape) == 1 and not name.startswith("00/")
            if info.memory not in memories and not repeated:
                memories.add(info.memory)
                dtype = str(info.dtype).removeprefix("torch.")
                counts[dtype] = counts.get(dtype, 0) + numel(info.shape)
        return dict(sorted(counts.items(), key=lambda item: -item[1]))

    @property
    def tied_head(self) -> tuple[str, str] | None:
        """Names of embedding and head, if they are stored apart although the configuration ties them."""
        pair = TABLE[0].qwen if self.is_qwen else TABLE[0].hf, TABLE[-1].hf
        infos = self.stored.infos
        stored = pair[0] in infos and pair[1] in infos and pair[1] not in self.weights
        return pair if stored and not share_memory(infos, *pair) else None
