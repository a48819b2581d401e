"""Reading and checking vocabulary files, extra vocabularies, added tokens."""

import base64
import logging

import pytest

from qwen1.tokenization_qwen import (
    EXTRAS,
    SPECIAL_TOKENS,
    QWenTokenizer,
    QWenTokenizerFast,
    load_base_ranks,
    load_extra_ranks,
    load_vocabulary,
)


@pytest.fixture
def lines(small_tokens):
    return [base64.b64encode(token) + b" %d\n" % i for i, token in enumerate(small_tokens)]


@pytest.mark.parametrize(
    ("line", "text", "message"),
    [
        (10, b"aGVsbG8=\n", r"line 11: expected 'base64 id', got b'aGVsbG8='"),
        (10, b"aGVs bG8= 10\n", r"line 11: expected 'base64 id'"),
        (10, b"a$b 10\n", r"line 11: b'a\$b' is not base64"),
        (10, b"aGVsbG8 10\n", r"line 11: b'aGVsbG8' is not base64"),
        (10, b"== 10\n", r"line 11: "),
        (10, b"aGVsbG8= ten\n", r"line 11: b'ten' is not an id"),
        (10, b"aGVsbG8= -1\n", r"line 11: b'-1' is not an id"),
        (10, b"CQ== 10\n", r"line 11: token b'\\t' is already on line 10"),
        (11, b"Cw== 9\n", r"line 12: id 9 is already on line 10"),
        (271, b"YWE= 280\n", r"line 272: id 280 leaves a gap, no line has id 271"),
        (0, b"\n", r"line 2: id 1 leaves a gap, no line has id 0"),
    ],
)
def test_damaged_lines_are_named(tmp_path, lines, line, text, message):
    lines[line] = text
    path = tmp_path / "qwen.tiktoken"
    path.write_bytes(b"".join(lines))
    with pytest.raises(ValueError, match=rf"{path}, {message}"):
        load_base_ranks(path)
    for cls in (QWenTokenizer, QWenTokenizerFast):
        with pytest.raises(ValueError, match=message):
            cls(path)


@pytest.mark.parametrize("size", [0, 100, 1000, 2000])
def test_truncated_files(tmp_path, lines, size):
    path = tmp_path / "qwen.tiktoken"
    path.write_bytes(b"".join(lines)[:size])
    with pytest.raises(ValueError, match=r"qwen.tiktoken, (after )?line \d+: "):
        load_base_ranks(path)


def test_truncated_published_file(tmp_path, published_vocabulary):
    path = tmp_path / "qwen.tiktoken"
    path.write_bytes(published_vocabulary.read_bytes()[:1_000_000])
    with pytest.raises(ValueError, match=r"qwen.tiktoken, line \d+: "):
        load_base_ranks(path)


def test_order_blank_lines_and_line_ends_do_not_matter(tmp_path, lines, small_tokens):
    path = tmp_path / "qwen.tiktoken"
    path.write_bytes(b"\r\n".join(line.strip() for line in reversed(lines)) + b"\n\n")
    assert load_base_ranks(path) == {token: i for i, token in enumerate(small_tokens)}


@pytest.mark.parametrize("cls", [QWenTokenizer, QWenTokenizerFast])
def test_missing_files(tmp_path, cls, small_vocabulary):
    with pytest.raises(FileNotFoundError, match=r"nowhere/qwen.tiktoken' does not exist. Download qwen.tiktoken"):
        cls("nowhere/qwen.tiktoken")
    with pytest.raises(FileNotFoundError, match="'qwen.tiktoken' does not exist. Download qwen.tiktoken"):
        cls(None)
    with pytest.raises(FileNotFoundError, match="'qwen.tiktoken' does not exist. Download qwen.tiktoken"):
        cls.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="extra.tiktoken' does not exist"):
        cls.from_pretrained(small_vocabulary.parent, extra_vocab_file="extra.tiktoken")


@pytest.fixture(params=[QWenTokenizer, QWenTokenizerFast])
def extended(request, tmp_path, small_vocabulary):
    """A tokenizer with the extra tokens "hell" (480) and "hello world" (482, never reached), and a gap between."""
    path = tmp_path / "extra.tiktoken"
    path.write_bytes(b"aGVsbCE= 480\naGVsbG8gd29ybGQ= 482\n")
    return request.param(small_vocabulary, extra_vocab_file=path)


def test_extra_vocabulary(extended):
    extended_ids = extended.mergeable_ranks[b"hell!"], extended.mergeable_ranks[b"hello world"]
    assert extended_ids == (480, 482)
    assert len(extended) == extended.vocab_size == 483
    assert extended.im_end_id == 274
    assert extended.decode([480, 274, 481, 482]) == "hell!<|im_end|>\ufffdhello world"
    assert extended.decode([480, 274], skip_special_tokens=True) == "hell!"


def test_extra_token_that_exists_is_skipped(tmp_path, small_vocabulary, caplog, write_vocabulary):
    extra = write_vocabulary(tmp_path / "extra.tiktoken", [b"hello", b"aaa"], start=480)
    logging.getLogger("transformers").propagate = True
    try:
        ranks, _ = load_vocabulary(small_vocabulary, extra)
    finally:
        logging.getLogger("transformers").propagate = False
    assert (ranks[b"hello"], ranks[b"aaa"]) == (259, 481)
    assert QWenTokenizer(small_vocabulary, extra_vocab_file=extra).encode("aaa") == [481]
    assert QWenTokenizerFast(small_vocabulary, extra_vocab_file=extra).encode("aaa") == [481]


