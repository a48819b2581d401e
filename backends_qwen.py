"""What cuts text into tokens: the pattern of this model, `tiktoken` with threads, and the `tokenizers` backend.

Both give the same ids. `tokenizers` knows tokens by byte-level names, "Ġhello" for b" hello".
"""

from __future__ import annotations

import functools
import itertools
import json
import operator
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import tiktoken
from tokenizers import Encoding, Regex, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import AddedToken

from .native_tokens_qwen import NativeTokens, NativeVocabulary
from .pieces_qwen import NFC, cut_text, has_long_blank, is_long, jobs_of, normalise, split_long_blanks, split_pattern
from .properties_qwen import kept
from .vocabulary_qwen import SPECIAL_TOKENS, VOCAB_FILES_NAMES, require_file

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
)
_BLANKS = r"\s+(?!\S)|\s+"
PAT_STR = f"{_WORDS}|{_BLANKS}"
# The same for tiktoken, whose engine tries the alternatives of a pattern that looks ahead one after another, but gives
# a group without look-ahead to an automaton as a whole.
GROUPED_PAT_STR = f"(?:{_WORDS})|{_BLANKS}"


# --- tiktoken ---


class TiktokenBackend:
    """Texts to ids by tiktoken, whatever their length, with as many threads as are of use.

    Once it has had much text a library of our own does that, where it can be made, in half of the time.

    Args:
        bpe: made with `GROUPED_PAT_STR` and what follows.
        ranks, special_tokens: as `load_vocabulary` gives them.
    """

    def __init__(self, bpe: tiktoken.Encoding, ranks: dict[bytes, int], special_tokens: dict[str, int]):
        self._bpe = bpe
        self.ranks = ranks
        self.special_tokens = special_tokens
        self._native = NativeTokens()

    @kept
    def _whole_piece_bpe(self) -> tiktoken.Encoding:
        """Encodes any text as one piece. Needed for very long runs of white space only, so built when first used."""
        return tiktoken.Encoding("qwen_piece", pat_str=r"[\s\S]+", mergeable_ranks=self.ranks, special_tokens={})

    def encode(self, texts: list[str], allowed: frozenset[str]) -> list[list[int]]:
        """Ids of each text, with the special tokens in `allowed` recognised."""
        if any(map(is_long, texts)):
            chunks = [cut_text(text) for text in texts]
            encoded = iter(self.encode_chunks(list(itertools.chain.from_iterable(chunks)), allowed))
            return [functools.reduce(operator.iadd, itertools.islice(encoded, len(line))) for line in chunks]
        return self.encode_chunks(texts, allowed)

    def encode_chunks(self, chunks: list[str], allowed: frozenset[str]) -> list[list[int]]:
        """Encode texts, long ones already cut, with as many threads as are of use."""
        jobs = jobs_of(chunks)
        native = self._native.vocabulary(sum(map(len, chunks)), self.ranks, self.special_tokens)
        encode = functools.partial(self._encode_job, allowed=allowed, native=native)
        if len(jobs) < 2:
            return [ids for job in jobs for ids in encode(job)]
        with ThreadPoolExecutor(min(8, _cores(), len(jobs))) as pool:  # more would wait for the interpreter's lock
            return list(itertools.chain.from_iterable(pool.map(encode, jobs)))

    def _encode_job(
        self, chunks: list[str], allowed: frozenset[str], native: NativeVocabulary | None
    ) -> list[list[int]]:
        """Encode chunks by one call, as every call makes its thread wait for the interpreter's lock.

        For that they are joined by a special token that none of them holds.
        """
        mark, known = "", allowed
        if len(chunks) > 1:
            whole = "".join(chunks)
            mark = next((token for token in reversed(self.special_tokens) if token not in whole), "")
            if not mark:
                return [self._encode_job([chunk], allowed, native)[0] for chunk in chunks]
            known = allowed | {mark}
        text = normalise(mark.join(chunks), split_pattern(known))
        if native and (ids := native.encode(text, known)) is not None:
            return _split_list(ids, self.special_tokens[mark]) if mark else [ids]
        if has_long_blank(text):
            chunks = text.split(mark) if mark else [text]
            return [self._encode_with_long_blanks(chunk, allowed) for chunk in chunks]
        if not known or "<|" not in text:
            return [self._bpe.encode_ordinary(text)]
        ids = self._bpe.encode(text, allowed_special=known, disallowed_special=())
        return _split_list(ids, self.special_tokens[mark]) if mark else [ids]

    def _encode_with_long_blanks(self, text: str, allowed: frozenset[str]) -> list[int]:
        """Encode normalised text that may hold runs of white space which are too long for tiktoken's pattern."""
        ids: list[int] = []
        for n, part in enumerate(split_pattern(allowed).split(text)):
            if n % 2:
                ids.append(self.special_tokens[part])
                continue
            for stretch, is_run in split_long_blanks(part):
                ids += (self._whole_piece_bpe if is_run else self._bpe).encode_ordinary(stretch)
        return ids


