"""Formats of checkpoints, told apart by their `config.json`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import Enum
from typing import Any

from ..errors import CheckpointError
from .relatives import refuse_relative

_OTHER_KINDS = {
    "mixtral": "a mixture of experts",
    "qwen2_moe": "a mixture of experts",
    "qwen3_moe": "a mixture of experts",
    "deepseek_v2": "a mixture of experts",
    "deepseek_v3": "a mixture of experts",
    "qwen3": "norms of queries and keys",
    "mistral": "sliding windows",
    "gemma": "scaled embeddings and other norms",
    "gemma2": "sliding windows and capped logits",
    "qwen2_vl": "images",
    "qwen2_5_vl": "images",
    "qwen3_vl": "images",
    "qwen2_audio": "sound",
    "qwen2_5_omni": "images and sound",
    "mllama": "images",
}


def unknown_kind(config: Mapping[str, Any]) -> CheckpointError:
    """The error for a model type that nothing here converts."""
    model_type = config.get("model_type")
    kind = _OTHER_KINDS.get(str(model_type))
    reason = f" ({kind})" if kind else ""
    return CheckpointError(
        f"model_type={model_type!r}{reason} can't be handled: only qwen, dense qwen2 and llama checkpoints can."
    )


class Kind(Enum):
    """Formats of checkpoints; the value is what people are told."""

    QWEN_2023_08 = "QWen as released in 2023-08"
    QWEN_2023_12 = "QWen as released in 2023-12"
    QWEN = "QWen of this repository"
    QWEN2 = "Qwen2 (Qwen1.5, Qwen2, Qwen2.5) in Hugging Face format"
    LLAMA = "LLaMA in Hugging Face format"
    LLAMA_ORIGINAL = "LLaMA in the original format"

    @property
    def is_qwen(self) -> bool:
        """Whether it is QWen, of whatever release."""
        return self in (Kind.QWEN_2023_08, Kind.QWEN_2023_12, Kind.QWEN)


def detect_kind(config: Mapping[str, Any], names: Iterable[str] = ()) -> Kind:
    """Format that a `config.json` announces.

    Args:
        names: of the stored tensors, where they are known, by which a disguised Qwen-VL is found out.

    Raises:
        CheckpointError: a model type that nothing here handles, Qwen-VL and Qwen-Audio included.
    """
    model_type = config.get("model_type")
    refuse_relative(config, names)
    if model_type == "qwen":
        auto_map = config.get("auto_map")
        if isinstance(auto_map, dict) and "AutoModel" in auto_map:
            return Kind.QWEN
        return Kind.QWEN_2023_08 if "n_embd" in config else Kind.QWEN_2023_12
    if model_type in ("qwen2", "llama"):
        return Kind.QWEN2 if model_type == "qwen2" else Kind.LLAMA
    raise unknown_kind(config)


def hidden_weights(kind: Kind | None, file: str, disguise: str) -> str:
    """What is wrong with a pickle that is no bare state dict, and what mends it."""
    if kind is None:
        remedy = "save the bare state dict"
    else:
        remedy = f"{'upgrade' if kind.is_qwen else 'convert --to qwen'} sees through that and writes safetensors"
    return (
        f"{file} {disguise}, as training does, so transformers finds none: it fails, or fills the model at random. "
        f"The folder does not load as it is; {remedy}."
    )
