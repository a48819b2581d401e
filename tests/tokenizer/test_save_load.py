"""Saving and loading: both classes, the Auto class, folders in the published layouts, copies."""

import copy
import json
import os
import pickle
import shutil
import subprocess

import pytest
from transformers import AutoTokenizer

from qwen1.tokenization_qwen import CHAT_TEMPLATE, QWenTokenizer, QWenTokenizerFast

TEXT = "<|im_start|>user\nhello world é  aaa<|im_end|>"
MESSAGES = [{"role": "user", "content": "hello<|im_end|>"}]


def state(tokenizer):
    """What must survive saving and loading."""
    return {
        "ids": tokenizer.encode(TEXT),
        "chat": tokenizer.apply_chat_template(MESSAGES, return_dict=False),
        "ranks": tokenizer.mergeable_ranks,
        "special": tokenizer.special_tokens,
        "length": len(tokenizer),
        "template": tokenizer.chat_template,
        "named": tokenizer.special_tokens_map,
        "errors": tokenizer.errors,
        "model_max_length": tokenizer.model_max_length,
        "padding_side": tokenizer.padding_side,
    }


@pytest.fixture
def hub_folder(tmp_path, code_of, small_vocabulary):
    """Make a folder as on the Hub, with a given tokenizer_config.json and other files beside our code."""

    def make(config, *files):
        folder = tmp_path / "hub"
        folder.mkdir()
        for file in (small_vocabulary, *code_of("tokenization_qwen"), *files):
            shutil.copy(file, folder)
        shutil.copy(config, folder / "tokenizer_config.json")
        return folder

    return make


@pytest.fixture
def our_folder(hub_folder, repository):
    return hub_folder(repository / "tokenizer_config.json", repository / "chat_template.jinja")


# Loads folder after folder as one who has not installed this package, and saves each tokenizer in the next folder.
REMOTE_CODE = """
import json, sys
from transformers import AutoTokenizer
arguments, folders = json.loads(sys.argv[1]), sys.argv[2:]
for n, folder in enumerate(folders):
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True, **(arguments if n == 0 else {}))
    print(json.dumps({
        "class": type(tokenizer).__name__,
        "remote": type(tokenizer).__module__.startswith("transformers_modules."),
        "is_fast": tokenizer.is_fast,
        "ids": tokenizer.encode(%r),
        "chat": tokenizer.apply_chat_template(%r, return_dict=False),
        "template": tokenizer.chat_template,
        "named": tokenizer.special_tokens_map,
        "length": len(tokenizer),
    }))
    if n + 1 < len(folders):
        tokenizer.save_pretrained(folders[n + 1])
"""


@pytest.fixture
def load_remote_code(tmp_path, small_vocabulary, warm_with):
    """Run `REMOTE_CODE` and return, for each folder, what it found beyond the state of a fresh tokenizer."""
    fresh = state(QWenTokenizer(small_vocabulary))

    def run(*folders, **arguments):
        environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
        command = [*warm_with(environment, "torch"), "-c", REMOTE_CODE % (TEXT, MESSAGES)]
        command += [json.dumps(arguments), *map(str, folders)]
        result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        found = [json.loads(line) for line in result.stdout.splitlines()]
        for item in found:
            assert item.pop("remote")
            for key in set(item) & set(fresh):
                assert item.pop(key) == fresh[key]
        return [item["class"] for item in found]

    return run


def test_template_file_equals_the_constant(repository):
    assert (repository / "chat_template.jinja").read_text(encoding="utf-8") == CHAT_TEMPLATE


def test_copies(fresh):
    for copied in (pickle.loads(pickle.dumps(fresh)), copy.deepcopy(fresh)):
        assert type(copied) is type(fresh)
        assert state(copied) == state(fresh)
        assert copied.get_vocab() == fresh.get_vocab()


@pytest.mark.parametrize("cls", [QWenTokenizer, QWenTokenizerFast])
def test_round_trips_keep_everything(tmp_path, small_vocabulary, cls, write_vocabulary):
    extra = write_vocabulary(tmp_path / "my_words.tiktoken", [b"aaa", b"helloaaa"], start=480)
    tokenizer = cls(
        small_vocabulary,
        errors="ignore",
        extra_vocab_file=extra,
        eos_token="<|im_end|>",
        pad_token="<|extra_1|>",
        padding_side="left",
        model_max_length=77,
    )
    tokenizer.chat_template = "{{ messages[0].content }}<|im_end|>"
    first = state(tokenizer)
    assert 480 in first["ids"]
    for n in range(3):
        folder = tmp_path / f"saved{n}"
        tokenizer.save_pretrained(folder)
        names = {path.name for path in folder.iterdir()}
        assert {"qwen.tiktoken", "qwen_extra.tiktoken", "chat_template.jinja", "tokenizer_config.json"} <= names
        assert ("tokenizer.json" in names) == (cls is QWenTokenizerFast)
        for other in (QWenTokenizer, QWenTokenizerFast):
            assert state(other.from_pretrained(folder)) == first
        tokenizer = cls.from_pretrained(folder)
    assert (folder / "qwen.tiktoken").read_bytes() == small_vocabulary.read_bytes()
    assert (folder / "qwen_extra.tiktoken").read_bytes() == extra.read_bytes()
    # The first save lacks notes of transformers on how the tokenizer was loaded.
    assert _files(tmp_path / "saved1") == _files(tmp_path / "saved2")


