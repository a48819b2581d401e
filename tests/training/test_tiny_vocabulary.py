"""A vocabulary trained here and written in the tiktoken format."""

import pytest

from qwen1 import QWenTokenizer, QWenTokenizerFast
from qwen1.training.tiny.dialogues import training_dialogues
from qwen1.training.tiny.vocabulary import spelled, train_vocabulary, without_names, write_tiktoken

TEXTS = ["the cat and the dog, the cat!", "我叫王小明。", "你好，世界"] * 50


@pytest.fixture(scope="module")
def vocabulary() -> dict[bytes, int]:
    return train_vocabulary(TEXTS + spelled(TEXTS), 295)


def test_bytes_come_first_and_ids_are_dense(vocabulary):
    assert list(vocabulary.values()) == list(range(295))
    assert [vocabulary[bytes([byte])] for byte in range(256)] == list(range(256))


def test_every_token_is_made_of_two_earlier_ones(vocabulary):
    for token, i in vocabulary.items():
        if i >= 256:
            halves = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
            assert any(vocabulary.get(a, i) < i and vocabulary.get(b, i) < i for a, b in halves), token


def test_both_tokenizers_read_it_alike(vocabulary, tmp_path):
    path = tmp_path / "qwen.tiktoken"
    write_tiktoken(vocabulary, path)
    assert list(tmp_path.iterdir()) == [path]
    slow, fast = QWenTokenizer(str(path)), QWenTokenizerFast(str(path))
    for text in [*TEXTS[:3], "My name is Émile. 12+34=46 👍", *(d.prompt() for d in training_dialogues(50, 3))]:
        assert slow.encode(text) == fast.encode(text)
        assert slow.decode(slow.encode(text)) == text


def test_a_character_is_one_token(vocabulary):
    assert all(character.encode() in vocabulary for character in "我叫王小明你好世界")


def test_names_are_taken_apart_before_learning():
    assert without_names("我叫王小明。") == "我叫王\n小明。"
    assert without_names("Tom") == "Tom"


@pytest.mark.parametrize(("size", "message"), [(255, "256"), (5000, "size=5000")])
def test_impossible_sizes_are_errors(size, message):
    with pytest.raises(ValueError, match=message):
        train_vocabulary(TEXTS, size)
