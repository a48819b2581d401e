"""What a library has rounded, and all else as it was."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..files.tensors import TensorInfo
from ..files.weights import Weights


class QuantisedWeights(Weights):
    """The packed tensors of one checkpoint and the others of another.

    Args:
        full: what was rounded.
        packed: what came of it.
        names: of the tensors -> whether each is packed.
    """

    def __init__(self, full: Weights, packed: Weights, names: Mapping[str, bool]):
        super().__init__(())
        self._places = {name: packed if is_packed else full for name, is_packed in names.items()}
        self.infos: dict[str, TensorInfo] = {
            name: weights.infos[name] for name, weights in self._places.items() if name in weights.infos
        }

    def read(self, name: str) -> torch.Tensor:
        """Values of one tensor, see `Weights.read`."""
        return self._places[name].read(name)

    def close(self) -> None:
        """Let go of all files."""
        for weights in self._places.values():
            weights.close()
