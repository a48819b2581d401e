"""Generation with the published extras: stop words, seeds, the model's own cache, the NTK alpha of each prompt."""

from __future__ import annotations

import copy
import functools
import inspect
import threading
from collections.abc import Generator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    ContinuousBatchingConfig,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.cache_utils import Cache, StaticCache, StaticLayer
from transformers.generation.streamers import BaseStreamer

from .arguments_qwen import CACHE_NAME, CACHE_NAMES, cache_argument, one_cache
from .cache_qwen import GROUPED_BACKEND, continues, named_cache, new_cache, refuse_quantized
from .ending_qwen import asked_late, with_late_answers
from .ntk_qwen import held_ntk_alpha, set_ntk_alpha
from .qwen_generation_utils import (
    SeededSampling,
    StopWordsCriteria,
    TokensType,
    check_stop_words,
    find_end,
    is_whole,
)
from .shards_qwen import draw_alike
from .tensor_parallel_qwen import shares_of_process

_EXTRAS = ("stop_words_ids", "seed")
"""Settings that `generate` knows beyond those of transformers."""

_COMPILED = (
    *("compile_config", "prefill_chunk_size", "prompt_lookup_num_tokens", "assistant_early_exit"),
    *("output_attentions", "output_hidden_states"),
)
"""Settings under which a static cache has the model compiled by transformers, on a GPU, as if there were no kernels."""

_OF_TOKENS = ("scores", "logits", "hidden_states", "attentions")
"""What `generate` returns of each token that it has written, under `return_dict_in_generate`."""

if TYPE_CHECKING:
    _GenerativeModel: Any  # transformers types `self` as a protocol that holds its own models only
else:
    _GenerativeModel = GenerationMixin


class GenerationSettings:
    """What `generate` will see of its settings: the call's, else those of its configuration, else those of the model's.

    Args:
        model: a `QWenLMHeadModel`, for its `generation_config`.
        generation_config: of the call, or None.
        call: settings of the call by name.
    """

    def __init__(self, model: Any, generation_config: GenerationConfig | None = None, call: Mapping[str, Any] = {}):  # noqa: B006
        self._call = call
        self._configurations = [config for config in (generation_config, model.generation_config) if config is not None]

    def __getitem__(self, name: str) -> Any:
        """The value of a setting, None where it has none."""
        if name in self._call:
            return self._call[name]
        values = (getattr(config, name, None) for config in self._configurations)
        return next((value for value in values if value is not None), None)


@dataclass
class Prompt:
    """What `generate` is given to read.

    Attributes:
        ids: (B, T), or None where only embeddings are given.
        rows: number of texts B.
        length: tokens that the output begins with; 0 where only embeddings are given.
        position_ids: (B or 1, tokens of the whole prompt), 0 for padding.
        ntk_alpha: given by the caller, (B, 1), or None.
    """

    ids: torch.Tensor | None
    rows: int
    length: int
    position_ids: torch.Tensor
    ntk_alpha: torch.Tensor | None

    @classmethod
    def read(cls, inputs: torch.Tensor | None, arguments: Mapping[str, Any], settings: GenerationSettings) -> Prompt:
        """From the arguments of `generate`; positions count real tokens, as transformers tells them from padding."""
        ids = arguments.get("input_ids") if inputs is None else inputs
        embeds, mask = arguments.get("inputs_embeds"), arguments.get("attention_mask")
        if ids is None and embeds is None:
            ids = torch.zeros((1, 1), dtype=torch.long)  # the token that begins every text
        read: torch.Tensor = ids if embeds is None else embeds  # type: ignore[assignment]
        positions = arguments.get("position_ids")
        if positions is None:
            mask = _mask_of_padding(read, settings) if mask is None else mask
            positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
        length = 0 if ids is None else ids.shape[1]
        return cls(ids, len(read), length, positions, arguments.get("ntk_alpha"))


