"""Keys of other models in a configuration of type "qwen": what they ask for is done anyway, or refused by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

RELATIVES = {
    "visual": ("Qwen-VL", "reads images", "blind"),
    "audio": ("Qwen-Audio", "listens to sound", "deaf"),
}
"""Key of config.json, and name of the part that it configures -> family, what it does, what it would become here.

They have `"model_type": "qwen"` too.
"""

ARITHMETIC = (
    "attn_logit_softcapping",
    "embedding_multiplier",
    "final_logit_softcapping",
    "logit_scale",
    "logits_scaling",
    "moe",
    "moe_args",
    "n_experts",
    "num_experts",
    "num_local_experts",
    "qk_norm",
    "residual_multiplier",
    "scale_depth",
    "scale_emb",
    "use_moe",
    "use_qk_norm",
    "use_scaled_rope",
)
"""Keys of relatives of these models that change what is computed, unless they are off or 1."""

FOREIGN: dict[str, tuple[Callable[[Any, Mapping[str, Any]], bool], str]] = {
    "hidden_act": (lambda value, _: value in ("silu", "swish"), "its MLP is SwiGLU, hidden_act='silu'"),
    "hidden_activation": (lambda value, _: value in ("silu", "swish"), "its MLP is SwiGLU, hidden_activation='silu'"),
    "use_sliding_window": (lambda value, _: not value, "every token attends to all tokens before it"),
    "sliding_window": (lambda value, _: False, "every token attends to all tokens before it"),
    "attention_chunk_size": (lambda value, _: False, "every token attends to all tokens before it"),
    "layer_types": (
        lambda value, _: isinstance(value, (list, tuple)) and set(value) <= {"full_attention", "attention"},
        "each layer is of type 'full_attention'",
    ),
    "mlp_layer_types": (lambda value, _: value == ["dense"] * len(value), "each layer's MLP is 'dense'"),
    "per_layer_config": (lambda value, _: not value, "all layers are alike"),
    "num_kv_shared_layers": (lambda value, _: not value, "each layer has keys and values of its own"),
    "kv_sharing_modes": (lambda value, _: not value, "each layer has keys and values of its own"),
    "is_causal": (lambda value, _: isinstance(value, bool), "a text is read forwards (true) or both ways (false)"),
    "use_bidirectional_attention": (lambda value, _: not value, "a token attends to no token behind it"),
    "query_pre_attn_scalar": (
        lambda value, values: value == values["kv_channels"] and bool(values["scale_attn_weights"]),
        "scores are divided by sqrt(kv_channels), or not at all with scale_attn_weights=False",
    ),
    "qkv_bias": (lambda value, _: value is True, "c_attn always has a bias"),
    "attention_bias": (
        lambda value, values: value is True and not values["no_bias"],
        "c_attn always has a bias, and the output projection has one with no_bias=False",
    ),
    "mlp_bias": (lambda value, values: value is (not values["no_bias"]), "no_bias says whether the MLP has biases"),
    "original_max_position_embeddings": (lambda value, _: False, "the key belongs into rope_parameters"),
}
"""Keys of transformers' other decoders: which values say what QWen does anyway, and what that is.

Some of them would act halfway: transformers builds masks and caches by them.
"""


def relative(values: Mapping[str, Any]) -> str | None:
    """The family that a configuration belongs to, if it is one that sees or hears: "Qwen-VL", "Qwen-Audio", or None."""
    return next((family for key, (family, *_) in RELATIVES.items() if values.get(key)), None)


def relative_refusal(key: str, sign: str) -> str:
    """Why a model of a family is refused, and the remedy.

    Args:
        key: of `RELATIVES`.
        sign: what gives it away, as a part of a sentence.
    """
    family, ability, loss = RELATIVES[key]
    return (
        f"This is {family} ({sign}), which {ability}: as a QWen model it would be {loss}, so it is refused. Load it "
        "with its own code (trust_remote_code=True), in an environment with transformers 4.32 and without qwen1, or "
        "take a text model, as Qwen-7B-Chat."
    )


def refuse_relatives(values: Mapping[str, Any]) -> None:
    """Refuse the configuration of a model that sees or hears, of which only the language model would be left.

    Raises:
        ValueError: names the family and the remedy.
    """
    if key := next((key for key in RELATIVES if values.get(key)), None):
        raise ValueError(relative_refusal(key, f"its configuration has {key!r}"))


def refuse_foreign(values: Mapping[str, Any]) -> None:
    """Refuse what keys of other decoders ask for and this architecture doesn't do."""
    refuse_relatives(values)
    for name in ARITHMETIC:
        value = values.get(name)
        if value is True or value not in (None, False, 0, 1):  # True equals 1
            raise ValueError(f"{name}={value!r} changes what is computed and has no counterpart in QWen: leave it out.")
    for name, (fits, what) in FOREIGN.items():
        value = values.get(name)
        if value is not None and not fits(value, values):
            raise ValueError(f"{name}={value!r} is not what QWen computes: {what}. Leave {name} out.")
