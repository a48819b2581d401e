"""Conversations: `chat`, `chat_stream` and `batch_chat`, the methods that `QWenLMHeadModel` takes from here."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.cache_utils import Cache
from transformers.generation.streamers import BaseStreamer

from .arguments_qwen import CACHE_NAMES, cache_argument
from .generation_qwen import (
    GenerationSettings,
    cache_of_settings,
    check_generation,
    check_generation_config,
    check_settings,
    eos_sequences,
    sequences_of,
)
from .kept_qwen import KEPT, KeptCache, cache_of_turn
from .qwen_generation_utils import (
    DEFAULT_SYSTEM,
    ChatHistory,
    HistoryType,
    StopTextCriteria,
    TokensType,
    check_stop_words,
    checked_history,
    checked_window,
    decode_text,
    end_sequences,
    find_end,
    fitting_context,
    plain_text,
)
from .streaming_qwen import stream_text, stream_tokens, stream_until
from .tools_qwen import OBSERVATION, Exchange, ToolResult, run_tools

_MADE_HERE = ("inputs", "input_ids", "inputs_embeds", "attention_mask", "position_ids", "ntk_alpha")
"""Arguments of `generate` that a chat makes from the conversation."""


@dataclass
class Choices:
    """Arguments that the methods share, as `chat` describes them."""

    stop_words_ids: list[TokensType] | None = None
    generation_config: GenerationConfig | None = None
    max_window_size: int | None = None
    keep_stop_words: bool = True


@dataclass
class ChatCall:
    """One call of a chat: what its arguments ask for, and the way from conversations to replies.

    Attributes:
        model: a `QWenLMHeadModel`.
        tokenizer: of the checkpoint.
        generation_config: a copy of the caller's or the model's, with the loose settings of the call in it.
        other_kwargs: arguments of `generate` that are no settings.
        cut: token sequences that end a reply and are no part of it.
        kept: those that are, stop words as published.
        window: tokens of context.
        carried: whether keys and values are in a cache of one sequence that a history can carry.
        stop_text: a text that ends a reply, whichever tokens it is made of.
    """

    model: Any
    tokenizer: PreTrainedTokenizerBase
    generation_config: GenerationConfig
    other_kwargs: dict[str, Any]
    cut: list[TokensType]
    kept: list[TokensType]
    window: int
    carried: bool
    stop_text: str | None = None

    @classmethod
    def begin(
        cls,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        query: str | ToolResult | Mapping[str, Any],
        history: Iterable[Sequence[str]] | None,
        tools: Iterable[Any] | None,
        choices: Choices,
        generate_kwargs: dict[str, Any],
    ) -> tuple[ChatCall, Exchange]:
        """The call of a single conversation, and its turn; with tools, replies end where the tools are to speak."""
        call = cls.prepare(model, tokenizer, choices, generate_kwargs, has_tools=tools is not None)
        exchange = Exchange.begin(query, history, tools)
        call.stop_text = OBSERVATION if exchange.tools else None
        return call, exchange

    @classmethod
    def prepare(
        cls,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        choices: Choices,
        generate_kwargs: dict[str, Any],
        has_tools: bool = False,
    ) -> ChatCall:
        """From the arguments of `chat`, whose errors it raises."""
        _check_tokenizer(tokenizer)
        check_generation_config(choices.generation_config)
        # One configuration and no loose settings beside it, which transformers is about to refuse.
        settings: Any = copy.deepcopy(choices.generation_config or model.generation_config)
        other_kwargs = settings.update(**generate_kwargs)
        _refuse_inputs(other_kwargs)
        effective = GenerationSettings(model, settings)
        check_settings(model, effective, choices.stop_words_ids)
        _refuse_several(effective["num_return_sequences"])
        chat_format = effective["chat_format"] or "chatml"
        _refuse_base_model(chat_format)
        settings.pad_token_id = tokenizer.eod_id  # fills up rows that have ended, and is cut off with what ended them
        if effective["stop_strings"] is not None:
            other_kwargs["tokenizer"] = tokenizer  # which `generate` asks for with them
        words = check_stop_words(choices.stop_words_ids) + check_stop_words(effective["stop_words_ids"])
        ends = eos_sequences(effective["eos_token_id"]) + end_sequences(chat_format, tokenizer)
        settings.stop_words_ids = [list(stop) for stop in dict.fromkeys(map(tuple, words + ends))]
        window = checked_window(choices.max_window_size, effective["max_window_size"])
        cut, kept = (ends, words) if choices.keep_stop_words and not has_tools else (ends + words, [])
        carried = _can_carry_cache(model, effective, other_kwargs)
        return cls(model, tokenizer, settings, other_kwargs, cut, kept, window, carried)

    def answer(
        self, exchange: Exchange, system: str, history: Iterable[Sequence[str]] | None, reuse_cache: bool
    ) -> tuple[str, KeptCache | None]:
        """The reply to an exchange, and what is kept of it."""
        context = self.context(exchange, system)
        inputs = self.inputs([context])
        cache = self.cache(history, context) if reuse_cache else None
        sequences = sequences_of(self.model.generate(**inputs, **cache_argument(cache)))
        (reply,) = self.replies(sequences, len(context))
        return reply, None if cache is None else KeptCache(self.model, sequences[0].tolist(), cache)

    def answer_batch(self, conversations: list[tuple[str, HistoryType, str]]) -> list[str]:
        """The replies to queries with their turns and system messages, as a single batch."""
        contexts = [fitting_context(self.tokenizer, *conversation, self.window) for conversation in conversations]
        inputs = self.inputs(contexts)
        sequences = sequences_of(self.model.generate(**inputs))
        return self.replies(sequences, inputs["input_ids"].shape[1])

    def stream(
        self,
        exchange: Exchange,
        system: str,
        history: Iterable[Sequence[str]] | None,
        reuse_cache: bool,
        logits_processor: LogitsProcessorList | None,
    ) -> Generator[str, None, None]:
        """The reply to an exchange as it grows; a `ChatHistory` gets what is kept of it."""
        if self.generation_config.num_beams not in (None, 1):
            raise ValueError(f"num_beams={self.generation_config.num_beams} can't be streamed: use chat.")
        context = self.context(exchange, system)
        inputs = self.inputs([context])
        check_generation(self.model, {**inputs, "logits_processor": logits_processor})
        cache = self.cache(history, context) if reuse_cache else None
        criteria = inputs.pop("stopping_criteria", None) or ()
        autocast = _callers_autocast(inputs["input_ids"].device.type)

        def generate(streamer: BaseStreamer, stopping_criteria: list[StoppingCriteria]) -> None:
            every = StoppingCriteriaList([*criteria, *stopping_criteria])
            arguments = {**inputs, **cache_argument(cache), "logits_processor": logits_processor}
            with autocast:
                output = self.model.generate(**arguments, streamer=streamer, stopping_criteria=every)
            if cache is not None and isinstance(history, ChatHistory):
                history.kept = KeptCache(self.model, sequences_of(output)[0].tolist(), cache)

        texts = stream_text(stream_tokens(generate), self.tokenizer, self.cut, self.kept)
        return texts if self.stop_text is None else exchange.stream(stream_until(texts, self.stop_text))

    def context(self, exchange: Exchange, system: str) -> TokensType:
        """Token ids of the prompt of an exchange."""
        return fitting_context(self.tokenizer, exchange.prompt, exchange.earlier, system, self.window, exchange.begun)

    def inputs(self, contexts: list[TokensType]) -> dict[str, Any]:
        """Arguments of `generate` for a batch of prompts, padded on the left."""
        length = max(len(context) for context in contexts)
        input_ids = torch.full((len(contexts), length), self.tokenizer.eod_id)
        attention_mask = torch.zeros_like(input_ids)
        for row, context in enumerate(contexts):
            input_ids[row, length - len(context) :] = torch.tensor(context)
            attention_mask[row, length - len(context) :] = 1
        device = _input_device(self.model)
        inputs = {
            "input_ids": input_ids.to(device),
            "attention_mask": attention_mask.to(device),
            "generation_config": self.generation_config,
            **self.other_kwargs,
        }
        if self.stop_text is not None:
            stop = StopTextCriteria(self.stop_text, self.tokenizer, length)
            inputs["stopping_criteria"] = StoppingCriteriaList([*(inputs.get("stopping_criteria") or ()), stop])
        return inputs

    def replies(self, sequences: torch.Tensor, length: int) -> list[str]:
        """The texts behind prompts of `length` tokens, one for each conversation."""
        replies = sequences[:, length:].tolist()
        ends = [find_end(reply, self.cut, self.kept) for reply in replies]
        texts = [decode_text(self.tokenizer, reply[:end]).strip() for reply, end in zip(replies, ends, strict=True)]
        if self.stop_text is None:
            return texts
        return [text.partition(self.stop_text)[0].rstrip() for text in texts]

    def cache(self, history: Iterable[Sequence[str]] | None, context: TokensType) -> Cache | None:
        """A branch of what the history carries, or an empty cache; None where none can be kept or others are used."""
        if not self.carried or self.model.training:
            return None
        empty = cache_of_settings(self.model, GenerationSettings(self.model, self.generation_config))
        return cache_of_turn(self.model, getattr(history, "kept", None), context, empty)


if TYPE_CHECKING:
    _Model: Any
else:
    _Model = object


class QWenChatMixin(_Model):
    """Conversations: `chat`, `chat_stream`, `batch_chat`, `run_tools`."""

    run_tools = run_tools  # of `tools_qwen.py`, its first argument being the model

    @staticmethod
    def new_history() -> ChatHistory:
        """A history without turns that can carry keys and values, for `chat_stream`, which returns none."""
        return ChatHistory()

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
        """Answer a query: the response, and the history with this turn, a `ChatHistory`.

        Args:
            query: what the user says now; or what a tool gave for the call that the history ends with, a `ToolResult`
                or `{"role": "tool", "content": …}`.
            history: earlier turns as returned here, or None; never changed.
            append_history: add this turn to the history returned.
            stream: return what `chat_stream` returns.
            stop_words_ids: token sequences that end the reply.
            generation_config: in place of the model's own.
            max_window_size: tokens of context; whole turns are left out from the front, all of them, with a warning,
                where the query alone is longer. Default: the generation configuration's, else 6144.
            reuse_cache: take up the keys and values that the history carries, and let the returned one carry them.
            tools: what the model may call: functions with type hints and docstrings, JSON schemas, or `Tool`s. The
                reply is then a `ToolReply`, a text with the call or the answer in it; nothing is run here.
            keep_stop_words: leave the stop word that ended the reply in it, as published; never with tools.
            generate_kwargs: anything that `generate` takes, such as `max_new_tokens`, `top_p`, `seed`.

        Raises:
            ValueError: a base model, a prompt that leaves no room within `max_length`, arguments of the wrong form.
        """
        _refuse_others("chat", generate_kwargs)
        choices = Choices(stop_words_ids, generation_config, max_window_size, keep_stop_words)
        if stream:
            more = {**vars(choices), "reuse_cache": reuse_cache, "tools": tools, **generate_kwargs}
            return self.chat_stream(tokenizer, query, history, system, **more)
        turns = checked_history(history)
        call, exchange = ChatCall.begin(self, tokenizer, query, turns, tools, choices, generate_kwargs)
        reply, kept = call.answer(exchange, system, history, reuse_cache)
        said = ChatHistory(checked_history(exchange.history(reply)) if append_history else turns)
        said.kept = kept
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
        _refuse_others("chat_stream", generate_kwargs)
        if generate_kwargs.pop("streamer", None) is not None:
            raise ValueError("chat_stream is a stream itself: read what it yields, and leave out streamer.")
        choices = Choices(stop_words_ids, generation_config, max_window_size, keep_stop_words)
        call, exchange = ChatCall.begin(self, tokenizer, query, history, tools, choices, generate_kwargs)
        return call.stream(exchange, system, history, reuse_cache, logits_processor)

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
        _refuse_others("batch_chat", generate_kwargs)
        choices = Choices(stop_words_ids, generation_config, max_window_size, keep_stop_words)
        call = ChatCall.prepare(self, tokenizer, choices, generate_kwargs)
        queries, turns, systems = _lists_of_batch(queries, histories, system)
        if not queries:
            return [], []
        replies = call.answer_batch(list(zip(queries, turns, systems, strict=True)))
        if append_history:
            turns = [[*turns[row], (plain_text(query), replies[row])] for row, query in enumerate(queries)]
        return replies, turns


def _lists_of_batch(queries: Any, histories: Any, system: Any) -> tuple[list[str], list[HistoryType], list[str]]:
    """The queries, histories and system messages of a batch, a list of the same length each."""
    queries = _listed("queries", queries, "a list of texts; for a single one use chat")
    histories = [None] * len(queries) if histories is None else histories
    histories = _listed("histories", histories, "None or a list of histories, one for each query")
    systems = [system] * len(queries) if isinstance(system, str) else system
    systems = _listed("system", systems, "a text, or a list of texts, one for each query")
    for name, values in (("histories", histories), ("system", systems)):
        if len(values) != len(queries):
            raise ValueError(f"{name} has {len(values)} entries for {len(queries)} queries: give one for each.")
    for name, texts in (("queries", queries), ("system", systems)):
        for row, text in enumerate(texts):
            if not isinstance(text, str):
                raise ValueError(f"{name}[{row}]={text!r:.80} must be a text.")
    turns = [checked_history(history, f"histories[{row}]") for row, history in enumerate(histories)]
    return queries, turns, systems


def _listed(name: str, values: Any, wanted: str) -> list[Any]:
    """An argument of a batch as a list."""
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise ValueError(f"{name}={values!r:.80} must be {wanted}.")
    return list(values)


def _refuse_others(method: str, arguments: Mapping[str, Any]) -> None:
    """Refuse arguments that another method of a chat has and `generate` hasn't; None asks for nothing."""
    methods = (QWenChatMixin.chat, QWenChatMixin.chat_stream, QWenChatMixin.batch_chat)
    named = {one.__name__: inspect.signature(one).parameters for one in methods}
    for name, value in arguments.items():
        others = [other for other, parameters in named.items() if name in parameters]
        if others and value is not None and name != "logits_processor":
            raise ValueError(f"{method} has no {name}: leave it out, or use {' or '.join(others)}.")


