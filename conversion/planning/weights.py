"""Tensors of a result, and the safetensors files that they are spread over."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from huggingface_hub import split_state_dict_into_shards_factory

from ..errors import CheckpointError
from ..files.tensors import meta_tensors
from ..files.weights import SAFETENSORS, Weights
from ..formats.recipes import Recipe
from ..writing.files import PlannedFile, ShardFile
from ..writing.tensors import Output
from .companions import json_file

_SIZE = re.compile(r"(?=.*[1-9])\d+(\.\d+)? *[KMGT]B", re.IGNORECASE)


def plan_weights(
    recipes: Sequence[Recipe], weights: Weights, dtype: torch.dtype | None, max_shard_size: str
) -> list[PlannedFile]:
    """The files of weights that follow recipes, see `plan_outputs` and `plan_shards`."""
    return plan_shards(plan_outputs(recipes, weights, dtype), weights, max_shard_size)


def plan_outputs(recipes: Sequence[Recipe], weights: Weights, dtype: torch.dtype | None) -> list[Output]:
    """Shapes and dtypes of what recipes will give, found by following them without values."""
    outputs = []
    for recipe in recipes:
        result = recipe.build(*meta_tensors(weights.infos, recipe.sources))
        converted = dtype if dtype is not None and result.is_floating_point() else result.dtype
        outputs.append(Output(recipe, converted, tuple(result.shape)))
    return outputs


def plan_shards(outputs: Sequence[Output], weights: Weights, max_shard_size: str) -> list[PlannedFile]:
    """Spread tensors over safetensors files of at most this size, in order, with an index where there are several.

    Args:
        max_shard_size: "5GB", "500MB"; a single tensor that is larger gets a file of its own.

    Raises:
        CheckpointError: not a size.
    """
    if not _SIZE.fullmatch(max_shard_size):
        raise CheckpointError(f"Shard size {max_shard_size!r} is not a size: write 5GB or 500MB.")
    by_name = {output.recipe.name: output for output in outputs}
    split = split_state_dict_into_shards_factory(
        by_name,
        get_storage_size=lambda output: output.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    files: list[PlannedFile] = [
        ShardFile(name, tuple(by_name[tensor] for tensor in tensors), weights)
        for name, tensors in split.filename_to_tensors.items()
    ]
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": dict(sorted(split.tensor_to_filename.items()))}
        files.append(json_file(f"{SAFETENSORS}.index.json", index))
    return files
