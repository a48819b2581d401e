"""`convert`: the same model in another architecture, with the same logits and the same token ids."""

from __future__ import annotations

import torch

from ..errors import CheckpointError
from ..files.links import check_links
from ..formats.companions import companion_names
from ..formats.qwen2 import RopeScaling
from ..opening.sources import Source
from ..writing.plans import Plan
from .companions import legal_files
from .dequantise import FULL, check_quantised, plan_dequantised
from .to_qwen import plan_qwen
from .to_qwen2 import plan_qwen2
from .weights import plan_weights

TARGETS = ("qwen2", "qwen")


def plan_conversion(
    source: Source,
    to: str,
    dtype: torch.dtype | None = None,
    max_shard_size: str = "5GB",
    scaling: RopeScaling | None = None,
    length: int | None = None,
    dequantize: bool = False,
) -> Plan:
    """Decide on every file of the converted checkpoint.

    Args:
        to: "qwen2" or "qwen"; QWen itself becomes "qwen" only to be dequantised.
        dtype: of the new weights, None for that of the old ones, and for bfloat16 of dequantised ones.
        scaling: for Qwen2, how to stretch texts beyond the trained length.
        length: trained length in tokens, where the source doesn't tell it.
        dequantize: make packed weights full ones; else their bits are kept.

    Raises:
        CheckpointError: something that the other architecture can't represent, by name; or a damaged source.
    """
    if to not in TARGETS:
        raise CheckpointError(f"Target {to!r} is unknown: use {' or '.join(TARGETS)}.")
    check_quantised(source, dequantize, dtype)
    if scaling is not None and to != "qwen2":
        raise CheckpointError("--rope-scaling is for --to qwen2 only: QWen has its own stretch, use_dynamic_ntk.")
    if length is not None and to != "qwen":
        raise CheckpointError("--seq-length is for --to qwen only: QWen tells its trained length itself.")
    if to == "qwen" and source.kind.is_qwen and dequantize:
        if length is not None:
            raise CheckpointError(f"--seq-length: {source.path} tells its trained length itself. Leave the option out.")
        return plan_dequantised(source, dtype or FULL, max_shard_size)
    if (to == "qwen2") != source.kind.is_qwen:
        remedy = "use upgrade" if source.kind.is_qwen else "only QWen becomes Qwen2"
        raise CheckpointError(f"{source.path} is {source.kind.value} and can't be converted to {to}: {remedy}.")
    if not source.path.is_dir():  # whose folder may hold much else
        check_links(source.folder, companion_names(source.folder))
    full = (dtype or FULL) if dequantize else None
    contents, plan = source.contents(full), Plan("convert", source)
    if to == "qwen2":
        recipes = plan_qwen2(plan, contents, dtype or contents.dtype, scaling)
    else:
        recipes = plan_qwen(plan, contents, dtype or contents.dtype, length)
    plan.details = {"dequantize": str(full)} if dequantize else {}
    plan.notes += source.contradictions()
    plan.files += legal_files(source.folder)
    plan.files[:0] = plan_weights(recipes, source.weights, full or dtype, max_shard_size)
    return plan
