"""Configuration of the QWen (Qwen-1) family: 1.8B, 7B, 14B and 72B, base and chat."""

from __future__ import annotations

import inspect
from typing import Any

from transformers import PreTrainedConfig
from transformers.utils import logging

logger = logging.get_logger(__name__)

AUTO_MAP: dict[str, str | list[str]] = {
    "AutoConfig": "configuration_qwen.QWenConfig",
    "AutoModel": "modeling_qwen.QWenModel",
    "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel",
    "AutoModelForSequenceClassification": "modeling_qwen.QWenForSequenceClassification",
    "AutoTokenizer": ["tokenization_qwen.QWenTokenizer", "tokenization_qwen.QWenTokenizerFast"],
}
"""Where the Auto classes find the code of this repository."""

ALIASES = {
    "hidden_size": "n_embd",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
    "num_hidden_layers": "n_layer",
    "intermediate_size": "ffn_hidden_size",
    "attn_dropout_prob": "attn_pdrop",
    "emb_dropout_prob": "embd_pdrop",
    "rms_norm_eps": "layer_norm_epsilon",
    "rope_theta": "rotary_emb_base",
    "head_dim": "kv_channels",
}
"""Other spelling -> the documented one. The first seven are those of the 2023-12 release."""

_BASE_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings")

PRECISION_FLAGS = ("bf16", "fp16", "fp32")


def _alias(target: str) -> property:
    def read(config: QWenConfig) -> Any:
        return getattr(config, target)

    def write(config: QWenConfig, value: Any) -> None:
        setattr(config, target, value)

    return property(read, write, doc=f"Another spelling of `{target}`.")


class QWenConfig(PreTrainedConfig):
    """Shape and behaviour of a QWen model; the defaults are those of the documented 7B model of 2023-08.

    Both published spellings of a key are understood (`n_embd` / `hidden_size`, `ffn_hidden_size` /
    `intermediate_size`, `attn_pdrop` / `attn_dropout_prob` …) and both are written, because programs outside read
    one or the other. Keys that nothing here knows are kept as they are.

    Args:
        vocab_size: number of token ids that the language model head scores.
        n_embd: width of the residual stream.
        n_layer: number of blocks.
        n_head: number of query heads.
        n_inner: kept for the files that carry it; the MLP takes its width from `ffn_hidden_size`.
        embd_pdrop: dropout probability after the embedding, while training.
        attn_pdrop: dropout probability of the attention weights, while training.
        layer_norm_epsilon: epsilon of every RMSNorm.
        initializer_range: standard deviation of fresh weights.
        scale_attn_weights: divide the attention scores by sqrt(kv_channels).
        use_cache: return a key/value cache from `forward`.
        eos_token_id: id that ends a text.
        apply_residual_connection_post_layernorm: take the residual after the norm instead of before it.
        bf16, fp16, fp32: precision to load weights in; at most one may be true. `dtype=` wins over them.
        kv_channels: size of one head.
        rotary_pct: share of each head that is rotated, in (0, 1].
        rotary_emb_base: base of the rotary frequencies (72B: 1,000,000).
        use_dynamic_ntk: stretch the rotary base for prompts longer than `seq_length` (inference only).
        use_logn_attn: scale queries beyond `seq_length` by log(position) / log(seq_length) (inference only).
        use_flash_attn: `False`, `True` or `"auto"`; see `QWenPreTrainedModel.from_pretrained`.
        ffn_hidden_size: twice the width of the MLP, as gate and up projection are counted together.
        no_bias: no bias in the output and MLP projections (`c_attn` always has one).
        tie_word_embeddings: `lm_head` shares the weight of `wte`.
        num_key_value_heads: number of key/value heads; `None` means `n_head`, as in every published QWen.
        seq_length: length in tokens that the model was trained on; NTK and LogN begin beyond it.
        n_positions: longest text in tokens that the checkpoint is meant for; nothing is allocated from it.
        padded_vocab_size: rows of the embedding where that is more than `vocab_size`.
        use_cache_quantization: keep keys and values as int8 (`QWenInt8Cache`).
        softmax_in_fp32: compute attention scores and softmax in float32 (`_upcast_and_reordered_attn`).
        bos_token_id, pad_token_id: ids that begin and fill up a text, where there are any.

    Raises:
        ValueError: an impossible value, or two values that contradict each other; the message names them.

    Source: `qwen-7b.md` (constructor, defaults, `attribute_map`); `golden/published_configs` (both spellings).
    """

    model_type = "qwen"
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {
        "hidden_size": "n_embd",
        "num_attention_heads": "n_head",
        "max_position_embeddings": "n_positions",
        "num_hidden_layers": "n_layer",
    }

    intermediate_size = _alias("ffn_hidden_size")
    attn_dropout_prob = _alias("attn_pdrop")
    emb_dropout_prob = _alias("embd_pdrop")
    rms_norm_eps = _alias("layer_norm_epsilon")
    rope_theta = _alias("rotary_emb_base")
    head_dim = _alias("kv_channels")

    def __init__(
        self,
        vocab_size=151851,
        n_embd=4096,
        n_layer=32,
        n_head=32,
        n_inner=None,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        layer_norm_epsilon=1e-5,
        initializer_range=0.02,
        scale_attn_weights=True,
        use_cache=True,
        eos_token_id=151643,
        apply_residual_connection_post_layernorm=False,
        bf16=False,
        fp16=False,
        fp32=False,
        kv_channels=128,
        rotary_pct=1.0,
        rotary_emb_base=10000,
        use_dynamic_ntk=False,
        use_logn_attn=False,
        use_flash_attn=True,
        ffn_hidden_size=22016,
        no_bias=True,
        tie_word_embeddings=False,
        num_key_value_heads=None,
        seq_length=2048,
        n_positions=6144,
        padded_vocab_size=None,
        use_cache_quantization=False,
        softmax_in_fp32=False,
        bos_token_id=None,
        pad_token_id=None,
        **kwargs,
    ):
        values = {name: value for name, value in locals().items() if name not in ("self", "kwargs", "__class__")}
        _take_aliases(values, kwargs)
        # What the base class declares goes through it; everything else is set first, because it reads some of them.
        base_values = {name: values.pop(name) for name in _BASE_KEYS}
        if values["num_key_value_heads"] is None:
            values["num_key_value_heads"] = values["n_head"]
        for name, value in values.items():
            setattr(self, name, value)
        self._validate_values()
        super().__init__(**base_values, **kwargs)

    @property
    def embedding_rows(self) -> int:
        """Rows of `wte` and `lm_head`: the vocabulary, padded where the checkpoint says so."""
        return max(self.vocab_size, self.padded_vocab_size or 0)

    @property
    def rotary_dim(self) -> int:
        """Leading channels of each head that are rotated."""
        return int(self.kv_channels * self.rotary_pct)

    def precision_flag(self) -> str | None:
        """The one of `bf16`, `fp16` and `fp32` that is set, or None.

        Raises:
            ValueError: more than one of them is set.
        """
        chosen = [name for name in PRECISION_FLAGS if getattr(self, name)]
        if len(chosen) > 1:
            contradiction = " and ".join(f"{name}=True" for name in chosen)
            raise ValueError(f"{contradiction} contradict each other: set one of them.")
        return chosen[0] if chosen else None

    def to_dict(self) -> dict[str, Any]:
        """As the base class, with both spellings of every key and the `auto_map` of this repository."""
        output = super().to_dict()
        for alias, name in ALIASES.items():
            if name in output:
                output[alias] = output[name]
        output["auto_map"] = {**(output.get("auto_map") or {}), **AUTO_MAP}
        return output

    def _validate_values(self) -> None:
        _check_types(self)
        _check_heads(self)
        self.precision_flag()
        if self.use_flash_attn not in (True, False, None, "auto"):
            raise ValueError(f"use_flash_attn={self.use_flash_attn!r} is unknown: use True, False or 'auto'.")
        if self.use_logn_attn and self.seq_length < 2:
            raise ValueError(f"seq_length={self.seq_length} with use_logn_attn=True divides by log(1): use 2 or more.")


