"""Weights in 8 and 4 bits through transformers' ordinary door: configuration, quantizer, and packed weights of others.

transformers' loader asks a quantizer how the tensors of a folder become those of the model, one layer at a time: float
weights are rounded, codes that were saved are taken as they are, those of GPTQ and AWQ are laid out anew, bit for bit.

Source: `HfQuantizer` and `WeightConverter` of transformers 5.4 and 5.24; `QuantLinear` of AutoGPTQ, whose first layout
stores z - 1 of a zero z; `WQLinear_GEMM` of AutoAWQ, which stores the columns of a word in an order of its own.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from .bits_qwen import (
    BITS,
    COLUMNS,
    QWenBitsEmbedding,
    QWenBitsLinear,
    check_format,
    fixed,
    pack,
    pack_groups,
    quantised,
    zero_point,
)

logger = logging.get_logger(__name__)

METHOD = "qwen_bits"

PACKED = {"gptq": ("gptqmodel", "optimum"), "awq": ("gptqmodel", "accelerate")}
"""Methods whose folders are read here too; the packages with which transformers reads them."""

_LAYERS = ("c_attn", "c_proj", "w1", "w2")
_OUTER = ("wte", "lm_head")
_LAYOUTS = {"gptq": ("gptq", "gptq_v2"), "awq": ("gemm",)}
_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # where in a word each of eight columns is
_REMEDY = "use `qwen1-checkpoint convert --dequantize`, or let gptqmodel read it (pip install gptqmodel optimum)"


class QWenBitsConfig(QuantizationConfigMixin):
    """Weights in 8 or 4 bits that this model reads itself, made for processors; nothing has to be installed.

    Args:
        bits: 8 or 4; 8.5 and 4.5 with their scales, in groups of 32.
        group_size: columns that share a scale, a multiple of 32; None for 32, or for what a packed folder has.
        head_bits: of the embedding and the head, 8 or 4; None for those of `bits`.
        modules_to_not_convert: names, ends or patterns of names, of layers that stay whole.
        own_zeros: whether groups have zeros of their own, as weights of others may; 4 bits only.
        packed: "gptq", "gptq_v2" or "awq" while weights are read from such a folder; never saved.

    Raises:
        ValueError: names the value and what it may be.
    """

    quant_method: Any = METHOD

    def __init__(
        self,
        bits: int = 8,
        group_size: int | None = None,
        head_bits: int | None = None,
        modules_to_not_convert: list[str] | None = None,
        own_zeros: bool = False,
        packed: str | None = None,
        quant_method: str = METHOD,
        **unknown: Any,
    ):
        if unknown:
            raise ValueError(
                f"{', '.join(map(repr, unknown))}: no setting of QWenBitsConfig, which has bits, group_size, "
                "head_bits, modules_to_not_convert and own_zeros."
            )
        if isinstance(modules_to_not_convert, str) or not all(
            isinstance(name, str) for name in modules_to_not_convert or ()
        ):
            raise ValueError(f"modules_to_not_convert={modules_to_not_convert!r}: give a list of names.")
        check_format(bits, COLUMNS if group_size is None else group_size)
        if head_bits is not None and head_bits not in BITS:
            raise ValueError(f"head_bits={head_bits!r}: give 8, 4, or None for those of the other layers.")
        if own_zeros and bits != 4:
            raise ValueError(
                f"own_zeros={own_zeros!r}: groups of {bits} bits have no zeros of their own, those of 4 may."
            )
        self.quant_method = METHOD
        self.bits, self.group_size, self.head_bits = bits, group_size, head_bits
        self.modules_to_not_convert = None if modules_to_not_convert is None else list(modules_to_not_convert)
        self.own_zeros, self.packed = own_zeros, packed

    def to_dict(self) -> dict[str, Any]:
        """What `config.json` gets."""
        return {name: value for name, value in super().to_dict().items() if name != "packed"}


class QWenBitsQuantizer(HfQuantizer):
    """What transformers' loader asks about weights in 8 and 4 bits."""

    quantization_config: QWenBitsConfig

    def __init__(self, quantization_config: Any, **kwargs: Any):
        # As if the folder were quantised already, so that tensors come as they are stored: to be rounded once.
        self.from_codes = kwargs.pop("pre_quantized", True) and quantization_config.packed is None
        super().__init__(quantization_config, **kwargs)
        self.names: dict[str, str] = {}

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Point to other libraries where weights go to a GPU."""
        devices = kwargs.get("device_map")
        devices = devices.values() if isinstance(devices, Mapping) else [devices]
        if any(str(device).startswith(("cuda", "xpu")) or isinstance(device, int) for device in devices):
            logger.warning_once(
                "Weights of qwen_bits are made for processors and slow on a GPU: take bitsandbytes there."
            )

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        if model.config.model_type != "qwen":  # whose head alone has a name that is known here
            raise ValueError(
                f"qwen_bits is for models of QWen, and {type(model).__name__} is of the type "
                f"{model.config.model_type!r}: take another library, such as bitsandbytes."
            )
        settings = self.quantization_config
        size = settings.group_size = settings.group_size or COLUMNS
        left_out = set(_chosen(model, settings.modules_to_not_convert))
        if settings.packed and (inner := [name for name in sorted(left_out) if name.rpartition(".")[2] in _LAYERS]):
            raise ValueError(
                f"modules_to_not_convert={settings.modules_to_not_convert}: {inner[0]} can't stay whole, as this "
                f"folder has it in {settings.bits} bits only: name none but {' and '.join(_OUTER)}."
            )
        for pattern in () if self.from_codes or settings.packed else settings.modules_to_not_convert or ():
            if not any(_chosen(model, [pattern])):
                logger.warning(f"modules_to_not_convert: {pattern!r} is the name of no layer that is rounded.")
        tied = {name.removesuffix(".weight") for pair in model.all_tied_weights_keys.items() for name in pair}
        left_out |= tied if left_out & tied else set()
        for name, module in list(model.named_modules()):
            if name in left_out or not _is_converted(name, module):
                continue
            width = module.embedding_dim if isinstance(module, nn.Embedding) else module.in_features
            if width % size and settings.packed and name.rpartition(".")[2] in _LAYERS:
                raise ValueError(f"{name} is {width} wide, which isn't a multiple of group_size={size}: {_REMEDY}.")
            if width % size:
                if not self.from_codes:
                    logger.warning(f"{name} stays whole: its width of {width} isn't a multiple of group_size={size}.")
                continue
            self._replace(model, name, module, size)
        tie(model, "weight", ("codes", "scales"), self.names)

    def _replace(self, model: Any, name: str, module: Any, size: int) -> None:
        settings = self.quantization_config
        outer = name.rpartition(".")[2] in _OUTER
        bits = settings.head_bits or settings.bits if outer else settings.bits
        few: nn.Module
        if isinstance(module, nn.Embedding):
            few = QWenBitsEmbedding(
                module.num_embeddings,
                module.embedding_dim,
                bits,
                size,
                dtype=module.weight.dtype,
                device=module.weight.device,
            )
        else:
            few = QWenBitsLinear(
                module.in_features,
                module.out_features,
                bits,
                size,
                bias=module.bias is not None,
                own_zeros=settings.own_zeros and not outer,
                dtype=module.weight.dtype,
                device=module.weight.device,
            )
        _keep_marks(module, few)
        self.names[name] = "weight" if outer or settings.packed is None else settings.packed
        model.set_submodule(name, few)

    def get_weight_conversions(self) -> list[WeightConverter]:
        """From what a folder may have of each layer to its codes."""
        found = []
        for name, stored in self.names.items():
            inner = name.removeprefix("transformer.")  # with or without, as in the folder
            if stored == "weight":
                found.append(_converter([f"{inner}.weight"], f"{inner}.codes", _Rounding(self)))
            else:
                parts = ("qweight", "qzeros", "scales") + (("g_idx",) if stored != "awq" else ())
                found.append(_converter([f"{inner}.{part}" for part in parts], f"{inner}.codes", _Repacking(self)))
        return found

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        layers = [model.get_submodule(name) for name in self.names]
        missing = [name for name, layer in zip(self.names, layers, strict=True) if not _is_loaded(layer)]
        if missing:
            raise ValueError(
                f"The folder has no weights of {', '.join(missing[:3])}{' and others' * (len(missing) > 3)}."
            )
        if any(layer.zeros is not None for layer in layers):
            self.quantization_config.own_zeros = True
            for name, layer in zip(self.names, layers, strict=True):
                if layer.zeros is None and name.rpartition(".")[2] not in _OUTER:
                    layer.zeros = fixed(torch.full_like(layer.scales, zero_point(4), dtype=torch.uint8))
        self.quantization_config.packed = None

    def is_serializable(self, **kwargs: Any) -> bool:
        """Codes are saved as they are."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Gradients go through, to adapters."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Nothing depends on values."""
        return True

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        # transformers takes that of the configuration, of which a model that was saved has the name.
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype or model.dtype
        names = [
            name for name, module in model.named_modules() if isinstance(module, (QWenBitsLinear, QWenBitsEmbedding))
        ]
        for name in names:
            few = model.get_submodule(name)
            weight = nn.Parameter(few.dequantised(dtype))
            with torch.device("meta"):
                whole = (
                    nn.Linear(few.in_features, few.out_features, bias=False)
                    if isinstance(few, QWenBitsLinear)
                    else nn.Embedding(few.num_embeddings, few.embedding_dim)
                )
            whole.weight = weight
            if isinstance(few, QWenBitsLinear) and few.bias is not None:
                whole.bias = nn.Parameter(few.bias.to(dtype))
            _keep_marks(few, whole)
            model.set_submodule(name, whole)
        tie(model, "codes", ("weight",), names)
        return model.to(dtype)


def _converter(sources: list[str], target: str, operation: ConversionOps) -> WeightConverter:
    return WeightConverter(source_patterns=sources, target_patterns=[target], operations=[operation])


def _is_converted(name: str, module: nn.Module) -> bool:
    last = name.rpartition(".")[2]
    kinds = (nn.Embedding,) if last == "wte" else (nn.Linear,)
    return last in (*_LAYERS, *_OUTER) and isinstance(module, kinds)


def _chosen(model: nn.Module, patterns: list[str] | None) -> Iterator[str]:
    """Names of the layers that patterns stand for."""
    for name, module in model.named_modules():
        if patterns and _is_converted(name, module) and not should_convert_module(name, patterns):
            yield name


def _is_loaded(layer: Any) -> bool:
    """Whether a layer has codes and scales of a folder; on the meta device are those that stay on a disk."""
    parts = [part for part in (layer.codes, layer.scales, layer.zeros) if part is not None]
    return all(getattr(part, "_is_hf_initialized", False) or part.is_meta for part in parts)


def _keep_marks(old: nn.Module, new: nn.Module) -> None:
    """What the model has noted on a layer: its heads, and that its output is added to the residual stream."""
    for mark in ("heads", "is_residual_projection"):
        if hasattr(old, mark):
            setattr(new, mark, getattr(old, mark))


def tie(model: Any, old: str, new: tuple[str, ...], names: Any) -> None:
    """Tie what layers of these names have become, where their `old` was tied, and do it now if there are numbers."""
    keys = model.all_tied_weights_keys
    pairs = {
        target.removesuffix(f".{old}"): source.removesuffix(f".{old}")
        for target, source in keys.items()
        if target.endswith(f".{old}") and target.removesuffix(f".{old}") in names
    }
    if not pairs:
        return
    model.all_tied_weights_keys = model._tied_weights_keys = {
        f"{target}.{part}": f"{source}.{part}" for target, source in pairs.items() for part in new
    }
    for target, source in pairs.items():
        for part in new:
            setattr(model.get_submodule(target), part, getattr(model.get_submodule(source), part))


class _Conversion(ConversionOps):
    """From the tensors of a folder to codes and scales of one layer; nothing is converted back when they are saved."""

    def __init__(self, hf_quantizer: Any):
        self.hf_quantizer = hf_quantizer

    def convert(  # type: ignore[override]  # by name, as transformers calls it
        self, input_dict: dict[str, Any], full_layer_name: str = "", model: Any = None, **kwargs: Any
    ) -> dict[str, torch.Tensor]:
        """Tensors by their whole names; `full_layer_name` is that of the codes."""
        name = full_layer_name.removesuffix(".codes")
        found = {
            key.rpartition(".")[2]: value[0] if isinstance(value, list) else value for key, value in input_dict.items()
        }
        codes, scales = self.of(found, model.get_submodule(name), name)
        return {f"{name}.codes": codes, f"{name}.scales": scales}

    def of(self, found: dict[str, torch.Tensor], layer: Any, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes and scales of a layer."""
        raise NotImplementedError

    @property
    def reverse_op(self) -> ConversionOps:
        """Codes are saved as codes."""
        return _Saved()


