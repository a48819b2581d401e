"""Files of a tokenizer that can't be read: what is wrong with which, and what to do."""

import os
import shutil

import pytest
from transformers import AutoTokenizer

from qwen1 import vocabulary_qwen
from qwen1.tokenization_qwen import QWenTokenizer, QWenTokenizerFast

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935\nsize 2561218\n"
CLASSES = [QWenTokenizer, QWenTokenizerFast]
NAMES = ["qwen.tiktoken", "qwen_extra.tiktoken", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]


@pytest.fixture
def folder(tmp_path, repository):
    """The tokenizer that ships, with its files to be damaged."""
    for name in ("qwen.tiktoken", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(repository / "qwen-tiny-chat" / name, tmp_path)
    return tmp_path


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("name", NAMES)
def test_a_pointer_of_git_lfs(folder, cls, name):
    (folder / name).write_bytes(POINTER)
    with pytest.raises(ValueError, match=rf"{name}' is a pointer of Git LFS.*run `git lfs pull` in '{folder}'"):
        cls.from_pretrained(folder)


@pytest.mark.parametrize("backend", ["tokenizers", "tiktoken"])
@pytest.mark.parametrize("name", ["qwen.tiktoken", "tokenizer.json", "chat_template.jinja"])
def test_a_pointer_of_git_lfs_beside_remote_code(tmp_path, repository, backend, name):
    folder = tmp_path / "model"
    shutil.copytree(repository / "qwen-tiny-chat", folder, ignore=shutil.ignore_patterns("*.safetensors"))
    (folder / name).write_bytes(POINTER)
    # By the Auto class, or by the tokenizer, where it alone knows that it reads the file.
    with pytest.raises((OSError, ValueError), match=f"{name}' is a pointer of Git LFS"):
        AutoTokenizer.from_pretrained(folder, trust_remote_code=True, backend=backend)


def test_a_pointer_given_to_the_constructor(tmp_path, small_vocabulary):
    (tmp_path / "file").write_bytes(POINTER)
    for arguments in ({"vocab_file": tmp_path / "file"},
                      {"vocab_file": small_vocabulary, "extra_vocab_file": tmp_path / "file"}):  # fmt: skip
        for cls in CLASSES:
            with pytest.raises(ValueError, match="git lfs pull"):
                cls(**arguments)
    with pytest.raises(ValueError, match="git lfs pull"):
        QWenTokenizerFast(tokenizer_file=tmp_path / "file")


@pytest.mark.parametrize("cls", CLASSES)
def test_what_is_no_file(folder, cls):
    (folder / "qwen.tiktoken").unlink()
    (folder / "qwen.tiktoken").mkdir()
    with pytest.raises(OSError, match="qwen.tiktoken' is a directory, not a file: put the qwen.tiktoken of"):
        cls.from_pretrained(folder)
    with pytest.raises(OSError, match="is a directory"):
        cls(folder / "qwen.tiktoken")
    os.rmdir(folder / "qwen.tiktoken")
    (folder / "qwen.tiktoken").symlink_to("nowhere")
    with pytest.raises(OSError, match="qwen.tiktoken' is a link to 'nowhere', where there is nothing"):
        cls.from_pretrained(folder)
    with pytest.raises(OSError, match="'/dev/zero' is a device or a pipe, not a file"):
        cls("/dev/zero")


@pytest.mark.parametrize("cls", CLASSES)
def test_a_link_to_itself(folder, cls):
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").symlink_to("tokenizer.json")
    with pytest.raises(OSError, match="tokenizer.json' is a link to 'tokenizer.json', where there is nothing"):
        cls.from_pretrained(folder)


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("name", ["qwen.tiktoken", "tokenizer.json"])
def test_a_file_without_the_right_to_read_it(folder, cls, name, monkeypatch):
    def denied(path, *arguments, **options):
        if os.fspath(path).endswith(name):
            raise PermissionError(13, "Permission denied", path)
        return open(path, *arguments, **options)

    monkeypatch.setattr(vocabulary_qwen, "open", denied, raising=False)  # root may read everything
    with pytest.raises(PermissionError, match=rf"{name}' can't be read \(Permission denied\): allow it, or put"):
        cls.from_pretrained(folder)


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("content", [b"{", b"\xff{}", b"[" * 100_000], ids=["truncated", "no UTF-8", "deep"])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_damaged_json_is_named(folder, cls, name, content):
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}' is damaged, no JSON that can be read .*again"):
        cls.from_pretrained(folder)


@pytest.mark.parametrize("content", [b"{}", b'{"added_tokens": null}'])
def test_json_that_is_no_tokenizer_is_named(folder, content):
    (folder / "tokenizer.json").write_bytes(content)
    with pytest.raises(ValueError, match="tokenizer.json' is damaged, no tokenizer that can be read"):
        QWenTokenizerFast.from_pretrained(folder)


@pytest.mark.parametrize("content", [b"{", b"{}", b'{"model": 5}'])
def test_a_damaged_backend_given_to_the_constructor(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ValueError, match="tokenizer.json' is damaged, no tokenizer that can be read"):
        QWenTokenizerFast(tokenizer_file=tmp_path / "tokenizer.json")