@pytest.mark.parametrize(("start", "owner"), [(100, "b'd'"), (274, r"b'<\|im_end\|>'")])
def test_extra_id_that_is_taken_is_an_error(tmp_path, small_vocabulary, start, owner, write_vocabulary):
    extra = write_vocabulary(tmp_path / "extra.tiktoken", [b"aaa"], start=start)
    expected = rf"{extra}, line 1: id {start} of token b'aaa' belongs to {owner}; new ids begin at 480"
    with pytest.raises(ValueError, match=expected):
        QWenTokenizer(small_vocabulary, extra_vocab_file=extra)


def test_extra_ranks_leave_the_vocabulary_alone(tmp_path, write_vocabulary):
    ranks, extra = {b"a": 0}, write_vocabulary(tmp_path / "extra.tiktoken", [b"b"], start=3)
    assert load_extra_ranks(extra, ranks, {"<|x|>": 1}) == {b"a": 0, b"b": 3}
    assert ranks == {b"a": 0}


@pytest.mark.parametrize("cls", [QWenTokenizer, QWenTokenizerFast])
def test_extra_token_with_the_text_of_a_special_one_is_an_error(tmp_path, small_vocabulary, cls, write_vocabulary):
    extra = write_vocabulary(tmp_path / "extra.tiktoken", [b"aaa", b"<|im_end|>"], start=480)
    with pytest.raises(ValueError, match=r"line 2: b'<\|im_end\|>' is the text of a special token"):
        cls(small_vocabulary, extra_vocab_file=extra)


@pytest.mark.parametrize("rank", [b"99999999999", b"1" * 5000, b"-1", b"x"])
@pytest.mark.parametrize("cls", [QWenTokenizer, QWenTokenizerFast])
def test_an_absurd_id_is_an_error_that_names_its_line(tmp_path, small_vocabulary, cls, rank):
    extra = tmp_path / "extra.tiktoken"
    extra.write_bytes(b"YWFh 480\nYWFhYQ== " + rank + b"\n")
    with pytest.raises(ValueError, match=r"extra.tiktoken, line 2: .* is not an id"):
        cls(small_vocabulary, extra_vocab_file=extra)


@pytest.mark.parametrize("cls", [QWenTokenizer, QWenTokenizerFast])
def test_a_refused_special_token_changes_nothing(small_vocabulary, cls):
    tokenizer = cls(small_vocabulary)
    with pytest.raises(ValueError, match="'<pad>' cannot be added"):
        tokenizer.add_special_tokens({"pad_token": "<pad>"})
    with pytest.raises(ValueError, match=r"'\[PAD\]' cannot be added"):
        tokenizer.pad_token = "[PAD]"
    assert tokenizer.pad_token == "<|endoftext|>" and tokenizer.pad_token_id == tokenizer.eod_id
    tokenizer.pad_token = "<|extra_3|>"
    assert tokenizer.pad_token_id == tokenizer.special_tokens["<|extra_3|>"]


def test_tokens_cannot_be_added(fresh):
    for add in (fresh.add_tokens, lambda tokens: fresh.add_special_tokens({"additional_special_tokens": tokens})):
        with pytest.raises(ValueError, match=r"'<new>' cannot be added.* one of .* qwen1-extend-vocabulary .* `extra_"):
            add(["<new>"])
    assert len(fresh) == 480


def test_unknown_special_tokens_are_refused(small_vocabulary):
    with pytest.raises(ValueError, match=r"Token '\[PAD\]' cannot be added"):
        QWenTokenizer(small_vocabulary, pad_token="[PAD]")
    with pytest.raises(ValueError, match=r"Token '\[PAD\]' cannot be added"):
        QWenTokenizerFast(small_vocabulary, pad_token="[PAD]")


def test_special_tokens_can_be_chosen_among_those_that_exist(fresh):
    assert (fresh.eos_token, fresh.pad_token) == ("<|endoftext|>", "<|endoftext|>")
    assert fresh.eos_token_id == fresh.pad_token_id == fresh.eod_id
    assert fresh.add_special_tokens({"pad_token": EXTRAS[0]}) == 0
    assert fresh.pad_token_id == 275
    fresh.eos_token = "<|im_end|>"
    assert fresh.eos_token_id == fresh.im_end_id
    fresh.pad_token_id = 276
    assert fresh.pad_token == EXTRAS[1]
    assert fresh.add_tokens(["<|im_start|>", ""]) == 0
    assert set(fresh.all_special_tokens) == set(SPECIAL_TOKENS)
    assert set(fresh.all_special_ids) == set(fresh.special_tokens.values())
    mask = fresh.get_special_tokens_mask([97, fresh.im_end_id], already_has_special_tokens=True)
    assert mask == [0, 1]


def test_saving_the_vocabulary(tmp_path, fresh, small_vocabulary):
    (path,) = fresh.save_vocabulary(str(tmp_path), filename_prefix="my")
    assert path == str(tmp_path / "my-qwen.tiktoken")
    assert (tmp_path / "my-qwen.tiktoken").read_bytes() == small_vocabulary.read_bytes()
    with pytest.raises(ValueError, match="is not a directory"):
        fresh.save_vocabulary(path)


@pytest.mark.parametrize("cls", [QWenTokenizer, QWenTokenizerFast])
def test_a_vocabulary_can_be_sorted(cls, byte_vocabulary):
    """Which transformers does with it for stop strings."""
    vocabulary = cls(str(byte_vocabulary)).get_vocab()
    tokens = sorted(vocabulary)
    assert len(tokens) == len(vocabulary) and set(tokens) == set(vocabulary)
    if cls is QWenTokenizer:
        assert tokens[:256] == [bytes([byte]) for byte in range(256)] and tokens[256:] == sorted(tokens[256:])
