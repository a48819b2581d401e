"""Configuration of the QWen (Qwen-1) family: 1.8B, 7B, 14B and 72B, base and chat."""

from __future__ import annotations

from .versions_qwen import check_versions as check_versions  # first: older versions lack what follows

# isort: split

import inspect
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig
from transformers.utils import logging

from .foreign_qwen import ARITHMETIC, FOREIGN, refuse_foreign, refuse_relatives
from .parallel_qwen import SHARDING_PLAN, TENSOR_PLAN
from .saving_qwen import saved_as_published
from .scaling_qwen import (
    ROPE_DEFAULTS,
    ROPE_SPELLINGS,
    RopeParameters,
    contradiction,
    plain_rope,
    take_rope,
)

logger = logging.get_logger(__name__)

AUTO_MAP: dict[str, str | list[str]] = {
    "AutoConfig": "configuration_qwen.QWenConfig",
    "AutoModel": "modeling_qwen.QWenModel",
    "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel",
    # Not that it decides anything: `transformers serve` looks for remote code under this name only.
    "AutoModelForDecision": "modeling_qwen.QWenLMHeadModel",
    "AutoModelForQuestionAnswering": "modeling_qwen.QWenForQuestionAnswering",
    "AutoModelForSequenceClassification": "modeling_qwen.QWenForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_qwen.QWenForTokenClassification",
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
    "attention_dropout": "attn_pdrop",
    "rms_norm_eps": "layer_norm_epsilon",
    "rope_theta": "rotary_emb_base",
    "partial_rotary_factor": "rotary_pct",
    "head_dim": "kv_channels",
}
"""Other spelling -> the documented one. The first seven are those of the 2023-12 release."""

_READ_ONLY = ("attention_dropout",)
"""Spellings that are not written: published files have `attn_dropout_prob`, and whoever edits two has found all."""


WITHOUT_EFFECT = (
    "activation",
    "bias_dropout_fusion",
    "onnx_safe",
    "params_dtype",
    "pos_emb",
    "resid_pdrop",
    "tokenizer_type",
    "use_cache_kernel",
)
"""Options of 2023 that changed nothing that is computed; kept, in a file and as arguments of `from_pretrained`."""

_BASE_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings")

PRECISION_FLAGS = ("bf16", "fp16", "fp32")
_SIZES = (
    "vocab_size",
    "n_embd",
    "n_layer",
    "n_head",
    "num_key_value_heads",
    "kv_channels",
    "ffn_hidden_size",
    "seq_length",
    "n_positions",
)
_SWITCHES = (
    *PRECISION_FLAGS,
    "scale_attn_weights",
    "use_cache",
    "apply_residual_connection_post_layernorm",
    "use_dynamic_ntk",
    "use_logn_attn",
    "no_bias",
    "softmax_in_fp32",
)


def _alias(target: str) -> property:
    def read(config: QWenConfig) -> Any:
        return getattr(config, target)

    def write(config: QWenConfig, value: Any) -> None:
        setattr(config, target, value)

    return property(read, write, doc=f"Another spelling of `{target}`.")


