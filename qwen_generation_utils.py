"""Chat helpers: the prompt of a conversation, its history, the end of a reply, sampling from a seed.

`make_context`, `decode_tokens` and `get_stop_words_ids` carry their published names and arguments, because users import
them, also from this file alone: it needs none of the others.
"""

from __future__ import annotations

import copy
import random
import unicodedata
from collections.abc import Iterable, Sequence
from numbers import Integral
from typing import Any

import torch
import transformers
from transformers import (
    LogitsProcessor,
    PreTrainedTokenizerBase,
    StoppingCriteria,
)
from transformers.utils import logging

logger = logging.get_logger(__name__)

HistoryType = list[tuple[str, str]]
"""Earlier turns of a conversation: (query, response), oldest first."""

TokensType = list[int]

DEFAULT_SYSTEM = "You are a helpful assistant."
DEFAULT_WINDOW = 6144
"""Tokens of context that the published code allows where the generation configuration names no number."""

_EOD = "<|endoftext|>"


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
        ValueError: an unknown `chat_format`, texts and turns of the wrong form, or a window that is none.

    Source: `golden/tokenizer/chat_context.json`.
    """
    if chat_format == "raw":
        return _text_of("user", query), _ids_of(tokenizer, query)
    if chat_format != "chatml":
        raise ValueError(f"chat_format={chat_format!r} is unknown: use 'chatml' or 'raw'.")
    window = checked_window(max_window_size)
    newline = _ids_of(tokenizer, "\n")
    text = ""
    ids: TokensType = []
    system_text, system_ids = _turn(tokenizer, newline, "system", system)
    for earlier_query, earlier_response in reversed(checked_history(history)):
        asked, asked_ids = _turn(tokenizer, newline, "user", earlier_query)
        answered, answered_ids = _turn(tokenizer, newline, "assistant", earlier_response)
        added = newline + asked_ids + newline + answered_ids
        if len(system_ids) + len(added) + len(ids) >= window:
            break
        text, ids = f"\n{asked}\n{answered}{text}", added + ids
    query_text, query_ids = _turn(tokenizer, newline, "user", query)
    opening = newline + [tokenizer.im_start_id] + _ids_of(tokenizer, "assistant") + newline
    text = f"{system_text}{text}\n{query_text}\n<|im_start|>assistant\n"
    return text, system_ids + ids + newline + query_ids + opening


def checked_window(given: Any, configured: Any = None) -> int:
    """The tokens of context: those given, else those of the configuration, else as published.

    Raises:
        ValueError: no whole number, or less than 1.
    """
    window = configured if given is None else given
    if window is None:
        return DEFAULT_WINDOW
    if not is_whole(window) or window < 1:
        raise ValueError(f"max_window_size={window!r} must be a whole number of tokens, at least 1.")
    return int(window)


def _ids_of(tokenizer: PreTrainedTokenizerBase, text: str, **options: Any) -> TokensType:
    """Token ids of a piece of a prompt, without what a tokenizer may have been told to put around whole texts."""
    return tokenizer.encode(text, add_special_tokens=False, **options)


def _turn(tokenizer: PreTrainedTokenizerBase, newline: TokensType, role: str, content: str) -> tuple[str, TokensType]:
    """What one side says, as text and as token ids, with the control tokens around it."""
    ids = _ids_of(tokenizer, role) + newline + _ids_of(tokenizer, _text_of(role, content), allowed_special=set())
    return f"<|im_start|>{role}\n{content}<|im_end|>", [tokenizer.im_start_id, *ids, tokenizer.im_end_id]


def _text_of(role: str, content: Any) -> str:
    if not isinstance(content, str):
        raise ValueError(f"The text of the {role} must be a str, got {type(content).__name__}: {content!r:.80}.")
    return content


class ChatHistory(HistoryType):
    """The turns of a conversation, a list, with the keys and values of what the model has read of it.

    `chat` returns one, and takes up what it carries. Copies carry it too, and it goes when the last history that has it
    goes, or by `drop_cache`. What leaves the process (pickles, YAML, JSON) is a plain list, which needs nothing of this
    code to be read. Turns may be changed in any way: what is kept is used only as far as it agrees with them.

    Attributes:
        kept: `kept_qwen.KeptCache`, or None.
    """

    kept: Any = None

    def drop_cache(self) -> None:
        """Free the memory of keys and values; the next turn reads the conversation anew."""
        self.kept = None

    def copy(self) -> ChatHistory:
        """Another list of the same turns, which also carries what is kept."""
        other = ChatHistory(self)
        other.kept = self.kept  # shared, since it never changes
        return other

    def __copy__(self) -> ChatHistory:
        return self.copy()

    def __deepcopy__(self, memo: dict[int, Any]) -> ChatHistory:
        memo[id(self)] = other = ChatHistory()
        other.extend(copy.deepcopy(turn, memo) for turn in self)
        other.kept = self.kept
        return other

    def __reduce__(self) -> tuple[type, tuple[HistoryType]]:
        return list, (list(self),)


def _write_as_list_in_yaml() -> None:
    """Teach PyYAML, which asks for the exact class, that a history is a list; where it is absent, nothing asks."""
    try:
        from yaml.representer import Representer, SafeRepresenter  # type: ignore[import-untyped]
    except ImportError:
        return
    for representer in (Representer, SafeRepresenter):
        representer.add_representer(ChatHistory, SafeRepresenter.represent_list)


_write_as_list_in_yaml()


def checked_history(history: Iterable[Sequence[str]] | None, name: str = "history") -> HistoryType:
    """A copy of the history as a list of pairs; the caller's own list is never changed.

    Texts of a derived class, such as a `ToolReply`, become plain ones, which can be read wherever they are stored.

    Args:
        name: of the argument, for the message.

    Raises:
        ValueError: no history, or a turn that is no pair of query and response.
    """
    if history is not None and not isinstance(history, Iterable):
        raise ValueError(f"{name}={history!r} must be None or a list of pairs (query, response).")
    turns: HistoryType = []
    for index, item in enumerate(history or ()):
        pair = isinstance(item, Sequence) and not isinstance(item, str) and len(item) == 2
        if not pair or not all(isinstance(text, str) for text in item):
            raise ValueError(f"{name}[{index}]={item!r:.80} must be a pair (query, response) of texts.")
        turns.append((plain_text(item[0]), plain_text(item[1])))
    return turns


def plain_text(text: Any) -> Any:
    """A text of a class derived from `str` as a `str`; anything else as it is."""
    return str.__str__(text) if isinstance(text, str) else text


def fitting_context(
    tokenizer: PreTrainedTokenizerBase,
    query: str,
    history: HistoryType,
    system: str,
    max_window_size: int,
    begun: str = "",
) -> TokensType:
    """Token ids of `make_context`, and of what the reply begins with, which takes its room from the history.

    A prompt that is longer than the window even without history is read without any, and a warning says so: as in the
    published code, the window cuts no query.

    Args:
        begun: the first part of the reply, which the model is to go on from.
        (the others): as `make_context`.

    Raises:
        ValueError: as `make_context`.
    """
    begun_ids = _ids_of(tokenizer, begun, allowed_special=set()) if begun else []
    _, alone = make_context(tokenizer, query, None, system)
    room = max_window_size - len(begun_ids)
    if len(alone) > room:
        parts = "The query, the system message and the reply so far" if begun else "The query and the system message"
        logger.warning(
            f"{parts} alone take {len(alone) + len(begun_ids)} tokens, more than max_window_size={max_window_size}: "
            f"they are read whole, without any of the {len(history)} earlier turns."
        )
        return alone + begun_ids
    return make_context(tokenizer, query, history, system, room)[1] + begun_ids


def get_stop_words_ids(chat_format: str, tokenizer: PreTrainedTokenizerBase) -> list[TokensType]:
    """Token sequences that end a reply in the given format.

    Raises:
        ValueError: an unknown `chat_format`.

    Source: `golden/tokenizer/facts.json`.
    """
    if chat_format == "raw":
        return [_ids_of(tokenizer, "Human:"), [tokenizer.eod_id]]
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
    """The reply in the output of `generate`, without the prompt.

    In `"chatml"` it ends before the first token that ends a reply. In `"raw"` it is everything behind the prompt, as
    published, with `<|endoftext|>` taken out wherever it stands.

    Args:
        tokens: prompt and reply, (length,).
        raw_text_len: length of the prompt in characters; the published code cut by it, `"chatml"` counts tokens here.
        context_length: length of the prompt in tokens.
        chat_format: `"chatml"` or `"raw"`.
        verbose: print the reply and why it ended.
        return_end_reason: return that reason too.
        errors: what becomes of bytes that are no UTF-8: `"replace"`, `"ignore"` or `"strict"`.

    Raises:
        ValueError: an unknown `chat_format`.
    """
    ids = tokens.tolist() if isinstance(tokens, torch.Tensor) else list(tokens)
    if chat_format == "raw":
        whole = _raw_reply(ids, tokenizer, raw_text_len, context_length, errors)
        text, reason = _without_eod(whole, f"Gen length {len(ids)}")
    else:
        reply = ids[context_length:]
        end = find_end(reply, end_sequences(chat_format, tokenizer))
        whole = decode_text(tokenizer, reply, errors)
        text = decode_text(tokenizer, reply[:end], errors).strip()
        reason = f"Gen length {len(ids)}" if end is None else f"Gen {tokenizer.decode(reply[end : end + 1])!r}"
    if verbose:
        print(f"\nRaw Generate: {whole}\n\nEnd Reason: {reason}\n\nGenerate: {text}")
    return (text, reason) if return_end_reason else text


def _raw_reply(
    tokens: TokensType, tokenizer: PreTrainedTokenizerBase, raw_text_len: int, context_length: int, errors: str
) -> str:
    """What stands behind the first `raw_text_len` characters; behind the prompt's own where NFC changed their number.

    The tokenizer composes what it encodes, so a prompt may be decoded to fewer characters than it was written with, or
    to more, by a mark, where a composed character has no place in NFC.
    """
    prompt = decode_text(tokenizer, tokens[:context_length], "replace" if errors == "strict" else errors)
    marks = sum(unicodedata.category(character).startswith("M") for character in prompt)
    if len(prompt) - marks <= raw_text_len <= len(unicodedata.normalize("NFD", prompt)):
        raw_text_len = len(prompt)
    return decode_text(tokenizer, tokens, errors)[raw_text_len:]


def _without_eod(text: str, reason: str) -> tuple[str, str]:
    """A reply without `<|endoftext|>`; it ends where one remains, put together by taking out another."""
    text, found, _ = text.replace(_EOD, "").strip().partition(_EOD)
    return text.strip(), f"Gen {_EOD!r}" if found else reason


def decode_text(tokenizer: PreTrainedTokenizerBase, ids: TokensType, errors: str = "replace") -> str:
    """Text of token ids, special tokens included; bytes that are no UTF-8 are treated as `errors` says."""
    return str(tokenizer.decode(ids, errors=errors))


def end_sequences(chat_format: str, tokenizer: PreTrainedTokenizerBase) -> list[TokensType]:
    """Everything that ends a reply: the stop words of the format and the end of text."""
    return [*get_stop_words_ids(chat_format, tokenizer), [tokenizer.eod_id]]


def find_end(
    reply: Sequence[int], cut: Sequence[Sequence[int]], kept: Sequence[Sequence[int]] = (), start: int = 0
) -> int | None:
    """Length of the reply, up to the stop sequence that is complete first, or None where there is none.

    The first and not the leftmost one, so that a reply ends the same however many tokens come at once. Where one to cut
    off and one to keep are complete at once, the first is cut off the second.

    Args:
        cut: stop sequences that are no part of the reply.
        kept: those that are.
        start: tokens in which no stop sequence is complete, for a reply that is searched while it grows.
    """
    for end in range(start + 1, len(reply) + 1):
        lengths = [len(stop) for stop in cut if _ends_with(reply, end, stop)]
        if lengths:
            return end - max(lengths)
        if any(_ends_with(reply, end, stop) for stop in kept):
            return end
    return None


def _ends_with(reply: Sequence[int], end: int, stop: Sequence[int]) -> bool:
    """Whether the first `end` tokens end with a stop sequence."""
    return list(reply[max(end - len(stop), 0) : end]) == list(stop)


def is_whole(value: Any) -> bool:
    """Whether a value is a whole number, of Python or of numpy; True and False are none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


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
        if not isinstance(word, (list, tuple)) or not word or not all(map(is_whole, word)):
            raise ValueError(
                f"stop_words_ids has the entry {word!r}: each must be a non-empty list of token ids, such as "
                "tokenizer.encode('Observation:')."
            )
    return [[int(token) for token in word] for word in words]


