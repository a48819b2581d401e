"""Names, shapes and dtypes of quantised weights, which follow from those of the full ones and the configuration.

Source: the layers that write and load such weights. GPTQ: `GPTQQuantLinear` of gptqmodel, which has the buffers of
AutoGPTQ's `QuantLinear`; AWQ: `WQLinear_GEMM` of AutoAWQ. Both pack whole numbers of a few bits into words, GPTQ along
the inputs of a layer, AWQ along its outputs; a group of inputs shares a scale and a zero.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError
from ..files.access import read_json
from .expected import Expected

METHODS = {"gptq": ("gptq", "gptq_v2"), "awq": ("gemm",)}
"""Method -> its layouts that are known here."""

_SETTINGS_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
"""Where AutoGPTQ and AutoAWQ keep settings that config.json may lack."""

_WORDS = {"int8": torch.int8, "int16": torch.int16, "int32": torch.int32, "int64": torch.int64}
_SIZES = {"bits": ("bits", "w_bit", "wbits"), "group": ("group_size", "q_group_size")}
_LAYER = re.compile(r"(?:model\.layers|transformer\.h)\.\d+\.(.+)")


@dataclass(frozen=True)
class Packing:
    """How linear layers are packed.

    Attributes:
        method: a key of `METHODS`.
        group: inputs that share a scale; -1 for all of them.
        word: dtype of the packed words.
        settings: all that the configuration says, for the choice of layers.
    """

    method: str
    bits: int
    group: int
    word: torch.dtype
    settings: Mapping[str, Any]

    def parts(self, outputs: int, inputs: int) -> dict[str, tuple[tuple[int, ...], torch.dtype | None]]:
        """Shape and dtype (None: floating) of what a layer consists of beside its bias."""
        groups = 1 if self.group == -1 else _ceil(inputs, self.group)
        zeros, scales = (groups, self._packed(outputs)), (groups, outputs)
        weights = (self._packed(inputs), outputs) if self.method == "gptq" else (inputs, self._packed(outputs))
        found: dict[str, tuple[tuple[int, ...], torch.dtype | None]] = {
            "qweight": (weights, self.word),
            "qzeros": (zeros, self.word),
            "scales": (scales, None),
        }
        if self.method == "gptq":
            found["g_idx"] = (inputs,), torch.int32
        return found

    @property
    def reorders(self) -> bool:
        """Whether GPTQ may have put the inputs into groups in an order of its own."""
        return self.settings.get("desc_act") is not False

    @property
    def is_symmetric(self) -> bool:
        """Whether all zeros are said to be the middle of the numbers."""
        return self.settings.get("sym") is True

    @property
    def along_outputs(self) -> frozenset[str]:
        """The parts whose words hold outputs of one input or group, beside one another."""
        return frozenset({"qzeros"} if self.method == "gptq" else {"qweight", "qzeros"})

    def of_weight(self, name: str, shape: Sequence[int]) -> Packing | None:
        """How a full weight of this name and shape is packed; None where it is not."""
        module, _, kind = name.rpartition(".")
        return self.of(module) if kind == "weight" and len(shape) == 2 else None

    def _packed(self, numbers: int) -> int:
        """Words that hold so many numbers."""
        return _ceil(numbers * self.bits, 8 * self.word.itemsize)

    def of(self, module: str) -> Packing | None:
        """How one layer is packed; None where it is not."""
        inside = _LAYER.fullmatch(module)
        if inside is None and not (module == "lm_head" and self.settings.get("lm_head") is True):
            return None
        if inside is not None and not self._chooses(module, inside[1]):
            return None
        rule = self.rule(module)
        if rule is None:
            return self
        return None if rule[0] == "-:" else self._changed(rule[1])

    def rule(self, module: str) -> tuple[str, Mapping[str, Any]] | None:
        """The first rule of gptqmodel's `dynamic` that names a layer: "-:" keeps it full, "+:" changes its settings."""
        for pattern, changes in _mapping(self.settings.get("dynamic")).items():
            if re.match(pattern.removeprefix("+:").removeprefix("-:"), module):
                return "-:" if pattern.startswith("-:") else "+:", _mapping(changes)
        return None

    def _chooses(self, module: str, inside: str) -> bool:
        if self.method == "awq":
            left_out = [str(name) for name in self.settings.get("modules_to_not_convert") or ()]
            return not any(_matches_module(name, module) for name in left_out)
        chosen = self.settings.get("modules_in_block_to_quantize")
        return not chosen or inside in {str(name) for group in chosen for name in _listed(group)}

    def _changed(self, changes: Mapping[str, Any]) -> Packing:
        return replace(self, bits=_size(changes, "bits", self.bits), group=_size(changes, "group", self.group))