def _mask_of_padding(read: torch.Tensor, settings: GenerationSettings) -> torch.Tensor:
    """The mask that transformers infers where none is given, (B, T): no padding, if that ends no text."""
    pad, ends = settings["pad_token_id"], [end for (end,) in eos_sequences(settings["eos_token_id"])]
    if pad is None or read.ndim != 2 or pad in ends or not bool((read == pad).any()):
        return read.new_ones(read.shape[:2], dtype=torch.long)
    return (read != pad).long()


class _CacheOfCall:
    """The attribute in which early releases of transformers 5 keep a static cache, and hand it to the next request,
    even one at once: here each thread has one of its own, for as long as the call takes.
    """

    _local = threading.local()

    def __get__(self, instance: Any, owner: type) -> Any:
        try:
            return self._local.cache
        except AttributeError:
            raise AttributeError("_cache") from None

    def __set__(self, instance: Any, cache: Any) -> None:
        self._local.cache = cache

    @classmethod
    @contextmanager
    def forgotten(cls) -> Generator[None, None, None]:
        """Begin and end without any."""
        vars(cls._local).pop("cache", None)
        try:
            yield
        finally:
            vars(cls._local).pop("cache", None)


def _under_both_names(output: Any) -> Any:
    """What `generate` returns, its cache also under the name that the transformers installed doesn't use."""
    if CACHE_NAME != "cache" and hasattr(output, CACHE_NAME):
        output.cache = getattr(output, CACHE_NAME)
    return output


def _without_drafts(output: Any, settings: GenerationSettings, prompt: Prompt, cache: Any) -> Any:
    """What `generate` returns, without what was drafted behind a stop word and accepted in one step with it.

    Args:
        cache: of the call, which forgets that too; None where transformers made one for it.
    """
    sequences = sequences_of(output)
    if settings["stop_words_ids"] is None or len(sequences) > 1:  # only single texts are drafted
        return output
    written = sequences[0, prompt.length :].tolist()
    end = find_end(written, cut=(), kept=check_stop_words(settings["stop_words_ids"]))
    if end is None or end == len(written):
        return output
    cache = getattr(output, CACHE_NAME, cache)
    if cache is not None:
        cache.crop(end - len(written))
    kept = sequences[:, : prompt.length + end]
    if isinstance(output, torch.Tensor):
        return kept
    output.sequences = kept
    for name in _OF_TOKENS:
        if getattr(output, name, None) is not None:
            output[name] = output[name][:end]
    return output


def check_generation_config(given: Any) -> None:
    """Refuse a mapping or the name of one, of which transformers would say that it has no such attribute."""
    if given is not None and not isinstance(given, GenerationConfig):
        raise ValueError(
            f"generation_config={given!r:.80} must be a GenerationConfig or None: give single settings as keyword "
            "arguments, such as max_new_tokens=20."
        )


def check_settings(model: Any, settings: GenerationSettings, stop_words_ids: Any = None) -> None:
    """Refuse settings by which transformers would divide, or of which it would make nothing.

    Args:
        stop_words_ids: of the call alone, or None: a configuration may be that of a larger model.

    Raises:
        ValueError: names the setting.
    """
    for name in ("num_beams", "num_return_sequences"):
        count = settings[name]
        if count is not None and (not is_whole(count) or count < 1):
            raise ValueError(f"{name}={count!r} must be a whole number of at least 1.")
    _check_cache_config(model.generation_config, settings)
    if not settings["is_assistant"]:  # which is given the words of the model that it helps
        _refuse_impossible(check_stop_words(stop_words_ids), model.config.vocab_size)


def _check_cache_config(own: Any, settings: GenerationSettings) -> None:
    """Refuse settings of a cache that nobody would make.

    Those of a model's `own` configuration stay behind where a call asks for another cache than that one names, and an
    assistant is given those of the model that it helps.
    """
    named, config = settings["cache_implementation"], settings["cache_config"]
    if config is not None and not isinstance(config, Mapping):
        example = {"backend": GROUPED_BACKEND}
        raise ValueError(f"cache_config={config!r:.80} must be a dictionary, such as {example}.")
    if not config or named == "quantized" or settings["is_assistant"]:
        return
    if own.cache_implementation == "quantized" and config == own.cache_config:
        return
    raise ValueError(
        f"cache_config={config!r:.80} is read with cache_implementation='quantized' alone, not with {named!r}: ask for "
        "that too, or leave cache_config out."
    )


