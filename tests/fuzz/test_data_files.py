"""Any file to train or calibrate on: read as it is, with control tokens in their places; else an error with a line."""

import json

from hypothesis import example, given
from hypothesis import strategies as st

from qwen1.conversion.errors import CheckpointError
from qwen1.conversion.quantising.calibration import make_rows, read_calibration
from qwen1.training.data import read_conversations, read_texts
from qwen1.training.errors import DataError
from qwen1.training.examples import IGNORED, Encoder

from .conftest import damaged, texts, values

roles = st.sampled_from(["system", "user", "assistant", "human", "gpt", "tool"])
turns = st.lists(st.fixed_dictionaries({"from": roles, "value": texts}) | values, max_size=4)
messages = st.lists(st.fixed_dictionaries({"role": roles, "content": texts}) | values, max_size=4)
pairs = st.lists(st.tuples(texts, texts), min_size=1, max_size=2).map(
    lambda said: [
        {"role": role, "content": text} for turn in said for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
)
records = (
    st.fixed_dictionaries({"conversations": turns | values})
    | st.fixed_dictionaries({"messages": messages | pairs})
    | st.fixed_dictionaries({"text": texts})
    | values
)
FILE = (
    '{"conversations": [{"from": "user", "value": "a"}, {"from": "assistant", "value": "b"}]}\n'
    '{"messages": [{"role": "user", "content": "你"}, {"role": "assistant", "content": "b"}]}\n'
).encode()


def lines_of(found):
    return "\n".join(map(json.dumps, found)).encode()


contents = st.lists(records, max_size=3).map(lines_of) | st.lists(records, max_size=3).map(
    lambda found: json.dumps(found).encode()
)


@given(contents | damaged(FILE) | st.binary(max_size=20))
@example(b"[" * 100_000)
@example(b'{"messages": ' + b"9" * 5000 + b"}")
def test_conversations(tmp_path_factory, tokenizers, content):
    path = tmp_path_factory.getbasetemp() / "data.jsonl"
    path.write_bytes(content)
    try:
        conversations = read_conversations(path)
    except DataError as error:
        assert str(error).startswith(str(path))
        return
    assert conversations
    for tokenizer in tokenizers:
        for example_, cut in Encoder(tokenizer).conversations(conversations):
            assert not cut and len(example_["input_ids"]) == len(example_["labels"])
            found = [i for i in example_["input_ids"] if i >= tokenizer.eod_id]
            assert found == [tokenizer.im_start_id, tokenizer.im_end_id] * (len(found) // 2)
            learnt = [i for i in example_["labels"] if i != IGNORED]
            assert learnt and set(learnt) & set(tokenizer.special_tokens.values()) == {tokenizer.im_end_id}


@given(st.lists(pairs, min_size=1, max_size=2), st.integers(2, 40))
def test_lengths(tokenizers, conversations, length):
    """No example is longer, each is the beginning of the whole one and ends with an answer."""
    encoder = Encoder(tokenizers[0], length)
    whole = Encoder(tokenizers[0]).conversations(conversations)
    for (example_, cut), (full, _) in zip(encoder.conversations(conversations), whole, strict=True):
        if example_ is None:
            assert cut
            continue
        count = len(example_["input_ids"])
        assert count <= length and example_["input_ids"] == full["input_ids"][:count]
        assert cut == (count < len(full["input_ids"])) and example_["labels"][-1] == tokenizers[0].im_end_id


@given(
    contents | damaged("a b\n\nc 你\r\n\r\nd".encode()) | texts.map(lambda text: text.encode("utf-8", "replace")),
    st.sampled_from(["txt", "jsonl"]),
)
def test_texts(tmp_path_factory, tokenizers, content, suffix):
    path = tmp_path_factory.getbasetemp() / f"texts.{suffix}"
    path.write_bytes(content)
    try:
        found = read_texts(path)
    except DataError as error:
        assert str(error).startswith(str(path))
        return
    tokenizer = tokenizers[0]
    for length in (None, 2, 5):
        for pieces in Encoder(tokenizer, length).texts(found):
            assert [piece["labels"] for piece in pieces] == [piece["input_ids"] for piece in pieces]
            assert all(0 < len(piece["input_ids"]) <= (length or 10**9) for piece in pieces)
            ids = [*pieces[0]["input_ids"], *(i for piece in pieces[1:] for i in piece["input_ids"][1:])]
            assert [i for i in ids if i >= tokenizer.eod_id] == [tokenizer.eod_id] == ids[-1:]


@given(contents | damaged(FILE) | st.binary(max_size=20), st.sampled_from(["txt", "jsonl"]))
# A role that the template doesn't know: its own error, with a traceback.
@example(b'{"messages": [{"role": "critic", "content": "' + b"a" * 200 + b'"}]}', "jsonl")
def test_texts_to_calibrate_on(tmp_path_factory, tokenizers, content, suffix):
    path = tmp_path_factory.getbasetemp() / f"calibration.{suffix}"
    path.write_bytes(content)
    try:
        found = read_calibration(path)
        rows = make_rows(found * 64, tokenizers[0], 8, 16, 0)
    except CheckpointError as error:
        assert str(error)
    else:
        assert rows.seen.shape[1] == rows.held_out.shape[1] == 16 and rows.counted.any()
