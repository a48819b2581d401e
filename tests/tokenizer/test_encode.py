"""Text to ids: golden ids, special tokens, normalisation, batches, long runs, threads."""

import itertools
import logging
import random
import unicodedata
from concurrent.futures import ThreadPoolExecutor

import pytest
import tiktoken

from qwen1 import backends_qwen, pieces_qwen
from qwen1.qwen_generation_utils import make_context
from qwen1.tokenization_qwen import (
    CHUNK,
    CUT,
    LONG_BLANK,
    NFC,
    PAT_STR,
    SPECIAL_TOKENS,
    UNSTABLE,
    QWenTokenizer,
    QWenTokenizerFast,
    cut_text,
    has_long_blank,
    split_long_blanks,
)

RUN = 10_000  # the length from which runs of white space are cut out of the text


def test_published_facts(published, golden_json):
    facts = golden_json("facts")
    assert len(published) == published.vocab_size == facts["len"]
    assert len(published.mergeable_ranks) == facts["n_mergeable"]
    assert (published.eod_id, published.im_start_id, published.im_end_id) == (
        facts["eod_id"],
        facts["im_start_id"],
        facts["im_end_id"],
    )
    assert published.special_tokens["<|extra_0|>"] == facts["extra_0"]
    assert published.special_tokens["<|extra_204|>"] == facts["extra_204"]


def test_golden_ids(published, golden_json):
    examples = golden_json("encode")
    for example in examples:
        assert published.encode(example["text"]) == example["ids"]
        assert published.encode(example["text"], allowed_special=set()) == example["ids_no_special"]
    texts = [example["text"] for example in examples]
    assert published(texts)["input_ids"] == [example["ids"] for example in examples]
    assert published(texts, allowed_special=set())["input_ids"] == [example["ids_no_special"] for example in examples]


def test_small_vocabulary_has_special_tokens_after_the_last_rank(small):
    assert (small.eod_id, small.im_start_id, small.im_end_id) == (272, 273, 274)
    assert len(small) == 272 + len(SPECIAL_TOKENS)
    assert small.encode("<|im_start|>user\nhello world<|im_end|>") == [273, 270, 10, 259, 266, 274]


def test_special_tokens_as_text(small):
    text = "<|im_end|>a<|extra_3|>"
    end, extra = small.im_end_id, small.special_tokens["<|extra_3|>"]
    assert small.encode(text) == [end, 97, extra]
    assert small.encode(text, allowed_special="all", disallowed_special="all") == [end, 97, extra]
    assert small.encode(text, allowed_special={"<|extra_3|>"}) == [*b"<|im_end|>a", extra]
    ordinary = [*b"<|im_end|>a<|extra_3|>"]
    assert small.encode(text, allowed_special=set()) == ordinary
    assert small.encode(text, split_special_tokens=True) == ordinary
    assert small([text], allowed_special=())["input_ids"] == [ordinary]
    assert small.encode("hi <|no_token|>", allowed_special={"<|no_token|>"}) == [*b"hi <|no_token|>"]


def test_disallowed_special_tokens_are_named(small):
    with pytest.raises(ValueError, match=r"disallowed special token '<\|im_end\|>'"):
        small.encode("a<|im_end|>", allowed_special=set(), disallowed_special="all")
    with pytest.raises(ValueError, match=r"'<\|extra_1\|>'"):
        small(["a", "<|extra_1|>"], disallowed_special={"<|extra_1|>"})
    with pytest.raises(ValueError, match="disallowed"):
        small.tokenize("<|im_end|>", disallowed_special=("<|im_end|>",))
    assert small.encode("<|im_end|>", disallowed_special={"<|im_start|>"}) == [small.im_end_id]


@pytest.mark.parametrize("argument", ["allowed_special", "disallowed_special"])
def test_a_single_name_is_refused(small, argument):
    with pytest.raises(ValueError, match=rf"`{argument}` must be .* got '<\|im_end\|>'"):
        small.encode("a", **{argument: "<|im_end|>"})


