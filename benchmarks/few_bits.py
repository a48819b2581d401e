"""The ways to weights in few bits: how each library quantises a model, for `bits.py` and the tests.

transformers quantises with bitsandbytes, torchao and quanto while it loads. compressed-tensors loads what was quantised
before, here to the nearest code, without calibration.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, QuantoConfig, TorchAoConfig

GROUP = 64
"""Values that share a scale, where a way has groups: it divides the rows of the model that ships."""


@dataclass(frozen=True)
class Way:
    """One way to few bits.

    Attributes:
        package: that has to be importable, `distribution` what pip calls it.
        configure: makes the `quantization_config` of `from_pretrained`, or None for `scheme`.
        scheme: of compressed-tensors.
        bits: of a weight.
        saves: whether the library saves what it has quantised.
        trains: whether adapters can be trained on it.
    """

    package: str
    distribution: str
    configure: Callable[[], Any] | None = None
    scheme: str | None = None
    bits: int = 8
    saves: bool = True
    trains: bool = True

    @property
    def missing(self) -> str | None:
        """Why it can't be tried here."""
        try:
            found = importlib.util.find_spec(self.package) is not None
        except ModuleNotFoundError:
            found = False
        return None if found else f"{self.package} is not installed: pip install {self.distribution}"

    def load(self, cls: Any, folder: Path, work: Path, **arguments: Any) -> Any:
        """The model of a class in a folder, in few bits; `work` is an empty folder for files in between."""
        if self.scheme is not None:
            compress(cls.from_pretrained(folder, **arguments), self.scheme, work)
            folder = work
        if self.configure is not None:
            arguments["quantization_config"] = self.configure()
        return cls.from_pretrained(folder, **arguments).eval()


def _torchao(name: str) -> Callable[[], Any]:
    def configure() -> Any:
        import torchao.quantization

        return TorchAoConfig(getattr(torchao.quantization, name)())

    return configure


def _nf4() -> Any:
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_use_double_quant=True,
    )


_BITSANDBYTES = ("bitsandbytes", "bitsandbytes")
_TORCHAO = ("torchao", "torchao")
_COMPRESSED = ("compressed_tensors", "compressed-tensors")
_QUANTO = ("optimum.quanto", "optimum-quanto")

WAYS = {
    "bitsandbytes int8": Way(*_BITSANDBYTES, lambda: BitsAndBytesConfig(load_in_8bit=True)),
    "bitsandbytes nf4": Way(*_BITSANDBYTES, _nf4, bits=4),
    "torchao int8, weights": Way(*_TORCHAO, _torchao("Int8WeightOnlyConfig")),
    "torchao int8, dynamic": Way(*_TORCHAO, _torchao("Int8DynamicActivationInt8WeightConfig"), trains=False),
    "torchao fp8, weights": Way(*_TORCHAO, _torchao("Float8WeightOnlyConfig")),
    "compressed-tensors W4A16": Way(*_COMPRESSED, scheme="W4A16", bits=4),
    "compressed-tensors W8A16": Way(*_COMPRESSED, scheme="W8A16"),
    "compressed-tensors W8A8": Way(*_COMPRESSED, scheme="W8A8", trains=False),
    "compressed-tensors FP8": Way(*_COMPRESSED, scheme="FP8_DYNAMIC", trains=False),
    "quanto int8": Way(*_QUANTO, lambda: QuantoConfig(weights="int8"), saves=False),
    "quanto int4": Way(*_QUANTO, lambda: QuantoConfig(weights="int4"), bits=4, saves=False),
}


@torch.no_grad()
def compress(model: Any, scheme: str, folder: Path) -> None:
    """Quantise the linear layers of a model but for its head by a scheme of compressed-tensors, and save it."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config, preset_name_to_scheme
    from compressed_tensors.quantization.utils import calculate_qparams

    layers = preset_name_to_scheme(scheme, ["Linear"])
    if layers.weights.strategy == "group":
        layers.weights.group_size = GROUP
    apply_quantization_config(model, QuantizationConfig(config_groups={"group_0": layers}, ignore=["lm_head"]))
    for module in model.modules():
        if getattr(module, "quantization_scheme", None) is None:
            continue
        size = GROUP if layers.weights.strategy == "group" else module.weight.shape[-1]
        groups = module.weight.unflatten(-1, (-1, size))
        scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), layers.weights)
        module.weight_scale.copy_(scale)
        if getattr(module, "weight_zero_point", None) is not None:
            module.weight_zero_point.copy_(zero)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)


def bytes_of(value: Any) -> int:
    """Memory of all tensors in a model, a cache, or any other object: what several names share counts once."""
    return sum(
        {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in _tensors(value, set())
        }.values()
    )


def _tensors(value: Any, seen: set[int]) -> Iterator[torch.Tensor]:
    if id(value) in seen or isinstance(value, (type, str, bytes)):
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        if hasattr(value, "__tensor_flatten__"):
            inner: Any = [getattr(value, name) for name in value.__tensor_flatten__()[0]]
        else:
            yield value.detach()
            inner = vars(value) if type(value) not in (torch.Tensor, nn.Parameter) else ()
    elif isinstance(value, (Mapping, list, tuple, set)):
        inner = value
    else:
        inner = [
            getattr(value, "__dict__", ()),
            *(getattr(value, name, ()) for name in getattr(type(value), "__slots__", ())),
        ]
    for part in inner.values() if isinstance(inner, Mapping) else inner:
        yield from _tensors(part, seen)
