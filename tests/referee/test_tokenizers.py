"""transformers' own tests of tokenizers, on our classes, and on its Qwen2 tokenizer beside them."""

import base64
import functools
import json
import os
import shutil
import tempfile
import unittest

import pytest
from transformers import Qwen2Tokenizer

from qwen1.conversion.planning.qwen2_companions import qwen2_tokenizer
from qwen1.tokenization_qwen import QWenTokenizer, QWenTokenizerFast

pytest.importorskip("parameterized")  # their tests use it

NO_NEW_TOKENS = "adds a token; the ids behind the vocabulary are not free, and 205 control tokens are spare"
BOTH = {
    "test_added_tokens_serialization": NO_NEW_TOKENS,
    "test_bos_token_with_add_bos_token_false": NO_NEW_TOKENS,
    "test_bos_token_with_add_bos_token_true": NO_NEW_TOKENS,
    "test_get_vocab": NO_NEW_TOKENS,
    "test_pad_token_initialization": NO_NEW_TOKENS,
    "test_save_and_load_tokenizer": NO_NEW_TOKENS,
    "test_tokenize_special_tokens": NO_NEW_TOKENS,
}
# The tests that may fail for us, though they pass for Qwen2's class, and why.
REASONS = {
    QWenTokenizer: BOTH
    | {
        "test_tokenizers_common_ids_setters": "ordinary tokens of this class are bytes, as in 2023, and names are text",
    },
    QWenTokenizerFast: BOTH
    | {
        "test_rust_tokenizer_add_prefix_space_0": "an error: the model was trained without a space before text",
        "test_training_new_tokenizer_with_special_tokens_change": "an error: control tokens have fixed names",
    },
}
# For the tests that the slow class has no part in.
NEED_THE_BACKEND = {
    "test_chat_template_return_assistant_tokens_mask",
    "test_chat_template_return_assistant_tokens_mask_truncated",
    "test_sequence_ids",
}

# Their own slow tests run where this variable is set; each of them loads a tokenizer, some several times.
TAKES_MINUTES = pytest.mark.skipif(not os.environ.get("RUN_SLOW"), reason="takes minutes; RUN_SLOW=1 runs it")


@pytest.fixture(scope="module")
def small_folder(tmp_path_factory, repository):
    """A folder to load our classes from, with the bytes and a few words."""
    folder = tmp_path_factory.mktemp("small")
    tokens = [bytes([byte]) for byte in range(256)] + [b"he", b"ll", b"llo", b"hello", b" w", b"or", b"ld", b"orld"]
    lines = [base64.b64encode(token) + b" %d\n" % i for i, token in enumerate(tokens)]
    (folder / "qwen.tiktoken").write_bytes(b"".join(lines))
    shutil.copy(repository / "tokenizer_config.json", folder)
    return folder


@pytest.fixture(scope="module")
def common_folder(tmp_path_factory, repository, published_vocabulary):
    """The same with the first 5,000 tokens of the published vocabulary."""
    folder = tmp_path_factory.mktemp("common")
    lines = published_vocabulary.read_bytes().splitlines(keepends=True)
    (folder / "qwen.tiktoken").write_bytes(b"".join(lines[:5_000]))
    shutil.copy(repository / "tokenizer_config.json", folder)
    return folder


@pytest.fixture(scope="module")
def published_folder(tmp_path_factory, repository, published_vocabulary):
    """The same with the whole of it."""
    folder = tmp_path_factory.mktemp("published")
    shutil.copy(published_vocabulary, folder / "qwen.tiktoken")
    shutil.copy(repository / "tokenizer_config.json", folder)
    return folder


@pytest.fixture(scope="module")
def run_on(upstream, run_suite):
    """Run their tests on a tokenizer class and a folder to load it from: name -> outcome."""

    def run(cls, folder):
        common = upstream("test_tokenization_common").TokenizerTesterMixin
        mixins = [common]
        if cls is not QWenTokenizer:
            mixins.insert(0, upstream("test_tokenizers_backend_mixin").TokenizersBackendTesterMixin)

        def set_up(case):
            """As theirs, without the sample text, which the source distribution lacks and these tests don't read."""
            case.tokenizers_list = [(cls, str(folder), {})]
            case.tmpdirname = tempfile.mkdtemp()
            cls.from_pretrained(folder).save_pretrained(case.tmpdirname)

        @functools.cache  # it looks at each token of the vocabulary, and is always given equal tokenizers
        def clean_sequence(**options):
            return common.get_clean_sequence(None, cls.from_pretrained(folder), **options)

        members = {
            "tokenizer_class": cls,
            "rust_tokenizer_class": cls,
            "from_pretrained_id": [str(folder)],
            "setUpClass": classmethod(set_up),
            "get_clean_sequence": lambda case, tokenizer, **options: clean_sequence(**options),
        }
        return run_suite(type(f"{cls.__name__}Test", (*mixins, unittest.TestCase), members))

    return run


@pytest.fixture(scope="module")
def theirs(run_on, small_folder, tmp_path_factory):
    """The outcomes for transformers' Qwen2 tokenizer with the small vocabulary."""
    folder = tmp_path_factory.mktemp("qwen2")
    for file in qwen2_tokenizer(small_folder, chat=False, length=8192):
        (folder / file.name).write_text(file.text, encoding="utf-8")
    assert json.loads((folder / "tokenizer_config.json").read_text())["tokenizer_class"] == "Qwen2Tokenizer"
    return run_on(Qwen2Tokenizer, folder)


@pytest.mark.parametrize("cls", [QWenTokenizer, QWenTokenizerFast])
@pytest.mark.parametrize("vocabulary", ["small", "common", pytest.param("published", marks=TAKES_MINUTES)])
@pytest.mark.no_cover
def test_what_passes_for_qwen2_passes_for_us(request, run_on, theirs, judge, cls, vocabulary):
    ours = run_on(cls, request.getfixturevalue(f"{vocabulary}_folder"))
    judge(ours, {name: outcome for name, outcome in theirs.items() if name in ours}, REASONS[cls])
    skipped = {name for name in ours if ours[name] == "skipped" and theirs[name] == "passed"}
    assert skipped == (NEED_THE_BACKEND if cls is QWenTokenizer else set())