def test_setting_of_split_special_tokens(fresh):
    fresh.split_special_tokens = True
    assert fresh.encode("<|im_end|>") == [*b"<|im_end|>"]
    assert fresh.encode("<|im_end|>", split_special_tokens=False) == [fresh.im_end_id]


def test_text_is_normalised_between_special_tokens(small):
    combining = "\u0338"  # composes with ">" to "≯"
    assert small.encode("e\u0301") == [*"é".encode()]
    assert small.encode("<|im_end|>" + combining) == [small.im_end_id, *combining.encode()]
    # As one piece of ordinary text it does compose.
    assert small.encode("<|im_end|>" + combining, allowed_special=set()) == [*"<|im_end|≯".encode()]


@pytest.mark.parametrize(
    ("text", "repaired"),
    [("\ud83d\ude00", "😀"), ("a\ud800b", "a\ufffdb"), ("\udc00", "\ufffd"), ("\ud800<|im_end|>", "\ufffd<|im_end|>")],
)
def test_surrogates(small, text, repaired):
    assert small.encode(text) == small.encode(repaired)
    assert small([text, "a"])["input_ids"] == [small.encode(repaired), [97]]
    assert small.encode(text, allowed_special=set()) == small.encode(repaired, allowed_special=set())


def test_tokens_of_each_class(small, small_vocabulary):
    tokens = small.tokenize(" world<|im_end|>")
    assert tokens == ([b" world", "<|im_end|>"] if isinstance(small, QWenTokenizer) else ["Ġworld", "<|im_end|>"])
    ids = [266, small.im_end_id]
    assert small.convert_tokens_to_ids(tokens) == ids
    assert small.convert_ids_to_tokens(ids) == tokens
    assert small.convert_ids_to_tokens(ids, skip_special_tokens=True) == tokens[:1]
    assert [small.convert_tokens_to_ids(token) for token in tokens] == ids
    assert small.convert_tokens_to_string(tokens) == " world<|im_end|>"
    assert small.tokenize("a", pair="<|im_end|>") == small.tokenize("a<|im_end|>")


def test_tokens_of_the_slow_class(small_vocabulary):
    tokenizer = QWenTokenizer(small_vocabulary)
    assert tokenizer.decoder[266] == b" world"
    assert tokenizer.decoder[tokenizer.im_end_id] == "<|im_end|>"
    assert tokenizer.convert_tokens_to_ids(["hello", b"hello", "no token", b"\xff\xff"]) == [259, 259, None, None]
    assert tokenizer.convert_tokens_to_ids(None) is None
    assert tokenizer.convert_tokens_to_string([b"\xe4", "<|im_end|>"]) == "\ufffd<|im_end|>"
    with pytest.raises(ValueError, match="No token has the id 5000; ids go from 0 to 479"):
        tokenizer.convert_ids_to_tokens([5000])


def test_vocabulary_has_special_tokens_as_text(small):
    vocabulary = small.get_vocab()
    assert len(vocabulary) == len(small)
    assert all(vocabulary[token] == i for token, i in small.special_tokens.items())
    assert sorted(vocabulary.values()) == list(range(len(small)))


def test_padding_truncation_and_tensors(fresh):
    fresh.padding_side = "left"
    batch = fresh(["hello", "hello world"], padding=True, return_tensors="pt")
    assert batch["input_ids"].tolist() == [[fresh.pad_token_id, 259], [259, 266]]
    assert batch["attention_mask"].tolist() == [[0, 1], [1, 1]]
    assert fresh(["hello"], padding="max_length", max_length=3, padding_side="right")["input_ids"] == [[259, 272, 272]]
    assert fresh("abc", truncation=True, max_length=2)["input_ids"] == [97, 98]
    fresh.truncation_side = "left"
    assert fresh("abc", truncation=True, max_length=2)["input_ids"] == [98, 99]
    assert fresh(["abc", "d"], truncation=True, max_length=2, padding=True)["input_ids"] == [[98, 99], [272, 100]]
    assert fresh("abc", return_tensors="np")["input_ids"].shape == (1, 3)


