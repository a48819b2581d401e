"""What `interruptions.py` takes for gptqmodel where that isn't installed: zeros, in the form that it writes."""

from __future__ import annotations

import importlib.machinery
import types
from pathlib import Path
from typing import Any

import torch


class Model:
    """A model whose layers are rounded to zeros.

    Args:
        folder: with the weights.
        settings: of the rounding.
    """

    def __init__(self, folder: str, settings: dict[str, Any]):
        self._folder, self._settings = Path(folder), settings

    @classmethod
    def load(cls, folder: str, settings: dict[str, Any], **options: Any) -> Model:
        """As the library's."""
        return cls(folder, settings)

    def quantize(self, samples: Any, batch_size: int) -> None:
        """Nothing to do for zeros."""

    def save(self, folder: str) -> None:
        """Write them."""
        from safetensors.torch import load_file, save_file

        Path(folder).mkdir()
        tensors: dict[str, torch.Tensor] = {}
        for path in sorted(self._folder.glob("*.safetensors")):
            for name, tensor in load_file(path).items():
                is_layer = tensor.ndim == 2 and name.startswith("transformer.h.")
                tensors |= self._rounded(name.removesuffix("weight"), tensor) if is_layer else {name: tensor}
        save_file(tensors, Path(folder) / "model.safetensors")

    def _rounded(self, stem: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        bits, size = self._settings["bits"], self._settings["group_size"]
        outputs, inputs = weight.shape
        groups = inputs // size
        return {
            f"{stem}qweight": torch.zeros(inputs * bits // 32, outputs, dtype=torch.int32),
            f"{stem}qzeros": torch.zeros(groups, outputs * bits // 32, dtype=torch.int32),
            f"{stem}scales": torch.zeros(groups, outputs, dtype=torch.float16),
            f"{stem}g_idx": torch.arange(inputs, dtype=torch.int32) // size,
        }


def stand_in() -> types.ModuleType:
    """The module in the place of gptqmodel."""
    module: Any = types.ModuleType("gptqmodel")
    module.__spec__ = importlib.machinery.ModuleSpec("gptqmodel", None)
    module.GPTQModel, module.QuantizeConfig = Model, lambda **settings: settings
    return module
