"""The formats that are known, each with what a checkpoint of it is read by: a new one is a file and a line here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..files.tensors import TensorInfo
from .architecture import Architecture
from .hugging_face import keep_all, read_hf
from .kinds import Kind
from .llama_original import embedding_split, llama_shapes, llama_to_hf, read_stored
from .names import hf_shapes
from .qwen import qwen_shapes, qwen_to_hf, read_qwen
from .recipes import Recipe

Infos = Mapping[str, TensorInfo]


@dataclass(frozen=True)
class Format:
    """How checkpoints of a format are read.

    Attributes:
        read: architecture, of a configuration, the stored tensors and the number of their files.
        shapes: name -> shape of every tensor, of an architecture, the stored tensors and the number of their files.
        to_hf: the way to the names of transformers' Qwen2 and LLaMA classes, of the same.
    """

    read: Callable[[Mapping[str, Any], Infos, int], Architecture]
    shapes: Callable[[Architecture, Infos, int], dict[str, tuple[int, ...]]]
    to_hf: Callable[[Architecture, Infos, int], list[Recipe]]


_QWEN = Format(
    read=lambda config, infos, files: read_qwen(config),
    shapes=lambda architecture, infos, files: qwen_shapes(architecture),
    to_hf=lambda architecture, infos, files: qwen_to_hf(architecture),
)
_HUGGING_FACE = Format(
    read=lambda config, infos, files: read_hf(config),
    shapes=lambda architecture, infos, files: hf_shapes(architecture),
    to_hf=lambda architecture, infos, files: keep_all(architecture),
)
_LLAMA_ORIGINAL = Format(
    read=read_stored,
    shapes=lambda architecture, infos, files: llama_shapes(architecture, files, embedding_split(architecture, infos)),
    to_hf=lambda architecture, infos, files: llama_to_hf(architecture, files, embedding_split(architecture, infos)),
)
FORMATS = {
    Kind.QWEN_2023_08: _QWEN,
    Kind.QWEN_2023_12: _QWEN,
    Kind.QWEN: _QWEN,
    Kind.QWEN2: _HUGGING_FACE,
    Kind.LLAMA: _HUGGING_FACE,
    Kind.LLAMA_ORIGINAL: _LLAMA_ORIGINAL,
}