def test_kinds_of_input(small):
    keys = {"input_ids", "attention_mask"}
    assert set(small("a")) == set(small(["a"])) == keys
    assert small("a", "b")["input_ids"] == [97, 98]
    assert small(["a", "c"], ["b", "d"])["input_ids"] == small([("a", "b"), ("c", "d")])["input_ids"]
    assert small(["hello", " world"], is_split_into_words=True)["input_ids"] == [259, 266]
    assert small([["he", "he"], ["ll"]], is_split_into_words=True)["input_ids"] == [[256, 256], [257]]
    assert small("")["input_ids"] == []
    assert small(["", "a"], padding=True)["input_ids"] == [[small.pad_token_id], [97]]
    assert small("a<|im_end|>", "b", allowed_special=set(), truncation="only_first", max_length=3)["input_ids"] == [
        97,
        60,
        98,
    ]
    with pytest.raises((ValueError, TypeError)):
        small(["a", "b"], "c")
    with pytest.raises((ValueError, TypeError)):
        small(3)


def test_ids_as_input_of_the_slow_class(small_vocabulary):
    tokenizer = QWenTokenizer(small_vocabulary)
    assert tokenizer([5, 6])["input_ids"] == [5, 6]
    assert tokenizer([[5, 6], [7]], padding=True)["input_ids"] == [[5, 6], [7, tokenizer.pad_token_id]]
    assert tokenizer([])["input_ids"] == []
    with pytest.raises(ValueError, match="must be a batch of 2 texts"):
        tokenizer(["a", "b"], ["c"])
    with pytest.raises(ValueError, match="got int"):
        tokenizer([[1], 2])


def test_overflowing_tokens(small_vocabulary):
    tokenizer = QWenTokenizer(small_vocabulary)
    options = {"truncation": True, "max_length": 2, "return_overflowing_tokens": True}
    assert tokenizer("abc", **options)["overflowing_tokens"] == [99]
    assert "overflowing_tokens" not in tokenizer(["abc", "de"], return_tensors="pt", **options)


def random_texts(count, seed=0):
    generator = random.Random(seed)
    words = [
        *SPECIAL_TOKENS[:5],
        *("<|", "|>", "<|im_", "'s", "'LL", " ", "  ", "\t", "\n", "\r\n", "\u3000", "\x85", "\x1c", "0", "12", "..."),
        *(
            "a",
            "bc",
            "Hello",
            "é",
            "e\u0301",
            "\u0300",
            "你好",
            "한",
            "\u1112\u1161\u11ab",
            "Ω",
            "👍🏽",
            "\ufffd",
            "\x00",
        ),
        *("\u0338", "ﬁ", "İ", "ß", "\u200b", "\U0001d7d8", "ก", "\u0e33", "\U000105d2\u0307"),
    ]
    for _ in range(count):
        pieces = generator.choices(words, k=generator.randrange(12))
        pieces += [chr(generator.randrange(0xD800)) for _ in range(generator.randrange(4))]
        generator.shuffle(pieces)
        yield "".join(pieces)


def test_both_classes_give_equal_ids(slow, fast):
    texts = list(random_texts(2000))
    assert slow(texts)["input_ids"] == fast(texts)["input_ids"]
    assert slow(texts, allowed_special=set())["input_ids"] == fast(texts, allowed_special=set())["input_ids"]
    for ids in slow(texts)["input_ids"][:200]:
        for errors in ("replace", "ignore"):
            assert slow.decode(ids, errors=errors) == fast.decode(ids, errors=errors)


@pytest.mark.slow
@pytest.mark.no_cover
def test_both_classes_agree_on_every_code_point(slow, fast):
    texts = ["".join(f"{chr(code)} a" for code in range(start, start + 64)) for start in range(0, 0x110000, 64)]
    assert slow(texts)["input_ids"] == fast(texts)["input_ids"]