def _files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_extra_vocabulary_given_for_a_saved_fast_tokenizer(tmp_path, small_vocabulary, write_vocabulary):
    QWenTokenizerFast(small_vocabulary).save_pretrained(tmp_path / "saved")
    extra = write_vocabulary(tmp_path / "extra.tiktoken", [b"aaa"], start=480)
    for cls in (QWenTokenizer, QWenTokenizerFast):
        assert cls.from_pretrained(tmp_path / "saved", extra_vocab_file=str(extra)).encode("aaa") == [480]


def test_fast_class_loads_from_tokenizer_json_alone(tmp_path, small_vocabulary):
    tokenizer = QWenTokenizerFast(small_vocabulary)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "qwen.tiktoken").unlink()
    assert state(QWenTokenizerFast.from_pretrained(tmp_path)) == state(tokenizer)
    assert QWenTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json")).encode(TEXT) == tokenizer.encode(TEXT)
    assert (tmp_path / "tokenizer.json").read_text().count(
        "\n"
    ) <= 1  # with a line for each word, the file is twice as large


@pytest.mark.parametrize("cls", [QWenTokenizer, QWenTokenizerFast])
def test_loading_from_the_path_of_a_vocabulary_file(small_vocabulary, cls):
    assert state(cls.from_pretrained(small_vocabulary)) == state(cls(small_vocabulary))


def test_auto_class_gives_the_fast_one(our_folder, load_remote_code, code_of, tmp_path):
    saved = [tmp_path / "saved0", tmp_path / "saved1", tmp_path / "saved2"]
    assert load_remote_code(our_folder, *saved) == ["QWenTokenizerFast"] * 4
    for folder in saved[:2]:
        config = json.loads((folder / "tokenizer_config.json").read_text())
        assert config["tokenizer_class"] == "QWenTokenizer"
        assert config["auto_map"]["AutoTokenizer"] == [
            "tokenization_qwen.QWenTokenizer",
            "tokenization_qwen.QWenTokenizerFast",
        ]
    assert _files(saved[0]) == _files(saved[1])
    for folder in saved:
        code = {name: content for name, content in _files(folder).items() if name.endswith(".py")}
        assert code == {path.name: path.read_bytes() for path in code_of("tokenization_qwen")}


def test_auto_class_gives_the_slow_one_on_demand(our_folder, load_remote_code, tmp_path):
    """transformers 5 drops `use_fast`; `backend` reaches the class. Folders saved by the slow class keep it."""
    saved = tmp_path / "saved"
    assert load_remote_code(our_folder, saved, backend="tiktoken") == ["QWenTokenizer"] * 2


@pytest.mark.parametrize("release", ["2023-08-chat", "2023-12-base"])
def test_published_layout(hub_folder, golden, load_remote_code, release, tmp_path):
    """No template, no named special tokens, and an auto_map without a fast class."""
    folder = hub_folder(golden / "published_configs" / f"{release}.tokenizer_config.json")
    assert load_remote_code(folder, tmp_path / "saved") == ["QWenTokenizer"] * 2
    assert QWenTokenizerFast.from_pretrained(folder).chat_template == CHAT_TEMPLATE


def test_auto_class_with_this_package_imported(our_folder, small_vocabulary):
    tokenizer = AutoTokenizer.from_pretrained(our_folder, trust_remote_code=True)
    assert type(tokenizer).__name__ == "QWenTokenizerFast"
    assert state(tokenizer) == state(QWenTokenizer(small_vocabulary)) | {"model_max_length": 8192}


def test_null_special_tokens_get_the_default(small_vocabulary):
    for cls in (QWenTokenizer, QWenTokenizerFast):
        assert cls(small_vocabulary, pad_token=None, chat_template=None).pad_token == "<|endoftext|>"


def test_added_tokens_of_another_vocabulary_are_refused(tmp_path, small_vocabulary):
    QWenTokenizer(small_vocabulary).save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["added_tokens_decoder"]["480"] = {**config["added_tokens_decoder"]["272"], "content": "<new>"}
    path.write_text(json.dumps(config))
    for cls in (QWenTokenizer, QWenTokenizerFast):
        with pytest.raises((ValueError, ImportError)) as caught:  # transformers 5.4 hides errors without protobuf
            cls.from_pretrained(tmp_path)
        messages = f"{caught.value} {caught.value.__context__}"
        assert "Token '<new>' cannot be added" in messages


@pytest.mark.parametrize("cls", [QWenTokenizer, QWenTokenizerFast])
def test_the_extra_vocabulary_is_among_the_arguments(tmp_path, small_vocabulary, write_vocabulary, cls):
    assert cls(small_vocabulary).init_kwargs["extra_vocab_file"] is None
    extra = write_vocabulary(tmp_path / "words.tiktoken", [b"aaa"], start=480)
    tokenizer = cls(small_vocabulary, extra_vocab_file=str(extra))
    assert tokenizer.init_kwargs["extra_vocab_file"] == str(extra)
    tokenizer.save_pretrained(tmp_path / "saved")
    assert "vocab" not in (tmp_path / "saved" / "tokenizer_config.json").read_text()
    extra.unlink()
    assert cls.from_pretrained(tmp_path / "saved").encode("aaa") == [480]


@pytest.mark.parametrize("cls", [QWenTokenizer, QWenTokenizerFast])
def test_no_space_is_put_before_text(small_vocabulary, cls):
    assert cls(small_vocabulary, add_prefix_space=False).add_prefix_space is False
    assert cls(small_vocabulary).add_prefix_space is False
    with pytest.raises(ValueError, match="`add_prefix_space=True` is not possible.* begin the text with a space"):
        cls(small_vocabulary, add_prefix_space=True)