class QWenConfig(RopeParameters, PreTrainedConfig):
    """Shape and behaviour of a QWen model; the defaults are those of the documented 7B model of 2023-08.

    Both published spellings of a key are understood (`n_embd` / `hidden_size`, `ffn_hidden_size` /
    `intermediate_size`, `attn_pdrop` / `attn_dropout_prob` …) and both are written, because programs outside read
    one or the other. So are the keys that transformers' own decoders have for the same things; where they ask for
    something else (a sliding window, another activation) they are refused. Keys that nothing here knows are kept.

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
        use_dynamic_ntk: stretch the rotary base for prompts longer than `seq_length` (inference only). Not together
            with scaling by `rope_parameters`.
        use_logn_attn: scale queries beyond `seq_length` by log(position) / log(seq_length) (inference only).
        use_flash_attn: `False`, `True` or `"auto"`; see `QWenPreTrainedModel.from_pretrained`.
        ffn_hidden_size: twice the width of the MLP, as gate and up projection are counted together.
        no_bias: no bias in the output and MLP projections (`c_attn` always has one).
        tie_word_embeddings: `lm_head` shares the weight of `wte`.
        num_key_value_heads: number of key/value heads; `None` means `n_head`, as in every published QWen.
        seq_length: length in tokens that the model was trained on; NTK and LogN begin beyond it.
        n_positions: longest text in tokens that the checkpoint is meant for; nothing is allocated from it.
        padded_vocab_size: rows of the embedding where that is more than `vocab_size`.
        use_cache_quantization: keep keys and values as int8: True as published (`QWenInt8Cache`), "grouped" accurately
            (`QWenGroupedInt8Cache`).
        softmax_in_fp32: compute attention scores and softmax in float32 (`_upcast_and_reordered_attn`).
        bos_token_id, pad_token_id: ids that begin and fill up a text, where there are any.
        kwargs: other spellings; `rope_parameters` (or `rope_scaling`), whose `rope_type` "linear", "dynamic" or "yarn"
            is computed as transformers does; keys that are kept.

    Raises:
        ValueError: an impossible value, or two values that contradict each other; the message names them.

    Source: `qwen-7b.md` (constructor, defaults, `attribute_map`); `golden/published_configs` (both spellings).
    """

    model_type = "qwen"
    base_model_tp_plan = TENSOR_PLAN
    base_model_fsdp_plan = SHARDING_PLAN
    keys_to_ignore_at_inference = ["past_key_values", "cache"]
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
    attention_dropout = _alias("attn_pdrop")
    rope_theta = _alias("rotary_emb_base")
    partial_rotary_factor = _alias("rotary_pct")
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
        rope = take_rope(kwargs)
        # What the base class declares goes through it; everything else is set first, because it reads some of them.
        base_values = {name: values.pop(name) for name in _BASE_KEYS}
        for name, value in values.items():
            setattr(self, name, value)
        self.rope_parameters = rope
        self.standardize_rope_params()
        _check_given({**values, **kwargs})
        self.check_values()
        with _as_value_errors():
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

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: Any, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """As in transformers.

        Raises:
            ValueError: a `config.json` that holds something else than an object.
        """
        try:
            return super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        except (AttributeError, TypeError):  # which say nothing of a file
            _refuse_no_object(os.path.join(pretrained_model_name_or_path, "config.json"))
            raise

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers; a file whose two spellings of a key differ is refused, overrides are checked as well.

        Raises:
            ValueError: as the constructor.
        """
        if not isinstance(config_dict, Mapping):
            raise ValueError(f"{config_dict!r:.80} is no object with settings: give those of a config.json.")
        for values in (config_dict, kwargs):
            refuse_relatives(values)
            _refuse_contradictions(values)
        taken = (*PRECISION_FLAGS, *WITHOUT_EFFECT, *FOREIGN, *ARITHMETIC)  # whether the file has them or not
        checked = {name: kwargs.pop(name) for name in taken if name in kwargs}
        result = super().from_dict(config_dict, **kwargs)
        config = result[0] if isinstance(result, tuple) else result  # with return_unused_kwargs
        refuse_foreign({**vars(config), **checked})
        config.override(checked)
        config.standardize_rope_params()
        config.check_values()
        return result

    def override(self, values: dict[str, Any]) -> None:
        """Set values that the user gave; a precision flag among them takes the place of any other."""
        if any(values.get(flag) for flag in PRECISION_FLAGS):
            values = {**dict.fromkeys(PRECISION_FLAGS, False), **values}
        for name, value in values.items():
            setattr(self, name, value)

    def to_dict(self) -> dict[str, Any]:
        """As the base class, with both spellings of every key and the `auto_map` of this repository."""
        output = super().to_dict()
        for key in ROPE_DEFAULTS:
            output[ALIASES[key]] = self.rope_parameters[key]
        for alias, name in ALIASES.items():
            if name in output and alias not in _READ_ONLY:
                output[alias] = output[name]
        if self.rope_scaling is None:
            output.pop("rope_parameters", None)  # which the other spellings say all of
        else:
            output["rope_scaling"] = {**output["rope_parameters"], "type": output["rope_parameters"]["rope_type"]}
        output["auto_map"] = {**(output.get("auto_map") or {}), **AUTO_MAP}
        return output

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """As in transformers, with the code of this class for one that derives from it."""
        with saved_as_published(self, __name__):
            super().save_pretrained(*args, **kwargs)

    def check_values(self) -> None:
        """Refuse impossible and contradicting values.

        Raises:
            ValueError: names the key and the value.
        """
        _check_types(self)
        _check_heads(self)
        refuse_foreign(vars(self))
        self.precision_flag()
        for name, word in (("use_flash_attn", "auto"), ("use_cache_quantization", "grouped")):
            value = getattr(self, name)
            if value not in (True, False, None, word) or type(value) is int:
                raise ValueError(f"{name}={value!r} is unknown: use True, False or {word!r}.")
        if self.use_logn_attn and self.seq_length < 2:
            raise ValueError(f"seq_length={self.seq_length} with use_logn_attn=True divides by log(1): use 2 or more.")
        if self.rotary_scaling.kind == "dynamic" and self.seq_length < self.n_positions:
            logger.warning_once(
                f"Dynamic rotary scaling begins beyond n_positions={self.n_positions}, as in transformers, and not "
                f"beyond the trained seq_length={self.seq_length}: for that, set max_position_embeddings="
                f"{self.seq_length} as well."
            )

    def __dir__(self) -> list[str]:
        """Every spelling, for programs that look for names there: those of `attribute_map` are no attributes."""
        return sorted({*super().__dir__(), *self.attribute_map})

    # The base class becomes a dataclass, whose own comparison would see none of the keys above.
    __eq__ = PreTrainedConfig.__eq__


@contextmanager
def _as_value_errors() -> Iterator[None]:
    """Make ValueErrors of huggingface_hub's own, for what isn't of a type that a release of transformers declares."""
    try:
        yield
    except StrictDataclassError as error:
        raise ValueError(str(error)) from error


def _check_given(values: Mapping[str, Any]) -> None:
    """Refuse other architectures, and values that the base class would read with an error that names nothing, or write
    wrongly.
    """
    import torch

    refuse_foreign(values)
    for name in ("dtype", "torch_dtype"):
        value = values.get(name)
        if value is None or isinstance(value, torch.dtype):
            continue
        if not isinstance(value, str) or not isinstance(getattr(torch, value, None), torch.dtype):
            raise ValueError(f"{name}={value!r} is no dtype of torch: give one, such as 'bfloat16', or leave it out.")
    for name in ("auto_map", "quantization_config"):
        value = values.get(name)
        if value is not None and not isinstance(value, Mapping) and not hasattr(value, "to_dict"):
            raise ValueError(f"{name}={value!r} is no object with settings: give one, or leave it out.")
    labels = values.get("id2label")
    if labels is not None and not (isinstance(labels, Mapping) and all(map(_is_index, labels))):
        raise ValueError(f"id2label={labels!r:.80} names no labels: give an object such as {{0: 'no', 1: 'yes'}}.")


def _is_index(value: Any) -> bool:
    """Whether this is an index, or reads as one, as the keys of JSON do."""
    return isinstance(value, int) or (isinstance(value, str) and value.isdecimal())


def _refuse_no_object(path: str) -> None:
    """Raise ValueError if this is a file of JSON, and that holds no object."""
    if not os.path.isfile(path):
        return
    with open(path, encoding="utf-8") as file:
        content = json.load(file)
    if not isinstance(content, dict):
        raise ValueError(f"{path!r} holds {content!r:.80}, no object with settings: download it again.")


def _spellings(values: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """Documented name, spelling and value of every key that is given in another spelling."""
    for alias, name in ALIASES.items():
        if values.get(alias) is not None:
            yield name, alias, values[alias]
    for spelling in ROPE_SPELLINGS:
        for key, value in plain_rope(values.get(spelling)).items():
            if key in ROPE_DEFAULTS:
                yield ALIASES[key], f"{spelling}.{key}", value


def _refuse_contradictions(values: Mapping[str, Any]) -> None:
    first = {name: (name, values[name]) for name in ALIASES.values() if values.get(name) is not None}
    for name, spelling, value in _spellings(values):
        other, given = first.setdefault(name, (spelling, value))
        if given != value:
            raise contradiction(other, given, spelling, value)


def _take_aliases(values: dict[str, Any], kwargs: dict[str, Any]) -> None:
    """Move aliased keys from `kwargs` to the documented names in `values`.

    A documented default can't be told from the same value given, so an alias wins over a default.
    """
    _refuse_contradictions(kwargs)
    for name, spelling, given in _spellings(kwargs):
        if values[name] not in (_DEFAULTS[name], given):
            raise contradiction(name, values[name], spelling, given)
        values[name] = given
    for alias in ALIASES:
        kwargs.pop(alias, None)
    if kwargs.get("use_sliding_window") is False:
        kwargs.pop("sliding_window", None)  # as Qwen2 does: transformers would build a cache by it
    if values["num_key_value_heads"] is None:
        values["num_key_value_heads"] = values["n_head"]


def _check_types(config: QWenConfig) -> None:
    for name in _SIZES:
        _require(config, name, lambda value: isinstance(value, int) and value > 0, "a positive integer")
    for name in _SWITCHES:
        _require(config, name, lambda value: isinstance(value, bool) or value is None, "true or false", switch=True)
    for name in ("embd_pdrop", "attn_pdrop"):
        _require(config, name, lambda value: 0.0 <= value < 1.0, "a dropout probability in [0, 1)")
    for name in ("layer_norm_epsilon", "rotary_emb_base"):
        _require(config, name, lambda value: value > 0, "a positive number")
    _require(config, "initializer_range", lambda value: value >= 0, "a number that is not negative")
    _require(config, "rotary_pct", lambda value: 0.0 < value <= 1.0, "the rotated share of a head, in (0, 1]")
    if config.padded_vocab_size is not None:
        _require(config, "padded_vocab_size", lambda value: isinstance(value, int) and value > 0, "a positive integer")


def _require(config: QWenConfig, name: str, holds: Callable[[Any], bool], wanted: str, switch: bool = False) -> None:
    value = getattr(config, name)
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not (number or switch) or not holds(value):
        raise ValueError(f"{name}={value!r} is impossible: it must be {wanted}.")


def _check_heads(config: QWenConfig) -> None:
    if config.n_head % config.num_key_value_heads:
        raise ValueError(
            f"n_head={config.n_head} does not divide into num_key_value_heads={config.num_key_value_heads} groups."
        )
    if config.ffn_hidden_size % 2:
        raise ValueError(
            f"ffn_hidden_size={config.ffn_hidden_size} is odd: it counts the gate and the up projection together."
        )
    stretched = config.use_dynamic_ntk or config.rotary_scaling.kind == "dynamic"
    smallest = 4 if stretched else 2  # the exponent of the base is d / (d - 2)
    if config.rotary_dim % 2 or config.rotary_dim < smallest:
        raise ValueError(
            f"kv_channels={config.kv_channels} with rotary_pct={config.rotary_pct} rotates {config.rotary_dim} "
            f"channels of each head: it must be an even number, {smallest} or more."
        )


_DEFAULTS = {name: parameter.default for name, parameter in inspect.signature(QWenConfig.__init__).parameters.items()}
