"""Generation with the published extras, and conversations: the methods that `QWenLMHeadModel` takes from here."""

from __future__ import annotations

import copy
import functools
import inspect
import threading
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    ContinuousBatchingConfig,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.cache_utils import Cache
from transformers.generation.streamers import BaseStreamer

from .arguments_qwen import CACHE_NAME, CACHE_NAMES, cache_argument, one_cache
from .cache_qwen import INT8_BACKEND, QWenCache, QWenInt8Cache, new_cache
from .kept_qwen import KeptCache, cache_of_turn
from .ntk_qwen import held_ntk_alpha, set_ntk_alpha
from .qwen_generation_utils import (
    DEFAULT_SYSTEM,
    DEFAULT_WINDOW,
    ChatHistory,
    HistoryType,
    SeededSampling,
    StopTextCriteria,
    StopWordsCriteria,
    TokensType,
    check_stop_words,
    checked_history,
    decode_text,
    end_sequences,
    find_end,
    fitting_context,
    plain_text,
    stream_text,
    stream_tokens,
    stream_until,
)
from .tools_qwen import OBSERVATION, Exchange, ToolResult, run_tools

_EXTRAS = ("stop_words_ids", "seed")
"""Settings that `generate` knows beyond those of transformers."""

if TYPE_CHECKING:
    _GenerativeModel: Any  # transformers types `self` as a protocol that holds its own models only
else:
    _GenerativeModel = GenerationMixin


