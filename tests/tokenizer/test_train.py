"""A vocabulary learnt from texts by `train_new_from_iterator`."""

import json

import pytest
from tokenizers import Tokenizer

from qwen1.tokenization_qwen import SPECIAL_TOKENS, QWenTokenizer, QWenTokenizerFast, build_backend

CORPUS = [["the cat sat on the mat", "the dog, the 你好 cat"], ["e\u0301t\u00e9 sat on <|im_end|> the end"]] * 3
TEXTS = ["the cat<|im_end|>", "étude 🤗 the  dog\n", "<|extra_204|>the end", "never seen: xyzzy"]


@pytest.fixture
def small_fast(small_vocabulary):
    return QWenTokenizerFast(small_vocabulary, model_max_length=77, eos_token="<|im_end|>")


def train(tokenizer, size=500, **arguments):
    return tokenizer.train_new_from_iterator(CORPUS, size, show_progress=False, **arguments)


def test_special_tokens_follow_what_was_learnt(small_fast):
    new = train(small_fast)
    learnt = len(new.mergeable_ranks)
    assert type(new) is QWenTokenizerFast and 256 < learnt == len(new) - 208 <= 500 - 208
    assert list(new.mergeable_ranks.values()) == list(range(learnt))
    assert new.special_tokens == {token: i for i, token in enumerate(SPECIAL_TOKENS, start=learnt)}
    assert len(new.encode("the cat", allowed_special=set())) < len(small_fast.encode("the cat", allowed_special=set()))
    assert [new.decode(new.encode(text)) for text in TEXTS] == TEXTS


def test_both_classes_load_it_with_the_same_ids(small_fast, tmp_path):
    new = train(small_fast)
    expected = [new.encode(text) for text in TEXTS]
    for folder in (tmp_path / "0", tmp_path / "1"):
        new.save_pretrained(folder)
        for cls in (QWenTokenizer, QWenTokenizerFast):
            loaded = cls.from_pretrained(folder)
            assert [loaded.encode(text) for text in TEXTS] == expected
            assert (loaded.special_tokens, loaded.model_max_length) == (new.special_tokens, 77)
            assert loaded.special_tokens_map == small_fast.special_tokens_map
        new = QWenTokenizerFast.from_pretrained(folder)
    assert QWenTokenizerFast(folder / "qwen.tiktoken").encode(TEXTS[1]) == expected[1]


def test_settings_go_along(small_fast, tmp_path):
    small_fast.padding_side = "left"
    small_fast.chat_template = "{{ messages[0].content }}"
    new = train(small_fast)
    assert (new.padding_side, new.chat_template, new.model_max_length) == ("left", small_fast.chat_template, 77)
    assert new.special_tokens_map == small_fast.special_tokens_map


def test_an_extra_vocabulary_is_left_behind(small_vocabulary, tmp_path, write_vocabulary):
    extra = write_vocabulary(tmp_path / "extra.tiktoken", [b"aaa"], start=480)
    new = train(QWenTokenizerFast(small_vocabulary, extra_vocab_file=str(extra)))
    new.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved" / "qwen_extra.tiktoken").exists()
    assert QWenTokenizer.from_pretrained(tmp_path / "saved").encode("aaa") == new.encode("aaa")


def test_small_sizes_keep_the_bytes(small_fast):
    assert len(train(small_fast, size=100)) == 256 + 208


def test_renaming(small_fast):
    assert train(small_fast, special_tokens_map={"<|im_end|>": "<|extra_0|>"}).eos_token == "<|extra_0|>"
    train(small_fast, new_special_tokens=["<|extra_3|>"])
    for arguments in ({"special_tokens_map": {"<|im_end|>": "</s>"}}, {"new_special_tokens": ["</s>"]}):
        with pytest.raises(ValueError, match="'</s>' cannot be a special token.* one of the 205 spare ones"):
            train(small_fast, **arguments)


@pytest.mark.parametrize(
    "option", [{"limit_alphabet": 10}, {"end_of_word_suffix": "</w>"}, {"initial_alphabet": ["a"]}]
)
def test_arguments_of_the_trainer(small_fast, option):
    with pytest.raises(ValueError, match=f"`{next(iter(option))}` can't be chosen"):
        train(small_fast, **option)
    assert len(train(small_fast, max_token_length=2)) < len(train(small_fast))


def test_named_tokens_that_were_not_learnt(small_fast):
    small_fast.pad_token = "user"
    with pytest.raises(ValueError, match="Token 'user' cannot be added: it is not in the vocabulary"):
        train(small_fast)


def test_other_control_tokens_are_saved_without_a_vocabulary_file(small_tokens, tmp_path):
    """`qwen.tiktoken` doesn't say what the control tokens are, so it would make others of them."""
    ranks = {token: i for i, token in enumerate(small_tokens)}
    names = [*SPECIAL_TOKENS[:3], "<tool>"]
    backend = build_backend(ranks, {token: i for i, token in enumerate(names, start=len(ranks))})
    tokenizer = QWenTokenizerFast(tokenizer_object=backend)
    with pytest.raises(ValueError, match="implies that .* follow the others"):
        tokenizer.save_vocabulary(str(tmp_path))
    tokenizer.save_pretrained(tmp_path)
    assert not (tmp_path / "qwen.tiktoken").exists()
    assert json.loads((tmp_path / "tokenizer.json").read_text())["added_tokens"][-1]["content"] == "<tool>"
    assert QWenTokenizerFast.from_pretrained(tmp_path).encode("a<tool>") == [97, 275]


def test_special_tokens_before_the_others_are_not_written_as_a_vocabulary(tmp_path):
    """As transformers' own method numbers them."""
    backend = Tokenizer.from_str(build_backend({bytes([i]): i + 208 for i in range(256)}, NUMBERED).to_str())
    with pytest.raises(ValueError, match="implies that .* follow the others"):
        QWenTokenizerFast(tokenizer_object=backend).save_vocabulary(str(tmp_path))


NUMBERED = {token: i for i, token in enumerate(SPECIAL_TOKENS)}
