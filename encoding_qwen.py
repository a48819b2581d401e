"""Text to ids and back: which special tokens are recognised, batches, truncation, padding, decoding."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Collection, Iterable, Mapping
from numbers import Integral
from typing import Any

from transformers import BatchEncoding, PreTrainedTokenizer

from .pieces_qwen import split_pattern
from .tokens_qwen import TokensMixin

_LONGEST = 2**62  # tokens; more than any text has
_UNCUT = (False, "do_not_truncate")


class LengthsMixin(TokensMixin):
    """How long texts may get, and what is cut off them: the same in both classes."""

    def _get_padding_truncation_strategies(
        self,
        padding: Any = False,
        truncation: Any = None,
        max_length: Any = None,
        pad_to_multiple_of: Any = None,
        verbose: Any = True,
        **kwargs: Any,
    ) -> Any:
        """As in transformers, for numbers that lengths can be.

        Raises:
            ValueError: a length that is no whole number or negative, or a multiple below 1.
        """
        for name, value, least in (("max_length", max_length, 0), ("pad_to_multiple_of", pad_to_multiple_of, 1)):
            if value is not None and (not isinstance(value, Integral) or value < least):
                raise ValueError(f"{name}={value!r} is impossible: it must be a whole number of at least {least}.")
        if max_length is not None:  # `model_max_length` may be 1e30, which fits no word
            max_length = min(max_length, _LONGEST)
        return super()._get_padding_truncation_strategies(
            padding, truncation, max_length, pad_to_multiple_of, verbose, **kwargs
        )

    def truncate_sequences(
        self,
        ids: list[int],
        pair_ids: list[int] | None = None,
        num_tokens_to_remove: int = 0,
        truncation_strategy: Any = "longest_first",
        stride: int = 0,
    ) -> tuple[list[int], list[int] | None, list[int]]:
        """As in transformers' slow class, but of two texts the longer is cut first as the `tokenizers` library does.

        What is cut off a pair so is not returned, there as here.

        Raises:
            ValueError: more is to be cut off a text than it has.
        """
        if num_tokens_to_remove > 0 and truncation_strategy in ("only_first", "only_second"):
            first = truncation_strategy == "only_first"
            if len(ids if first else pair_ids or ()) <= num_tokens_to_remove:
                raise ValueError(
                    f"{num_tokens_to_remove} tokens are to be cut off the {'first' if first else 'second'} text of a "
                    f"pair, which hasn't more: raise max_length, or cut both with truncation='longest_first'."
                )
        if pair_ids is None or truncation_strategy != "longest_first" or num_tokens_to_remove <= 0:
            tokenizer: Any = self
            cut = PreTrainedTokenizer.truncate_sequences
            return cut(tokenizer, ids, pair_ids, num_tokens_to_remove, truncation_strategy, stride)
        room = max(len(ids) + len(pair_ids) - num_tokens_to_remove, 0)
        shorter = min(len(ids), len(pair_ids))
        shorter = shorter if 2 * shorter <= room else room // 2
        lengths = (shorter, room - shorter) if len(ids) <= len(pair_ids) else (room - shorter, shorter)
        kept = [
            row[len(row) - length :] if self.truncation_side == "left" else row[:length]
            for row, length in zip((ids, pair_ids), lengths, strict=True)
        ]
        return kept[0], kept[1], []


class EncodingMixin(LengthsMixin):
    """The `allowed_special` interface of 2023 and the batches of transformers, by way of lists of ids.

    Subclasses implement `_encode_texts`.
    """

    errors: str

    def _encode_texts(self, texts: list[str], allowed: frozenset[str]) -> list[list[int]]:
        """Encode texts straight to ids, with the special tokens in `allowed` recognised."""
        raise NotImplementedError

    def _resolve_allowed(
        self, allowed_special: str | Collection[str], split_special_tokens: bool | None
    ) -> frozenset[str]:
        """The special tokens to recognise. transformers' `split_special_tokens=True` means none."""
        if self.split_special_tokens if split_special_tokens is None else split_special_tokens:
            return frozenset()
        if isinstance(allowed_special, str):
            if allowed_special != "all":
                raise ValueError(f'`allowed_special` must be "all" or a set of special tokens, got {allowed_special!r}')
            return frozenset(self.special_tokens)
        return frozenset(self.special_tokens).intersection(allowed_special)

    def _check_disallowed(
        self, texts: Iterable[str], allowed: frozenset[str], disallowed_special: str | Collection[str]
    ) -> None:
        """Raise ValueError if a text holds a disallowed special token ("all": all that are not allowed)."""
        if isinstance(disallowed_special, str):
            if disallowed_special != "all":
                raise ValueError(
                    f'`disallowed_special` must be "all" or a collection of special tokens, got {disallowed_special!r}'
                )
            disallowed_special = frozenset(self.special_tokens) - allowed
        if not disallowed_special:
            return
        pattern = split_pattern(frozenset(disallowed_special))
        for text in texts:
            if match := pattern.search(text):
                raise ValueError(
                    f"The text holds the disallowed special token {match.group()!r}. To encode it as a special token, "
                    f"pass allowed_special={{{match.group()!r}, ...}}; to encode it as ordinary text, pass "
                    "disallowed_special=()."
                )

    def tokenize(  # type: ignore[override]
        self,
        text: str,
        allowed_special: str | Collection[str] = "all",
        disallowed_special: str | Collection[str] = (),
        *,
        pair: str | None = None,
        split_special_tokens: bool | None = None,
        **kwargs: Any,
    ) -> list[Any]:
        """Split text into tokens: bytes (slow) or byte-level strings (fast), and str for special tokens.

        Args:
            allowed_special: "all", or the special tokens to recognise; the others are ordinary text.
            disallowed_special: (), "all", or special tokens whose presence raises ValueError.
            pair: a second text, whose tokens follow.

        Raises:
            ValueError: what is no text, or a disallowed special token.
        """
        for given in (text, pair or ""):
            if not isinstance(given, str):
                raise ValueError(f"Only a str can be split into tokens, got {type(given).__name__}: {given!r:.80}")
        allowed = self._resolve_allowed(allowed_special, split_special_tokens)
        texts = [text] if pair is None else [text, pair]
        self._check_disallowed(texts, allowed, disallowed_special)
        ids = list(itertools.chain.from_iterable(self._encode_texts(texts, allowed)))
        return list(self.convert_ids_to_tokens(ids))

    def _encode_to_ids(
        self,
        text: Any,
        text_pair: Any = None,
        is_split_into_words: bool = False,
        allowed_special: str | Collection[str] = "all",
        disallowed_special: str | Collection[str] = (),
        split_special_tokens: bool | None = None,
        **options: Any,
    ) -> BatchEncoding:
        """`__call__` by way of id lists; all texts of a batch are encoded in parallel. Options: `_from_ids`."""
        batched = isinstance(text, (list, tuple)) and (
            bool(text) and isinstance(text[0], (list, tuple)) if is_split_into_words else not _is_ids(text)
        )
        examples = _pair_examples(text, text_pair, is_split_into_words) if batched else [(text, text_pair)]
        allowed = self._resolve_allowed(allowed_special, split_special_tokens)
        # Each sequence is a list of ids, one text, or the words of a text, which are encoded one by one.
        texts = [word for example in examples for sequence in example for word in _texts_of(sequence)]
        self._check_disallowed(texts, allowed, disallowed_special)
        encoded = iter(self._encode_texts(texts, allowed))

        def ids_of(sequence: Any) -> list[int] | None:
            if isinstance(sequence, str):
                return next(encoded)
            if sequence is None or _is_ids(sequence):
                return None if sequence is None else list(sequence)
            return list(itertools.chain.from_iterable(next(encoded) for _ in _texts_of(sequence)))

        return self._from_ids([(ids_of(first) or [], ids_of(second)) for first, second in examples], batched, **options)

    def _from_ids(
        self,
        sequences: list[tuple[list[int], list[int] | None]],
        batched: bool,
        return_tensors: Any = None,
        return_offsets_mapping: bool = False,
        **options: Any,
    ) -> BatchEncoding:
        """Truncate, pad and pack id lists (each with an optional second one) as transformers' slow tokenizers do.

        Raises:
            ValueError: offsets are asked for.
        """
        if return_offsets_mapping:
            raise ValueError(
                "`return_offsets_mapping` needs QWenTokenizerFast, called on text with the default `allowed_special`"
            )
        if not batched and not any(sequences[0]):  # which transformers doesn't pad, except in a batch
            rows = self._from_ids(sequences, True, **options)
            return BatchEncoding(
                {key: row[0] for key, row in rows.items()}, tensor_type=return_tensors, prepend_batch_axis=True
            )
        options["truncation"] = options.pop("truncation_strategy", False)
        padding = options.pop("padding_strategy", False)
        options["add_special_tokens"] = False  # this model adds none
        joined = self._joined(sequences, options) if self._only_joins(options) else None
        if joined and padding in (False, "do_not_pad"):
            columns = joined if batched else {key: rows[0] for key, rows in joined.items()}
            return BatchEncoding(columns, tensor_type=return_tensors, prepend_batch_axis=not batched)
        if options.get("max_length") == 0 and options["truncation"] not in _UNCUT:  # which transformers takes for None
            sequences = [([], None if second is None else []) for _, second in sequences]
        # transformers' slow and fast classes share these steps, but keep them in the slow class.
        tokenizer: Any = self
        prepare = functools.partial(PreTrainedTokenizer.prepare_for_model, tokenizer)
        if not batched:
            return prepare(
                *sequences[0], padding=padding, return_tensors=return_tensors, prepend_batch_axis=True, **options
            )
        pad_options = {
            key: options.pop(key, None) for key in ("pad_to_multiple_of", "padding_side", "return_attention_mask")
        }
        columns = joined or {"input_ids": []}
        for first, second in [] if joined else sequences:
            for key, value in prepare(first, second, return_attention_mask=False, **options).items():
                columns.setdefault(key, []).append(value)
        if return_tensors:  # ragged, so these cannot become tensors
            columns.pop("overflowing_tokens", None)
            columns.pop("num_truncated_tokens", None)
        padded = self.pad(columns, padding=padding, max_length=options.get("max_length"), **pad_options)
        return BatchEncoding(dict(padded), tensor_type=return_tensors)

    def _joined(
        self, sequences: list[tuple[list[int], list[int] | None]], options: Mapping[str, Any]
    ) -> dict[str, list[Any]]:
        """The columns of a batch of which nothing is to be cut off, padded or added; warns of ids that are too many."""
        rows = [first + second if second else first for first, second in sequences]
        too_long = next((ids for ids in rows if len(ids) > self.model_max_length), [])
        self._eventual_warn_about_too_long_sequence(too_long, None, options.get("verbose", True))
        masks = options.get("return_attention_mask")
        if masks or masks is None and rows and "attention_mask" in self.model_input_names:
            return {"input_ids": rows, "attention_mask": [[1] * len(ids) for ids in rows]}
        return {"input_ids": rows}

    def _only_joins(self, options: Mapping[str, Any]) -> bool:
        """Whether `prepare_for_model` would do no more than join two sequences, for which it takes long."""
        wanted = ("max_length", "return_overflowing_tokens", "return_special_tokens_mask", "return_length")
        token_types = options.get("return_token_type_ids")
        return (
            options["truncation"] in _UNCUT
            and not any(options.get(name) for name in wanted)
            and not ("token_type_ids" in self.model_input_names if token_types is None else token_types)
        )

    # Ids to text

    def decode(self, token_ids: Any, skip_special_tokens: bool = False, **kwargs: Any) -> str | list[str]:
        """As in transformers, which takes longer to see that a list has only ids than to decode them. See `_decode`."""
        if type(token_ids) is list and set(map(type, token_ids)) == {int}:
            return self._text_of(token_ids, skip_special_tokens, **kwargs)
        return super().decode(token_ids, skip_special_tokens, **kwargs)

    def _decode(  # type: ignore[override]
        self, token_ids: int | list[int], skip_special_tokens: bool = False, **kwargs: Any
    ) -> str:
        """The text of ids, see `_text_of`.

        Raises:
            TypeError: what is no id; tokens, say, which would count as ids that no token has.
        """
        ids = [token_ids] if isinstance(token_ids, int) else token_ids
        wrong = [one for one in ids if not isinstance(one, int)]
        if wrong:
            raise TypeError(
                f"Only ids can be decoded, whole numbers, not {wrong[0]!r:.80}: those of tokens come from "
                "convert_tokens_to_ids."
            )
        return self._text_of(ids, skip_special_tokens, **kwargs)

    def _text_of(
        self,
        ids: list[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        errors: str | None = None,
        **kwargs: Any,
    ) -> str:
        """Join the bytes of the tokens and decode them as UTF-8.

        Args:
            clean_up_tokenization_spaces: ignored, as it would damage the text of a byte-level vocabulary.
            errors: "replace", "ignore" or "strict": what to do with bytes that are not UTF-8; `self.errors` by default.
                An id that no token has counts as such a byte (the model has more rows than there are tokens).

        Raises:
            ValueError: with "strict", for invalid bytes or an id that no token has.
        """
        errors = errors or self.errors
        skipped = self._special_ids if skip_special_tokens else frozenset()
        known = self._token_bytes
        if errors == "strict" and (unknown := [i for i in ids if i not in known]):
            raise ValueError(f"No token has the id {unknown[0]}; ids go from 0 to {len(self) - 1}")
        return self._joined_bytes([i for i in ids if i not in skipped] if skipped else ids).decode("utf-8", errors)

    def _joined_bytes(self, ids: list[int]) -> bytes:
        """The bytes of tokens; an id that no token has counts as one that is not UTF-8."""
        known = self._token_bytes
        try:
            return b"".join(map(known.__getitem__, ids))
        except KeyError:
            return b"".join([known.get(i, b"\xff") for i in ids])


def _is_ids(sequence: Any) -> bool:
    """Whether this is a list of ids rather than text."""
    return isinstance(sequence, (list, tuple)) and bool(sequence) and isinstance(sequence[0], int)


def _texts_of(sequence: Any) -> list[str]:
    """The texts to encode for a sequence: none for None or ids, itself for text, the words for a list of words.

    Raises:
        ValueError: it is none of these.
    """
    if sequence is None or _is_ids(sequence):
        return []
    if isinstance(sequence, str):
        return [sequence]
    if isinstance(sequence, (list, tuple)) and all(isinstance(word, str) for word in sequence):
        return list(sequence)
    raise ValueError(f"Text input must be a str, a list of words or a list of ids, got {type(sequence).__name__}")


def _pair_examples(text: Any, text_pair: Any, is_split_into_words: bool) -> list[tuple[Any, Any]]:
    """The (first, second) sequences of a batch.

    Raises:
        ValueError: `text_pair` has another length than `text`, or there is None in place of a text.
    """
    missing = [place for place, item in enumerate(text) if item is None]
    if missing:
        raise ValueError(
            f"Text {missing[0]} of the batch is None: give it a text, if only an empty one, or leave it out."
        )
    if text_pair is not None:
        if isinstance(text_pair, str) or len(text_pair) != len(text):
            raise ValueError(f"`text_pair` must be a batch of {len(text)} texts, like `text`")
        return list(zip(text, text_pair, strict=True))
    kinds = tuple if is_split_into_words else (list, tuple)
    is_pair = [isinstance(item, kinds) and len(item) == 2 and not _is_ids(item) for item in text]
    return [tuple(item) if pair else (item, None) for item, pair in zip(text, is_pair, strict=True)]


def is_plain_batch(text: Any) -> bool:
    """Whether this is a text, or texts without pairs."""
    return isinstance(text, str) or isinstance(text, (list, tuple)) and all(isinstance(item, str) for item in text)


def map_texts(value: Any, function: Callable[[str], str]) -> Any:
    """Apply `function` to each string of nested lists and tuples, which are kept as they are."""
    if isinstance(value, (list, tuple)):
        return type(value)(map_texts(item, function) for item in value)
    return function(value) if isinstance(value, str) else value
