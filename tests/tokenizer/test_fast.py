"""What only the fast class has: offsets, and a backend that other programs load."""

import json
import threading

import pytest
from tokenizers import Tokenizer

from qwen1.tokenization_qwen import QWenTokenizer, QWenTokenizerFast


@pytest.fixture(scope="module")
def small_fast(small_vocabulary):
    return QWenTokenizerFast(small_vocabulary)


def test_offsets(small_fast):
    text = "hello world<|im_end|>é"
    encoding = small_fast(text, return_offsets_mapping=True)
    assert encoding.is_fast
    assert encoding["offset_mapping"] == [(0, 5), (5, 11), (11, 21), (21, 22), (21, 22)]
    assert encoding.char_to_token(12) == 2
    with pytest.raises(ValueError, match="needs QWenTokenizerFast"):
        small_fast(text, return_offsets_mapping=True, allowed_special=set())


def test_backend_alone_gives_the_same_ids(tmp_path, small_fast):
    small_fast.save_pretrained(tmp_path)
    backend = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    text = "hello\n\n<|im_start|>user é<|extra_204|>"
    assert backend.encode(text).ids == small_fast.encode(text)
    assert backend.decode(backend.encode(text).ids, skip_special_tokens=False) == text
    state = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    assert state["decoder"]["type"] == "ByteLevel"
    assert state["normalizer"]["type"] == "NFC"


def test_streaming_decoder(small_fast):
    from tokenizers.decoders import DecodeStream

    stream = DecodeStream(skip_special_tokens=False)
    steps = [stream.step(small_fast._tokenizer, i) for i in [259, *"你".encode(), 274]]
    assert "".join(filter(None, steps)) == "hello你<|im_end|>"


def test_slow_class_on_demand(small_vocabulary):
    folder = small_vocabulary.parent
    assert type(QWenTokenizerFast.from_pretrained(folder)) is QWenTokenizerFast
    assert type(QWenTokenizerFast.from_pretrained(folder, use_fast=True)) is QWenTokenizerFast
    assert type(QWenTokenizerFast.from_pretrained(folder, use_fast=False)) is QWenTokenizer
    assert type(QWenTokenizerFast.from_pretrained(folder, backend="tiktoken")) is QWenTokenizer
    assert type(QWenTokenizer.from_pretrained(folder, use_fast=False)) is QWenTokenizer


def test_built_from_a_backend(small_fast):
    copy = QWenTokenizerFast(tokenizer_object=small_fast._tokenizer)
    assert copy.mergeable_ranks == small_fast.mergeable_ranks
    assert copy.special_tokens == small_fast.special_tokens
    assert copy.encode("hello<|im_end|>") == [259, 274]


def test_threads_never_get_the_truncation_of_others(byte_vocabulary):
    tokenizer, failures = QWenTokenizerFast(str(byte_vocabulary)), []

    def work(limit):
        options = {} if limit is None else {"truncation": True, "max_length": limit}
        for _ in range(200):
            if len(tokenizer("hello world", **options)["input_ids"]) != (limit or 11):
                failures.append(limit)

    threads = [threading.Thread(target=work, args=(limit,)) for limit in (None, 3, 5, None)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_an_empty_batch(byte_vocabulary):
    assert QWenTokenizerFast(str(byte_vocabulary))([])["input_ids"] == []
