"""GGUF, the files of llama.cpp and of what is built on it: names of tensors, encodings, and what it has no place for.

A model is written as one of the architecture `qwen2`, whose tensors are those of transformers' Qwen2 under other names:
it takes grouped heads and a tied head, which `qwen` of llama.cpp doesn't, and more programs know it.

Source: the converter of llama.cpp and what its `qwen2` loads. The package `gguf` has the tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from types import ModuleType

import torch

from ..errors import CheckpointError
from .architecture import Architecture
from .recipes import Recipe

ARCHITECTURE = "qwen2"
BLOCK, BLOCK_BYTES = 32, 34  # of q8_0: values that share a scale, which takes two bytes

_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_LAYER = "model.layers."


class Encoding(Enum):
    """How values are stored, by the name that llama.cpp's `--outtype` has for it."""

    F32 = "f32"
    F16 = "f16"
    BF16 = "bf16"
    Q8_0 = "q8_0"

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype of torch; None where values are quantised."""
        return {value: key for key, value in _OF_DTYPE.items()}.get(self)

    @classmethod
    def of(cls, dtype: torch.dtype) -> Encoding:
        """In which values of a dtype lose nothing, or as little as can be."""
        return _OF_DTYPE.get(dtype, cls.F32)


_OF_DTYPE = {
    torch.float32: Encoding.F32,
    torch.float16: Encoding.F16,
    torch.bfloat16: Encoding.BF16,
}


def gguf_package() -> ModuleType:
    """The package `gguf`.

    Raises:
        CheckpointError: it isn't installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise CheckpointError(f"--to gguf needs the package gguf ({error}): pip install gguf") from error
    return gguf


def gguf_name(name: str) -> str:
    """Name of a tensor, of its name in transformers' Qwen2."""
    module, _, kind = name.rpartition(".")
    if not module.startswith(_LAYER):
        return f"{_NAMES[module]}.{kind}"
    layer, _, inside = module.removeprefix(_LAYER).partition(".")
    return f"blk.{layer}.{_NAMES[inside]}.{kind}"


def to_gguf(recipes: Sequence[Recipe]) -> list[Recipe]:
    """The same tensors under the names of a GGUF."""
    return [Recipe(gguf_name(recipe.name), recipe.sources, recipe.build) for recipe in recipes]


def encoding_of(shape: Sequence[int], wanted: Encoding) -> Encoding:
    """How a tensor is stored: vectors always in float32, and what isn't made of whole blocks in float16, as there."""
    if len(shape) == 1:
        return Encoding.F32
    return Encoding.F16 if wanted is Encoding.Q8_0 and shape[-1] % BLOCK else wanted


def check_gguf(architecture: Architecture) -> None:
    """Refuse shapes that llama.cpp's `qwen2` can't have.

    Raises:
        CheckpointError: such a shape.
    """
    if architecture.queries != architecture.width:
        raise CheckpointError(
            f"{architecture.heads} heads of {architecture.head_dim} are {architecture.queries} wide, the model is "
            f"{architecture.width}: llama.cpp has only models of Qwen where they are equal. Use --to qwen2, which vLLM "
            "and transformers take."
        )
