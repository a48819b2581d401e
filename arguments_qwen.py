"""What `forward` takes and gives: one cache under either of its names, the keyword arguments that are known, outputs.

Transformers 5.24 renamed the cache of every model, `past_key_values` to `cache`, and hands it to remote code under the
new name. Here both names work on every release, and an argument under a name that nobody here reads is an error:
swallowed, a cache under a third name would leave each step with a single token.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import transformers
from transformers import GenerationMixin
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    SequenceClassifierOutputWithPast,
)
from transformers.utils import logging

logger = logging.get_logger(__name__)

TESTED_RELEASES = ("5.4.0", "5.23.0", "5.24.0")
"""Releases of transformers that were tested: the oldest, the newest with the old name of the cache, the newest."""

CACHE_NAMES = ("past_key_values", "cache")
CACHE_NAME = (
    "cache"
    if "cache" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    else ("past_key_values")
)
"""The name of the cache in the transformers installed: in its `generate`, its masks, its layers and its outputs."""

_PACKING = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "max_seqlen_q", "max_seqlen_k", "seq_idx")
_PAGED = ("read_index", "write_index", "block_table", "logits_indices", "logits_processor_args")
_ENGINES = {"attention_instances": "vLLM", "forward_batch": "SGLang"}
_LOSS = ("num_items_in_batch", "ignore_index", "shift_labels")
_OUTPUTS = ("output_attentions", "output_hidden_states", "return_dict")
_DEBUGGING = ("debug_io", "debug_io_dir", "prune_layers")
_GENERATION = ("tokenizer", "assistant_tokenizer")  # which `generate` hands down beside what the model reads
# The published code took them and computed the same whatever they held.
_WITHOUT_EFFECT = ("token_type_ids", "output_router_logits")
UNREAD = frozenset((*_GENERATION, *_WITHOUT_EFFECT))
"""Those that nothing in the model reads."""
_HERE = ("is_causal", "padding_is_read")  # the latter tells the blocks that a head reads the states of padding
KNOWN_ARGUMENTS = frozenset(
    (*_PACKING, *_PAGED, *_ENGINES, *_LOSS, *_OUTPUTS, *_DEBUGGING, *_GENERATION, *_WITHOUT_EFFECT, *_HERE)
)
"""Keyword arguments of `forward` beside its own: each is read by an attention implementation, an engine's cache, the
loss, the blocks together or a decorator of transformers."""

_REMEDIES = {
    "cache_position": "give position_ids, (B, T)",
    "cache_params": "give the cache as cache or past_key_values",
    "past_key_value": "give the cache as cache or past_key_values",
    "labels": "a model without a head has no loss: use QWenLMHeadModel",
    "head_mask": "the published code ignored it: leave it out",
    "encoder_hidden_states": "QWen has no cross-attention: leave it out",
    "encoder_attention_mask": "QWen has no cross-attention: leave it out",
}


def without_resume_download(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `from_pretrained` without the one that the programs of 2023 pass and transformers 5 doesn't know."""
    if "resume_download" in arguments:
        logger.warning_once("resume_download is left out: downloads are always resumed. Remove the argument.")
    return {name: value for name, value in arguments.items() if name != "resume_download"}


def cache_argument(cache: Any) -> dict[str, Any]:
    """A cache as a keyword argument of the transformers installed; none for None."""
    return {} if cache is None else {CACHE_NAME: cache}


def one_cache(past_key_values: Any, cache: Any) -> Any:
    """The cache given under either name, or None.

    Raises:
        ValueError: two different ones, or something that is no cache of transformers.
    """
    if past_key_values is not None and cache is not None and past_key_values is not cache:
        raise ValueError("past_key_values and cache are two names of one argument, and differ: give one of them.")
    given = cache if past_key_values is None else past_key_values
    if given is not None and not hasattr(given, "update"):
        raise ValueError(
            f"The cache is a {type(given).__name__}, which transformers 5 no longer takes: give a Cache, such as "
            "DynamicCache(), or none."
        )
    return given


def engine_of(arguments: Iterable[str]) -> str | None:
    """Name of the engine that keeps keys in a place of its own, from the arguments that it hands down, or None."""
    return next((name for argument, name in _ENGINES.items() if argument in arguments), None)


def check_arguments(owner: str, arguments: dict[str, Any], reader: Callable[..., Any] | None = None) -> None:
    """Refuse keyword arguments that nobody reads; None asks for nothing.

    Args:
        owner: name of the class, for the message.
        arguments: what `forward` was given beside its own arguments.
        reader: a function of somebody else's that is given them too and names what it reads: an attention
            implementation, a loss.

    Raises:
        TypeError: names the argument, the releases that were tested, and the remedy.
    """
    unknown = [name for name, value in arguments.items() if name not in KNOWN_ARGUMENTS and value is not None]
    if unknown and reader is not None:
        unknown = [name for name in unknown if name not in inspect.signature(reader).parameters]
    if not unknown:
        return
    remedies = "; ".join(f"{name}: {_REMEDIES[name]}" for name in unknown if name in _REMEDIES)
    raise TypeError(
        f"{owner}.forward doesn't know {', '.join(unknown)}, so it would be ignored. {remedies or 'Leave it out'}. "
        f"(Tested with transformers {', '.join(TESTED_RELEASES)}; {transformers.__version__} is installed: if it hands "
        "this down by itself, install a tested release.)"
    )


class _UnderBothNames:
    """The cache of an output under the name that the transformers installed doesn't use."""


# Read-only properties, of which a type checker would say that they hide the fields of the other releases.
setattr(
    _UnderBothNames,
    next(name for name in CACHE_NAMES if name != CACHE_NAME),
    property(lambda output: getattr(output, CACHE_NAME), doc="The cache."),
)


@dataclass
class QWenModelOutput(_UnderBothNames, BaseModelOutputWithPast):
    """Output of `QWenModel`: `last_hidden_state` (B, T, E), the cache as `cache` and as `past_key_values`, and
    `hidden_states` and `attentions` where they were asked for."""


@dataclass
class QWenCausalLMOutput(_UnderBothNames, CausalLMOutputWithPast):
    """Output of `QWenLMHeadModel`: `loss`, `logits` (B, T, V), the cache as `cache` and as `past_key_values`, and
    `hidden_states` and `attentions` where they were asked for."""


@dataclass
class QWenSequenceClassifierOutput(_UnderBothNames, SequenceClassifierOutputWithPast):
    """Output of `QWenForSequenceClassification`: `loss`, `logits` (B, num_labels), the cache as `cache` and as
    `past_key_values`, and `hidden_states` and `attentions` where they were asked for."""