def _split_list(ids: list[int], separator: int) -> list[list[int]]:
    """What `str.split` does, for a list."""
    parts, start = [], 0
    for _ in range(ids.count(separator)):
        end = ids.index(separator, start)
        parts.append(ids[start:end])
        start = end + 1
    return [*parts, ids[start:] if start else ids]


def _cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# --- the `tokenizers` backend ---


@functools.lru_cache(maxsize=1)
def byte_alphabet() -> tuple[dict[int, int], dict[int, int]]:
    """The byte-level alphabet of GPT-2 as tables for `str.translate`: byte -> code point, and back.

    Printable Latin-1 characters stand for themselves, the other bytes for U+0100 and up.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    table = {byte: byte for byte in printable} | {byte: 0x100 + i for i, byte in enumerate(others)}
    return table, {code: byte for byte, code in table.items()}


def byte_level_name(token: bytes) -> str:
    """The name of a token in the fast class's vocabulary, "Ġhello" for b" hello"."""
    return token.decode("latin-1").translate(byte_alphabet()[0])


def bytes_of_name(name: str) -> bytes | None:
    """The bytes of which `byte_level_name` makes this name; None if there are none."""
    codes = [byte_alphabet()[1].get(ord(character)) for character in name]
    return None if None in codes else bytes(code for code in codes if code is not None)


def build_backend(ranks: Mapping[bytes, int], special_tokens: Mapping[str, int]) -> Tokenizer:
    """Build the `tokenizers.Tokenizer` that gives the ids of tiktoken with these tokens.

    The special tokens are part of the BPE vocabulary as well, otherwise `tokenizers` would number them from the size of
    that vocabulary and collide with extra tokens. No piece of text is ever one of them: `PAT_STR` cuts them in three.
    """
    vocab, merges = bpe_of_ranks(ranks, special_tokens)
    return _backend_around(BPE(vocab, merges, fuse_unk=False, ignore_merges=True), special_tokens)


def bpe_of_ranks(
    ranks: Mapping[bytes, int], special_tokens: Mapping[str, int]
) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of the backend with these tokens."""
    names = {token: byte_level_name(token) for token in ranks}
    merges: list[tuple[str, str]] = []
    for token in sorted(ranks, key=ranks.__getitem__):
        # tiktoken joins any two neighbours that make a token, so every way to cut the token is a merge.
        cuts = ((token[:i], token[i:]) for i in range(1, len(token)))
        known = sorted(
            (ranks[left], ranks[right], left, right) for left, right in cuts if left in ranks and right in ranks
        )
        merges.extend((names[left], names[right]) for _, _, left, right in known)
    return {name: ranks[token] for token, name in names.items()} | dict(special_tokens), merges


def _backend_around(model: Any, special_tokens: Iterable[str]) -> Tokenizer:
    """A backend with this model, and all else as this family needs it."""
    backend = Tokenizer(model)
    backend.normalizer = NFC
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PAT_STR), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    backend.add_special_tokens([special_added_token(token) for token in special_tokens])
    return backend


def refuse_tokens_around(backend: Tokenizer, wanted: bool) -> None:
    """Refuse a call that wants what a backend puts around whole texts and goes past it, by lists of ids."""
    if wanted and backend.num_special_tokens_to_add(False):
        raise ValueError(
            "`add_bos_token` and `add_eos_token` need calls with the default `allowed_special` and "
            "`disallowed_special`, or with `add_special_tokens=False`."
        )


def copy_backend(backend: Tokenizer) -> Tokenizer:
    """A backend with settings of its own and the same model, which isn't copied."""
    copy = Tokenizer(backend.model)
    for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        setattr(copy, part, getattr(backend, part))
    tokens = [token for _, token in sorted(backend.get_added_tokens_decoder().items())]
    for special, group in itertools.groupby(tokens, lambda token: token.special):
        (copy.add_special_tokens if special else copy.add_tokens)(list(group))
    return copy


