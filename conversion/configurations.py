"""Configurations of every format, read into an `Architecture` and written from one.

What a format cannot say is refused here, by name; what it says otherwise is noted for the user.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import LlamaConfig, Qwen2Config

from ..configuration_qwen import ARITHMETIC, QWenConfig
from .errors import CheckpointError
from .names import MOST_LAYERS, Architecture, short

LLAMA_2_LENGTH = 4096
"""Tokens that LLaMA 2 was trained on at once; its `params.json` doesn't say."""

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
_SCALINGS = ("linear", "dynamic", "yarn")
"""Kinds of rotary scaling that QWen computes as transformers' classes do."""

_LAYERS = ("n_layer", "num_hidden_layers", "num_layers", "max_window_layers")
_SETTINGS = ("bos_token_id", "eos_token_id", "pad_token_id", "initializer_range")


@dataclass(frozen=True)
class RopeScaling:
    """How a Qwen2 model is to stretch texts beyond the length that it was trained on."""

    kind: str
    factor: float

    @classmethod
    def parse(cls, text: str) -> RopeScaling:
        """`yarn:FACTOR`, `dynamic` or `dynamic:FACTOR`.

        With factor 2, transformers' dynamic scaling gives QWen's own stretch where the length is a power of two times
        the trained one, so this is the default.

        Raises:
            CheckpointError: another text.
        """
        kind, _, factor = text.partition(":")
        try:
            value = float(factor) if factor or kind != "dynamic" else 2.0
        except ValueError:
            value = 0.0
        if kind not in ("yarn", "dynamic") or not 1.0 < value < float("inf"):
            raise CheckpointError(
                f"Rope scaling {text!r} is unknown: use yarn:FACTOR, dynamic or dynamic:FACTOR, with a factor above 1."
            )
        return cls(kind, value)


# --- reading ---


def read_qwen(config: Mapping[str, Any]) -> Architecture:
    """Architecture of a QWen configuration, of 2023 or ours.

    Raises:
        CheckpointError: impossible values.
    """
    values = _parse(QWenConfig, config)
    rope = _scaling_of(values.rope_parameters)
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
        settings=_settings(values),
    )


def read_hf(config: Mapping[str, Any]) -> Architecture:
    """Architecture of a dense Qwen2 (Qwen1.5, Qwen2, Qwen2.5) or LLaMA configuration in Hugging Face's format.

    Raises:
        CheckpointError: impossible values, or something that QWen can't represent.
    """
    is_llama = config["model_type"] == "llama"
    values = _parse(LlamaConfig if is_llama else Qwen2Config, config)
    rope = _check_hf(values, config)
    scaling = _scaling_of(rope)
    return Architecture(
        layers=values.num_hidden_layers,
        width=values.hidden_size,
        heads=values.num_attention_heads,
        kv_heads=values.num_key_value_heads,
        head_dim=getattr(values, "head_dim", None) or values.hidden_size // max(values.num_attention_heads, 1),
        mlp=values.intermediate_size,
        rows=values.vocab_size,
        norm_eps=values.rms_norm_eps,
        rope_theta=rope["rope_theta"],
        length=rope["original_max_position_embeddings"] if _is_yarn(scaling) else values.max_position_embeddings,
        tied=values.tie_word_embeddings,
        qkv_bias=not is_llama or values.attention_bias,
        output_bias=is_llama and values.attention_bias,
        mlp_bias=is_llama and values.mlp_bias,
        rope=scaling,
        positions=None if scaling is None else values.max_position_embeddings,
        settings=_settings(values),
    )


def _parse(config_class: Any, config: Mapping[str, Any]) -> Any:
    _refuse_quantised(config)
    refuse_sizes(config)
    try:
        return config_class.from_dict(dict(config))
    except Exception as error:  # what configuration classes raise differs between releases of transformers
        raise CheckpointError(f"config.json can't be used: {' '.join(str(error).split())}") from error


