"""Quantised sources of a conversion: whether their bits can be kept, and QWen with full weights in their place."""

from __future__ import annotations

import torch

from ..errors import CheckpointError
from ..files.weights import SAFETENSORS
from ..formats.configurations import quantization_method
from ..opening.sources import Source
from ..writing.plans import Plan
from .companions import json_file
from .merge import with_dtype
from .upgrade import plan_upgrade, quantised_notes, upgraded_config
from .weights import plan_weights

FULL = torch.bfloat16
"""Dtype of dequantised weights where none is asked for."""


def check_quantised(source: Source, dequantize: bool, dtype: torch.dtype | None) -> None:
    """Compare what is asked for with how the weights are stored.

    Raises:
        CheckpointError: what doesn't go together, or a quantisation that is unknown here.
    """
    method = quantization_method(source.config)
    if method is not None and source.packing is None:
        raise CheckpointError(
            f"The weights are quantised ({method}) in a way that is unknown here, so they can't be converted: convert "
            "the full ones, then quantise."
        )
    if dequantize and method is None:
        raise CheckpointError(f"{source.path} holds full weights already: leave --dequantize out.")
    if dtype is not None and method is not None and not dequantize:
        raise CheckpointError(
            f"--dtype {str(dtype).removeprefix('torch.')} would round the scales, and so change the weights: leave it "
            "out to keep the bits, or use --dequantize, which gives full weights of that dtype."
        )


def plan_dequantised(source: Source, dtype: torch.dtype, max_shard_size: str) -> Plan:
    """Decide on every file of a QWen folder with full weights in place of packed ones.

    Raises:
        CheckpointError: see `plan_upgrade` and `Source.contents`.
    """
    source.check()
    source.check_packed_values()
    upgraded = plan_upgrade(source)
    plan = Plan("convert", source, details={"dequantize": str(dtype)})
    left_out = ("config.json", f"{SAFETENSORS}.index.json", "quantize_config.json", "quant_config.json")
    plan.files = [file for file in upgraded.files if not file.tensors and file.name not in left_out]
    plan.files.append(json_file("config.json", upgraded_config(with_dtype(source.plain_config, dtype))))
    plan.files[:0] = plan_weights(source.full_weights(dtype), source.weights, dtype, max_shard_size)
    of_packed = quantised_notes(source)
    plan.notes = [note for note in upgraded.notes if note not in of_packed] + source.contradictions()
    return plan
