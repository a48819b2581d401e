"""Checkpoints loaded for comparison, each by its own class."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen2ForCausalLM

from ...modeling_qwen import QWenLMHeadModel
from ..errors import CheckpointError
from ..files.weights import ADAPTER_CONFIG
from ..formats.architecture import Architecture
from ..formats.configurations import quantization_method, refuse_sizes
from ..formats.kinds import Kind
from ..formats.names import IGNORED
from ..formats.recipes import Recipe
from ..opening.sources import Source, open_source


def load_model(
    path: Path,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    params: Path | None = None,
    rounded: torch.dtype | None = None,
) -> PreTrainedModel:
    """A checkpoint in its own class, in eval mode and with eager attention; no code beside the weights is run.

    Weights of GPTQ and AWQ are computed in float32 here, where an engine's kernels round to what they compute in.

    Args:
        path: QWen of any release, Qwen2 or LLaMA in Hugging Face format, LLaMA in the original format.
        params: `params.json` of a LLaMA checkpoint, where it isn't in the same folder.
        rounded: round each weight to this dtype first, as `convert --dtype` does.

    Raises:
        CheckpointError: a checkpoint that is damaged or incomplete, quantised in an unknown way, or an adapter.
    """
    return load_opened(open_for_comparison(path, params), dtype, device, rounded)


def open_for_comparison(path: Path, params: Path | None) -> Source:
    source = open_source(path, None if (path / "config.json").is_file() else params, any_links=True)
    if (source.folder / ADAPTER_CONFIG).is_file():
        raise CheckpointError(
            f"{path} holds an adapter ({ADAPTER_CONFIG}): join it to its model with merge-lora first."
        )
    method = quantization_method(source.config)
    if method is not None and source.packing is None:
        raise CheckpointError(f"{path} is quantised ({method}) in a way that is unknown here: verify the full weights.")
    refuse_sizes(source.config)
    if source.hidden_from_transformers:
        raise CheckpointError(f"{path}: {source.hidden_from_transformers}")
    return source


def load_opened(
    source: Source, dtype: torch.dtype, device: str | torch.device, rounded: torch.dtype | None
) -> PreTrainedModel:
    if source.kind is Kind.LLAMA_ORIGINAL:
        model = _build_llama(source, dtype, device)
    else:
        model = (_load_folder if source.packing is None else _build_dequantised)(source, dtype, device)
    if rounded is not None:
        for parameter in model.parameters():
            parameter.data.copy_(parameter.data.to(rounded))
    return model.eval()


_CLASSES: dict[Kind, Any] = {Kind.QWEN2: Qwen2ForCausalLM, Kind.LLAMA: LlamaForCausalLM}


def _load_folder(source: Source, dtype: torch.dtype, device: str | torch.device) -> PreTrainedModel:
    if source.kind.is_qwen:
        source.check()  # which refuses much that transformers' own classes can have
    model, found = _CLASSES.get(source.kind, QWenLMHeadModel).from_pretrained(
        source.path,
        dtype=dtype,
        attn_implementation="eager",
        local_files_only=True,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    # What is missing would be random, and what differs in size as well.
    for word in ("missing", "unexpected", "mismatched"):
        names = sorted(str(name) for name in found[f"{word}_keys"] if not IGNORED.fullmatch(str(name)))
        if names:
            raise CheckpointError(
                f"{source.path} has {len(names)} {word} tensors, first {names[0]}: use inspect to see what is wrong."
            )
    return model.to(device)


def _build_llama(source: Source, dtype: torch.dtype, device: str | torch.device) -> PreTrainedModel:
    """LLaMA's original format in transformers' class, a tensor at a time, so that nothing is in memory twice."""
    source.check()
    config = _llama_config(source.architecture)
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its table is no weight, so it needs values now
    return _filled(model, source, source.to_hf(), dtype, device)


def _build_dequantised(source: Source, dtype: torch.dtype, device: str | torch.device) -> PreTrainedModel:
    """A folder of packed weights in the class for full ones, a tensor at a time."""
    source.check()
    source.check_packed_values()
    model_class = _CLASSES.get(source.kind, QWenLMHeadModel)
    config = model_class.config_class.from_dict(source.plain_config)
    config._attn_implementation = "eager"
    with torch.device("meta"):
        model = model_class(config)
    if source.kind.is_qwen:  # what is no weight needs values now
        model.transformer.program_alpha = torch.ones((1, 1), dtype=torch.long)
    else:
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return _filled(model, source, source.full_weights(torch.float32), dtype, device)


def _filled(
    model: Any, source: Source, recipes: Sequence[Recipe], dtype: torch.dtype, device: str | torch.device
) -> PreTrainedModel:
    """A model without values, filled from the files."""
    for recipe in recipes:
        tensor = recipe.build(*(source.weights.read(name) for name in recipe.sources))
        copied = tensor.to(device, dtype, copy=True)  # a mapped tensor would hold on to its file
        model.load_state_dict({recipe.name: copied}, strict=False, assign=True)
    source.weights.close()
    model.tie_weights()
    return model.to(device)


def _llama_config(architecture: Architecture) -> LlamaConfig:
    config = LlamaConfig(
        vocab_size=architecture.rows,
        hidden_size=architecture.width,
        intermediate_size=architecture.mlp,
        num_hidden_layers=architecture.layers,
        num_attention_heads=architecture.heads,
        num_key_value_heads=architecture.kv_heads,
        head_dim=architecture.head_dim,
        rms_norm_eps=architecture.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": float(architecture.rope_theta)},
        max_position_embeddings=architecture.length,
        tie_word_embeddings=architecture.tied,
    )
    config._attn_implementation = "eager"
    return config
