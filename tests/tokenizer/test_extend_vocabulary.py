"""Learning new tokens, and using them."""

import random

import pytest
import tiktoken

from qwen1.tokenization_qwen import PAT_STR, QWenTokenizer, QWenTokenizerFast, load_base_ranks
from qwen1.vocabulary.commands import main
from qwen1.vocabulary.learning import bpe, extend_vocabulary, learn_merges, learnable_words, read_words


@pytest.fixture(scope="module")
def ranks(small_vocabulary):
    return load_base_ranks(small_vocabulary)


def test_published_example(tmp_path, golden, published_vocabulary):
    output = tmp_path / "qwen_extra.tiktoken"
    count = extend_vocabulary(published_vocabulary, golden / "tokenizer" / "qwen_extra_vocab.txt", output)
    assert count == 6
    assert output.read_bytes() == (golden / "tokenizer" / "qwen_extra.tiktoken").read_bytes()


@pytest.mark.parametrize("cls", [QWenTokenizer, QWenTokenizerFast])
@pytest.mark.no_cover
def test_published_example_encodes(golden, published_vocabulary, cls):
    tokenizer = cls(published_vocabulary, extra_vocab_file=golden / "tokenizer" / "qwen_extra.tiktoken")
    assert len(tokenizer) == 151857
    assert tokenizer.encode("我是一只猫") == [151854]
    assert tokenizer.encode("你是一只猫<|im_end|>他是一只猫。") == [151855, 151645, 151856, 1773]
    assert tokenizer.decode([151854, 151852]) == "我是一只猫只猫"
    assert tokenizer.encode("一只") == [102292]


def test_most_frequent_pairs_come_first(ranks):
    learned = learn_merges(ranks, {"ab": 1, "cd": 5, "abe": 3}, first_id=480)
    assert learned == {b"cd": 480, b"ab": 481, b"abe": 482}


def test_shorter_tokens_come_first_among_equals(ranks):
    assert list(learn_merges(ranks, {"xhello": 2, "yz": 2}, first_id=480)) == [b"yz", b"xhello"]
    assert list(learn_merges(ranks, {"éx": 1}, first_id=480)) == ["é".encode(), "éx".encode()]


def test_old_tokens_are_found_again(ranks):
    """A new token can complete an old one, which was out of reach before."""
    vocabulary = dict(ranks) | {b"qrs": 600}
    assert bpe(b"qrst", vocabulary) == (b"q", b"r", b"s", b"t")
    learned = learn_merges(vocabulary, {"qrz": 9, "qrst": 1}, first_id=700)
    assert list(learned) == [b"qr", b"qrz", b"qrst"]
    assert bpe(b"qrst", vocabulary | learned) == (b"qrst",)


def test_arguments_are_not_changed(ranks):
    before, words = dict(ranks), {"ab": 1}
    learn_merges(ranks, words, first_id=480)
    assert ranks == before
    assert words == {"ab": 1}


def test_no_words(ranks):
    assert learn_merges(ranks, {}, first_id=480) == {}


def test_ids_must_come_after_the_old_ones(ranks):
    with pytest.raises(ValueError, match="first_id is 271, but ids up to 271 are in use"):
        learn_merges(ranks, {"ab": 1}, first_id=271)


def test_result_is_a_valid_bpe(ranks):
    """tiktoken gives each word as one token, and each part of a word as the plain algorithm does."""
    generator = random.Random(0)
    words = {
        "".join(generator.choices("abch", k=generator.randrange(2, 9))): generator.randrange(1, 9) for _ in range(60)
    }
    words = learnable_words(words, ranks)
    merged = ranks | learn_merges(ranks, words, first_id=480)
    encoding = tiktoken.Encoding("test", pat_str=PAT_STR, mergeable_ranks=merged, special_tokens={})
    for word in words:
        assert encoding.encode_ordinary(word) == [merged[word.encode()]]
        text = word[1:] + "x" + word[:-1]
        assert encoding.encode_ordinary(text) == [merged[part] for part in bpe(text.encode(), merged)]


def test_bpe_is_that_of_tiktoken(ranks):
    encoding = tiktoken.Encoding("test", pat_str=PAT_STR, mergeable_ranks=ranks, special_tokens={})
    for word in ("hello", "aaaaa", "hellollo", "worldorld", "é", "usher"):
        assert [ranks[part] for part in bpe(word.encode(), ranks)] == encoding.encode_ordinary(word)


def test_words_that_cannot_be_learned(ranks):
    words = {"hello": 1, "new words": 1, "don't": 1, "a1": 1, " new": 1, "...": 1, "né": 1}
    assert list(learnable_words(words, ranks)) == [" new", "...", "né"]


def test_reading_words(tmp_path):
    path = tmp_path / "words.txt"
    path.write_bytes("\ufeffcafe\u0301\t3\r\n\r\n new\t 2 \r\ncafé\t4\n\x85x\t1".encode())
    assert read_words(path) == {"café": 7, " new": 2, "\x85x": 1}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("word", "line 2: expected 'word<TAB>frequency', got 'word'"),
        ("\t3", "line 2: expected 'word<TAB>frequency'"),
        ("word 3", "line 2: expected 'word<TAB>frequency'"),
        ("word\tmany", "line 2: the frequency of 'word' must be a positive whole number, got 'many'"),
        ("word\t0", "got '0'"),
        ("word\t-1", "got '-1'"),
        ("word\t1.5", "got '1.5'"),
    ],
)
def test_damaged_lines_are_named(tmp_path, line, message):
    path = tmp_path / "words.txt"
    path.write_text("ok\t1\n" + line + "\n")
    with pytest.raises(ValueError, match=message):
        read_words(path)


def test_words_that_are_not_utf8(tmp_path):
    path = tmp_path / "words.txt"
    path.write_bytes(b"\xff\xfe\t1\n")
    with pytest.raises(ValueError, match=r"words.txt is not UTF-8"):
        read_words(path)


def test_command(tmp_path, small_vocabulary, capsys):
    words = tmp_path / "words.txt"
    words.write_text("hellos\t2\n")
    main([str(small_vocabulary), str(words), str(tmp_path / "extra.tiktoken")])
    assert (tmp_path / "extra.tiktoken").read_bytes() == b"aGVsbG9z 480\n"
    assert capsys.readouterr().err == f"1 new tokens in {tmp_path}/extra.tiktoken\n"
    with pytest.raises(SystemExit, match="2"):
        main([str(small_vocabulary), str(tmp_path / "none.txt"), str(tmp_path / "extra.tiktoken")])
    assert "none.txt" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert "qwen1-extend-vocabulary qwen.tiktoken words.txt qwen_extra.tiktoken" in capsys.readouterr().out
