"""LLaMA's original format: `params.json`, and model-parallel files that hold slices."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from ..errors import CheckpointError
from ..files.tensors import TensorInfo
from .architecture import Architecture
from .configurations import refuse_arithmetic
from .names import EMBEDDING, Row, layer_rows
from .recipes import Recipe, concatenate, halves_from_pairs


def llama_shapes(architecture: Architecture, files: int, embedding_split: int) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every weight in LLaMA's original format, `files` model-parallel files together."""
    shapes = {}
    for row, layer in layer_rows(architecture):
        shape = list(architecture.shape(row.dimensions))
        dimension = split_of(row, embedding_split)
        if dimension is not None:
            shape[dimension] //= files
        for number in range(files):
            shapes[f"{number:02d}/{str(row.llama).format(layer)}"] = tuple(shape)
    return shapes


def split_of(row: Row, embedding_split: int) -> int | None:
    return embedding_split if row is EMBEDDING else row.split


def llama_to_hf(architecture: Architecture, files: int, embedding_split: int) -> list[Recipe]:
    """LLaMA's original format to the names of transformers' class: slices joined, rotated pairs made halves."""
    recipes = []
    for row, layer in layer_rows(architecture):
        dimension = split_of(row, embedding_split)
        numbers = range(files if dimension is not None else 1)
        sources = tuple(f"{number:02d}/{str(row.llama).format(layer)}" for number in numbers)
        join = partial(concatenate, dim=dimension or 0)
        build = partial(_join_and_reorder, join=join, head_dim=architecture.head_dim) if row.rotary else join
        recipes.append(Recipe(row.hf.format(layer), sources, build))
    return recipes


def _join_and_reorder(*tensors: torch.Tensor, join: Callable[..., torch.Tensor], head_dim: int) -> torch.Tensor:
    return halves_from_pairs(join(*tensors), head_dim)


LLAMA_2_LENGTH = 4096
"""Tokens that LLaMA 2 was trained on at once; its `params.json` doesn't say."""


def embedding_split(architecture: Architecture, infos: Mapping[str, TensorInfo]) -> int:
    """The dimension along which model-parallel files hold slices of the embedding."""
    embedding = next(info for name, info in infos.items() if name.endswith("/tok_embeddings.weight"))
    return 0 if embedding.shape[1] == architecture.width else 1


def read_stored(params: Mapping[str, Any], infos: Mapping[str, TensorInfo], files: int) -> Architecture:
    """The same as `read_llama`, of the tensors of all files, whose names begin with the number of the file."""
    first = {name[3:]: info for name, info in infos.items() if name.startswith("00/")}
    return read_llama(params, own_shapes(first), files)


def own_shapes(first: Mapping[str, TensorInfo]) -> dict[str, tuple[int, ...]]:
    """Shapes of the first file's tensors, without a head that is the embedding's memory."""
    shapes = {name: info.shape for name, info in first.items()}
    head, embedding = first.get("output.weight"), first.get("tok_embeddings.weight")
    if head is not None and embedding is not None and head.memory == embedding.memory:
        del shapes["output.weight"]
    return shapes


def read_llama(params: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], files: int) -> Architecture:
    """Architecture of a checkpoint in LLaMA's original format: `params.json` and, for what it leaves out, the weights.

    Args:
        params: `dim`, `n_layers`, `n_heads`, and where present `n_kv_heads`, `head_dim`, `norm_eps`, `rope_theta`,
            `max_seq_len`.
        shapes: those of the first file's tensors, by name, and of "output.weight" only if it is a weight of its own.
        files: number of model-parallel files.

    Raises:
        CheckpointError: a missing or impossible value, or something that QWen can't represent.
    """
    refuse_arithmetic(params)
    for name in ("rope_scaling", "sliding_window"):
        if params.get(name):
            raise CheckpointError(f"{name}={params[name]!r} has no counterpart in QWen.")
    width, heads = _size(params, "dim"), _size(params, "n_heads")
    embedding, gate = _shape(shapes, "tok_embeddings.weight"), _shape(shapes, "layers.0.feed_forward.w1.weight")
    rows = embedding[0] * (files if embedding[1] == width else 1)
    vocabulary = params.get("vocab_size") or 0  # -1 where it was left to the tokenizer
    if type(vocabulary) is not int or vocabulary > rows:
        raise CheckpointError(f"params.json: vocab_size={vocabulary!r:.80}, but the embedding has {rows} rows.")
    if width % heads:
        raise CheckpointError(f"params.json: dim={width} does not divide into n_heads={heads} heads.")
    return Architecture(
        layers=_size(params, "n_layers"),
        width=width,
        heads=heads,
        kv_heads=_size(params, "n_kv_heads", heads),
        head_dim=_size(params, "head_dim", width // heads),
        mlp=gate[0] * files,
        rows=rows,
        norm_eps=params.get("norm_eps", 1e-5),
        rope_theta=params.get("rope_theta", 10000.0),
        length=params.get("max_seq_len") or LLAMA_2_LENGTH,
        tied="output.weight" not in shapes,
        qkv_bias=False,
        settings={"bos_token_id": 1, "eos_token_id": 2},  # those of its tokenizer
    )


def _size(params: Mapping[str, Any], name: str, default: int | None = None) -> int:
    value = default if params.get(name) is None else params[name]
    if type(value) is not int or value < 1:
        raise CheckpointError(f"params.json needs a positive integer {name!r}, not {value!r}.")
    return value


def _shape(shapes: Mapping[str, tuple[int, ...]], name: str) -> tuple[int, ...]:
    if name not in shapes:
        raise CheckpointError(f"{name!r} is missing: this is no LLaMA checkpoint.")
    if len(shapes[name]) != 2:
        raise CheckpointError(f"{name!r} has shape {shapes[name]}: this is no LLaMA checkpoint.")
    return shapes[name]