class _Checked(Exception):  # noqa: N818 (it says that nothing is wrong)
    """Ends a call of `generate` that was only to check its arguments."""


class _OnlyChecks(StoppingCriteria):
    """Stands among the criteria of a call that is to end before its first step; after that, should it come to it."""

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """(B, length) -> (B,), true for all rows."""
        return torch.ones(len(input_ids), dtype=torch.bool, device=input_ids.device)

    @classmethod
    def is_in(cls, criteria: StoppingCriteriaList | None) -> bool:
        """Whether it is among the criteria of a call."""
        return any(isinstance(one, cls) for one in criteria or ())


def check_generation(model: Any, arguments: Mapping[str, Any]) -> None:
    """Raise what `generate` would say of its arguments before the first step, which isn't made.

    Transformers looks at names and values in many places, the last of them where it makes a processor of each setting.
    """
    if "generate" in vars(model) or isinstance(arguments.get("custom_generate"), str):
        return  # another program, which may begin at once
    criteria = StoppingCriteriaList([*(arguments.get("stopping_criteria") or ()), _OnlyChecks()])
    with suppress(_Checked):
        model.generate(**{**arguments, "stopping_criteria": criteria})


def _with_stop_words(
    criteria: StoppingCriteriaList | None, settings: GenerationSettings, prompt: Prompt
) -> StoppingCriteriaList | None:
    if settings["stop_words_ids"] is None:
        return criteria
    words = check_stop_words(settings["stop_words_ids"])
    return StoppingCriteriaList([*(criteria or ()), StopWordsCriteria(words, prompt.length)])


def _refuse_impossible(words: list[TokensType], vocabulary: int) -> None:
    """Refuse stop words with an id that a model of so many tokens can't write, which would never end a text."""
    for word in words:
        unknown = [token for token in word if not 0 <= token < vocabulary]
        if unknown:
            raise ValueError(
                f"stop_words_ids has the entry {word}, but this model writes the ids 0 to {vocabulary - 1} and no "
                f"{', '.join(map(str, unknown))}: encode stop words with the tokenizer of the checkpoint."
            )


def _with_seed(
    processors: LogitsProcessorList | None, settings: GenerationSettings, prompt: Prompt
) -> LogitsProcessorList | None:
    seed = settings["seed"]
    if seed is None or not settings["do_sample"]:
        return processors
    if (settings["num_beams"] or 1) > 1:
        raise ValueError(f"seed={seed} can't be used with num_beams={settings['num_beams']}: drop one.")
    return LogitsProcessorList([*(processors or ()), SeededSampling(seed, prompt.length, arranged=False)])


