"""`quantize`: what `upgrade` would write, with weights in few bits in the published layout."""

from __future__ import annotations

from typing import cast

from ..errors import CheckpointError
from ..files.weights import SAFETENSORS, Weights
from ..formats.configurations import quantization_method
from ..formats.expected import check_stored
from ..formats.quantised import Packing, expect_packed, read_packing
from ..formats.recipes import Recipe, keep
from ..opening.sources import Source
from ..quantising.library import Settings
from ..quantising.weights import QuantisedWeights
from ..writing.plans import Plan
from .companions import json_file
from .upgrade import plan_upgrade, upgraded_config
from .weights import plan_weights


def check_quantisable(source: Source, settings: Settings) -> None:
    """Refuse what can't be rounded before hours are spent on it.

    Raises:
        CheckpointError: another format, weights in few bits, or a group size that a layer doesn't divide into.
    """
    if not source.kind.is_qwen:
        raise CheckpointError(
            f"{source.path} is {source.kind.value}: only QWen is quantised here, see convert --to qwen."
        )
    if method := quantization_method(source.config):
        raise CheckpointError(f"{source.path} is quantised already ({method}): name the full weights.")
    source.check()
    for name, shape in source.shapes.items():
        if not _packing(settings).of_weight(name, shape):
            continue
        outputs, inputs = shape
        if settings.group_size != -1 and inputs % settings.group_size:
            raise CheckpointError(
                f"{name!r} has {inputs} inputs, which don't divide into groups of {settings.group_size}: choose "
                "--group-size 64 or 32, or -1 for one group."
            )
        if inputs % 32 or outputs % 32:
            raise CheckpointError(f"{name!r} of shape {shape} fills no words of 32 bits: it can't be packed.")


def plan_quantised(source: Source, packed: Weights, settings: Settings, max_shard_size: str) -> Plan:
    """Decide on every file of the result.

    Args:
        source: with full weights.
        packed: what the library has made of them.

    Raises:
        CheckpointError: the library has made something else.
    """
    expected = expect_packed(source.shapes, _packing(settings))
    names = {name: name not in source.shapes for name in expected.required}
    weights = QuantisedWeights(source.weights, packed, names)
    check_stored(weights.infos, expected)
    upgraded = plan_upgrade(source)
    plan = Plan("quantize", source, notes=upgraded.notes, details={"settings": settings.published})
    plan.files = [file for file in upgraded.files if not file.tensors]
    plan.files = [file for file in plan.files if file.name not in ("config.json", f"{SAFETENSORS}.index.json")]
    config = {**upgraded_config(source.config), "quantization_config": settings.published}
    recipes = [Recipe(name, (name,), keep) for name in names]
    plan.files[:0] = [*plan_weights(recipes, weights, None, max_shard_size), json_file("config.json", config)]
    return plan


def _packing(settings: Settings) -> Packing:
    return cast(Packing, read_packing(settings.published))  # of GPTQ, so there is one
