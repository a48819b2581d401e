"""QWen's names, shapes and configuration, of whatever release."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from ...configuration_qwen import QWenConfig
from ..errors import CheckpointError
from .architecture import Architecture
from .configurations import parse, scaling_of, settings_of
from .names import hf_shapes, layer_rows
from .recipes import Recipe, compose, concatenate, keep, take_rows


def qwen_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every weight under QWen's names."""
    shapes: dict[str, tuple[int, ...]] = {}
    for row, layer in layer_rows(architecture):
        name, shape = row.qwen.format(layer), architecture.shape(row.dimensions)
        rows = shapes[name][0] if name in shapes else 0
        shapes[name] = (rows + shape[0], *shape[1:])
    return shapes


def qwen_to_hf(architecture: Architecture) -> list[Recipe]:
    """QWen's names to those of Qwen2: query, key and value are cut apart."""
    recipes = []
    ends: dict[str, int] = {}
    sizes = qwen_shapes(architecture)
    for row, layer in layer_rows(architecture):
        source = row.qwen.format(layer)
        start = ends.get(source, 0)
        stop = ends[source] = start + architecture.shape(row.dimensions)[0]
        whole = stop - start == sizes[source][0]
        build = keep if whole else partial(take_rows, start=start, stop=stop)
        recipes.append(Recipe(row.hf.format(layer), (source,), build))
    return recipes


def as_qwen(architecture: Architecture) -> Architecture:
    """The same model with the biases that QWen has: always in c_attn, elsewhere everywhere or nowhere."""
    elsewhere = architecture.output_bias or architecture.mlp_bias
    return replace(architecture, qkv_bias=True, output_bias=elsewhere, mlp_bias=elsewhere)


def hf_to_qwen(architecture: Architecture, dtype: torch.dtype) -> list[Recipe]:
    """Names of Qwen2 or LLaMA to QWen's; biases that the source lacks are zero, of this dtype."""
    there, target = hf_shapes(architecture), as_qwen(architecture)
    parts: dict[str, list[Recipe]] = {}
    for row, layer in layer_rows(target):
        source = row.hf.format(layer)
        zeros = partial(torch.zeros, architecture.shape(row.dimensions), dtype=dtype)
        part = Recipe(source, (source,), keep) if source in there else Recipe(source, (), zeros)
        parts.setdefault(row.qwen.format(layer), []).append(part)
    fused = [Recipe(name, tuple(part.name for part in group), concatenate) for name, group in parts.items()]
    return compose([part for group in parts.values() for part in group], fused)


def read_qwen(config: Mapping[str, Any]) -> Architecture:
    """Architecture of a QWen configuration, of 2023 or ours.

    Raises:
        CheckpointError: impossible values.
    """
    values = parse(QWenConfig, config)
    rope = scaling_of(values.rope_parameters)
    return Architecture(
        layers=values.n_layer,
        width=values.n_embd,
        heads=values.n_head,
        kv_heads=values.num_key_value_heads,
        head_dim=values.kv_channels,
        mlp=values.ffn_hidden_size // 2,
        rows=values.embedding_rows,
        norm_eps=values.layer_norm_epsilon,
        rope_theta=values.rotary_emb_base,
        length=values.seq_length,
        tied=values.tie_word_embeddings,
        output_bias=not values.no_bias,
        mlp_bias=not values.no_bias,
        rope=rope,
        positions=None if rope is None else values.n_positions,
        settings=settings_of(values),
    )


def qwen_config(architecture: Architecture) -> dict[str, Any]:
    """`config.json` of a QWenLMHeadModel: no NTK and no LogN, as the source has none; its rotary scaling is kept.

    Raises:
        CheckpointError: impossible values.
    """
    settings = {name: value for name, value in (architecture.settings or {}).items() if value is not None}
    try:
        config = QWenConfig(
            vocab_size=architecture.rows,
            n_embd=architecture.width,
            n_layer=architecture.layers,
            n_head=architecture.heads,
            num_key_value_heads=architecture.kv_heads,
            kv_channels=architecture.head_dim,
            ffn_hidden_size=2 * architecture.mlp,
            layer_norm_epsilon=architecture.norm_eps,
            rotary_emb_base=architecture.rope_theta,
            seq_length=architecture.length,
            n_positions=architecture.positions or architecture.length,
            rope_parameters=architecture.rope,
            no_bias=not (architecture.output_bias or architecture.mlp_bias),
            tie_word_embeddings=architecture.tied,
            use_flash_attn="auto",
            architectures=["QWenLMHeadModel"],
            **{"eos_token_id": None, **settings},  # not that of QWen, which is the default
        )
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"The configuration can't be converted: {error}") from error
    return config.to_diff_dict()
