"""Any vocabulary file: what is read is what is written, with the same ids in both classes; all else is an error."""

import base64
import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from qwen1 import QWenTokenizer, QWenTokenizerFast
from qwen1.vocabulary_qwen import SPECIAL_TOKENS, load_extra_ranks, load_vocabulary

from .conftest import changed, damaged, heavy, texts

BYTES = [bytes([byte]) for byte in range(256)]
LINES = b"".join(base64.b64encode(token) + b" %d\n" % i for i, token in enumerate([*BYTES, b"he", b"llo", b"hello"]))
CONTROLS = [token.encode() for token in SPECIAL_TOKENS[:4]]
words = st.lists(
    st.binary(min_size=1, max_size=4)
    | texts.filter(bool).map(lambda text: text.encode("utf-8", "replace"))
    | st.sampled_from(CONTROLS),
    max_size=5,
)


@given(damaged(LINES))
@example(LINES + b"MTI= 259 1\n")
@example(LINES.replace(b"CA== 8", b"CA==\r 8"))  # white space, no end of a line
def test_damaged_files(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "damaged.tiktoken"
    path.write_bytes(content)
    try:
        ranks, special_tokens = load_vocabulary(path)
    except ValueError as error:
        assert str(path) in str(error)
        return
    assert sorted(ranks.values()) == list(range(len(ranks)))
    assert {base64.b64decode(line.split()[0]) for line in content.split(b"\n") if line.strip()} == ranks.keys()
    assert special_tokens["<|endoftext|>"] == len(ranks)


@heavy
@given(words, texts)
@example([b"<|im_start|>"], "<|im_start|>")  # a word that only one class knew
def test_any_words(tmp_path_factory, write_vocabulary, learnt, text):
    """Words of a vocabulary of one's own: the ids of both classes, and again when it is saved."""
    folder = tmp_path_factory.getbasetemp()
    path = write_vocabulary(folder / "words.tiktoken", [*BYTES, *learnt])
    try:
        slow, fast = QWenTokenizer(path), QWenTokenizerFast(path)
    except ValueError as error:
        assert str(path) in str(error) and (len({*BYTES, *learnt}) < 256 + len(learnt) or {*learnt} & {*CONTROLS})
        return
    ids = slow.encode(text, allowed_special=set())
    assert ids == fast.encode(text, allowed_special=set())
    assert all(i < slow.eod_id for i in ids)
    assert slow.encode(text) == fast.encode(text)
    assert slow.decode(ids) == fast.decode(ids)
    assert slow.mergeable_ranks == fast.mergeable_ranks
    (saved,) = fast.save_vocabulary(str(folder))
    assert load_vocabulary(saved) == (slow.mergeable_ranks, slow.special_tokens)


@heavy
@given(st.lists(st.tuples(st.binary(min_size=1, max_size=3) | st.sampled_from(CONTROLS), st.integers(455, 480))), texts)
def test_extra_words(tmp_path_factory, learnt, text):
    folder = tmp_path_factory.getbasetemp()
    path, extra = folder / "base.tiktoken", folder / "extra.tiktoken"
    path.write_bytes(LINES)
    extra.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % i for token, i in learnt))
    try:
        slow, fast = (cls(path, extra_vocab_file=extra) for cls in (QWenTokenizer, QWenTokenizerFast))
    except ValueError as error:
        assert str(extra) in str(error)
        return
    for allowed in ("all", set()):
        assert slow.encode(text, allowed_special=allowed) == fast.encode(text, allowed_special=allowed)
    assert not set(slow.encode(text, allowed_special=set())) & set(slow.special_tokens.values())
    assert all(
        slow.decode([i]) == fast.decode([i]) == token.decode("utf-8", "replace")
        for token, i in learnt
        if slow.mergeable_ranks[token] == i
    )


@given(damaged(LINES.splitlines(keepends=True)[-1] + b"PHxlb3Q+ 480\n"))
def test_damaged_extra_files(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "more.tiktoken"
    path.write_bytes(content)
    ranks = {token: i for i, token in enumerate(BYTES)}
    try:
        merged = load_extra_ranks(path, ranks, {token: i for i, token in enumerate(SPECIAL_TOKENS, start=256)})
    except ValueError as error:
        assert str(path) in str(error)
    else:
        assert ranks.items() <= merged.items() and min(merged.values()) == 0


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The files of a folder that both classes save."""
    folder = tmp_path_factory.mktemp("saved")
    (folder / "qwen.tiktoken").write_bytes(LINES)
    QWenTokenizerFast(folder / "qwen.tiktoken").save_pretrained(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def write(folder, files):
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


@heavy
@given(st.data(), st.sampled_from(["qwen.tiktoken", "tokenizer.json", "tokenizer_config.json"]), st.booleans())
def test_damaged_folders(saved, tmp_path_factory, data, name, slow):
    """Loaded as it was, or an error."""
    changes = {name: data.draw(damaged(saved[name]))}
    folder = write(tmp_path_factory.getbasetemp() / "folder", {**saved, **changes})
    cls = QWenTokenizer if slow else QWenTokenizerFast
    try:
        tokenizer = cls.from_pretrained(folder)
    except (ValueError, OSError) as error:
        assert str(error)
    else:
        assert tokenizer.decode(tokenizer.encode("hello 你好<|im_end|>")) == "hello 你好<|im_end|>"


@heavy
@given(st.data())
def test_settings_of_a_tokenizer(saved, tmp_path_factory, data):
    """Anything in tokenizer_config.json."""
    config = json.loads(saved["tokenizer_config.json"])
    keys = st.sampled_from(
        [
            "add_prefix_space",
            "pad_token",
            "bos_token",
            "errors",
            "chat_template",
            "padding_side",
            "model_max_length",
            "added_tokens_decoder",
            "extra_special_tokens",
            "split_special_tokens",
        ]
    )
    changes = {"tokenizer_config.json": json.dumps(data.draw(changed(config, keys))).encode()}
    folder = write(tmp_path_factory.getbasetemp() / "settings", {**saved, **changes})
    for cls in (QWenTokenizer, QWenTokenizerFast):
        try:
            tokenizer = cls.from_pretrained(folder)
        except (ValueError, OSError) as error:
            assert str(error)
        else:
            ids = tokenizer.encode("hello<|im_end|>", allowed_special=set())
            assert tokenizer.decode(ids) == "hello<|im_end|>"
            assert not set(ids) & set(tokenizer.special_tokens.values())


@pytest.mark.parametrize(
    "settings",
    [
        {"added_tokens_decoder": None},
        {"model_max_length": ""},
        {"model_max_length": -1},
        {"errors": "x"},
        {"errors": 1},
    ],
)
@pytest.mark.parametrize("cls", [QWenTokenizer, QWenTokenizerFast])
def test_settings_that_were_tracebacks(saved, tmp_path, cls, settings):
    config = json.loads(saved["tokenizer_config.json"]) | settings
    folder = write(tmp_path / "folder", {**saved, "tokenizer_config.json": json.dumps(config).encode()})
    with pytest.raises(ValueError, match="|".join([*settings, "tokenizer_config.json"])):
        cls.from_pretrained(folder)