def read_backend(path: str | os.PathLike) -> Tokenizer:
    """Read a `tokenizer.json`.

    Raises:
        OSError, ValueError: it can't be read, or is damaged.
    """
    require_file(path, "tokenizer.json")
    try:
        return Tokenizer.from_file(os.fspath(path))
    except Exception as error:  # the library has no kind of its own
        raise ValueError(
            f"{os.fspath(path)!r} is damaged, no tokenizer that can be read ({error}): download it again, or remove "
            f"it, and {VOCAB_FILES_NAMES['vocab_file']} is read in its place."
        ) from error


def special_added_token(token: str) -> AddedToken:
    return AddedToken(token, lstrip=False, rstrip=False, normalized=False, special=True)


def ranks_of_backend(backend: Tokenizer, special_tokens: Iterable[str]) -> dict[bytes, int]:
    """Token bytes -> id, in the order of ids, read back from a backend; without the special tokens."""
    return _ranks_of_names(backend.get_vocab(with_added_tokens=False), special_tokens)


def _ranks_of_names(vocab: Mapping[str, int], special_tokens: Iterable[str]) -> dict[bytes, int]:
    _, table = byte_alphabet()
    ranks = {token.translate(table).encode("latin-1"): i for token, i in vocab.items() if token not in special_tokens}
    return dict(sorted(ranks.items(), key=lambda item: item[1]))


_FIXED = (
    "continuing_subword_prefix",
    "end_of_word_suffix",
    "initial_alphabet",
    "limit_alphabet",
    "special_tokens",
)
"""Settings of a trainer that would leave texts without tokens."""


def learn_ranks(
    texts: Iterable[str] | Iterable[list[str]], size: int, like: Tokenizer, length: int | None, **settings: Any
) -> dict[bytes, int]:
    """Learn a vocabulary from texts that are cut as `like` cuts them.

    Args:
        texts: texts, or batches of texts.
        size: how many tokens there are to be, of which the 256 bytes are the first.
        like: a backend.
        length: how many items `texts` has, for a progress bar.
        **settings: other arguments of `tokenizers.trainers.BpeTrainer`.

    Raises:
        ValueError: an alphabet, or other settings that would leave texts without tokens.
    """
    if given := [name for name in _FIXED if settings.get(name) is not None]:
        raise ValueError(f"`{given[0]}` can't be chosen, as every text must have tokens, made of bytes; leave it out")
    learner = Tokenizer(BPE())
    learner.normalizer, learner.pre_tokenizer = like.normalizer, like.pre_tokenizer
    settings["initial_alphabet"] = pre_tokenizers.ByteLevel.alphabet()
    learner.train_from_iterator(texts, trainer=BpeTrainer(vocab_size=max(size, 256), **settings), length=length)
    learnt = sorted(learner.get_vocab().items(), key=lambda item: item[1])
    return {name.translate(byte_alphabet()[1]).encode("latin-1"): i for name, i in learnt}