class StopWordsCriteria(StoppingCriteria):
    """Ends each row of a batch once one of the stop words stands anywhere in what it generated.

    Args:
        stop_words_ids: token sequences.
        prompt_length: tokens of the prompt, where stop words mean nothing.
    """

    def __init__(self, stop_words_ids: Iterable[Sequence[int]], prompt_length: int):
        self.stop_words_ids = check_stop_words(stop_words_ids)
        self.prompt_length = prompt_length
        self._held: tuple[Any, list[torch.Tensor]] = (None, [])

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """(B, length) -> (B,), true for the rows that have ended."""
        written = input_ids[:, self.prompt_length :]
        done = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        for word in self._on(written.device):
            if written.shape[1] >= len(word):
                windows = written.unfold(1, len(word), 1)  # (B, places, len(word))
                done |= (windows == word).all(-1).any(-1)
        return done

    def _on(self, device: torch.device) -> list[torch.Tensor]:
        """The words as tensors, made once: before it takes one, a GPU finishes all that it has begun."""
        wanted = device, [list(word) for word in self.stop_words_ids]
        known, words = self._held  # at once, for another thread may want them elsewhere
        if known != wanted:
            words = [torch.tensor(word, device=device) for word in wanted[1]]
            self._held = wanted, words
        return words


