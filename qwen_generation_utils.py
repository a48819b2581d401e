"""Chat helpers: the prompt of a conversation, the end of a reply, and streaming it while it is written.

The first three functions carry their published names and arguments, because users import them.
"""

from __future__ import annotations

import copy
import queue
import random
import threading
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.cache_utils import Cache
from transformers.generation.streamers import BaseStreamer

from .cache_qwen import INT8_BACKEND, QWenInt8Cache, set_ntk_alpha

if TYPE_CHECKING:
    _GenerativeModel: Any  # transformers types `self` as a protocol that holds its own models only
else:
    _GenerativeModel = GenerationMixin

HistoryType = list[tuple[str, str]]
"""Earlier turns of a conversation: (query, response), oldest first."""

TokensType = list[int]

DEFAULT_SYSTEM = "You are a helpful assistant."
DEFAULT_WINDOW = 6144
"""Tokens of context that the published code allows where the generation configuration names no number."""

_INCOMPLETE = "\ufffd"


def make_context(
    tokenizer: PreTrainedTokenizerBase,
    query: str,
    history: Iterable[Sequence[str]] | None = None,
    system: str = "",
    max_window_size: int = DEFAULT_WINDOW,
    chat_format: str = "chatml",
) -> tuple[str, TokensType]:
    """The prompt of a conversation, as text and as token ids.

    Texts are encoded with no special tokens allowed, so nothing in them can become a control token. Turns are kept
    whole, from the newest back, while system and history together stay below `max_window_size` tokens; the query is
    not counted, as in the published code.

    Args:
        tokenizer: a QWen tokenizer.
        query: what the user says now.
        history: earlier turns, oldest first.
        system: system message.
        max_window_size: tokens.
        chat_format: `"chatml"`, or `"raw"` for the query alone.

    Returns:
        the text and its token ids.

    Raises:
        ValueError: an unknown `chat_format`, or texts and turns of the wrong form.

    Source: `golden/tokenizer/chat_context.json`.
    """
    if chat_format == "raw":
        return query, tokenizer.encode(query)
    if chat_format != "chatml":
        raise ValueError(f"chat_format={chat_format!r} is unknown: use 'chatml' or 'raw'.")
    newline = tokenizer.encode("\n")

    def turn(role: str, content: str) -> tuple[str, TokensType]:
        if not isinstance(content, str):
            raise ValueError(f"The text of the {role} must be a str, got {type(content).__name__}: {content!r:.80}.")
        ids = tokenizer.encode(role) + newline + tokenizer.encode(content, allowed_special=set())
        return f"<|im_start|>{role}\n{content}<|im_end|>", [tokenizer.im_start_id, *ids, tokenizer.im_end_id]

    text = ""
    ids: TokensType = []
    system_text, system_ids = turn("system", system)
    for earlier_query, earlier_response in reversed(checked_history(history)):
        asked, asked_ids = turn("user", earlier_query)
        answered, answered_ids = turn("assistant", earlier_response)
        added = newline + asked_ids + newline + answered_ids
        if len(system_ids) + len(added) + len(ids) >= max_window_size:
            break
        text, ids = f"\n{asked}\n{answered}{text}", added + ids

    query_text, query_ids = turn("user", query)
    opening = newline + [tokenizer.im_start_id] + tokenizer.encode("assistant") + newline
    return (
        f"{system_text}{text}\n{query_text}\n<|im_start|>assistant\n",
        system_ids + ids + newline + query_ids + opening,
    )


def checked_history(history: Iterable[Sequence[str]] | None) -> HistoryType:
    """A copy of the history as a list of pairs; the caller's own list is never changed.

    Raises:
        ValueError: no history, or a turn that is no pair of query and response.
    """
    if history is not None and not isinstance(history, Iterable):
        raise ValueError(f"history={history!r} must be None or a list of pairs (query, response).")
    turns: HistoryType = []
    for index, item in enumerate(history or ()):
        if isinstance(item, str) or not isinstance(item, Sequence) or len(item) != 2:
            raise ValueError(f"history[{index}]={item!r:.80} must be a pair (query, response).")
        turns.append((item[0], item[1]))
    return turns