def _take_aliases(values: dict[str, Any], kwargs: dict[str, Any]) -> None:
    """Move aliased keys from `kwargs` to the documented names in `values`.

    A documented default can't be told from the same value given, so an alias wins over a default.
    """
    for alias, name in ALIASES.items():
        if alias not in kwargs:
            continue
        given = kwargs.pop(alias)
        if given is None:
            continue
        if values[name] not in (_DEFAULTS[name], given):
            raise ValueError(
                f"{name}={values[name]!r} and {alias}={given!r} are two spellings of one key and contradict each "
                "other: give one of them, or the same value to both."
            )
        values[name] = given


def _check_types(config: QWenConfig) -> None:
    sizes = ("vocab_size", "n_embd", "n_layer", "n_head", "num_key_value_heads", "kv_channels", "ffn_hidden_size")
    for name in (*sizes, "seq_length", "n_positions"):
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r} is impossible: it must be a positive integer.")
    for name in ("embd_pdrop", "attn_pdrop"):
        if not 0.0 <= (value := getattr(config, name)) < 1.0:
            raise ValueError(f"{name}={value!r} is impossible: a dropout probability lies in [0, 1).")
    for name in ("layer_norm_epsilon", "rotary_emb_base"):
        if not (value := getattr(config, name)) > 0:
            raise ValueError(f"{name}={value!r} is impossible: it must be positive.")
    if config.initializer_range < 0:
        raise ValueError(f"initializer_range={config.initializer_range!r} is impossible: it must not be negative.")
    padded = config.padded_vocab_size
    if padded is not None and padded < 1:
        raise ValueError(f"padded_vocab_size={padded!r} is impossible: it must be a positive integer or None.")


def _check_heads(config: QWenConfig) -> None:
    if config.n_embd % config.n_head:
        raise ValueError(f"n_embd={config.n_embd} does not divide into n_head={config.n_head} heads.")
    if config.n_head % config.num_key_value_heads:
        raise ValueError(
            f"n_head={config.n_head} does not divide into num_key_value_heads={config.num_key_value_heads} groups."
        )
    if config.ffn_hidden_size % 2:
        raise ValueError(
            f"ffn_hidden_size={config.ffn_hidden_size} is odd: it counts the gate and the up projection together."
        )
    if not 0.0 < config.rotary_pct <= 1.0:
        raise ValueError(f"rotary_pct={config.rotary_pct!r} is impossible: the rotated share lies in (0, 1].")
    smallest = 4 if config.use_dynamic_ntk else 2  # NTK's exponent is d / (d - 2)
    if config.rotary_dim % 2 or config.rotary_dim < smallest:
        raise ValueError(
            f"kv_channels={config.kv_channels} with rotary_pct={config.rotary_pct} rotates {config.rotary_dim} "
            f"channels of each head: it must be an even number, {smallest} or more."
        )


_DEFAULTS = {name: parameter.default for name, parameter in inspect.signature(QWenConfig.__init__).parameters.items()}