class StopTextCriteria(StoppingCriteria):
    """Ends each row of a batch once a text stands in what it generated, whichever tokens it is made of.

    Args:
        text: of ASCII characters.
        tokenizer: decodes what was generated.
        prompt_length: tokens of the prompt, where the text means nothing.
    """

    def __init__(self, text: str, tokenizer: PreTrainedTokenizerBase, prompt_length: int):
        self.text = text
        self.tokenizer = tokenizer
        self.prompt_length = self._searched = prompt_length

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """(B, length) -> (B,), true for the rows in which it is complete since the last call."""
        # No token is shorter than a byte, so a text that ends in a new token begins at most its length before.
        start = max(self.prompt_length, self._searched - len(self.text) + 1)
        self._searched = input_ids.shape[1]
        found = [self.text in decode_text(self.tokenizer, row) for row in input_ids[:, start:].tolist()]
        return torch.tensor(found, dtype=torch.bool, device=input_ids.device)


class SeededSampling(LogitsProcessor):
    """Draws the next token of each row from seed, row and place in the reply, and leaves no other choice.

    The last processor before sampling. It neither reads nor seeds the global generator and keeps none of its own, so
    requests at once don't disturb each other, the first row of a batch is drawn as it would be alone, and drafts that
    assisted decoding rejects leave no trace. (`generate` still draws from what is left, which moves the global one on.)

    Args:
        seed: any whole number.
        prompt_length: tokens of the prompt.
        arranged: it stands behind all others; if not yet, `comes_last` has to be asked before the first draw.

    Raises:
        ValueError: a seed that is no whole number.
    """

    def __init__(self, seed: int, prompt_length: int, arranged: bool = True):
        if not is_whole(seed):
            raise ValueError(f"seed={seed!r} must be a whole number, or None to sample without one.")
        self.seed = int(seed)
        self.prompt_length = prompt_length
        self.arranged = arranged

    @staticmethod
    def comes_last(processor: Any) -> bool:
        """Key that sorts processors so that this one is the last; noted, for before it would draw from other scores."""
        last = isinstance(processor, SeededSampling)
        if last:
            processor.arranged = True
        return last

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor) -> torch.Tensor:
        """(B, V) scores -> (B, V): 0 for the drawn token, -inf elsewhere."""
        if not self.arranged:
            raise RuntimeError(
                f"seed={self.seed} would draw before temperature, top_k and top_p: transformers "
                f"{transformers.__version__} no longer lets a model arrange its logits processors. Sample without a "
                "seed, or install a tested release."
            )
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
