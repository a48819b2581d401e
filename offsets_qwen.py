"""Where the tokens of a chat are in its text: found out by the `tokenizers` library, when somebody asks."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tokenizers import Encoding, PreTokenizedString, Token

from .backends_qwen import byte_level_name
from .pieces_qwen import NFC, repair_surrogates
from .properties_qwen import kept
from .templates_qwen import unused_characters


def locate(pieces: list[tuple[str, bool]], backend: Any, special_tokens: Mapping[str, int]) -> Encoding:
    """The `tokenizers.Encoding` of pieces (text, whether it is a control token), with their places in the whole.

    Args:
        pieces: of one chat, in order.
        backend: a `tokenizers.Tokenizer`.
        special_tokens: their ids.
    """
    pieces = [(repair_surrogates(text), is_control) for text, is_control in pieces if text]
    whole = "".join(text for text, _ in pieces)
    ends = itertools.accumulate((len(text) for text, _ in pieces), initial=0)
    # Control tokens go through the pre-tokenizer as runs of a letter that the text lacks, in NFC too.
    stand_in = unused_characters([whole, NFC.normalize_str(whole)], 1)[0]
    disguised = byte_level_name(stand_in.encode())
    controls = iter([special_tokens[text] for text, is_control in pieces if is_control])

    def cut(_: int, text: Any) -> list[Any]:
        parts = [text[start:end] for start, end in itertools.pairwise(ends)]
        for part, piece in zip(parts, pieces, strict=True):
            if piece[1]:
                part.map(lambda character: stand_in)
        return parts

    def tokens_of(word: str) -> list[Token]:
        if not word.startswith(disguised):
            return backend.model.tokenize(word)
        control = next(controls)
        return [Token(control, backend.id_to_token(control), (0, len(word.encode())))]

    prepared = PreTokenizedString(whole)
    prepared.split(cut)
    prepared.normalize(backend.normalizer.normalize)
    backend.pre_tokenizer.pre_tokenize(prepared)
    prepared.tokenize(tokens_of)
    return prepared.to_encoding()


class LazyEncodings(Sequence[Encoding]):
    """The encodings of a batch, which are made when they are first looked at, as few callers do.

    Args:
        make: gives all of them.
        length: how many there are.
    """

    def __init__(self, make: Callable[[], list[Encoding]], length: int):
        self._make = make
        self._length = length

    @kept
    def _made(self) -> list[Encoding]:
        return self._make()

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: Any) -> Any:
        return self._made[index]

    def __reduce__(self) -> tuple[Any, ...]:
        return list, (self._made,)  # copies and pickles need no tokenizer