class QWenGenerationMixin(_GenerativeModel):
    """`generate` with the published extras.

    `generate` also takes `stop_words_ids`, a list of token sequences of which each ends a text, and `seed`, which makes
    sampling repeatable, whatever the state of the global generator, which it doesn't seed.
    """

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        prefix_allowed_tokens_fn: Any = None,
        synced_gpus: bool | None = None,
        assistant_model: Any = None,
        streamer: BaseStreamer | None = None,
        **kwargs: Any,
    ) -> Any:
        """As in transformers, with `stop_words_ids`, `seed`, the model's own cache, and the NTK alpha of each prompt.

        The cache to continue may be given as `cache` or `past_key_values`, whatever transformers calls it.

        Args:
            stop_words_ids: token sequences, as an argument or in the generation configuration; each ends a text.
            seed: likewise; makes sampling repeatable, whatever the state of the global generator.
            (the others): as in transformers.

        Raises:
            ValueError: a configuration, stop words or a seed of the wrong form; a seed with beams; no beam; two
                different caches; settings of a cache that nobody would make.
        """
        check_generation_config(generation_config)
        extras = {name: kwargs.pop(name) for name in _EXTRAS if name in kwargs}
        settings = GenerationSettings(self, generation_config, {**kwargs, **extras})
        check_settings(self, settings, extras.get("stop_words_ids"))
        given = one_cache(*(kwargs.pop(name, None) for name in CACHE_NAMES))
        arguments = dict(generation_config=generation_config, synced_gpus=synced_gpus, assistant_model=assistant_model)
        arguments |= dict(prefix_allowed_tokens_fn=prefix_allowed_tokens_fn, streamer=streamer)
        if settings["cache_implementation"] == "paged" or isinstance(kwargs.get("custom_generate"), str):
            # Another program runs these, which reads prompts and settings itself.
            arguments |= {"logits_processor": logits_processor, "stopping_criteria": stopping_criteria}
            return super().generate(inputs, **arguments, **extras, **cache_argument(given), **kwargs)
        prompt = Prompt.read(inputs, kwargs, settings)
        arguments["stopping_criteria"] = _with_stop_words(stopping_criteria, settings, prompt)
        arguments["logits_processor"] = _with_seed(logits_processor, settings, prompt)
        cache = _cache_of_generation(self, given, settings, assistant_model)
        # An assistant would be handed the argument too; and a `forward` that somebody has wrapped may not name it.
        named = assistant_model is None and "ntk_alpha" in inspect.signature(self.forward).parameters
        kwargs |= self._alpha_argument(prompt, cache, named)
        if settings["do_sample"] and not _OnlyChecks.is_in(stopping_criteria):
            draw_alike(self)
        late = asked_late(self, prompt.ids, cache, settings, arguments)
        with _CacheOfCall.forgotten(), nullcontext() if late is None else late:
            output = super().generate(inputs, **arguments, **cache_argument(cache), **kwargs)
        finished = output if late is None else late.finish(output, cache)
        return _without_drafts(_under_both_names(finished), settings, prompt, cache)

    @functools.wraps(GenerationMixin.prepare_inputs_for_generation)  # `generate` reads the names of its arguments
    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As in transformers; whoever comes between this and `forward` gets the cache under its first name.

        Peft (0.21) does, with a function in the place of this one or a hook before `forward`, and knows no other name:
        it would put its prefix into a cache that nobody uses, or before each token anew.
        """
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        between = "prepare_inputs_for_generation" in vars(self) or self._forward_pre_hooks
        if between and CACHE_NAME in inputs:
            inputs[CACHE_NAMES[0]] = inputs.pop(CACHE_NAME)
        return inputs

    _cache = _CacheOfCall()

    def _get_static_cache_init_shape(self) -> tuple[int, int] | None:
        """As in transformers, which knows the heads of this process by names of other models' projections only."""
        shape = super()._get_static_cache_init_shape()
        if shape is None:
            return None
        projection = self.transformer.h[0].attn.c_attn
        return *shares_of_process(projection, self.config.num_key_value_heads), self.config.kv_channels

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """As in transformers, which takes no cache beside the name of one, not even beside its own."""
        named = generation_config.cache_implementation is not None
        wanted = cache_of_settings(self, GenerationSettings(self, generation_config)) if named else None
        if wanted is not None and continues(model_kwargs.get(CACHE_NAME), wanted):
            generation_config.cache_implementation = None
        generation_config.cache_config = copy.copy(generation_config.cache_config)  # 5.4 takes keys out of the caller's
        return super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)

    def _valid_auto_compile_criteria(self, model_kwargs: dict[str, Any], generation_config: GenerationConfig) -> bool:
        """As in transformers, but where kernels are quicker than what would be compiled: not if a `compile_config` asks
        for that, nor where several tokens are read at once, or more is returned than kernels tell.
        """
        cache: Any = model_kwargs.get(CACHE_NAME)
        static = type(cache) is StaticCache and not cache.offloading and len(cache.layers) == len(self.transformer.h)
        plain = static and all(type(layer) is StaticLayer for layer in cache.layers)
        if plain and not any(getattr(generation_config, name, None) for name in _COMPILED):
            if self.transformer.takes_static_cache():
                return False
        return super()._valid_auto_compile_criteria(model_kwargs, generation_config)

    def _get_stopping_criteria(self, *args: Any, **kwargs: Any) -> StoppingCriteriaList:
        """As in transformers, which asks for them last before the first step; on a GPU they may be asked late."""
        criteria = super()._get_stopping_criteria(*args, **kwargs)
        if _OnlyChecks.is_in(criteria):
            raise _Checked
        return with_late_answers(criteria)

    def _get_logits_processor(self, *args: Any, **kwargs: Any) -> LogitsProcessorList:
        """Transformers puts temperature, top_k and so on behind what it is given; a seed draws from their result."""
        processors = super()._get_logits_processor(*args, **kwargs)
        return LogitsProcessorList(sorted(processors, key=SeededSampling.comes_last))

    def init_continuous_batching(
        self,
        generation_config: GenerationConfig | None = None,
        continuous_batching_config: ContinuousBatchingConfig | None = None,
        **kwargs: Any,
    ) -> Any:
        """As in transformers, without sharing the keys of equal beginnings while `use_dynamic_ntk` is on: the keys of a
        longer text are rotated by another alpha.
        """
        if self.config.use_dynamic_ntk:
            continuous_batching_config = copy.copy(continuous_batching_config or ContinuousBatchingConfig())
            continuous_batching_config.allow_block_sharing = False
        return super().init_continuous_batching(generation_config, continuous_batching_config, **kwargs)

    def _alpha_argument(self, prompt: Prompt, cache: Cache | None, named: bool) -> dict[str, torch.Tensor]:
        """The alpha of each row as an argument of `forward`, (B, 1), which doesn't see the whole prompt in chunks,
        behind drafts or without a cache; kept by the cache alone where `forward` can't be given it.
        """
        if not self.config.use_dynamic_ntk or self.training or prompt.ntk_alpha is not None:
            return {}
        held = held_ntk_alpha(cache)
        if held is not None and held.shape[0] not in (1, prompt.rows):
            return {}  # of beams or samples, which `forward` tells apart
        alpha = self.transformer.choose_alpha(prompt.position_ids).amax(-1, keepdim=True) if held is None else held
        if named:
            return {"ntk_alpha": alpha.expand(prompt.rows, -1)}
        if held is None and cache is not None:
            set_ntk_alpha(cache, alpha.expand(prompt.rows, -1), planned=True)
        return {}


