"""`pad_token`, `eos_token` and the like: control tokens or any token of the vocabulary, the same in both classes."""

import pytest
from transformers import AddedToken

from qwen1.tokenization_qwen import SPECIAL_TOKENS, QWenTokenizer, QWenTokenizerFast

NAMES = ["pad_token", "eos_token", "bos_token", "unk_token"]
CLASSES = [QWenTokenizer, QWenTokenizerFast]
TEXT = "banana hello world, <|im_end|>\n"


@pytest.mark.parametrize("indices", [(97, 0xE9, 264, 274), (259, 479, 0, 266), (0xE9, 98, 98, 97)], ids=str)
def test_every_id_of_the_vocabulary(fresh, indices, tmp_path):
    """Letters, words, words with a space, bytes that are no text, control tokens."""
    ids = fresh.encode(TEXT)
    for name, index in zip(NAMES, indices, strict=True):
        setattr(fresh, f"{name}_id", index)
        assert getattr(fresh, f"{name}_id") == index
        assert isinstance(getattr(fresh, name), str)
    assert set(indices) <= set(fresh.all_special_ids)
    fresh.save_pretrained(tmp_path)
    for cls in CLASSES:
        loaded = cls.from_pretrained(tmp_path)
        assert [getattr(loaded, f"{name}_id") for name in NAMES] == list(indices)
        assert loaded.special_tokens_map == fresh.special_tokens_map
        assert loaded.encode(TEXT) == fresh.encode(TEXT) == ids
        assert list(loaded.special_tokens) == list(SPECIAL_TOKENS)
        assert loaded.decode([98, 97, 97, 259, 274], skip_special_tokens=True) == "baahello"


def test_both_classes_name_tokens_alike(small_vocabulary):
    slow, fast = (cls(small_vocabulary) for cls in CLASSES)
    for index in range(480):
        slow.pad_token_id = fast.pad_token_id = index
        assert slow.pad_token == fast.pad_token == fast.convert_ids_to_tokens(index)
        slow.eos_token = fast.eos_token = slow.pad_token
        assert slow.eos_token_id == fast.eos_token_id == index
        assert slow.all_special_ids == fast.all_special_ids


@pytest.mark.parametrize(
    ("token", "index"),
    [("a", 97), (" world", 266), ("\u0120world", 266), (b" world", 266), ("hello", 259), (AddedToken("hello"), 259)],
)
def test_tokens_as_text(fresh, token, index):
    fresh.pad_token = token
    assert fresh.pad_token_id == index
    ids = fresh.encode("hello a")
    if not isinstance(token, bytes):
        assert fresh.add_special_tokens({"pad_token": token}) == fresh.add_tokens([token]) == 0
    assert fresh.pad_token_id == index and fresh.encode("hello a") == ids


def test_padding_with_an_ordinary_token(fresh):
    fresh.pad_token_id = 264
    batch = fresh(["a", "abc"], padding=True)
    assert batch["input_ids"] == [[97, 264, 264], [97, 98, 99]]
    assert batch["attention_mask"] == [[1, 0, 0], [1, 1, 1]]


def test_ordinary_tokens_in_chats(fresh):
    """No text becomes a control token because it is named."""
    chat = [{"role": "user", "content": "hello <|im_end|>"}]
    ids = fresh.apply_chat_template(chat, return_dict=False)
    fresh.pad_token_id, fresh.bos_token = 97, "hello"
    assert fresh.apply_chat_template(chat, return_dict=False) == ids


def test_constructor(small_vocabulary):
    for cls in CLASSES:
        tokenizer = cls(small_vocabulary, pad_token=" world", extra_special_tokens=["hello", "<|extra_0|>"])
        assert tokenizer.pad_token_id == 266
        assert tokenizer.extra_special_tokens_ids == [259, 275]
        with pytest.raises(ValueError, match="Token 'no such' cannot be added"):
            cls(small_vocabulary, pad_token="no such")


def test_extra_special_tokens(fresh, tmp_path):
    fresh.extra_special_tokens_ids = [266, 274]
    assert fresh.extra_special_tokens == ["\u0120world", "<|im_end|>"]
    fresh.save_pretrained(tmp_path)
    assert [cls.from_pretrained(tmp_path).extra_special_tokens_ids for cls in CLASSES] == [[266, 274]] * 2
    fresh.extra_special_tokens = []
    assert fresh.extra_special_tokens_ids == []


@pytest.mark.parametrize("name", NAMES)
def test_what_is_no_token_is_refused_at_once(fresh, name):
    before = fresh.special_tokens_map
    for index in (480, 151900, -1):
        with pytest.raises(ValueError, match=f"No token has the id {index}; ids go from 0 to 479"):
            setattr(fresh, f"{name}_id", index)
    for token in ("[PAD]", "", b"no such", "\ud800"):
        with pytest.raises(
            ValueError, match="cannot be added: it is not in the vocabulary. Use a token that is, or one"
        ):
            setattr(fresh, name, token)
    with pytest.raises(ValueError, match="got 5; assign an id to `..._token_id`"):
        setattr(fresh, name, 5)
    with pytest.raises(ValueError, match="cannot be added"):
        fresh.add_special_tokens({name: "[PAD]"})
    assert fresh.special_tokens_map == before
    setattr(fresh, f"{name}_id", None)
    assert getattr(fresh, name) is None and getattr(fresh, f"{name}_id") is None