def _check_tokenizer(tokenizer: Any) -> None:
    """Refuse what doesn't know the control tokens of a chat, such as the query in the place of the tokenizer."""
    if not all(hasattr(tokenizer, name) for name in ("eod_id", "im_start_id", "im_end_id")):
        raise ValueError(
            f"tokenizer={tokenizer!r:.80} must be a tokenizer of QWen, the first argument: load the checkpoint's by "
            "AutoTokenizer.from_pretrained(folder, trust_remote_code=True)."
        )


def _refuse_base_model(chat_format: str) -> None:
    if chat_format != "chatml":
        raise ValueError(
            f"This checkpoint has chat_format={chat_format!r}: it is a base model, which continues texts and was "
            "not taught to chat. Load the chat model of the family, such as Qwen-7B-Chat, or use generate. If it "
            "has been fine-tuned on conversations, tell it so: model.generation_config.chat_format = 'chatml', or "
            '"chat_format": "chatml" in its generation_config.json.'
        )


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


def _refuse_several(count: int | None) -> None:
    """Refuse several replies to a query, of which a history can take one, rather than throw the others away."""
    if (count or 1) > 1:
        raise ValueError(
            f"num_return_sequences={count} must be 1 in a chat, which gives one reply to each query: for several give "
            "batch_chat the query as often, or use generate."
        )


def _can_carry_cache(model: Any, settings: GenerationSettings, other_kwargs: dict[str, Any]) -> bool:
    """Whether generation keeps one sequence in a cache of the model's own that may be cut short, and nothing else."""
    others = ("prompt_lookup_num_tokens", "assistant_early_exit")
    return (
        isinstance(cache_of_settings(model, settings), KEPT)
        and all(settings[name] is None for name in others)
        and (settings["num_beams"] or 1) == 1
        and not {*CACHE_NAMES, "assistant_model", "custom_generate"} & other_kwargs.keys()
    )


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
    device: torch.device = next(embedding.parameters()).device  # in few bits it has no weight
    if device.type == "meta":
        raise ValueError(
            "The embedding of this model is on the meta device, and no hook of accelerate takes it to another (early "
            "releases of transformers 5 put none where all is on a disk): load it with another device_map."
        )
    return device


def _callers_autocast(device_type: str) -> AbstractContextManager[Any]:
    """The autocast of this thread, for another one to enter, which inherits none."""
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return nullcontext()
    dtype, cached = torch.get_autocast_dtype(device_type), torch.is_autocast_cache_enabled()
    return torch.autocast(device_type, dtype=dtype, cache_enabled=cached)