def refuse_sizes(config: Mapping[str, Any]) -> None:
    """Refuse numbers of layers over which a configuration class would count for minutes, and what fits no word.

    Raises:
        CheckpointError: such a number; the message names it.
    """
    for name, value in config.items():
        most = MOST_LAYERS if name in _LAYERS else 2**63
        if type(value) is int and value > most:
            raise CheckpointError(
                f"config.json can't be used: {name}={short(value)} is more than {most:,}, which no model has. Mend it."
            )


def quantization_method(config: Mapping[str, Any]) -> str | None:
    """Name of the method by which weights are quantised, None where they are not."""
    quantization = config.get("quantization_config")
    if not quantization:
        return None
    return str(quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else quantization)


def _refuse_quantised(config: Mapping[str, Any]) -> None:
    if method := quantization_method(config):
        raise CheckpointError(
            f"The weights are quantised ({method}), so they can't be converted: convert the full ones, then quantise."
        )


def _settings(values: Any) -> dict[str, Any]:
    return {name: getattr(values, name, None) for name in _SETTINGS}


def _scaling_of(rope: Mapping[str, Any]) -> dict[str, Any] | None:
    """What of rotary parameters scales."""
    if rope.get("rope_type", "default") == "default":
        return None
    return {key: value for key, value in rope.items() if key not in ("rope_theta", "partial_rotary_factor", "type")}


def _is_yarn(scaling: Mapping[str, Any] | None) -> bool:
    return scaling is not None and scaling["rope_type"] == "yarn"


