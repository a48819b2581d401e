"""Ids to text."""

import pytest


def test_golden_texts(published, golden_json):
    for example in golden_json("encode"):
        assert published.decode(example["ids"]) == example["decoded"]
        assert published.decode(example["ids"], skip_special_tokens=True) == example["decoded_skip_special"]


def test_golden_random_ids(published, golden_json):
    for example in golden_json("decode"):
        assert published.decode(example["ids"]) == example["replace"]
        assert published.decode(example["ids"], errors="ignore") == example["ignore"]
        assert published.decode(example["ids"], skip_special_tokens=True) == example["skip_special"]


def test_errors(small):
    ids = [*"你".encode()][:2] + [small.im_end_id]
    assert small.decode(ids) == "\ufffd<|im_end|>"
    assert small.decode(ids, errors="ignore") == "<|im_end|>"
    with pytest.raises(UnicodeDecodeError):
        small.decode(ids, errors="strict")


def test_default_for_errors(fresh, small_vocabulary):
    fresh.errors = "ignore"
    assert fresh.decode([0xFF, 97]) == "a"
    assert fresh.decode([0xFF, 97], errors="replace") == "\ufffda"
    assert type(fresh)(small_vocabulary, errors="ignore").decode([0xFF, 97]) == "a"


def test_ids_without_a_token_count_as_invalid_bytes(small):
    assert small.decode([97, 5000, 98]) == "a\ufffdb"
    assert small.decode([97, -100, 98], errors="ignore") == "ab"
    with pytest.raises(ValueError, match="No token has the id 5000; ids go from 0 to 479"):
        small.decode([97, 5000], errors="strict")


@pytest.mark.parametrize("wrong", [["hello"], [97, None], [97.0], "a"])
def test_what_is_no_id(small, wrong):
    """Swallowed, a token would be a character that can't be read."""
    with pytest.raises(TypeError, match="Only ids can be decoded, whole numbers, not "):
        small.decode(wrong)
    with pytest.raises(TypeError, match="Only ids can be decoded"):
        small.batch_decode([wrong])


def test_kinds_of_input(small):
    torch = pytest.importorskip("torch")
    assert small.decode(97) == "a"
    assert small.decode([]) == ""
    assert small.decode(torch.tensor([259, 266])) == "hello world"
    assert small.batch_decode([[259], [266, small.eod_id]], skip_special_tokens=True) == ["hello", " world"]
    assert small.batch_decode(torch.tensor([[259], [266]]), errors="ignore") == ["hello", " world"]