@dataclass
class ChatSettings:
    """What the arguments of a chat ask for, in all conversations of the call.

    Attributes:
        generation_config: a copy of the caller's or the model's, with the loose settings of the call in it.
        other_kwargs: arguments of `generate` that are no settings.
        cut: token sequences that end a reply and are no part of it.
        kept: those that are, stop words as published.
        window: tokens of context.
        default_cache: whether keys and values are in a growing cache of one sequence, which a history can carry.
        stop_text: a text that ends a reply, whichever tokens it is made of.
    """

    generation_config: GenerationConfig
    other_kwargs: dict[str, Any]
    cut: list[TokensType]
    kept: list[TokensType]
    window: int
    default_cache: bool
    stop_text: str | None = None


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
        rows: number of texts B.
        length: tokens that the output begins with; 0 where only embeddings are given.
        position_ids: (B or 1, tokens of the whole prompt), 0 for padding.
        ntk_alpha: given by the caller, (B, 1), or None.
    """

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
        return cls(len(read), 0 if ids is None else ids.shape[1], positions, arguments.get("ntk_alpha"))


def _mask_of_padding(read: torch.Tensor, settings: GenerationSettings) -> torch.Tensor:
    """The mask that transformers infers where none is given, (B, T): no padding, if that ends no text."""
    pad, ends = settings["pad_token_id"], [end for (end,) in _eos_sequences(settings["eos_token_id"])]
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


def _without_drafts(output: Any, settings: GenerationSettings, prompt: Prompt) -> Any:
    """What `generate` returns, without what was drafted behind a stop word and accepted in one step with it."""
    sequences = _sequences_of(output)
    if settings["stop_words_ids"] is None or len(sequences) > 1:  # only single texts are drafted
        return output
    written = sequences[0, prompt.length :].tolist()
    end = find_end(written, cut=(), kept=check_stop_words(settings["stop_words_ids"]))
    kept = sequences if end is None else sequences[:, : prompt.length + end]
    if isinstance(output, torch.Tensor):
        return kept
    output.sequences = kept
    return output


def _with_stop_words(
    criteria: StoppingCriteriaList | None, settings: GenerationSettings, prompt: Prompt
) -> StoppingCriteriaList | None:
    words = settings["stop_words_ids"]
    if words is None:
        return criteria
    return StoppingCriteriaList([*(criteria or ()), StopWordsCriteria(words, prompt.length)])


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
    """`generate` with the published extras, and conversations: `chat`, `chat_stream`, `batch_chat`.

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
            ValueError: stop words or a seed of the wrong form; a seed with beams; two different caches.
        """
        extras = {name: kwargs.pop(name) for name in _EXTRAS if name in kwargs}
        settings = GenerationSettings(self, generation_config, {**kwargs, **extras})
        given = one_cache(*(kwargs.pop(name, None) for name in CACHE_NAMES))
        arguments = {
            "generation_config": generation_config,
            "prefix_allowed_tokens_fn": prefix_allowed_tokens_fn,
            "synced_gpus": synced_gpus,
            "assistant_model": assistant_model,
            "streamer": streamer,
        }
        if settings["cache_implementation"] == "paged" or isinstance(kwargs.get("custom_generate"), str):
            # Another program runs these, which reads prompts and settings itself.
            arguments |= {"logits_processor": logits_processor, "stopping_criteria": stopping_criteria}
            return super().generate(inputs, **arguments, **extras, **cache_argument(given), **kwargs)
        prompt = Prompt.read(inputs, kwargs, settings)
        arguments["stopping_criteria"] = _with_stop_words(stopping_criteria, settings, prompt)
        arguments["logits_processor"] = _with_seed(logits_processor, settings, prompt)
        cache = self._default_cache(settings) if given is None else given
        if given is None and cache is not None and settings["cache_implementation"] is not None:
            kwargs["cache_implementation"] = None  # it is this cache
        # An assistant would be handed the argument too; and a `forward` that somebody has wrapped may not name it.
        named = assistant_model is None and "ntk_alpha" in inspect.signature(self.forward).parameters
        kwargs |= self._alpha_argument(prompt, cache, named)
        with _CacheOfCall.forgotten():
            output = super().generate(inputs, **arguments, **cache_argument(cache), **kwargs)
        return _without_drafts(_under_both_names(output), settings, prompt)

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

    def _default_cache(self, settings: GenerationSettings) -> Cache | None:
        """The model's own cache where nothing else is asked for, or the int8 cache by its name."""
        if settings["use_cache"] is False:
            return None
        if settings["cache_implementation"] in (None, "dynamic"):
            return new_cache(self.transformer)
        backend = (settings["cache_config"] or {}).get("backend")
        named = settings["cache_implementation"] == "quantized" and backend == INT8_BACKEND
        return QWenInt8Cache(self.config) if named else None

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

    def chat(
        self,
        tokenizer: PreTrainedTokenizerBase,
        query: str | ToolResult | Mapping[str, Any],
        history: Iterable[Sequence[str]] | None = None,
        system: str = DEFAULT_SYSTEM,
        append_history: bool = True,
        stream: bool = False,
        stop_words_ids: list[TokensType] | None = None,
        generation_config: GenerationConfig | None = None,
        max_window_size: int | None = None,
        reuse_cache: bool = True,
        tools: Iterable[Any] | None = None,
        keep_stop_words: bool = True,
        **generate_kwargs: Any,
    ) -> tuple[str, HistoryType] | Generator[str, None, None]:
        """Answer a query within a conversation.

        Args:
            tokenizer: the tokenizer of the checkpoint.
            query: what the user says now; or what a tool gave for the call that the history ends with, a `ToolResult`
                or `{"role": "tool", "content": …}`.
            history: earlier turns as returned here, or None; never changed.
            system: system message.
            append_history: add this turn to the history returned.
            stream: return what `chat_stream` returns.
            stop_words_ids: token sequences that end the reply.
            generation_config: in place of the model's own.
            max_window_size: tokens of context; whole turns are left out from the front, all of them, with a warning,
                where the query alone is longer. Default: the generation configuration's, else 6144.
            reuse_cache: take up the keys and values that the history carries, as far as they agree with the prompt, and
                let the returned one carry them. Only what the model's default cache holds is carried.
            tools: what the model may call: functions with type hints and docstrings, JSON schemas, or `Tool`s. The
                reply is then a `ToolReply`, a text with the call or the answer in it; nothing is run here.
            keep_stop_words: leave the stop word that ended the reply in it, and so in the history, as published; with
                tools and for the tokens that end every reply it is always left out.
            generate_kwargs: anything that `generate` takes, such as `max_new_tokens`, `top_p`, `seed`.

        Returns:
            the response, and the history with this turn, a `ChatHistory`.

        Raises:
            ValueError: a base model, a prompt that leaves no room for a reply within `max_length`, or arguments of the
                wrong form.
        """
        if stream:
            generate_kwargs |= {"generation_config": generation_config, "max_window_size": max_window_size}
            generate_kwargs |= {"reuse_cache": reuse_cache, "tools": tools, "keep_stop_words": keep_stop_words}
            return self.chat_stream(tokenizer, query, history, system, stop_words_ids, **generate_kwargs)
        turns = checked_history(history)
        exchange = Exchange.begin(query, turns, tools)
        keep = keep_stop_words and tools is None
        settings = self._chat_settings(
            tokenizer, stop_words_ids, keep, generation_config, max_window_size, generate_kwargs
        )
        context = _exchange_context(tokenizer, exchange, system, settings)
        inputs = self._chat_inputs(tokenizer, [context], settings)
        cache = self._conversation_cache(history, context, settings) if reuse_cache else None
        sequences = _sequences_of(self.generate(**inputs, **cache_argument(cache)))
        (reply,) = self._read_replies(tokenizer, sequences, len(context), settings, count=1)
        said = ChatHistory(checked_history(exchange.history(reply)) if append_history else turns)
        said.kept = None if cache is None else KeptCache(self, sequences[0].tolist(), cache)
        return exchange.reply(reply), said

    def chat_stream(
        self,
        tokenizer: PreTrainedTokenizerBase,
        query: str | ToolResult | Mapping[str, Any],
        history: Iterable[Sequence[str]] | None = None,
        system: str = DEFAULT_SYSTEM,
        stop_words_ids: list[TokensType] | None = None,
        logits_processor: LogitsProcessorList | None = None,
        generation_config: GenerationConfig | None = None,
        max_window_size: int | None = None,
        reuse_cache: bool = True,
        tools: Iterable[Any] | None = None,
        keep_stop_words: bool = True,
        **generate_kwargs: Any,
    ) -> Generator[str, None, None]:
        """As `chat`, yielding the response so far each time it has grown.

        Closing the generator stops the generation at once. Arguments are checked by the call itself, not by the first
        `next`. A `ChatHistory` that is passed in carries the keys and values of this turn too when the stream has ended
        or was closed; its turns stay as they are. A new one comes from `new_history`. With tools the last text is a
        `ToolReply`, and nothing of what ended it is shown before.
        """
        if generate_kwargs.pop("streamer", None) is not None:
            raise ValueError("chat_stream is a stream itself: read what it yields, and leave out streamer.")
        keep = keep_stop_words and tools is None
        settings = self._chat_settings(
            tokenizer, stop_words_ids, keep, generation_config, max_window_size, generate_kwargs
        )
        if settings.generation_config.num_beams not in (None, 1):
            raise ValueError(f"num_beams={settings.generation_config.num_beams} can't be streamed: use chat.")
        exchange = Exchange.begin(query, history, tools)
        context = _exchange_context(tokenizer, exchange, system, settings)
        inputs = self._chat_inputs(tokenizer, [context], settings)
        cache = self._conversation_cache(history, context, settings) if reuse_cache else None
        criteria = inputs.pop("stopping_criteria", None) or ()
        autocast = _callers_autocast(inputs["input_ids"].device.type)

        def generate(streamer: BaseStreamer, stopping_criteria: list[StoppingCriteria]) -> None:
            every = StoppingCriteriaList([*criteria, *stopping_criteria])
            arguments = {**inputs, **cache_argument(cache), "logits_processor": logits_processor}
            with autocast:
                output = self.generate(**arguments, streamer=streamer, stopping_criteria=every)
            if cache is not None and isinstance(history, ChatHistory):
                history.kept = KeptCache(self, _sequences_of(output)[0].tolist(), cache)

        texts = stream_text(stream_tokens(generate), tokenizer, settings.cut, settings.kept)
        return texts if settings.stop_text is None else exchange.stream(stream_until(texts, settings.stop_text))

    run_tools = run_tools  # of `tools_qwen.py`, its first argument being the model

    @staticmethod
    def new_history() -> ChatHistory:
        """A history without turns that can carry keys and values, for `chat_stream`, which returns none."""
        return ChatHistory()

    def batch_chat(
        self,
        tokenizer: PreTrainedTokenizerBase,
        queries: Sequence[str],
        histories: Sequence[Iterable[Sequence[str]] | None] | None = None,
        system: str | Sequence[str] = DEFAULT_SYSTEM,
        append_history: bool = True,
        stop_words_ids: list[TokensType] | None = None,
        generation_config: GenerationConfig | None = None,
        max_window_size: int | None = None,
        keep_stop_words: bool = True,
        **generate_kwargs: Any,
    ) -> tuple[list[str], list[HistoryType]]:
        """Answer one query in each of several conversations, as a single batch; each as it would be alone.

        Args:
            queries: one for each conversation.
            histories: one for each conversation, or None for new ones.
            system: one for all, or one for each.
            (the others): as `chat`.

        Returns:
            the responses and the histories, in the order of the queries.

        Raises:
            ValueError: as `chat`, or lists of different lengths.
        """
        if isinstance(queries, str):
            raise ValueError(f"queries={queries!r:.80} must be a list of texts; for a single one use chat.")
        queries = list(queries)
        histories = [None] * len(queries) if histories is None else list(histories)
        systems = [system] * len(queries) if isinstance(system, str) else list(system)
        for name, values in (("histories", histories), ("system", systems)):
            if len(values) != len(queries):
                raise ValueError(f"{name} has {len(values)} entries for {len(queries)} queries: give one for each.")
        if not queries:
            return [], []
        turns = [checked_history(history) for history in histories]
        settings = self._chat_settings(
            tokenizer, stop_words_ids, keep_stop_words, generation_config, max_window_size, generate_kwargs
        )
        contexts = [
            fitting_context(tokenizer, *conversation, settings.window)
            for conversation in zip(queries, turns, systems, strict=True)
        ]
        inputs = self._chat_inputs(tokenizer, contexts, settings)
        sequences = _sequences_of(self.generate(**inputs))
        length = inputs["input_ids"].shape[1]
        replies = self._read_replies(tokenizer, sequences, length, settings, count=len(contexts))
        if append_history:
            turns = [[*turns[row], (plain_text(query), replies[row])] for row, query in enumerate(queries)]
        return replies, turns

    def _chat_settings(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop_words_ids: list[TokensType] | None,
        keep_stop_words: bool,
        generation_config: GenerationConfig | None,
        max_window_size: int | None,
        generate_kwargs: dict[str, Any],
    ) -> ChatSettings:
        # One configuration and no loose settings beside it, which transformers is about to refuse.
        settings: Any = copy.deepcopy(self.generation_config if generation_config is None else generation_config)
        other_kwargs = settings.update(**generate_kwargs)
        _refuse_inputs(other_kwargs)
        effective = GenerationSettings(self, settings)
        chat_format = effective["chat_format"] or "chatml"
        if chat_format != "chatml":
            raise ValueError(
                f"This checkpoint has chat_format={chat_format!r}: it is a base model, which continues texts and was "
                "not taught to chat. Load the chat model of the family, such as Qwen-7B-Chat, or use generate. If it "
                "has been fine-tuned on conversations, tell it so: model.generation_config.chat_format = 'chatml', or "
                '"chat_format": "chatml" in its generation_config.json.'
            )
        settings.pad_token_id = tokenizer.eod_id  # fills up rows that have ended, and is cut off with what ended them
        if effective["stop_strings"] is not None:
            other_kwargs["tokenizer"] = tokenizer  # which `generate` asks for with them
        words = check_stop_words(stop_words_ids) + check_stop_words(effective["stop_words_ids"])
        ends = _eos_sequences(effective["eos_token_id"]) + end_sequences(chat_format, tokenizer)
        settings.stop_words_ids = [list(stop) for stop in dict.fromkeys(map(tuple, words + ends))]
        if max_window_size is None:
            max_window_size = effective["max_window_size"] or DEFAULT_WINDOW
        if not isinstance(max_window_size, int):
            raise ValueError(f"max_window_size={max_window_size!r} must be a whole number of tokens.")
        cut, kept = (ends, words) if keep_stop_words else (ends + words, [])
        default_cache = self._has_default_cache(effective, other_kwargs)
        return ChatSettings(settings, other_kwargs, cut, kept, max_window_size, default_cache)

    def _chat_inputs(
        self, tokenizer: PreTrainedTokenizerBase, contexts: list[TokensType], settings: ChatSettings
    ) -> dict[str, Any]:
        """Arguments of `generate` for a batch of prompts, padded on the left."""
        length = max(len(context) for context in contexts)
        input_ids = torch.full((len(contexts), length), tokenizer.eod_id)
        attention_mask = torch.zeros_like(input_ids)
        for row, context in enumerate(contexts):
            input_ids[row, length - len(context) :] = torch.tensor(context)
            attention_mask[row, length - len(context) :] = 1
        device = _input_device(self)
        inputs = {
            "input_ids": input_ids.to(device),
            "attention_mask": attention_mask.to(device),
            "generation_config": settings.generation_config,
            **settings.other_kwargs,
        }
        if settings.stop_text is not None:
            stop = StopTextCriteria(settings.stop_text, tokenizer, length)
            inputs["stopping_criteria"] = StoppingCriteriaList([*(inputs.get("stopping_criteria") or ()), stop])
        return inputs

    @staticmethod
    def _read_replies(
        tokenizer: PreTrainedTokenizerBase, sequences: torch.Tensor, length: int, settings: ChatSettings, count: int
    ) -> list[str]:
        """The texts behind prompts of `length` tokens, one for each of `count` conversations."""
        copies = len(sequences) // count  # num_return_sequences: the first of each is the reply
        replies = sequences[::copies, length:].tolist()
        ends = [find_end(reply, settings.cut, settings.kept) for reply in replies]
        texts = [decode_text(tokenizer, reply[:end]).strip() for reply, end in zip(replies, ends, strict=True)]
        if settings.stop_text is None:
            return texts
        return [text.partition(settings.stop_text)[0].rstrip() for text in texts]

    def _conversation_cache(
        self, history: Iterable[Sequence[str]] | None, context: TokensType, settings: ChatSettings
    ) -> QWenCache | None:
        """A branch of what the history carries, or an empty cache; None where none can be kept or others are used."""
        if not settings.default_cache or self.training:
            return None
        return cache_of_turn(self, getattr(history, "kept", None), context)

    def _has_default_cache(self, settings: GenerationSettings, other_kwargs: dict[str, Any]) -> bool:
        """Whether generation keeps one sequence in the model's growing cache and nothing else."""
        others = ("cache_implementation", "prompt_lookup_num_tokens", "assistant_early_exit")
        return (
            not self.config.use_cache_quantization
            and settings["use_cache"] is not False
            and all(settings[name] is None for name in others)
            and all((settings[name] or 1) == 1 for name in ("num_beams", "num_return_sequences"))
            and not {*CACHE_NAMES, "assistant_model", "custom_generate"} & other_kwargs.keys()
        )