def _cache_of_generation(model: Any, given: Any, settings: GenerationSettings, assistant_model: Any) -> Any:
    """The cache of a call, None for one that transformers makes."""
    cache = cache_of_settings(model, settings) if given is None else given
    if cache is not None or settings["cache_implementation"] == "quantized":
        drafted = any(settings[name] is not None for name in ("prompt_lookup_num_tokens", "assistant_early_exit"))
        searched = drafted or assistant_model is not None or (settings["num_beams"] or 1) > 1
        refuse_quantized(model.config, cache, settings["cache_config"] or {}, searched)
    return cache


def cache_of_settings(model: Any, settings: GenerationSettings) -> Cache | None:
    """Empty cache of ours: the model's own where nothing else is asked for, or an int8 cache by its name; else None."""
    if settings["use_cache"] is False:
        return None
    if settings["cache_implementation"] in (None, "dynamic"):
        return new_cache(model.transformer)
    if settings["cache_implementation"] == "quantized":
        return named_cache(model.config, settings["cache_config"])
    return None


def sequences_of(output: Any) -> torch.Tensor:
    """Token ids of prompts and replies, (B, T), whatever form `generate` was asked to return."""
    return output if isinstance(output, torch.Tensor) else output.sequences


def eos_sequences(eos: Any) -> list[TokensType]:
    """The ids that end a text, one or several, as sequences of one token."""
    if isinstance(eos, torch.Tensor):
        eos = eos.flatten().tolist()
    return [] if eos is None else [[token] for token in (eos if isinstance(eos, list) else [eos])]
