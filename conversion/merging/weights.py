"""`merge-lora`: the weights of a QWen checkpoint with an adapter of peft merged into them.

peft builds the adapter around our own model and merges it, but a layer at a time: each layer is copied with its weights
in float32, merged, rounded once to the dtype of the result, written and forgotten. So the result is the rounded float32
merge bit for bit.

Memory holds the adapter in float32 and, in float32 too, about four times the weight of the largest layer that it adds
to: for a 7B model less than 1 GB, or 10 GB where that is the embedding. Modules that were trained as a whole
(`modules_to_save`) only pass through. Methods other than LoRA, and those that start a LoRA from the base's weights, get
to see the whole base, mapped from its files.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..files.tensors import TensorInfo
from ..files.weights import Weights
from ..opening.adapters import Adapter, modules_of
from ..opening.sources import Source
from .base import EMBEDDING_WEIGHT, HEAD_WEIGHT, Base
from .layers import peft_errors


class MergedWeights(Weights):
    """The weights of a base with an adapter merged into them, each computed when it is read.

    Args:
        source: where the base comes from.
        adapter: where the adapter comes from.
        base: the base as a model.
        wrapped: that model with the adapter around its layers.
    """

    def __init__(self, source: Source, adapter: Adapter, base: Base, wrapped: nn.Module):
        super().__init__(())
        self._base = base
        self._layers = dict(_adapted_layers(wrapped))
        self._merged: tuple[str, dict[str, torch.Tensor]] = ("", {})
        for name in dict.fromkeys((*source.shapes, HEAD_WEIGHT)):
            info = base.info(name)
            stored = source.weights.infos.get(name, source.weights.infos[EMBEDDING_WEIGHT])
            file = info.file if self._layer_of(name) is None else adapter.file
            self.infos[name] = TensorInfo(name, file, stored.dtype, info.shape)
        if source.architecture.tied and self._is_tied():
            del self.infos[HEAD_WEIGHT]

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding."""
        return HEAD_WEIGHT not in self.infos

    def _is_tied(self) -> bool:
        if self._layer_of(EMBEDDING_WEIGHT) is None and self._layer_of(HEAD_WEIGHT) is None:
            return self._base.tied
        return torch.equal(self.read(EMBEDDING_WEIGHT), self.read(HEAD_WEIGHT))

    def _layer_of(self, name: str) -> str | None:
        return next((module for module in modules_of(name) if module in self._layers), None)

    def read(self, name: str) -> torch.Tensor:
        """One weight: float32 where the adapter changes it, as it was elsewhere.

        Raises:
            CheckpointError: a damaged file, or a layer that peft can't merge.
        """
        layer = self._layer_of(name)
        if layer is None:
            return self._base.read(name)
        if layer != self._merged[0]:
            self._merged = ("", {})  # so that two are never held
            self._merged = (layer, self._merge(layer))
        return self._merged[1][name]

    def close(self) -> None:
        """Let go of the layer that was merged last."""
        self._merged = ("", {})

    def _merge(self, name: str) -> dict[str, torch.Tensor]:
        layer = self._layers[name]
        weights = [parameter for parameter in layer.parameters() if self._base.holds(parameter)]
        copied = {
            id(parameter): nn.Parameter(self._base.value(parameter).to(torch.float32, copy=True), requires_grad=False)
            for parameter in weights
        }
        with peft_errors(f"{name!r} can't be merged"), torch.no_grad():
            merged: Any = copy.deepcopy(layer, copied).float()
            # Without a check for NaN, which writing makes and which would cost a copy.
            if hasattr(merged, "unload_and_optionally_merge_module"):
                merged = merged.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
            else:
                merged.merge()
                merged = merged.get_base_layer()
        return {f"{name}.{key}": tensor for key, tensor in merged.state_dict().items()}


def _adapted_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Name and module of each outermost layer of peft."""
    outer = None
    for name, module in model.named_modules():
        if outer is not None and name.startswith(f"{outer}."):
            continue
        if hasattr(module, "unload_and_optionally_merge_module") or hasattr(module, "base_layer"):
            outer = name
            yield name, module
