"""The published `decode_tokens` and `get_stop_words_ids`: a reply is what stands between prompt and end token."""

import json
from pathlib import Path

import pytest
import torch

from qwen1 import decode_tokens, get_stop_words_ids, make_context
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


def test_raw_replies_of_the_published_code(either_tokenizer):
    """Random prompts and replies of control tokens, broken characters and pieces of `<|endoftext|>`."""
    cases = json.loads((Path(__file__).parent / "raw_replies.json").read_text())
    for tokens, characters, length, errors, text, reason in cases:
        for given in (tokens, torch.tensor(tokens, dtype=torch.long)):
            arguments = {"errors": errors, "return_end_reason": True}
            assert decode_tokens(given, either_tokenizer, characters, length, "raw", **arguments) == (text, reason)
    assert len(cases) == 300 and len({case[4] for case in cases}) > 200
    assert sum(reason == "Gen '<|endoftext|>'" for *_, reason in cases) > 5


@pytest.mark.parametrize(
    ("reply", "text"),
    [
        ([*b"text Human: more", EOD], "text Human: more"),
        ([*b"text", IM_END, *b"more", EOD], "text<|im_end|>more"),
        ([*b" a ", EOD, *b" b ", EOD], "a  b"),
        ([EOD, EOD], ""),
        ([], ""),
        ([*b"<|endof", EOD, *b"text|> b"], ""),
        ([*b"a <|endof", EOD, *b"text|> b"], "a"),
    ],
)
def test_raw_takes_the_end_of_text_out_and_goes_on(either_tokenizer, reply, text):
    characters = len("caf\u00e9 prompt")
    assert decode_tokens(PROMPT + reply, either_tokenizer, characters, len(PROMPT), "raw") == text


@pytest.mark.parametrize(
    "written", ["cafe\u0301 " * 3, "\u0958\u0915", "\u212b ngstr\u00f6m", "\u1112\u1161\u11ab", "plain"]
)
@pytest.mark.parametrize("chat_format", ["raw", "chatml"])
def test_prompt_that_normalises_to_another_length_shifts_nothing(either_tokenizer, written, chat_format):
    text, context = make_context(either_tokenizer, written, chat_format=chat_format)
    reply = [*context, *b"HELLO WORLD"]
    assert decode_tokens(reply, either_tokenizer, len(text), len(context), chat_format) == "HELLO WORLD"


def test_raw_is_cut_by_characters(byte_tokenizer):
    """As published, where normalising doesn't explain another length."""
    tokens = list(b"prompt reply")
    for characters, text in [(0, "prompt reply"), (7, "reply"), (9, "ply"), (99, "")]:
        assert decode_tokens(tokens, byte_tokenizer, characters, 7, "raw") == text
        assert decode_tokens(tokens, byte_tokenizer, characters, 0, "raw") == text


@pytest.mark.parametrize("chat_format", ["raw", "chatml"])
def test_errors_strict(byte_tokenizer, chat_format):
    """A character that begins in the prompt is whole."""
    tokens = list("你好".encode())
    assert decode_tokens(tokens, byte_tokenizer, 0, 0, chat_format, errors="strict") == "你好"
    assert decode_tokens(tokens, byte_tokenizer, 1, 4, "raw", errors="strict") == "好"
    with pytest.raises(UnicodeDecodeError):
        decode_tokens(tokens[:-1], byte_tokenizer, 0, 0, chat_format, errors="strict")


def test_end_reason(byte_tokenizer):
    assert decoded(byte_tokenizer, [*b"a", IM_END], return_end_reason=True) == ("a", "Gen '<|im_end|>'")
    reason = f"Gen length {len(PROMPT) + 2}"
    assert decoded(byte_tokenizer, list(b"ab"), return_end_reason=True) == ("ab", reason)


def test_verbose_prints_reply_and_reason(byte_tokenizer, capsys):
    assert decoded(byte_tokenizer, [*b"a", EOD], verbose=True) == "a"
    assert (
        capsys.readouterr().out == "\nRaw Generate: a<|endoftext|>\n\nEnd Reason: Gen '<|endoftext|>'\n\nGenerate: a\n"
    )


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
