"""Any text and any ids: both tokenizers agree, nothing is lost, and what can't be done is a ValueError."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from qwen1.native_tokens_qwen import PAYS, NativeTokens
from qwen1.pieces_qwen import normalise, split_pattern

from .conftest import SPECIALS, encodable, objects, texts

allowed = st.just("all") | st.sets(st.sampled_from(SPECIALS), max_size=3)
ids = st.lists(st.integers(-2, 1400) | st.integers(), max_size=8)


def resolved(tokenizer, allowed_special):
    return frozenset(tokenizer.special_tokens) if allowed_special == "all" else frozenset(allowed_special)


@given(texts, allowed)
def test_round_trip(tokenizers, text, allowed_special):
    """Slow, fast and what NFC makes of the text between control tokens."""
    slow, fast = tokenizers
    known = resolved(slow, allowed_special)
    encoded = slow.encode(text, allowed_special=allowed_special)
    assert encoded == fast.encode(text, allowed_special=allowed_special)
    expected = normalise(encodable(text), split_pattern(known))
    assert slow.decode(encoded) == fast.decode(encoded) == expected
    literal = [part for part in split_pattern(known).split(encodable(text)) if part in known]
    assert [i for i in encoded if i >= slow.eod_id] == [slow.special_tokens[token] for token in literal]


@pytest.fixture(scope="module")
def native(tokenizers):
    """The library with the vocabulary of both."""
    slow, _ = tokenizers
    found = NativeTokens().vocabulary(PAYS, slow.mergeable_ranks, slow.special_tokens)
    return found or pytest.skip("needs g++ or clang++ on Linux")


@given(texts, allowed)
def test_the_library_gives_the_ids_of_tiktoken_or_none(tokenizers, native, text, allowed_special):
    slow, _ = tokenizers
    known = resolved(slow, allowed_special)
    text = normalise(encodable(text), split_pattern(known))
    ids = native.encode(text, known)
    assert ids is None or ids == slow._bpe.encode(text, allowed_special=known, disallowed_special=())


@given(texts, allowed)
def test_tokens_are_those_of_the_ids(tokenizers, text, allowed_special):
    for tokenizer in tokenizers:
        encoded = tokenizer.encode(text, allowed_special=allowed_special)
        tokens = tokenizer.tokenize(text, allowed_special=allowed_special)
        assert tokenizer.convert_tokens_to_ids(tokens) == encoded
        assert tokenizer.convert_ids_to_tokens(encoded) == tokens
        assert tokenizer.convert_tokens_to_string(tokens) == tokenizer.decode(encoded)


@given(st.binary(max_size=24) | st.lists(st.sampled_from([b"\xe4\xbd", b"\xa0", b"\xf0\x9f", b"a"])).map(b"".join))
def test_any_bytes(tokenizers, content):
    """The ids of single bytes are their own ranks in every vocabulary."""
    slow, fast = tokenizers
    encoded = [slow.mergeable_ranks[bytes([byte])] for byte in content]
    for errors in ("replace", "ignore"):
        expected = content.decode("utf-8", errors)
        assert slow.decode(encoded, errors=errors) == fast.decode(encoded, errors=errors) == expected
    for tokenizer in tokenizers:
        try:
            assert tokenizer.decode(encoded, errors="strict").encode() == content
        except UnicodeDecodeError:
            with pytest.raises(UnicodeDecodeError):
                content.decode()


@given(ids, st.booleans())
def test_any_ids(tokenizers, given_ids, skip):
    slow, fast = tokenizers
    assert slow.decode(given_ids, skip_special_tokens=skip) == fast.decode(given_ids, skip_special_tokens=skip)
    for tokenizer in tokenizers:
        if any(not 0 <= i < len(tokenizer) for i in given_ids):
            with pytest.raises(ValueError):
                tokenizer.decode(given_ids, errors="strict")


@given(
    st.lists(texts, min_size=1, max_size=4),
    st.sampled_from([False, True, "max_length", "longest"]),
    st.sampled_from([False, True, "longest_first", "only_first", "only_second"]),
    st.none() | st.integers(-1, 9),
    st.none() | st.integers(0, 5),
    st.sampled_from([None, "left", "right"]),
    st.booleans(),
)
# What these showed: a length of 0 was none at all, numbers that divided by zero or fitted no word, a pair of which each
# class cut another text, one that stayed too long.
@example(["hello world"], False, True, 0, None, None, False)
@example(["a", "b"], True, False, None, 0, None, False)
@example(["a"], False, True, -1, None, None, False)
@example(["a"], False, True, 10**30, None, None, False)
@example(["<|endoftext|><|im_start|>"], False, True, 3, None, None, True)
@example(["a"], False, "only_first", 1, None, None, True)
def test_batches(tokenizers, batch, padding, truncation, max_length, multiple, side, with_pairs):
    """Both classes give the same rows, and each row is that of its text alone, cut and filled up."""
    options = {"padding": padding, "truncation": truncation, "max_length": max_length, "pad_to_multiple_of": multiple}
    results = []
    for tokenizer in tokenizers:
        pairs = (batch[::-1],) if with_pairs else ()
        try:
            results.append(dict(tokenizer(batch, *pairs, padding_side=side, **options)))
        except ValueError as error:
            results.append(type(error))
    assert results[0] == results[1]


@given(texts)
def test_places(tokenizers, text):
    """The fast class tells which characters a token is made of; together they are all of a text that NFC leaves."""
    fast = tokenizers[1]
    text = normalise(encodable(text), split_pattern(frozenset(SPECIALS)))
    out = fast(text, return_offsets_mapping=True)
    assert out["input_ids"] == fast.encode(text)
    places = out["offset_mapping"]
    length = len(encodable(text))
    assert all(0 <= start <= end <= length for start, end in places)
    assert {n for start, end in places for n in range(start, end)} == set(range(length))


@given(objects, st.sampled_from(["encode", "__call__", "tokenize", "decode", "convert_ids_to_tokens"]))
# Tracebacks of Python and of a library in place of errors.
@example(("a", "b"), "tokenize")
@example(b"a", "tokenize")
@example([-1], "convert_ids_to_tokens")
@example([2**40], "convert_ids_to_tokens")
def test_anything_else(tokenizers, value, method):
    for tokenizer in tokenizers:
        try:
            getattr(tokenizer, method)(value)
        except (ValueError, TypeError) as error:
            assert str(error)
