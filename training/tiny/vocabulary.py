"""Trains a byte-pair vocabulary and writes it in the tiktoken format."""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from ...tokenization_qwen import PAT_STR
from .phrases import GIVEN, SURNAMES

_EMPHASIS = 20_000  # more often than any phrase occurs
_NAME_CHARACTERS = re.compile(f"([{SURNAMES}])(?=[{GIVEN}])")


def train_vocabulary(texts: Iterable[str], size: int) -> dict[bytes, int]:
    """Learn byte pairs with the library tokenizers, split as QWen's pattern splits.

    Args:
        texts: to learn from.
        size: tokens, the 256 single bytes included.

    Returns:
        token bytes -> id: the bytes first, then the pairs in the order of learning.

    Raises:
        ValueError: `size` is below 256, or the texts hold too little for it.
    """
    if size < 256:
        raise ValueError(f"size={size} leaves no room for the 256 single bytes.")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(PAT_STR), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=True, min_frequency=2)
    tokenizer.train_from_iterator(texts, trainer)
    learned = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    tokens = [_bytes_of(token) for token, _ in learned]
    if len(tokens) < size:
        raise ValueError(f"The texts give {len(tokens)} tokens only, fewer than size={size}: pass more of them.")
    ranks = {bytes([byte]): byte for byte in range(256)}
    return ranks | {token: i for i, token in enumerate((t for t in tokens if len(t) > 1), start=256)}


def write_tiktoken(ranks: dict[bytes, int], path: str | os.PathLike) -> None:
    """Write a vocabulary as lines of a token in base64 and its id; appears when complete."""
    partial = Path(f"{os.fspath(path)}.partial")
    partial.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % i for token, i in ranks.items()))
    partial.replace(path)


def without_names(text: str) -> str:
    """Take Chinese names apart, so that a name heard for the first time has the tokens of known ones."""
    return _NAME_CHARACTERS.sub("\\1\n", text)


def spelled(texts: Iterable[str]) -> list[str]:
    """Every character beyond ASCII alone on many lines, so that each is one token before any phrase is."""
    counted = sorted({character for text in texts for character in text if ord(character) > 127})
    return [f"{character}\n" * _EMPHASIS for character in counted]


def _byte_letters() -> dict[str, int]:
    """The letters by which the byte-level alphabet stands for bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_LETTERS = _byte_letters()


def _bytes_of(token: str) -> bytes:
    return bytes(_LETTERS[letter] for letter in token)