def fitting_context(
    tokenizer: PreTrainedTokenizerBase, query: str, history: HistoryType, system: str, max_window_size: int
) -> TokensType:
    """Token ids of `make_context`.

    Raises:
        ValueError: query and system message alone don't fit into the window; or as `make_context`.
    """
    _, alone = make_context(tokenizer, query, None, system)
    if len(alone) > max_window_size:
        raise ValueError(
            f"The query and the system message alone take {len(alone)} tokens, more than "
            f"max_window_size={max_window_size}: shorten them, or pass a larger max_window_size."
        )
    return make_context(tokenizer, query, history, system, max_window_size)[1]


def get_stop_words_ids(chat_format: str, tokenizer: PreTrainedTokenizerBase) -> list[TokensType]:
    """Token sequences that end a reply in the given format.

    Raises:
        ValueError: an unknown `chat_format`.

    Source: `golden/tokenizer/facts.json`.
    """
    if chat_format == "raw":
        return [tokenizer.encode("Human:"), [tokenizer.eod_id]]
    if chat_format == "chatml":
        return [[tokenizer.im_end_id], [tokenizer.im_start_id]]
    raise ValueError(f"chat_format={chat_format!r} is unknown: use 'chatml' or 'raw'.")


def decode_tokens(
    tokens: torch.Tensor | Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    raw_text_len: int,
    context_length: int,
    chat_format: str,
    verbose: bool = False,
    return_end_reason: bool = False,
    errors: str = "replace",
) -> str | tuple[str, str]:
    """The reply in the output of `generate`, without the prompt and without what ended it.

    Args:
        tokens: prompt and reply, (length,).
        raw_text_len: length of the prompt in characters; the published code cut by it, here tokens are counted.
        context_length: length of the prompt in tokens.
        chat_format: `"chatml"` or `"raw"`.
        verbose: print the reply and why it ended.
        return_end_reason: return that reason too.
        errors: what becomes of bytes that are no UTF-8: `"replace"`, `"ignore"` or `"strict"`.

    Raises:
        ValueError: an unknown `chat_format`.
    """
    reply = tokens[context_length:]
    reply = reply.tolist() if isinstance(reply, torch.Tensor) else list(reply)
    end = find_end(reply, end_sequences(chat_format, tokenizer))
    text = _decode(tokenizer, reply[:end], errors).strip()
    reason = f"Gen {tokenizer.decode(reply[end : end + 1])!r}" if end < len(reply) else f"Gen length {len(tokens)}"
    if verbose:
        print(f"\nReply: {text}\nEnd reason: {reason}")
    return (text, reason) if return_end_reason else text


def _decode(tokenizer: PreTrainedTokenizerBase, ids: TokensType, errors: str = "replace") -> str:
    return str(tokenizer.decode(ids, errors=errors))


def end_sequences(chat_format: str, tokenizer: PreTrainedTokenizerBase) -> list[TokensType]:
    """Everything that ends a reply: the stop words of the format and the end of text."""
    return [*get_stop_words_ids(chat_format, tokenizer), [tokenizer.eod_id]]


def find_end(reply: Sequence[int], stops: Sequence[Sequence[int]], start: int = 0) -> int:
    """Index in `reply` where the stop sequence that is complete first begins, or its length where there is none.

    The first and not the leftmost one, so that a reply ends the same however many tokens come at once.

    Args:
        start: tokens in which no stop sequence is complete, for a reply that is searched while it grows.
    """
    for end in range(start + 1, len(reply) + 1):
        lengths = [len(stop) for stop in stops if list(reply[max(end - len(stop), 0) : end]) == list(stop)]
        if lengths:
            return end - max(lengths)
    return len(reply)