def read_packing(quantization: Any) -> Packing | None:
    """How a `quantization_config` packs weights; None where its method or layout is unknown here.

    Raises:
        CheckpointError: values that no such checkpoint can have; the message names them.
    """
    if not isinstance(quantization, Mapping) or quantization.get("quant_method") not in METHODS:
        return None
    method = quantization["quant_method"]
    if layout_of(quantization) not in METHODS[method]:
        return None
    word = quantization.get("pack_dtype") or "int32"
    if not isinstance(word, str) or word.removeprefix("torch.") not in _WORDS:
        raise CheckpointError(f"quantization_config: pack_dtype={word!r} is none of {', '.join(_WORDS)}.")
    bits, group = _size(quantization, "bits", 4 if method == "awq" else None), _size(quantization, "group", 128)
    packing = Packing(method, bits, group, _WORDS[word.removeprefix("torch.")], quantization)
    try:
        packing.of("transformer.h.0.attn.c_attn")
    except (re.error, TypeError) as error:
        raise CheckpointError(
            f"quantization_config can't be used: its choice of layers is no list ({error})."
        ) from error
    return packing


def settings_beside(folder: Path, config: Mapping[str, Any], names: Iterable[str]) -> tuple[str, dict[str, Any]] | None:
    """Settings that lie in a file of their own, which transformers doesn't read: its name and a `quantization_config`.

    Args:
        config: `config.json`; where it has settings, they hold.
        names: of the stored tensors; where none is packed, such a file means nothing.

    Raises:
        CheckpointError: a damaged file, or impossible values.
    """
    if config.get("quantization_config") or not any(name.endswith(".qweight") for name in names):
        return None
    for file, method in _SETTINGS_FILES.items():
        if (folder / file).is_file():
            found = {"quant_method": method, **read_json(folder / file)}
            if (packing := read_packing(found)) is not None:
                found |= {"bits": packing.bits, "group_size": packing.group}
            return file, {name: value for name, value in found.items() if name not in ("w_bit", "q_group_size")}
    return None


def layout_of(quantization: Mapping[str, Any]) -> str:
    """Name of the layout, where a method has several."""
    default = "gemm" if quantization.get("quant_method") == "awq" else "gptq"
    if quantization.get("backend") == "llm-awq":
        return "llm-awq"
    names = (quantization.get(key) for key in ("checkpoint_format", "version", "format"))
    return str(next((name for name in names if name), default)).lower()


def expect_packed(shapes: Mapping[str, tuple[int, ...]], packing: Packing) -> Expected:
    """What is stored of a model whose full weights have these shapes.

    A bias that the configuration doesn't ask for may be there, as AutoGPTQ gave one, of zeros, to every layer.
    """
    required: dict[str, tuple[int, ...]] = {}
    optional: dict[str, tuple[int, ...]] = {}
    words: dict[str, torch.dtype] = {}
    for name, shape in shapes.items():
        packed = packing.of_weight(name, shape)
        if packed is None:
            required[name] = shape
            continue
        module = name.removesuffix(".weight")
        for part, (size, dtype) in packed.parts(*shape).items():
            required[f"{module}.{part}"] = size
            if dtype is not None:
                words[f"{module}.{part}"] = dtype
        if f"{module}.bias" not in shapes:
            optional[f"{module}.bias"] = shape[:1]
    return Expected(required, optional, words)


def _ceil(numbers: int, size: int) -> int:
    return -(-numbers // size)


def _size(values: Mapping[str, Any], name: str, default: int | None) -> int:
    key = next((key for key in _SIZES[name] if values.get(key) is not None), None)
    value = default if key is None else values[key]
    fits = value in (2, 3, 4, 5, 6, 7, 8) if name == "bits" else type(value) is int and 0 < value < 2**31 or value == -1
    if type(value) is not int or not fits:
        wanted = "2 to 8" if name == "bits" else "a positive number, or -1 for one group"
        method = values.get("quant_method")
        raise CheckpointError(
            f"quantization_config{f' ({method})' if method else ''}: {key or _SIZES[name][0]}={value!r} can't be used: "
            f"{wanted} is."
        )
    return value


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _matches_module(pattern: str, module: str) -> bool:
    """Whether transformers counts a module among those that a name stands for: a beginning of it or an end."""
    return re.match(rf"(?:{pattern})(?:(?<=\.)|(?=\.|$))", module) is not None or module.endswith(pattern)