def test_decoding_gives_the_normalised_text_back(small):
    for text in random_texts(300, seed=1):
        parts = small._encode_texts([text], frozenset())
        assert small.decode(parts[0], errors="strict") == unicodedata.normalize("NFC", text)


BLANKS = [" ", "\t", "\n", "\r", "\u3000", "\x85", "\r\n", " \n", "\n ", " \u3000"]


@pytest.mark.parametrize("blank", BLANKS)
@pytest.mark.parametrize("before", ["", "a", ".", "\n", ".\n"])
def test_long_runs_have_the_ids_of_the_pattern(slow, blank, before):
    """Around the length from which runs are cut out, against tiktoken on the whole text."""
    for after in ("", "a", ".", "1", "\n", "\na", "é\n"):
        for length in (RUN - 1, RUN, RUN + 1, RUN + 2):
            text = before + blank * length + after
            assert slow.encode(text) == slow._bpe.encode_ordinary(text), (before, length, after)


def test_runs_are_really_cut_out():
    text = "a" + " " * RUN + "b" + "\t" * RUN + "\n" + " " * RUN
    parts = list(split_long_blanks(text))
    assert "".join(part for part, _ in parts) == text
    assert [len(part) for part, is_run in parts if is_run] == [RUN - 1, RUN]
    assert list(split_long_blanks(" " * (RUN - 1))) == [(" " * (RUN - 1), False)]