def _held_back(reply: Sequence[int], stops: Iterable[Sequence[int]]) -> int:
    """Tokens at the end of `reply` that may turn out to be the beginning of a stop sequence."""
    longest = 0
    for stop in stops:
        for length in range(1, min(len(stop), len(reply) + 1)):
            if list(reply[-length:]) == list(stop[:length]):
                longest = max(longest, length)
    return longest


def check_stop_words(stop_words_ids: Any) -> list[TokensType]:
    """A copy of the stop words as lists of token ids, an empty one for None.

    Raises:
        ValueError: anything but a list of non-empty lists of token ids.
    """
    if stop_words_ids is None:
        return []
    if isinstance(stop_words_ids, (str, bytes)) or not isinstance(stop_words_ids, Iterable):
        raise ValueError(f"stop_words_ids={stop_words_ids!r} must be a list of lists of token ids.")
    words = [word.tolist() if isinstance(word, torch.Tensor) else word for word in stop_words_ids]
    for word in words:
        if not isinstance(word, (list, tuple)) or not word or not all(isinstance(token, int) for token in word):
            raise ValueError(
                f"stop_words_ids has the entry {word!r}: each must be a non-empty list of token ids, such as "
                "tokenizer.encode('Observation:')."
            )
    return [list(word) for word in words]


class StopWordsCriteria(StoppingCriteria):
    """Ends each row of a batch once one of the stop words stands anywhere in what it generated.

    Args:
        stop_words_ids: token sequences.
        prompt_length: tokens of the prompt, where stop words mean nothing.
    """

    def __init__(self, stop_words_ids: Iterable[Sequence[int]], prompt_length: int):
        self.stop_words_ids = check_stop_words(stop_words_ids)
        self.prompt_length = prompt_length

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """(B, length) -> (B,), true for the rows that have ended."""
        written = input_ids[:, self.prompt_length :]
        done = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        for word in self.stop_words_ids:
            if written.shape[1] >= len(word):
                windows = written.unfold(1, len(word), 1)  # (B, places, len(word))
                done |= (windows == torch.tensor(word, device=written.device)).all(-1).any(-1)
        return done


class SeededSampling(LogitsProcessor):
    """Draws the next token of each row from seed, row and place in the reply, and leaves no other choice.

    The last processor before sampling. It neither touches the global generator nor keeps one of its own, so requests at
    once don't disturb each other, the first row of a batch is drawn as it would be alone, and drafts that assisted
    decoding rejects leave no trace.

    Args:
        seed: any whole number.
        prompt_length: tokens of the prompt.

    Raises:
        ValueError: a seed that is no whole number.
    """

    def __init__(self, seed: int, prompt_length: int):
        if not isinstance(seed, int) or isinstance(seed, bool):
            raise ValueError(f"seed={seed!r} must be a whole number, or None to sample without one.")
        self.seed = seed
        self.prompt_length = prompt_length

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor) -> torch.Tensor:
        """(B, V) scores -> (B, V): 0 for the drawn token, -inf elsewhere."""
        step = input_ids.shape[1] - self.prompt_length
        generator = torch.Generator(device=scores.device)
        draws = torch.empty_like(scores, dtype=torch.float32)  # (B, V)
        for row, drawn in enumerate(draws):
            # Hashed by `random`, so that neighbouring seeds, rows and steps have nothing in common.
            generator.manual_seed(random.Random(f"{self.seed}/{row}/{step}").getrandbits(63))
            drawn.exponential_(generator=generator)
        # The smallest of exponential variables with rates p falls on each token with probability p.
        draws = draws.clamp(min=torch.finfo(torch.float32).tiny)
        chosen = (scores.float().softmax(-1) / draws).argmax(-1, keepdim=True)
        return torch.full_like(scores, -torch.inf).scatter(-1, chosen, 0.0)


class _Stopped(StoppingCriteria):
    def __init__(self, flag: threading.Event):
        self.flag = flag

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self.flag.is_set(), dtype=torch.bool, device=input_ids.device)


