"""The base of an adapter: its weights, and a model for peft to put the adapter around."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn

from ...configuration_qwen import QWenConfig
from ...modeling_qwen import QWenLMHeadModel
from ..errors import CheckpointError
from ..files.tensors import TensorInfo, is_finite
from ..opening.adapters import Adapter
from ..opening.sources import Source

_PREFIX = "base_model.model."
EMBEDDING_WEIGHT, HEAD_WEIGHT = "transformer.wte.weight", "lm_head.weight"


class Base:
    """The base: its weights, and a model for peft to put the adapter around.

    What the adapter holds whole is taken from there: modules that were trained so, biases, and embeddings that were
    resized or saved along.

    Attributes:
        model: with values, mapped from the files, only if peft may read or change them.
        config: `config.json`, with the number of rows that the embedding has now.
        tied: whether the head is the embedding.
        taken: names in the adapter's file of what is taken from there.

    Raises:
        CheckpointError: weights of the adapter that don't fit, or a damaged file.
    """

    def __init__(self, source: Source, adapter: Adapter):
        replaced = _replacements(source, adapter)
        self._places = {name: (source.weights, name) for name in source.shapes}
        self._places |= {name: (adapter.weights, info.name) for name, info in replaced.items()}
        self.taken = {info.name for info in replaced.values()}
        rows = self.info(EMBEDDING_WEIGHT).shape[0]
        self.config = source.config if rows == source.architecture.rows else _resized(source.config, rows)
        self.tied = source.architecture.tied and self._tie(source, adapter)
        self._is_hollow = adapter.leaves_base_alone
        self.model = self._build({name for name in replaced if not self.tied and adapter.replaces(name)})
        self._parameters = dict(self.model.named_parameters(remove_duplicate=False))
        self._names = {id(parameter): name for name, parameter in reversed(self._parameters.items())}
        self._addresses = {id(parameter): parameter.data_ptr() for parameter in self._parameters.values()}

    def _tie(self, source: Source, adapter: Adapter) -> bool:
        """Decide where the head is, which has no place of its own yet; returns whether it is the embedding."""
        embedding = self._places[EMBEDDING_WEIGHT]
        untrained = (source.weights, EMBEDDING_WEIGHT) if adapter.replaces(EMBEDDING_WEIGHT) else embedding
        head = self._places.setdefault(HEAD_WEIGHT, untrained)
        return head == embedding or torch.equal(self.read(HEAD_WEIGHT), self.read(EMBEDDING_WEIGHT))

    def _build(self, copied: Collection[str]) -> QWenLMHeadModel:
        """The model for peft; weights that it would make a copy of stay without memory."""
        with torch.device("meta"):
            model = QWenLMHeadModel(QWenConfig.from_dict({**self.config, "tie_word_embeddings": self.tied}))
        # Where a tensor of one number stands for a weight, peft can neither read nor write it unnoticed.
        read = self._stand_in if self._is_hollow else self.read
        state = {name: read(name) for name in self._places if name not in copied}
        model.load_state_dict(state, strict=False, assign=True)
        model.tie_weights()
        return model.requires_grad_(False)

    def info(self, name: str) -> TensorInfo:
        """What is known of a weight, in the file that it is taken from."""
        weights, stored = self._places[name]
        return weights.infos[stored]

    def read(self, name: str) -> torch.Tensor:
        """A weight without what the adapter adds to it."""
        weights, stored = self._places[name]
        return weights.read(stored)

    def _stand_in(self, name: str) -> torch.Tensor:
        return torch.zeros(()).expand(self.info(name).shape)

    def holds(self, parameter: torch.Tensor) -> bool:
        """Whether a parameter is one of the base, and not of the adapter around it."""
        return id(parameter) in self._names

    def value(self, parameter: nn.Parameter) -> torch.Tensor:
        """What the adapter is to be merged into.

        Raises:
            CheckpointError: the file is damaged or holds NaN or infinity, or peft has changed the weight unexpectedly.
        """
        name = self._names[id(parameter)]
        if self._is_hollow and self._addresses[id(parameter)] != parameter.data_ptr():
            raise CheckpointError(f"peft changes {name!r} before it merges, which is unknown here: use peft alone.")
        value = self.read(name) if self._is_hollow else parameter.data
        if not is_finite(value):
            raise CheckpointError(f"{self.info(name)} holds NaN or infinity: download it again.")
        return value


def _replacements(source: Source, adapter: Adapter) -> dict[str, TensorInfo]:
    """Weights that the adapter holds whole, under their names in the base.

    Raises:
        CheckpointError: a shape that doesn't fit.
    """
    shapes = dict(source.shapes)
    shapes.setdefault(HEAD_WEIGHT, shapes[EMBEDDING_WEIGHT])
    found = {}
    for name, shape in shapes.items():
        module, _, kind = name.rpartition(".")
        stored = (f"{_PREFIX}{module}.base_layer.{kind}", _PREFIX + name)
        info = next((adapter.weights.infos[key] for key in stored if key in adapter.weights.infos), None)
        if info is None:
            continue
        kept = 1 if name in (EMBEDDING_WEIGHT, HEAD_WEIGHT) else 0  # the number of rows may be another
        if len(info.shape) != len(shape) or info.shape[kept:] != shape[kept:]:
            raise CheckpointError(
                f"{info} has shape {info.shape}, the base {shape}: the adapter belongs to another base."
            )
        found[name] = info
    _check_rows(source, adapter, found)
    return found


def _check_rows(source: Source, adapter: Adapter, found: Mapping[str, TensorInfo]) -> None:
    """Embedding and head must have equal numbers of rows, wherever they come from."""
    rows = source.architecture.rows
    held = {name: found[name].shape[0] for name in (EMBEDDING_WEIGHT, HEAD_WEIGHT) if name in found}
    follows = source.architecture.tied and not adapter.replaces(EMBEDDING_WEIGHT) and HEAD_WEIGHT not in held
    for name in (EMBEDDING_WEIGHT,) if follows else (EMBEDDING_WEIGHT, HEAD_WEIGHT):
        others = [other for other, count in held.items() if count != held.get(name, rows)]
        if others:
            raise CheckpointError(
                f"{found[others[0]]} has {held[others[0]]} rows, but {name!r} has {held.get(name, rows)}: save the "
                "adapter with save_embedding_layers=True, or name the base that it was trained on."
            )


def _resized(config: Mapping[str, Any], rows: int) -> dict[str, Any]:
    padded = {} if config.get("padded_vocab_size") is None else {"padded_vocab_size": rows}
    return {**config, "vocab_size": rows, **padded}