def _sequences_of(output: Any) -> torch.Tensor:
    """Token ids of prompts and replies, (B, T), whatever form `generate` was asked to return."""
    return output if isinstance(output, torch.Tensor) else output.sequences


def _input_device(model: Any) -> torch.device:
    """Where token ids belong: beside the embedding, or where accelerate takes it to from the CPU or a disk.

    Raises:
        ValueError: weights that are nowhere.
    """
    embedding = model.get_input_embeddings()
    hook = getattr(embedding, "_hf_hook", None)
    for part in (hook, *getattr(hook, "hooks", ())):  # several hooks are one that has them
        execution_device = getattr(part, "execution_device", None)
        if execution_device is not None:
            return torch.empty(0, device=execution_device).device  # accelerate names a GPU by its number alone
    device: torch.device = embedding.weight.device
    if device.type == "meta":
        raise ValueError(
            "The embedding of this model is on the meta device, and no hook of accelerate takes it to another (early "
            "releases of transformers 5 put none where all is on a disk): load it with another device_map."
        )
    return device


def _exchange_context(
    tokenizer: PreTrainedTokenizerBase, exchange: Exchange, system: str, settings: ChatSettings
) -> TokensType:
    """Token ids of the prompt of an exchange; where it has tools, its replies end where they are to speak."""
    settings.stop_text = OBSERVATION if exchange.tools else None
    return fitting_context(tokenizer, exchange.prompt, exchange.earlier, system, settings.window, exchange.begun)


_MADE_HERE = ("inputs", "input_ids", "inputs_embeds", "attention_mask", "position_ids", "ntk_alpha")


def _refuse_inputs(arguments: Mapping[str, Any]) -> None:
    """Refuse arguments of `generate` that a chat makes from the conversation, rather than replace them.

    Raises:
        ValueError: names them.
    """
    given = [name for name in _MADE_HERE if name in arguments]
    if given:
        raise ValueError(
            f"A chat makes {', '.join(given)} from the conversation itself: leave that out, or use generate."
        )


def _callers_autocast(device_type: str) -> AbstractContextManager[Any]:
    """The autocast of this thread, for another one to enter, which inherits none."""
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return nullcontext()
    dtype, cached = torch.get_autocast_dtype(device_type), torch.is_autocast_cache_enabled()
    return torch.autocast(device_type, dtype=dtype, cache_enabled=cached)


def _eos_sequences(eos: Any) -> list[TokensType]:
    """The ids that end a text, one or several, as sequences of one token."""
    if isinstance(eos, torch.Tensor):
        eos = eos.flatten().tolist()
    return [] if eos is None else [[token] for token in (eos if isinstance(eos, list) else [eos])]