@pytest.mark.parametrize("blank", [" ", "\n", "\t", "\u3000", " \n"])
def test_a_million_blanks(published, blank):
    text = "a" + blank * (1_000_000 // len(blank)) + "b"
    ids = published.encode(text)
    assert published.decode(ids) == text
    assert published.encode(text, allowed_special=set()) == ids


def test_both_classes_agree_on_a_million_blanks(slow, fast):
    text = " " * 1_000_000 + "."
    assert slow.encode(text) == fast.encode(text)


def test_batches_are_encoded_as_single_texts(slow):
    texts = ["hello world " * 500, " " * (RUN + 5) + "x", "", "<|im_end|>你好" * 200]
    assert slow(texts)["input_ids"] == [slow.encode(text) for text in texts]


def reference_ids(tokenizer, text, allowed):
    """What the docstring of the module says, step by step."""
    parts = pieces_qwen.split_pattern(allowed).split(pieces_qwen.repair_surrogates(text))
    return [
        i
        for n, part in enumerate(parts)
        for i in (
            [tokenizer.special_tokens[part]]
            if n % 2
            else tokenizer._bpe.encode_ordinary(unicodedata.normalize("NFC", part))
        )
    ]


@pytest.mark.parametrize("allowed", [frozenset(), frozenset({"<|im_end|>"}), frozenset(SPECIAL_TOKENS)])
@pytest.mark.no_cover
def test_cut_and_joined_texts_have_their_own_ids(slow, monkeypatch, allowed):
    """With chunks so small that all is cut and joined; a spare control token in the text is not taken for a mark."""
    texts = [
        "".join(f"{text} 你好，a1.b {SPECIAL_TOKENS[-1 - n % 3]}" for n, text in enumerate(random_texts(6, seed)))
        for seed in range(100)
    ]
    texts += ["", "a", "\ud83d", "\ude00", "<|im_end|>\u0338", "e", "\u0301", "<|extra_", "204|>"]
    expected = [reference_ids(slow, text, allowed) for text in texts]
    for size in (1, 7, 60, 500, CHUNK):
        monkeypatch.setattr(pieces_qwen, "CHUNK", size)
        assert slow(texts, allowed_special=allowed)["input_ids"] == expected
        assert [slow.encode(text, allowed_special=allowed) for text in texts] == expected


def test_text_is_cut_where_the_pattern_cuts(slow, monkeypatch):
    monkeypatch.setattr(pieces_qwen, "CHUNK", 5)
    text = "The quick, brown fox. 敏捷的狐狸，跳过。 x1 2\n\n  a" + "b" * 20
    assert cut_text(text) == [
        "The quick",
        ", brown",
        " fox. 敏捷的狐狸",
        "，跳过。 x1",
        " 2\n\n  abbbbbbbbbbbbbbbbbbbb",
    ]
    assert [slow.decode(ids) for ids in slow._tiktoken.encode_chunks(cut_text(text), frozenset())] == cut_text(text)
    assert not any(CUT.search(token + "<|endoftext|>") for token in SPECIAL_TOKENS)


def test_tokens_around_a_text(small_vocabulary):
    """Only where they are wanted: no part of a prompt gets them."""
    plain, around = (
        QWenTokenizerFast(small_vocabulary, bos_token="<|extra_0|>", add_bos_token=wanted, add_eos_token=wanted)
        for wanted in (False, True)
    )
    bos, eos = around.bos_token_id, around.eos_token_id
    long = "hello" * 3000  # where ids come from tiktoken, else
    assert around("hello").input_ids == [bos, 259, eos]
    assert around(["hello", long]).input_ids[1] == [bos, *plain(long).input_ids, eos]
    for text in ("hello", ["hello", long]):
        assert around(text, add_special_tokens=False).input_ids == plain(text).input_ids
    assert around("hello", allowed_special=set(), add_special_tokens=False).input_ids == [259]
    assert make_context(around, "hello", [("a", "b")], "c") == make_context(plain, "hello", [("a", "b")], "c")
    with pytest.raises(ValueError, match="need calls with the default `allowed_special`"):
        around("hello", allowed_special=set())
    with pytest.raises(ValueError, match="need QWenTokenizerFast"):
        QWenTokenizer(small_vocabulary, add_eos_token=True)


@pytest.mark.parametrize("options", [{}, {"allowed_special": set()}, {"text_pair": ["c", "d"]}])
def test_a_text_that_is_missing_from_a_batch(small, options):
    """Such as an empty cell of a table; it was taken for an empty text."""
    with pytest.raises((ValueError, TypeError), match="Text 1 of the batch is None|must be"):
        small(["a", None], **options)


@pytest.mark.parametrize("side", ["left", "right"])
def test_an_empty_text_is_padded_as_any(small, side):
    options = dict(padding="max_length", max_length=3, padding_side=side)
    pad = small.pad_token_id
    assert dict(small("", **options)) == {"input_ids": [pad] * 3, "attention_mask": [0] * 3}
    assert small("", return_tensors="pt", **options)["input_ids"].tolist() == [[pad] * 3]
    assert small("", allowed_special=set(), pad_to_multiple_of=4, **options)["input_ids"] == [pad] * 4
    assert dict(small("")) == {"input_ids": [], "attention_mask": []}
    assert small("", return_tensors="pt")["input_ids"].shape == (1, 0)


def test_texts_that_hold_every_special_token(small):
    """None is left to join texts with."""
    texts = ["".join(SPECIAL_TOKENS), "a"]
    assert small(texts)["input_ids"] == [list(small.special_tokens.values()), [97]]


def test_stable_characters_stay_as_they_are():
    """Those that normalisation is left out for: themselves in NFC, no marks, and the second part of no composition."""
    stable = [chr(code) for code in range(0x110000) if not UNSTABLE.match(chr(code))]
    assert len(stable) > 45_000
    text = "".join(stable)
    assert NFC.normalize_str(text) == unicodedata.normalize("NFC", text) == text
    assert not any(map(unicodedata.combining, stable))
    decompositions = (unicodedata.decomposition(chr(code)).split() for code in range(0x110000))
    seconds = {chr(int(parts[1], 16)) for parts in decompositions if len(parts) == 2 and parts[0][0] != "<"}
    jamo = {chr(code) for code in [*range(0x1161, 0x1176), *range(0x11A8, 0x11C3)]}
    assert not (seconds | jamo) & set(stable)


@pytest.mark.parametrize("before", [0, 1, 4999, 5000, 9999, 12345])
@pytest.mark.parametrize("blank", [" ", "\x85", "\u2028", "\u3000"])
def test_no_long_blank_is_missed(before, blank):
    text = "a" * before + blank * RUN + "b"
    assert LONG_BLANK.search(text)
    assert has_long_blank(text)
    assert not has_long_blank("a" * before + blank * (RUN - 1) + "b")
    assert all(
        unicodedata.normalize("NFC", char).isspace() for char in map(chr, range(0x3001)) if LONG_BLANK.match(char * RUN)
    )


def test_long_blanks_beside_special_tokens(slow):
    text = "<|im_end|>" + " " * RUN + "<|im_end|>" + " " * RUN + "a"
    end = slow.im_end_id
    assert slow([text, "b"])["input_ids"][0] == [
        end, *slow.encode(" " * RUN), end, *slow.encode(" " * RUN + "a")
    ]  # fmt: skip


def test_threads_are_used_for_long_text(slow, monkeypatch):
    used = []

    class Pool(ThreadPoolExecutor):
        def __init__(self, workers):
            used.append(workers)
            super().__init__(workers)

    monkeypatch.setattr(backends_qwen, "ThreadPoolExecutor", Pool)
    monkeypatch.setattr(backends_qwen, "_cores", lambda: 3)
    text = "hello world " * (3 * CHUNK // 12)
    assert slow.encode(text) == slow._bpe.encode_ordinary(text)
    slow([text[:CHUNK], text[:CHUNK]])
    slow(["hello world"] * 100)
    assert used == [3, 2]


@pytest.mark.parametrize(
    "options",
    [{}, {"padding": True}, {"return_attention_mask": False}, {"return_token_type_ids": True}, {"return_length": True}],
)
def test_rows_are_those_of_transformers(small_vocabulary, monkeypatch, options):
    """Joining rows without `prepare_for_model` changes nothing."""
    tokenizer = QWenTokenizer(small_vocabulary)
    inputs = [(["hello", "ab", ""],), (["a", "bc"], ["hello", "d"]), ("ab",), ("ab", "c"), ("",), ([],)]
    quick = [dict(tokenizer(*texts, **options)) for texts in inputs]
    monkeypatch.setattr(QWenTokenizer, "_only_joins", lambda *_: False)
    assert quick == [dict(tokenizer(*texts, **options)) for texts in inputs]


def test_warning_of_long_text(fresh, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    fresh.model_max_length = 2
    fresh(["ab", "abc", "abcd"])
    fresh("abcde")
    # Counted by record: where pytest listens to transformers' logger too it hears each twice.
    assert len({id(record) for record in caplog.records if "(3 > 2)" in record.getMessage()}) == 1
    assert "(5 > 2)" not in caplog.text


def test_threads(small):
    """Ordinary and parsed text at once: neither may see the other's setting."""
    text = "<|im_end|>hello"
    parsed, ordinary = [small.im_end_id, 259], small.encode(text, allowed_special=set())

    def encode(n):
        return small.encode(text, allowed_special=set() if n % 2 else "all")

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(encode, range(400))) == [parsed, ordinary] * 200


def test_grouped_pattern_has_the_pieces_of_the_published_one(slow):
    assert isinstance(slow._bpe, tiktoken.Encoding)
    published = tiktoken.Encoding(
        "published", pat_str=PAT_STR, mergeable_ranks=slow.mergeable_ranks, special_tokens=slow.special_tokens
    )
    for text in [*random_texts(3000, seed=2), *map("".join, itertools.product(" \t\n\r\u3000a.1's", repeat=4))]:
        assert slow._bpe.encode_ordinary(text) == published.encode_ordinary(text)


def test_no_attribute_is_called_tokenizer(small):
    assert not hasattr(small, "tokenizer")
