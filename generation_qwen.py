"""Generation with the published extras, and conversations: the methods that `QWenLMHeadModel` takes from here."""

from __future__ import annotations

import copy
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.cache_utils import Cache
from transformers.generation.streamers import BaseStreamer

from .cache_qwen import INT8_BACKEND, KeptCache, QWenCache, QWenInt8Cache, set_ntk_alpha
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
    stream_text,
    stream_tokens,
    stream_until,
)
from .tools_qwen import OBSERVATION, Exchange, ToolResult, run_tools

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
        stops: sequences that end a reply.
        window: tokens of context.
        default_cache: whether keys and values are in a growing cache of one sequence, which a history can carry.
        stop_text: a text that ends a reply, whichever tokens it is made of.
    """

    generation_config: GenerationConfig
    other_kwargs: dict[str, Any]
    stops: list[TokensType]
    window: int
    default_cache: bool
    stop_text: str | None = None


class QWenGenerationMixin(_GenerativeModel):
    """`generate` with the published extras, and conversations: `chat`, `chat_stream`, `batch_chat`.

    `generate` also takes `stop_words_ids`, a list of token sequences of which each ends a text, and `seed`, which makes
    sampling repeatable, whatever the state of the global generator, which it doesn't seed.
    """

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
            stop_words_ids: token sequences that end the reply and are left out of it.
            generation_config: in place of the model's own.
            max_window_size: tokens of context; whole turns are left out from the front. Default: the generation
                configuration's, else 6144.
            reuse_cache: take up the keys and values that the history carries, as far as they agree with the prompt, and
                let the returned one carry them. Only what the model's default cache holds is carried.
            tools: what the model may call: functions with type hints and docstrings, JSON schemas, or `Tool`s. The
                reply is then a `ToolReply`, a text with the call or the answer in it; nothing is run here.
            generate_kwargs: anything that `generate` takes, such as `max_new_tokens`, `top_p`, `seed`.

        Returns:
            the response, and the history with this turn, a `ChatHistory`.

        Raises:
            ValueError: a base model, a query that alone is longer than the window, or arguments of the wrong form.
        """
        if stream:
            generate_kwargs |= {"generation_config": generation_config, "max_window_size": max_window_size}
            generate_kwargs |= {"reuse_cache": reuse_cache, "tools": tools}
            return self.chat_stream(tokenizer, query, history, system, stop_words_ids, **generate_kwargs)
        turns = checked_history(history)
        exchange = Exchange.begin(query, turns, tools)
        settings = self._chat_settings(tokenizer, stop_words_ids, generation_config, max_window_size, generate_kwargs)
        context = _exchange_context(tokenizer, exchange, system, settings)
        inputs = self._chat_inputs(tokenizer, [context], settings)
        cache = self._conversation_cache(history, context, settings) if reuse_cache else None
        sequences = _sequences_of(self.generate(**inputs, **_as_argument(cache)))
        (reply,) = self._read_replies(tokenizer, sequences, len(context), settings, count=1)
        said = ChatHistory(exchange.history(reply) if append_history else turns)
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
        settings = self._chat_settings(tokenizer, stop_words_ids, generation_config, max_window_size, generate_kwargs)
        if settings.generation_config.num_beams not in (None, 1):
            raise ValueError(f"num_beams={settings.generation_config.num_beams} can't be streamed: use chat.")
        exchange = Exchange.begin(query, history, tools)
        context = _exchange_context(tokenizer, exchange, system, settings)
        inputs = self._chat_inputs(tokenizer, [context], settings)
        cache = self._conversation_cache(history, context, settings) if reuse_cache else None
        criteria = inputs.pop("stopping_criteria", None) or ()
        autocast = _callers_autocast(self.device.type)

        def generate(streamer: BaseStreamer, stopping_criteria: list[StoppingCriteria]) -> None:
            every = StoppingCriteriaList([*criteria, *stopping_criteria])
            arguments = {**inputs, **_as_argument(cache), "logits_processor": logits_processor}
            with autocast:
                output = self.generate(**arguments, streamer=streamer, stopping_criteria=every)
            if cache is not None and isinstance(history, ChatHistory):
                history.kept = KeptCache(self, _sequences_of(output)[0].tolist(), cache)

        texts = stream_text(stream_tokens(generate), tokenizer, settings.stops)
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
        settings = self._chat_settings(tokenizer, stop_words_ids, generation_config, max_window_size, generate_kwargs)
        contexts = [
            fitting_context(tokenizer, *conversation, settings.window)
            for conversation in zip(queries, turns, systems, strict=True)
        ]
        inputs = self._chat_inputs(tokenizer, contexts, settings)
        sequences = _sequences_of(self.generate(**inputs))
        length = inputs["input_ids"].shape[1]
        replies = self._read_replies(tokenizer, sequences, length, settings, count=len(contexts))
        if append_history:
            turns = [[*turns[row], (query, replies[row])] for row, query in enumerate(queries)]
        return replies, turns

    def _chat_settings(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop_words_ids: list[TokensType] | None,
        generation_config: GenerationConfig | None,
        max_window_size: int | None,
        generate_kwargs: dict[str, Any],
    ) -> ChatSettings:
        # One configuration and no loose settings beside it, which transformers is about to refuse.
        settings: Any = copy.deepcopy(self.generation_config if generation_config is None else generation_config)
        other_kwargs = settings.update(**generate_kwargs)
        # As `generate` will see it: what the caller's configuration leaves open is the model's.
        merged, _ = self._prepare_generation_config(settings)
        chat_format = getattr(merged, "chat_format", "chatml")
        if chat_format != "chatml":
            raise ValueError(
                f"This checkpoint has chat_format={chat_format!r}: it is a base model, which continues texts and was "
                "not taught to chat. Load the chat model of the family, such as Qwen-7B-Chat, or use generate."
            )
        settings.pad_token_id = tokenizer.eod_id  # fills up rows that have ended, and is cut off with what ended them
        if merged.stop_strings is not None:
            other_kwargs["tokenizer"] = tokenizer  # which `generate` asks for with them
        configured = check_stop_words(getattr(merged, "stop_words_ids", None)) + _eos_sequences(merged)
        stops = check_stop_words(stop_words_ids) + configured + end_sequences(chat_format, tokenizer)
        settings.stop_words_ids = stops = [list(stop) for stop in dict.fromkeys(map(tuple, stops))]
        if max_window_size is None:
            max_window_size = getattr(merged, "max_window_size", None) or DEFAULT_WINDOW
        return ChatSettings(
            settings, other_kwargs, stops, max_window_size, self._has_default_cache(merged, other_kwargs)
        )

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
        inputs = {
            "input_ids": input_ids.to(self.device),
            "attention_mask": attention_mask.to(self.device),
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
        texts = [decode_text(tokenizer, reply[: find_end(reply, settings.stops)]).strip() for reply in replies]
        if settings.stop_text is None:
            return texts
        return [text.partition(settings.stop_text)[0].rstrip() for text in texts]

    def _conversation_cache(
        self, history: Iterable[Sequence[str]] | None, context: TokensType, settings: ChatSettings
    ) -> QWenCache | None:
        """A branch of what the history carries, or an empty cache; None where another kind of cache is asked for."""
        if not settings.default_cache or self.training:
            return None
        kept: KeptCache | None = getattr(history, "kept", None)
        branch = None if kept is None else kept.branch(self, context)
        return QWenCache(config=self.config) if branch is None else branch

    def _has_default_cache(self, generation_config: Any, other_kwargs: dict[str, Any]) -> bool:
        """Whether generation keeps one sequence in the model's growing cache and nothing else."""
        others = ("cache_implementation", "prompt_lookup_num_tokens", "assistant_early_exit")
        return (
            not self.config.use_cache_quantization
            and generation_config.use_cache is not False
            and all(getattr(generation_config, name, None) is None for name in others)
            and all((getattr(generation_config, name, 1) or 1) == 1 for name in ("num_beams", "num_return_sequences"))
            and not {"past_key_values", "assistant_model", "custom_generate"} & other_kwargs.keys()
        )

    def _prepare_generation_config(
        self, generation_config: GenerationConfig | None, **kwargs: Any
    ) -> tuple[GenerationConfig, dict[str, Any]]:
        extras = {name: kwargs.pop(name) for name in ("stop_words_ids", "seed") if name in kwargs}
        generation_config, model_kwargs = super()._prepare_generation_config(generation_config, **kwargs)
        for name, value in extras.items():
            setattr(generation_config, name, value)
        return generation_config, model_kwargs

    def _prepare_generated_length(self, generation_config: Any, **kwargs: Any) -> GenerationConfig:
        # The configuration is a copy made for this call; the extras below count from here.
        generation_config._prompt_length = kwargs["input_ids_length"]
        return super()._prepare_generated_length(generation_config, **kwargs)

    def _get_stopping_criteria(self, generation_config: Any, *args: Any, **kwargs: Any) -> StoppingCriteriaList:
        criteria = super()._get_stopping_criteria(generation_config, *args, **kwargs)
        words = getattr(generation_config, "stop_words_ids", None)
        if words is not None:
            criteria.append(StopWordsCriteria(words, generation_config._prompt_length))
        return criteria

    def _get_logits_processor(self, generation_config: Any, *args: Any, **kwargs: Any) -> LogitsProcessorList:
        processors = super()._get_logits_processor(generation_config, *args, **kwargs)
        seed = getattr(generation_config, "seed", None)
        if seed is not None and generation_config.do_sample:
            if generation_config.num_beams > 1:
                raise ValueError(f"seed={seed} can't be used with num_beams={generation_config.num_beams}: drop one.")
            processors.append(SeededSampling(seed, generation_config._prompt_length))
        return processors

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        cache = self._own_cache(generation_config, model_kwargs)
        if cache is not None:
            model_kwargs["past_key_values"] = cache
        else:
            super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        # Early releases of transformers 5 keep a static cache here and hand it to the next request, even one at once.
        self.__dict__.pop("_cache", None)
        self._plan_ntk(model_kwargs)

    def _own_cache(self, generation_config: GenerationConfig, model_kwargs: dict[str, Any]) -> Cache | None:
        """The model's own cache where nothing else is asked for, or the int8 cache by its name."""
        if model_kwargs.get("past_key_values") is not None or generation_config.use_cache is False:
            return None
        if generation_config.cache_implementation in (None, "dynamic"):
            return self.transformer.new_cache()
        backend = (generation_config.cache_config or {}).get("backend")
        named = generation_config.cache_implementation == "quantized" and backend == INT8_BACKEND
        return QWenInt8Cache(self.config) if named else None

    def _plan_ntk(self, model_kwargs: dict[str, Any]) -> None:
        """Choose alpha from the whole prompt, which `forward` doesn't see in chunks or without a cache."""
        position_ids = model_kwargs.get("position_ids")
        if not self.config.use_dynamic_ntk or self.training or position_ids is None:
            return
        alpha = self.transformer.choose_alpha(position_ids).amax(-1, keepdim=True)
        cache = model_kwargs.get("past_key_values")
        if cache is None:
            model_kwargs["ntk_alpha"] = alpha
        elif int(cache.get_seq_length()) == 0:
            set_ntk_alpha(cache, alpha, planned=True)


def _sequences_of(output: Any) -> torch.Tensor:
    """Token ids of prompts and replies, (B, T), whatever form `generate` was asked to return."""
    return output if isinstance(output, torch.Tensor) else output.sequences


def _exchange_context(
    tokenizer: PreTrainedTokenizerBase, exchange: Exchange, system: str, settings: ChatSettings
) -> TokensType:
    """Token ids of the prompt of an exchange; where it has tools, its replies end where they are to speak."""
    settings.stop_text = OBSERVATION if exchange.tools else None
    return fitting_context(tokenizer, exchange.prompt, exchange.earlier, system, settings.window, exchange.begun)


def _as_argument(cache: QWenCache | None) -> dict[str, QWenCache]:
    return {} if cache is None else {"past_key_values": cache}


def _callers_autocast(device_type: str) -> AbstractContextManager[Any]:
    """The autocast of this thread, for another one to enter, which inherits none."""
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return nullcontext()
    dtype, cached = torch.get_autocast_dtype(device_type), torch.is_autocast_cache_enabled()
    return torch.autocast(device_type, dtype=dtype, cache_enabled=cached)


def _eos_sequences(generation_config: GenerationConfig) -> list[TokensType]:
    eos = generation_config.eos_token_id
    if isinstance(eos, torch.Tensor):
        eos = eos.flatten().tolist()
    return [] if eos is None else [[token] for token in (eos if isinstance(eos, list) else [eos])]
