"""Any conversation as ChatML: what was said is read back from the ids, and control tokens are where turns are."""

import itertools

from hypothesis import example, given
from hypothesis import strategies as st

from qwen1.pieces_qwen import normalise, split_pattern
from qwen1.qwen_generation_utils import check_stop_words, decode_tokens, find_end, fitting_context, make_context

from .conftest import SPECIALS, encodable, objects, texts

NOTHING = split_pattern(frozenset())
turns = st.lists(st.tuples(texts, texts), max_size=3)
formats = st.sampled_from(["chatml", "raw", "", "ChatML", None])
few_ids = st.lists(st.integers(0, 4), max_size=12)
stops = st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=3), max_size=3)


def read(text):
    """A text as the model reads it."""
    return normalise(encodable(text), NOTHING)


def conversation_in(tokenizer, ids):
    """(role, text) of each turn; the last one is open."""
    assert tokenizer.eod_id not in ids and max(ids) <= tokenizer.im_end_id
    parts = []
    for is_start, group in itertools.groupby(ids, lambda i: i in (tokenizer.im_start_id, tokenizer.im_end_id)):
        group = list(group)
        if is_start:
            assert len(group) == 1
        parts.append(group[0] if is_start else tokenizer.decode(group))
    marks = [part for part in parts if isinstance(part, int)]
    assert marks == ([tokenizer.im_start_id, tokenizer.im_end_id] * len(marks))[: len(marks)] and len(marks) % 2
    said = [part for part in parts if isinstance(part, str)]
    assert all(between == "\n" for between in said[1::2])
    return [tuple(turn.split("\n", 1)) for turn in said[::2]]


@given(texts, turns, texts)
def test_conversations(tokenizers, query, history, system):
    contexts = [make_context(tokenizer, query, history, system, 10**6) for tokenizer in tokenizers]
    assert contexts[0] == contexts[1]
    turns_ = itertools.chain.from_iterable([("user", asked), ("assistant", answered)] for asked, answered in history)
    said = [("system", system), *turns_, ("user", query), ("assistant", "")]
    expected = [(role, read(text)) for role, text in said]
    assert conversation_in(tokenizers[0], contexts[0][1]) == expected


@given(texts, turns, texts, st.integers(0, 120), texts)
def test_windows(tokenizers, query, history, system, window, begun):
    """As many whole turns from the end as fit, or none."""
    tokenizer = tokenizers[0]
    ids = fitting_context(tokenizer, query, history, system, window, begun)
    begun_ids = tokenizer.encode(begun, allowed_special=set())
    candidates = [
        make_context(tokenizer, query, history[start:], system, 10**6)[1] + begun_ids
        for start in range(len(history) + 1)
    ]
    assert ids in candidates
    assert ids == candidates[-1] or len(ids) - len(make_context(tokenizer, query)[1]) < window
    same = [n for n, candidate in enumerate(candidates) if candidate == ids]
    longer = candidates[same[0] - 1] if same[0] else None
    assert longer is None or len(longer) >= window - len(begun_ids)


@given(objects, objects, objects, formats)
@example(None, [], "", "raw")  # None came back as the text of the prompt
def test_anything_else(tokenizers, query, history, system, chat_format):
    for tokenizer in tokenizers:
        try:
            text, ids = make_context(tokenizer, query, history, system, 6144, chat_format)
        except (ValueError, TypeError) as error:
            assert str(error)
        else:
            assert isinstance(text, str) and all(isinstance(i, int) for i in ids)


@given(
    texts,
    st.sampled_from(["<|im_end|>", "<|im_start|>", "<|endoftext|>", ""]),
    texts,
    st.sampled_from(["chatml", "raw"]),
)
def test_replies(tokenizers, reply, end, behind, chat_format):
    """What the model wrote before the token that ends it, whatever stands behind."""
    for tokenizer in tokenizers:
        prompt_text, prompt = make_context(tokenizer, "q", None, "s")
        written = tokenizer.encode(reply, allowed_special=set())
        last = [tokenizer.special_tokens[end], *tokenizer.encode(behind, allowed_special=set())] if end else []
        text = decode_tokens([*prompt, *written, *last], tokenizer, len(prompt_text), len(prompt), chat_format)
        if chat_format == "chatml":
            assert text == read(reply).strip()
        assert isinstance(text, str)


@given(few_ids, stops, stops, st.integers(0, 12))
def test_ends(reply, cut, kept, split):
    """Searched at once or while it grows; none complete before the end, and one complete at it."""
    end = find_end(reply, cut, kept)
    grown = next(
        (found for n in range(len(reply) + 1) if (found := find_end(reply[:n], cut, kept, max(n - 1, 0))) is not None),
        None,
    )
    assert grown == end
    contains = any(reply[n : n + len(stop)] == stop for stop in cut + kept for n in range(len(reply)))
    assert (end is not None) == contains
    if end is not None and not kept:
        assert any(reply[end : end + len(stop)] == stop for stop in cut)


@given(objects | st.lists(st.lists(st.integers() | objects, max_size=2), max_size=2))
def test_stop_words(value):
    try:
        words = check_stop_words(value)
    except ValueError as error:
        assert str(error).startswith("stop_words_ids")
    else:
        assert all(word and all(isinstance(i, int) for i in word) for word in words)
        assert value is None or len(words) == len(list(value))


@given(texts)
def test_control_tokens_are_not_said(tokenizers, text):
    ids = make_context(tokenizers[0], text + SPECIALS[2], [(text, SPECIALS[1])], SPECIALS[0] + text, 10**6)[1]
    assert len([i for i in ids if i >= tokenizers[0].eod_id]) == 9
