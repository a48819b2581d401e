"""The published `decode_tokens` and `get_stop_words_ids`: a reply is what stands between prompt and end token."""

import json

import pytest
import torch

from qwen1 import decode_tokens, get_stop_words_ids
from qwen1.qwen_generation_utils import find_end

EOD, IM_START, IM_END = 256, 257, 258
PROMPT = list("caf\u00e9 prompt".encode())


def decoded(tokenizer, reply, chat_format="chatml", **kwargs):
    """The reply after a prompt whose length in characters is given wrong, as it is where NFC shortens the text."""
    return decode_tokens(PROMPT + reply, tokenizer, 99, len(PROMPT), chat_format, **kwargs)


@pytest.mark.parametrize("end", [EOD, IM_START, IM_END])
def test_reply_ends_before_the_first_end_token(either_tokenizer, end):
    assert decoded(either_tokenizer, [*b" hello ", end, *b"more", IM_END]) == "hello"


def test_reply_without_an_end_keeps_its_last_token(either_tokenizer):
    assert decoded(either_tokenizer, list(b"hello")) == "hello"
    assert decoded(either_tokenizer, []) == ""


def test_tensor_and_list_alike(byte_tokenizer):
    tokens = [*PROMPT, *"你好".encode(), IM_END]
    assert decode_tokens(torch.tensor(tokens), byte_tokenizer, 0, len(PROMPT), "chatml") == "你好"
    assert decode_tokens(tokens, byte_tokenizer, 0, len(PROMPT), chat_format="chatml") == "你好"


def test_raw_ends_at_the_stop_words_of_the_format(byte_tokenizer):
    assert decoded(byte_tokenizer, [*b"text Human: more", EOD], "raw") == "text"
    assert decoded(byte_tokenizer, [*b"text", IM_END, *b"more", EOD], "raw") == "text<|im_end|>more"


def test_end_reason(byte_tokenizer):
    assert decoded(byte_tokenizer, [*b"a", IM_END], return_end_reason=True) == ("a", "Gen '<|im_end|>'")
    reason = f"Gen length {len(PROMPT) + 2}"
    assert decoded(byte_tokenizer, list(b"ab"), return_end_reason=True) == ("ab", reason)


def test_verbose_prints_reply_and_reason(byte_tokenizer, capsys):
    assert decoded(byte_tokenizer, [*b"a", EOD], verbose=True) == "a"
    assert capsys.readouterr().out == "\nReply: a\nEnd reason: Gen '<|endoftext|>'\n"


def test_errors(byte_tokenizer):
    broken = list(b"a\xe4\xbd")
    assert decoded(byte_tokenizer, broken) == "a\ufffd"
    assert decoded(byte_tokenizer, broken, errors="ignore") == "a"
    with pytest.raises(UnicodeDecodeError):
        decoded(byte_tokenizer, broken, errors="strict")


def test_published_stop_words(published_tokenizer, golden):
    facts = json.loads((golden / "tokenizer" / "facts.json").read_text())
    for chat_format in ("chatml", "raw"):
        assert get_stop_words_ids(chat_format, published_tokenizer) == facts[f"stop_{chat_format}"]


@pytest.mark.parametrize("call", ["get_stop_words_ids", "decode_tokens"])
def test_unknown_format(byte_tokenizer, call):
    with pytest.raises(ValueError, match="chat_format='alpaca' is unknown: use 'chatml' or 'raw'"):
        if call == "decode_tokens":
            decoded(byte_tokenizer, [], "alpaca")
        else:
            get_stop_words_ids("alpaca", byte_tokenizer)


@pytest.mark.parametrize(
    ("reply", "cut", "kept", "end"),
    [
        ([1, 2, 3], [[4]], [[5]], None),
        ([1, 2, 3], [[2, 3], [3]], [], 1),  # both complete at once: the longer one is cut off
        ([1, 2, 3], [[3]], [[2, 3]], 2),  # the control token behind a stop word
        ([1, 2, 3, 4], [[1, 2, 3, 4], [3]], [], 2),  # the one that is complete first ends the reply
        ([1, 2, 3, 4], [[3]], [[1, 2]], 2),
        ([1, 2, 3, 4], [[1]], [[1, 2]], 0),
        ([1, 2, 3], [], [[2, 3], [3]], 3),
        ([1, 1, 2], [[1, 2]], [], 1),
        ([1, 1, 2], [], [[1, 2]], 3),
        ([1, 2], [[1, 2, 3]], [[2, 3]], None),
        ([], [[1]], [[2]], None),
    ],
)
def test_find_end(reply, cut, kept, end):
    assert find_end(reply, cut, kept) == end
    found = (find_end(reply[:size], cut, kept, start=size - 1) for size in range(1, len(reply) + 1))
    assert next((place for place in found if place is not None), None) == end