class BackendOfCall:
    """The truncation and padding of one call, around a backend that has neither and adds no tokens.

    It does for texts without pairs what `copy_backend` with these settings would do, without the time of the copy.
    """

    encode_special_tokens = False
    truncation: dict[str, Any] | None = None
    padding: dict[str, Any] | None = None

    def __init__(self, backend: Any):
        self._backend = backend

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def enable_truncation(self, **settings: Any) -> None:
        """What transformers calls with its settings."""
        self.truncation = settings

    def enable_padding(self, **settings: Any) -> None:
        """What transformers calls with its settings."""
        self.padding = settings

    def encode_batch(self, texts: list[str], **options: Any) -> list[Any]:
        """The encodings of texts, cut and padded."""
        encodings = self._backend.encode_batch(texts, **options)
        if self.truncation:
            limit, side = self.truncation["max_length"], self.truncation["direction"]
            for encoding in encodings:
                encoding.truncate(limit, direction=side)
        if self.padding and encodings:
            settings = dict(self.padding)
            length, multiple = settings.pop("length"), settings.pop("pad_to_multiple_of") or 1
            longest = max(map(len, encodings)) if length is None else length
            for encoding in encodings:
                encoding.pad(-(-longest // multiple) * multiple, **settings)
        return encodings


# --- tiktoken in place of that backend ---

SHORT = 10_000  # characters up to which a look at the settings of a backend would take longer than it saves
_SAMPLES = 64  # tokens of a model that are looked at for each call
_PARTS = ("normalizer", "pre_tokenizer", "post_processor")


class Shortcut:
    """tiktoken beside a `tokenizers` backend, for calls that want no more than ids: it takes a tenth of the time.

    It is used only where the backend is known to be the one that `build_backend` makes of its vocabulary. That is found
    out by comparing all tokens and merges, which takes a second or two, so not before as much text has come as pays for
    it. What else a backend has (normaliser, pre-tokenizer, special tokens, settings of the model) and a sample of its
    tokens are compared for each call, all of its model again for each call with as much text. Copies begin anew.

    Attributes:
        shown: whether the backend was handed out, so that its model may change at any time; then calls with less text
            do without tiktoken.
    """

    def __init__(self) -> None:
        self.shown = False
        self._seen = 0  # characters that came before it was known whether tiktoken may be used
        self._twin: TiktokenTwin | None = None
        self._refused: Any = None  # the looks of a backend that tiktoken doesn't do the work of

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()

    def twin(self, backend: Tokenizer, special_tokens: dict[str, int], texts: Iterable[str]) -> TiktokenTwin | None:
        """What does the work of this backend for these texts; None where that isn't known, or doesn't pay."""
        characters, pays = sum(map(len, texts)), 10 * backend.get_vocab_size(False)
        if characters < SHORT or (self.shown and characters < pays):
            return None
        twin = self._twin
        if twin is None:
            self._seen += characters
            if self._seen < pays:
                return None
        looks = _looks_of(backend, special_tokens)
        if looks is None or looks == self._refused:
            return None
        if twin and twin.looks == looks and (characters < pays or hash(_state_of(backend.model)) == twin.state):
            return twin
        if found := TiktokenTwin.of(backend, special_tokens, looks):
            self._twin = found
        else:
            self._refused = looks
        return found


class TiktokenTwin:
    """tiktoken with the vocabulary of a backend, of which it gives the ids.

    Attributes:
        tiktoken: it.
        looks: `_looks_of` that backend.
        state: hash of the model of that backend.
    """

    def __init__(self, backend: Tokenizer, bpe: TiktokenBackend, looks: Any, state: int):
        self.tiktoken, self.looks, self.state = bpe, looks, state
        self._backend = _backend_around(backend.model, bpe.special_tokens)  # whatever becomes of the other one

    @classmethod
    def of(cls, backend: Tokenizer, special_tokens: dict[str, int], looks: Any) -> TiktokenTwin | None:
        """That of a backend; None if `build_backend` makes another one of its vocabulary."""
        if not isinstance(backend.model, BPE) or not set(SPECIAL_TOKENS).issuperset(special_tokens):
            return None
        plain = _backend_around(BPE(fuse_unk=False, ignore_merges=True), special_tokens)
        added = sorted((i, _flags_of(special_added_token(token))) for token, i in special_tokens.items())
        if _parts_of(backend) != _parts_of(plain) or _added_to(backend) != added:
            return None
        state = _state_of(backend.model)
        model = json.loads(state)
        try:
            ranks = _ranks_of_names(model["vocab"], special_tokens)
        except ValueError:  # names that don't stand for bytes
            return None
        vocab, merges = bpe_of_ranks(ranks, special_tokens)
        wanted = json.loads(_state_of(plain.model)) | {"vocab": vocab, "merges": [list(merge) for merge in merges]}
        if model != wanted or not all(bytes([byte]) in ranks for byte in range(256)):
            return None
        bpe = tiktoken.Encoding("qwen", pat_str=GROUPED_PAT_STR, mergeable_ranks=ranks, special_tokens=special_tokens)
        return cls(backend, TiktokenBackend(bpe, ranks, dict(special_tokens)), looks, hash(state))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def encode_batch(self, texts: list[str], **_: Any) -> list[EncodedRow]:
        """Ids of texts, special tokens recognised; the method of a backend that transformers calls."""
        return [EncodedRow(ids) for ids in self.tiktoken.encode(texts, frozenset(self.tiktoken.special_tokens))]

    def locate(self, texts: list[str], truncation: Any, padding: Any) -> list[Encoding]:
        """The encodings that the backend would have given.

        Args:
            texts: those of a call.
            truncation, padding: as `BackendOfCall` has them.

        Raises:
            RuntimeError: its model is another one by now.
        """
        if _model_looks(self._backend) != self.looks[0]:
            raise RuntimeError(
                "The places of these tokens aren't known any more: the model of the tokenizer's backend was changed "
                "after the call. Ask for them in the call, with `return_offsets_mapping=True`."
            )
        call = BackendOfCall(self._backend)
        call.truncation, call.padding = truncation, padding
        return call.encode_batch(texts)


class EncodedRow:
    """As much of a `tokenizers.Encoding` as transformers makes rows of."""

    n_sequences = 1

    def __init__(self, ids: list[int]):
        self.ids = ids
        self.attention_mask = [1] * len(ids)

    def __len__(self) -> int:
        return len(self.ids)

    def truncate(self, max_length: int, direction: str) -> None:
        """Leave out what is more than `max_length` ids, on the side `direction`."""
        beyond = max(len(self) - max_length, 0)
        keep = slice(beyond, None) if direction == "left" else slice(len(self) - beyond)
        self.ids, self.attention_mask = self.ids[keep], self.attention_mask[keep]

    def pad(self, length: int, direction: str, pad_id: int, **_: Any) -> None:
        """Add ids up to `length`, on the side `direction`."""
        missing = max(length - len(self), 0)
        ids, mask = [pad_id] * missing, [0] * missing
        if direction == "left":
            self.ids, self.attention_mask = ids + self.ids, mask + self.attention_mask
        else:
            self.ids, self.attention_mask = self.ids + ids, self.attention_mask + mask


def _looks_of(backend: Tokenizer, special_tokens: Mapping[str, int]) -> tuple[Any, ...] | None:
    """What is quickly seen of a backend: its model, its parts, its tokens; None if some of it is no data."""
    try:
        return _model_looks(backend), _parts_of(backend), _added_to(backend), tuple(special_tokens.items())
    except Exception:  # the library has no kind of its own for parts that are code of the caller's
        return None


def _model_looks(backend: Tokenizer) -> tuple[Any, ...]:
    """Kind, settings, size and some tokens of a model, and how it cuts the text that they are."""
    model, size = backend.model, backend.get_vocab_size(False)
    names = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk", "byte_fallback")
    settings = [getattr(model, name, None) for name in (*names, "ignore_merges")]
    sample = [model.id_to_token(i) for i in range(0, size, size // _SAMPLES + 1)]
    ids = [token.id for token in model.tokenize("".join(filter(None, sample)))]
    return type(model), settings, size, sample, ids


def _parts_of(backend: Tokenizer) -> list[Any]:
    return [_state_of(getattr(backend, part)) for part in _PARTS]


def _state_of(part: Any) -> Any:
    return None if part is None else part.__getstate__()


def _added_to(backend: Tokenizer) -> list[tuple[int, tuple[Any, ...]]]:
    return [(i, _flags_of(token)) for i, token in sorted(backend.get_added_tokens_decoder().items())]


def _flags_of(token: AddedToken) -> tuple[Any, ...]:
    return token.content, token.special, token.normalized, token.lstrip, token.rstrip, token.single_word
