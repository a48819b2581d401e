"""Tokens for new words, learned by byte-pair encoding, to be loaded with `extra_vocab_file`.

New tokens are pairs of tokens that follow one another in the words: the most frequent pair first, until each word is
one token. Their ids begin after the special tokens, at 151851 for the published vocabulary. A word is skipped, with a
warning, if it is one token already, or if the tokenizer's pattern would split it, for no token ever reaches across such
a split.
"""

from __future__ import annotations

import base64
import os
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

from tokenizers import Regex, pre_tokenizers
from transformers.utils import logging

from ..programs.failures import naming
from ..tokenization_qwen import PAT_STR, SPECIAL_TOKENS, load_base_ranks

logger = logging.get_logger(__name__)

Pair = tuple[bytes, bytes]


def bpe(word: bytes, ranks: Mapping[bytes, int]) -> tuple[bytes, ...]:
    """Byte-pair encode a piece of text as tiktoken does: join the neighbours of lowest rank, the leftmost first."""
    if word in ranks:
        return (word,)
    parts = [bytes([byte]) for byte in word]
    while True:
        known = [(ranks[left + right], i) for i, (left, right) in enumerate(pairwise(parts)) if left + right in ranks]
        if not known:
            return tuple(parts)
        _, i = min(known)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


def read_words(path: str | os.PathLike) -> dict[str, int]:
    """Read `word<TAB>frequency` lines. Words are normalised to NFC; the frequencies of equal words are added up.

    Raises:
        OSError: the file cannot be read.
        ValueError: a line has another form. The message names file, line and value.
    """
    words: Counter[str] = Counter()
    with open(path, encoding="utf-8-sig") as file:
        try:
            lines = file.read().split("\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"{os.fspath(path)} is not UTF-8: {error}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        word, tab, frequency = line.rpartition("\t")
        if not tab or not word:
            raise ValueError(f"{os.fspath(path)}, line {number}: expected 'word<TAB>frequency', got {line!r}")
        if not frequency.strip().isdecimal() or int(frequency) == 0:
            raise ValueError(
                f"{os.fspath(path)}, line {number}: the frequency of {word!r} must be a positive whole number, "
                f"got {frequency!r}"
            )
        words[unicodedata.normalize("NFC", word)] += int(frequency)
    return dict(words)


def learnable_words(words: Mapping[str, int], ranks: Mapping[bytes, int]) -> dict[str, int]:
    """The words that can become one token; a warning tells why another cannot, or need not."""
    split = pre_tokenizers.Split(Regex(PAT_STR), behavior="isolated")
    kept = {}
    for word, frequency in words.items():
        pieces = [piece for piece, _ in split.pre_tokenize_str(word)]
        if word.encode("utf-8") in ranks:
            logger.warning(f"Skipping {word!r}: it is one token already, {ranks[word.encode('utf-8')]}")
        elif len(pieces) > 1:
            logger.warning(f"Skipping {word!r}: it is split into {pieces} before encoding, so it cannot be one token")
        else:
            kept[word] = frequency
    return kept


def _preference(pair: Pair) -> tuple[int, int, str, bytes]:
    """Sort key among pairs of one frequency: the shorter token first, then by text and bytes."""
    token = b"".join(pair)
    text = token.decode("utf-8", errors="replace")
    return len(text), len(token), text, token


def learn_merges(ranks: Mapping[bytes, int], words: Mapping[str, int], first_id: int) -> dict[bytes, int]:
    """Learn tokens so that each word becomes a single one.

    Args:
        ranks: token bytes -> id of the vocabulary to extend; not changed.
        words: NFC words -> frequency. Each is taken as one piece of text; see `learnable_words`.
        first_id: id of the first new token, above all ids in use.

    Returns:
        New token bytes -> id, in the order of learning. `ranks` and these make a valid BPE: tiktoken gives each word as
        the one token learned for it.

    Raises:
        ValueError: `first_id` is not above the ids of `ranks`, so that the new tokens would come before old ones.
    """
    if first_id <= max(ranks.values()):
        raise ValueError(f"first_id is {first_id}, but ids up to {max(ranks.values())} are in use")
    known = dict(ranks)
    learned: dict[bytes, int] = {}
    frequency_of = {word.encode("utf-8"): frequency for word, frequency in words.items()}
    parts = {word: bpe(word, known) for word in frequency_of}
    counts: Counter[Pair] = Counter()  # how often two parts follow one another
    holders: defaultdict[Pair, set[bytes]] = defaultdict(set)  # the words in which they do, or did

    def count(word: bytes, sign: int) -> None:
        for pair in pairwise(parts[word]):
            counts[pair] += sign * frequency_of[word]
            if not counts[pair]:
                del counts[pair]
            holders[pair].add(word)

    for word in parts:
        count(word, 1)
    while counts:
        most = max(counts.values())
        pair = min((pair for pair, n in counts.items() if n == most), key=_preference)
        learned[b"".join(pair)] = known[b"".join(pair)] = first_id + len(learned)
        for word in holders.pop(pair):
            count(word, -1)
            parts[word] = bpe(word, known)  # from its bytes, as the new token may complete an old one
            count(word, 1)
    return learned


def extend_vocabulary(vocab_file: str | os.PathLike, words_file: str | os.PathLike, output: str | os.PathLike) -> int:
    """Learn tokens from `words_file` and write them as a tiktoken file.

    Returns:
        The number of new tokens.

    Raises:
        OSError, ValueError: a file cannot be read or has another form.
    """
    ranks = load_base_ranks(vocab_file)
    words = learnable_words(read_words(words_file), ranks)
    learned = learn_merges(ranks, words, first_id=len(ranks) + len(SPECIAL_TOKENS))
    _write(learned, Path(output))
    return len(learned)


def _write(learned: Mapping[bytes, int], output: Path) -> None:
    """Write a tiktoken file, under its name only when complete; where that fails, an old one stays."""
    partial = output.with_name(f"{output.name}.partial")
    try:
        with naming(output), open(partial, "wb") as file:
            file.writelines(base64.b64encode(token) + b" %d\n" % i for token, i in learned.items())
        partial.replace(output)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