def _check_hf(values: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary parameters, after refusing what QWen has no counterpart for."""
    rope = dict(values.rope_parameters or {})
    rope.setdefault("rope_theta", 10000.0)
    kind = rope.get("rope_type", "default")
    if kind not in ("default", *_SCALINGS):
        raise CheckpointError(f"Rope scaling {kind!r} has no counterpart in QWen, which has {', '.join(_SCALINGS)}.")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise CheckpointError(f"partial_rotary_factor={rope['partial_rotary_factor']} can't be converted.")
    _refuse_arithmetic(config)
    windows = [kind for kind in getattr(values, "layer_types", None) or [] if kind != "full_attention"]
    if windows:
        raise CheckpointError(f"Layers of type {windows[0]!r} (sliding windows) have no counterpart in QWen.")
    if values.hidden_act not in ("silu", "swish"):
        raise CheckpointError(f"hidden_act={values.hidden_act!r} has no counterpart in QWen, which computes SwiGLU.")
    return rope


def _refuse_arithmetic(config: Mapping[str, Any]) -> None:
    for name in ARITHMETIC:
        value = config.get(name)
        if value is True or value not in (None, False, 0, 1):  # True equals 1
            raise CheckpointError(f"{name}={config[name]!r} changes what is computed and has no counterpart in QWen.")


def refuse_kind(config: Mapping[str, Any]) -> CheckpointError:
    """The error for a model type that nothing here converts."""
    model_type = config.get("model_type")
    kind = _OTHER_KINDS.get(str(model_type))
    reason = f" ({kind})" if kind else ""
    return CheckpointError(
        f"model_type={model_type!r}{reason} can't be handled: only qwen, dense qwen2 and llama checkpoints can."
    )


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
    _refuse_arithmetic(params)
    for name in ("rope_scaling", "sliding_window"):
        if params.get(name):
            raise CheckpointError(f"{name}={params[name]!r} has no counterpart in QWen.")
    width, heads = _size(params, "dim"), _size(params, "n_heads")
    embedding, gate = _shape(shapes, "tok_embeddings.weight"), _shape(shapes, "layers.0.feed_forward.w1.weight")
    rows = embedding[0] * (files if embedding[1] == width else 1)
    if (params.get("vocab_size") or 0) > rows:
        raise CheckpointError(f"params.json: vocab_size={params['vocab_size']}, but the embedding has {rows} rows.")
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


# --- writing ---


def check_qwen2(config: Mapping[str, Any]) -> list[str]:
    """What is lost when a QWen configuration becomes a Qwen2 one, in sentences for the user.

    Raises:
        CheckpointError: something that changes logits even within the trained length.
    """
    values = _parse(QWenConfig, config)
    for name, wanted in (
        ("apply_residual_connection_post_layernorm", False),
        ("scale_attn_weights", True),
        ("rotary_pct", 1.0),
    ):
        if getattr(values, name) != wanted:
            raise CheckpointError(f"{name}={getattr(values, name)} has no counterpart in Qwen2, only {wanted} has.")
    notes = []
    stretch = [word for word, on in (("NTK", values.use_dynamic_ntk), ("LogN", values.use_logn_attn)) if on]
    if stretch:
        notes.append(
            f"{' and '.join(stretch)} {'has' if len(stretch) == 1 else 'have'} no counterpart in Qwen2: texts longer "
            f"than the trained {values.seq_length} tokens lose quality."
        )
    if values.use_cache_quantization:
        notes.append("The int8 cache (use_cache_quantization) has no counterpart in Qwen2's configuration.")
    return notes


def qwen2_config(architecture: Architecture, dtype: str, scaling: RopeScaling | None = None) -> dict[str, Any]:
    """`config.json` of a Qwen2ForCausalLM, in the keys that programs of all ages read.

    Args:
        dtype: name of the dtype of the weights, "bfloat16".
        scaling: how to stretch texts beyond the trained length; `max_position_embeddings` is that length without it.

    Raises:
        CheckpointError: the architecture has a scaling of its own.
    """
    settings = dict(architecture.settings or {})
    config: dict[str, Any] = {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": settings.get("bos_token_id"),
        "eos_token_id": settings.get("eos_token_id"),
        "hidden_act": "silu",
        "hidden_size": architecture.width,
        "initializer_range": settings.get("initializer_range") or 0.02,
        "intermediate_size": architecture.mlp,
        "max_position_embeddings": architecture.length,
        "max_window_layers": architecture.layers,
        "model_type": "qwen2",
        "num_attention_heads": architecture.heads,
        "num_hidden_layers": architecture.layers,
        "num_key_value_heads": architecture.kv_heads,
        "pad_token_id": settings.get("pad_token_id"),
        "rms_norm_eps": architecture.norm_eps,
        "rope_scaling": None,
        "rope_theta": float(architecture.rope_theta),
        "sliding_window": None,
        "tie_word_embeddings": architecture.tied,
        "torch_dtype": dtype,
        "transformers_version": transformers.__version__,  # without it, some releases take the tokenizer for another
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": architecture.rows,
    }
    if architecture.queries != architecture.width:
        config["head_dim"] = architecture.head_dim
    if architecture.rope is not None:
        kind = architecture.rope["rope_type"]
        if scaling is not None:
            raise CheckpointError(
                f"--rope-scaling {scaling.kind}: the checkpoint has {kind} scaling of its own, which is carried over. "
                "Leave the option out."
            )
        config["rope_scaling"] = {**architecture.rope, "type": kind}
        config["max_position_embeddings"] = architecture.positions
    elif scaling is not None:
        config |= _scaled(architecture.length, scaling)
    return config


def _scaled(length: int, scaling: RopeScaling) -> dict[str, Any]:
    # Both spellings of the type: transformers 4.45 and later read the first, programs before and beside it the second.
    rope: dict[str, Any] = {"rope_type": scaling.kind, "type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "dynamic":  # begins beyond max_position_embeddings, which so stays the trained length
        return {"rope_scaling": rope}
    rope["original_max_position_embeddings"] = length
    return {"rope_scaling": rope, "max_position_embeddings": int(length * scaling.factor)}


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
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise CheckpointError(f"The configuration can't be converted: {error}") from error
    return config.to_diff_dict()