class _TokenQueue(BaseStreamer):
    """Hands new tokens from the thread that generates to the one that reads; the prompt is left out."""

    def __init__(self) -> None:
        self.items: queue.SimpleQueue[TokensType | BaseException | None] = queue.SimpleQueue()
        self.prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        if self.prompt_seen:
            self.items.put(value.flatten().tolist())
        elif len(value) > 1:
            raise ValueError(f"A stream carries one reply, not {len(value)}: leave num_return_sequences at 1.")
        self.prompt_seen = True

    def end(self) -> None:
        """Nothing to do: the reader waits for the thread."""


def stream_tokens(generate: Callable[..., Any]) -> Generator[TokensType, None, None]:
    """Run `generate` in a thread of its own and yield the tokens of one conversation as they come.

    The thread ends with the generator: closing it stops the generation after the step under way and waits for that.

    Args:
        generate: called once with the keyword arguments `streamer` and `stopping_criteria`.

    Raises:
        Exception: whatever `generate` raised.
    """
    tokens, stop = _TokenQueue(), threading.Event()

    def run() -> None:
        try:
            generate(streamer=tokens, stopping_criteria=[_Stopped(stop)])
        except BaseException as error:  # handed to the reader, who raises it
            tokens.items.put(error)
        tokens.items.put(None)

    thread = threading.Thread(target=run, name="qwen-chat-stream", daemon=True)
    thread.start()
    try:
        while (item := tokens.items.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
        if thread is not threading.current_thread():  # where the garbage collector happened to run
            thread.join()


def stream_text(
    chunks: Generator[TokensType, None, None], tokenizer: PreTrainedTokenizerBase, stops: Sequence[Sequence[int]]
) -> Generator[str, None, None]:
    """The reply so far each time it has grown, from new tokens as they come; `chunks` is closed with it.

    Half a character is held back until the rest of its bytes is there, half a stop word until it is none; the last
    text, of which each one before is the beginning, is that of `chat`. There is always one, if only an empty one.
    """
    reply: TokensType = []
    shown = ""
    end = 0
    with closing(chunks):
        for chunk in chunks:
            searched = len(reply)
            reply += chunk
            end = find_end(reply, stops, searched)
            if end < len(reply):
                break
            text = _decode(tokenizer, reply[: end - _held_back(reply, stops)])
            text = text.rstrip(_INCOMPLETE).strip()
            if len(text) > len(shown):
                shown = text
                yield shown
    text = _decode(tokenizer, reply[:end]).strip()
    if not shown or text != shown:
        yield text


@dataclass
class ChatSettings:
    """What the arguments of a chat ask for, in all conversations of the call.

    Attributes:
        generation_config: a copy of the caller's or the model's, with the loose settings of the call in it.
        other_kwargs: arguments of `generate` that are no settings.
        stops: sequences that end a reply.
        window: tokens of context.
    """

    generation_config: GenerationConfig
    other_kwargs: dict[str, Any]
    stops: list[TokensType]
    window: int


class QWenGenerationMixin(_GenerativeModel):
    """`generate` with the published extras, and conversations: `chat`, `chat_stream`, `batch_chat`.

    `generate` also takes `stop_words_ids`, a list of token sequences of which each ends a text, and `seed`, which makes
    sampling repeatable without touching the global generator.
    """

    def chat(
        self,
        tokenizer: PreTrainedTokenizerBase,
        query: str,
        history: Iterable[Sequence[str]] | None = None,
        system: str = DEFAULT_SYSTEM,
        append_history: bool = True,
        stream: bool = False,
        stop_words_ids: list[TokensType] | None = None,
        generation_config: GenerationConfig | None = None,
        max_window_size: int | None = None,
        **generate_kwargs: Any,
    ) -> tuple[str, HistoryType] | Generator[str, None, None]:
        """Answer a query within a conversation.

        Args:
            tokenizer: the tokenizer of the checkpoint.
            query: what the user says now.
            history: earlier turns as returned here, or None; never changed.
            system: system message.
            append_history: add this turn to the history returned.
            stream: return what `chat_stream` returns.
            stop_words_ids: token sequences that end the reply and are left out of it.
            generation_config: in place of the model's own.
            max_window_size: tokens of context; whole turns are left out from the front. Default: the generation
                configuration's, else 6144.
            generate_kwargs: anything that `generate` takes, such as `max_new_tokens`, `top_p`, `seed`.

        Returns:
            the response, and the history with this turn.

        Raises:
            ValueError: a base model, a query that alone is longer than the window, or arguments of the wrong form.
        """
        if stream:
            generate_kwargs.update(generation_config=generation_config, max_window_size=max_window_size)
            return self.chat_stream(tokenizer, query, history, system, stop_words_ids, **generate_kwargs)
        turns = checked_history(history)
        settings = self._chat_settings(tokenizer, stop_words_ids, generation_config, max_window_size, generate_kwargs)
        context = fitting_context(tokenizer, query, turns, system, settings.window)
        (reply,) = self._generate_replies(tokenizer, [context], settings)
        return reply, [*turns, (query, reply)] if append_history else turns

    def chat_stream(
        self,
        tokenizer: PreTrainedTokenizerBase,
        query: str,
        history: Iterable[Sequence[str]] | None = None,
        system: str = DEFAULT_SYSTEM,
        stop_words_ids: list[TokensType] | None = None,
        logits_processor: LogitsProcessorList | None = None,
        generation_config: GenerationConfig | None = None,
        max_window_size: int | None = None,
        **generate_kwargs: Any,
    ) -> Generator[str, None, None]:
        """As `chat`, yielding the response so far each time it has grown.

        Closing the generator stops the generation at once. Arguments are checked by the call itself, not by the first
        `next`.
        """
        if generate_kwargs.pop("streamer", None) is not None:
            raise ValueError("chat_stream is a stream itself: read what it yields, and leave out streamer.")
        settings = self._chat_settings(tokenizer, stop_words_ids, generation_config, max_window_size, generate_kwargs)
        if settings.generation_config.num_beams not in (None, 1):
            raise ValueError(f"num_beams={settings.generation_config.num_beams} can't be streamed: use chat.")
        context = fitting_context(tokenizer, query, checked_history(history), system, settings.window)
        inputs = self._chat_inputs(tokenizer, [context], settings)
        criteria = inputs.pop("stopping_criteria", None) or ()
        autocast = _callers_autocast(self.device.type)

        def generate(streamer: BaseStreamer, stopping_criteria: list[StoppingCriteria]) -> None:
            every = StoppingCriteriaList([*criteria, *stopping_criteria])
            with autocast:
                self.generate(**inputs, logits_processor=logits_processor, streamer=streamer, stopping_criteria=every)

        return stream_text(stream_tokens(generate), tokenizer, settings.stops)

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
        replies = self._generate_replies(tokenizer, contexts, settings)
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
        return ChatSettings(settings, other_kwargs, stops, max_window_size)

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
        return {
            "input_ids": input_ids.to(self.device),
            "attention_mask": attention_mask.to(self.device),
            "generation_config": settings.generation_config,
            **settings.other_kwargs,
        }

    def _generate_replies(
        self, tokenizer: PreTrainedTokenizerBase, contexts: list[TokensType], settings: ChatSettings
    ) -> list[str]:
        inputs = self._chat_inputs(tokenizer, contexts, settings)
        output = self.generate(**inputs)
        sequences = output if isinstance(output, torch.Tensor) else output.sequences
        copies = len(sequences) // len(contexts)  # num_return_sequences: the first of each is the reply
        replies = []
        for reply in sequences[::copies, inputs["input_ids"].shape[1] :].tolist():
            replies.append(_decode(tokenizer, reply[: find_end(reply, settings.stops)]).strip())
        return replies

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