class _Saved(ConversionOps):
    def convert(  # type: ignore[override]
        self, input_dict: dict[str, Any], full_layer_name: str = "", **kwargs: Any
    ) -> dict[str, Any]:
        """Codes under their own name, which the loader has turned into that of what they were made from."""
        (codes,) = input_dict.values()
        return {f"{full_layer_name.rpartition('.')[0]}.codes": codes}

    @property
    def reverse_op(self) -> ConversionOps:
        """The same."""
        return self


class _Rounding(_Conversion):
    def of(self, found: dict[str, torch.Tensor], layer: Any, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Of a float weight."""
        (weight,) = found.values()
        rows, width = _shape(layer)
        if weight.shape != (rows, width):
            raise ValueError(f"{name}.weight has the shape {tuple(weight.shape)}, and the model wants {(rows, width)}.")
        try:
            return quantised(weight, layer.bits, layer.group_size)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error


class _Repacking(_Conversion):
    def of(self, found: dict[str, torch.Tensor], layer: Any, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Of GPTQ's or AWQ's tensors; a layer gets zeros of its own where they aren't all the middle."""
        packed, (rows, width) = self.hf_quantizer.quantization_config.packed, _shape(layer)
        wanted = {"qweight", "qzeros", "scales"} | ({"g_idx"} if packed != "awq" else set())
        if missing := sorted(wanted - set(found)):
            raise ValueError(f"{name}: the folder has no {', '.join(missing)}.")
        groups = width // layer.group_size
        if packed == "awq":
            q, zeros = (_awq_columns(found[part]) for part in ("qweight", "qzeros"))
        else:
            q, zeros = _numbers(found["qweight"].t(), layer.bits).t(), _numbers(found["qzeros"], layer.bits)
            if packed == "gptq":
                zeros = (zeros + 1) & (2**layer.bits - 1)
            _check_order(found["g_idx"], layer.group_size, name)
        scales = found["scales"]
        if q.shape != (width, rows) or zeros.shape != (groups, rows) or scales.shape != (groups, rows):
            raise ValueError(f"{name}: the shapes of the packed tensors aren't those of {rows} x {width} weights.")
        if not torch.equal(scales.half().to(scales.dtype), scales) or not scales.isfinite().all():
            raise ValueError(f"{name}.scales aren't numbers of float16, which scales are here: {_REMEDY}.")
        _set_zeros(layer, zeros.t(), name)
        return pack(q.t().contiguous(), layer.bits), pack_groups(scales.half().t()).view(torch.int16)


def _shape(layer: Any) -> tuple[int, int]:
    if isinstance(layer, QWenBitsEmbedding):
        return layer.num_embeddings, layer.embedding_dim
    return layer.out_features, layer.in_features


def _numbers(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Words of 32 bits, (n, words), to the numbers in them, (n, 32 / bits * words) uint8."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=words.device)
    return ((words[..., None] >> shifts) & (2**bits - 1)).to(torch.uint8).flatten(1)


def _awq_columns(words: torch.Tensor) -> torch.Tensor:
    """Columns in their order, (n, O), of those that AutoAWQ has packed."""
    return _numbers(words, 4).unflatten(1, (-1, 8))[:, :, list(_AWQ_PLACES)].flatten(1)


def _check_order(g_idx: torch.Tensor, size: int, name: str) -> None:
    if not torch.equal(g_idx.long(), torch.arange(len(g_idx), device=g_idx.device) // size):
        raise ValueError(
            f"{name}.g_idx has its inputs in an order of its own (desc_act), which isn't read here: {_REMEDY}."
        )


def _set_zeros(layer: Any, zeros: torch.Tensor, name: str) -> None:
    if (zeros == zero_point(layer.bits)).all():
        return
    if layer.bits == 8:
        raise ValueError(f"{name}.qzeros aren't all 128, and 8 bits have no other zero here: {_REMEDY}.")
    layer.zeros = fixed(pack_groups(zeros, zero_point(4)))
    layer.zeros._is_hf_initialized = True


def chosen_settings(asked: Any, stored: Any, device_map: Any) -> QWenBitsConfig | None:
    """The settings with which weights are read here; None where this is another library's matter.

    Weights of GPTQ and AWQ are where it is asked for, and on a processor where their own packages aren't installed.

    Args:
        asked, stored: `quantization_config` of the call and of the folder: a dictionary, an object or None.

    Raises:
        ValueError: they contradict each other, or weights that can't be read here; with the remedy.
    """
    wish = _own(asked)
    method = _method(stored)
    if method == METHOD:
        found = QWenBitsConfig(**_values(stored))
        _check_wish(wish, found.bits, found.group_size)
        _check_layers(wish, found)
        return found
    if method in PACKED and (wish is not None or (asked is None and _reads_alone(method, device_map))):
        return _of_packed(_values(stored), method, wish)
    return None if method else wish


def _method(settings: Any) -> str | None:
    method = _values(settings).get("quant_method")
    return None if method is None else str(getattr(method, "value", method))


def _values(settings: Any) -> Mapping[str, Any]:
    if settings is None or isinstance(settings, Mapping):
        return settings or {}
    return settings.to_dict() if hasattr(settings, "to_dict") else vars(settings)


def _own(settings: Any) -> QWenBitsConfig | None:
    """Settings of this kind, of a dictionary or of another copy of this file, which remote code brings."""
    return QWenBitsConfig(**_values(settings)) if _method(settings) == METHOD else None


def _check_wish(wish: QWenBitsConfig | None, bits: int, group_size: int | None) -> None:
    if wish is None:
        return
    if wish.bits != bits:
        raise ValueError(
            f"bits={wish.bits}, but the weights of this folder have {bits}: ask for these, or take whole weights."
        )
    if wish.group_size not in (None, group_size):
        raise ValueError(f"group_size={wish.group_size}, but this folder has groups of {group_size}: leave it out.")


def _check_layers(wish: QWenBitsConfig | None, found: QWenBitsConfig) -> None:
    """Refuse other bits of the head, and layers that are to stay whole, than those that the codes were made with."""
    if wish is None:
        return
    asked = {"head_bits": wish.head_bits, "modules_to_not_convert": wish.modules_to_not_convert}
    stored = {"head_bits": found.head_bits or found.bits, "modules_to_not_convert": found.modules_to_not_convert or []}
    for name, value in asked.items():
        if value is not None and value != stored[name]:
            raise ValueError(
                f"{name}={value!r}, but this folder was rounded with {stored[name]!r}: leave it out, or take whole "
                "weights."
            )


def missing_packages(method: str | None) -> list[str]:
    """Of the packages that transformers reads a method of `PACKED` with, those that aren't installed."""
    return [name for name in PACKED.get(method or "", ()) if importlib.util.find_spec(name) is None]


def _reads_alone(method: str, device_map: Any) -> bool:
    if not missing_packages(method):
        return False
    devices = device_map.values() if isinstance(device_map, Mapping) else [device_map]
    if all(str(device) == "cpu" for device in devices):
        return True
    return device_map in (None, "auto", "balanced", "sequential") and not torch.cuda.is_available()


def _of_packed(settings: Mapping[str, Any], method: str, wish: QWenBitsConfig | None) -> QWenBitsConfig:
    """Settings that read a folder of GPTQ or AWQ as it is; embedding and head stay whole unless there is a wish."""
    bits, size = (
        settings.get("bits", settings.get("w_bit", 4)),
        settings.get("group_size", settings.get("q_group_size", 128)),
    )
    names = (settings.get(key) for key in ("checkpoint_format", "version", "format"))
    layout = str(next((name for name in names if name), _LAYOUTS[method][0])).lower()
    left_out = settings.get("modules_to_not_convert") or []
    rules = {
        f"bits={bits!r}": bits not in (BITS if method == "gptq" else (4,)),
        f"group_size={size!r}": not isinstance(size, int) or size < 1 or size % COLUMNS != 0,
        f"layout {layout!r}": layout not in _LAYOUTS[method],
        "desc_act=True": settings.get("desc_act") is True and settings.get("static_groups") is not True,
        "rules for single layers (dynamic)": bool(settings.get("dynamic")),
        "a head in few bits (lm_head)": settings.get("lm_head") is True,
        f"layers left out ({left_out})": any(name not in _OUTER for name in left_out),
        "only some layers (modules_in_block_to_quantize)": not _chooses_all(
            settings.get("modules_in_block_to_quantize")
        ),
    }
    if found := [rule for rule, broken in rules.items() if broken]:
        raise ValueError(
            f"A folder of {method} with {', '.join(found)} isn't read without its own packages: {_REMEDY}."
        )
    _check_wish(wish, bits, size)
    kept = list(_OUTER) if wish is None else wish.modules_to_not_convert
    packed = layout if method == "gptq" else "awq"
    return QWenBitsConfig(bits, size, wish.head_bits if wish else None, kept, packed=packed)


def _chooses_all(chosen: Any) -> bool:
    names = {str(name) for group in chosen or () for name in (group if isinstance(group, list) else [group])}
    return not names or names >= {"attn.c_attn", "attn.c_proj", "mlp.w1", "mlp.w2", "mlp.c_proj"}


def register() -> None:
    """Make this copy of the file the one that transformers asks; remote code brings copies of its own."""
    AUTO_QUANTIZATION_CONFIG_MAPPING.pop(METHOD, None)
    AUTO_QUANTIZER_MAPPING.pop(METHOD, None)
    register_quantization_config(METHOD)(QWenBitsConfig)
    register_quantizer(METHOD)(QWenBitsQuantizer)


register()
