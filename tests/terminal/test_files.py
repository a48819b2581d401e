"""Conversations on file."""

import json
import os
import socket
import stat
from pathlib import Path

import pytest

from qwen1.terminal import files
from qwen1.terminal.errors import CommandError
from qwen1.training.data import read_conversations

TURNS = [("你好 👋\n\tzwei", "Hello!"), ("再见", "")]


def test_what_is_saved_is_loaded(tmp_path):
    path = tmp_path / "with blank.json"
    files.save(path, "简短。", TURNS)
    assert files.load(path) == ("简短。", TURNS)
    assert "你好" in path.read_text(encoding="utf-8")
    assert os.listdir(tmp_path) == [path.name]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_saved_conversation_is_a_training_record(tmp_path):
    path = tmp_path / "saved.jsonl"
    files.save(path, "", TURNS[:1])
    (record,) = read_conversations(path)
    assert [message["role"] for message in record] == ["system", "user", "assistant"]


def test_an_existing_file_is_kept_unless_told_otherwise(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("precious")
    with pytest.raises(CommandError, match="a.json exists.*:save!"):
        files.save(path, "", TURNS)
    assert path.read_text() == "precious"
    files.save(path, "", TURNS, overwrite=True)
    assert files.load(path) == ("", TURNS)


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    files.save(path, "", TURNS)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(CommandError, match="a.json can't be written: No space left"):
        files.save(path, "", [], overwrite=True)
    assert files.load(path) == ("", TURNS)
    assert os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize("name", ["missing/a.json", ".", "x" * 300, "nul\0.json"])
def test_names_that_cannot_be_written(tmp_path, name):
    with pytest.raises(CommandError, match="can't be written"):
        files.save(tmp_path / name, "", TURNS, overwrite=True)


def test_a_link_stays_one(tmp_path):
    target, link = tmp_path / "target.json", tmp_path / "link.json"
    target.write_text("old")
    link.symlink_to(target)
    files.save(link, "", TURNS, overwrite=True)
    assert link.is_symlink() and files.load(target) == ("", TURNS)


def test_a_file_that_is_there_keeps_its_permissions(tmp_path):
    path, link = tmp_path / "a.json", tmp_path / "link.json"
    path.write_text("old")
    path.chmod(0o644)
    link.symlink_to(path)
    for name in (path, link):
        files.save(name, "", TURNS, overwrite=True)
        assert files.load(path) == ("", TURNS) and stat.S_IMODE(path.stat().st_mode) == 0o644


@pytest.fixture(params=["device", "pipe", "socket", "link to a device"])
def no_file(request, tmp_path):
    """What is there and is no file."""
    path = tmp_path / "no_file"
    if request.param == "pipe":
        os.mkfifo(path)
    elif request.param == "socket":
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
    elif request.param == "link to a device":
        path.symlink_to("/dev/zero")
    return Path("/dev/zero") if request.param == "device" else path


def test_what_is_no_file_is_refused_at_once(no_file):
    before = no_file.stat()
    with pytest.raises(CommandError, match=f"{no_file} can't be written: it is a device, a pipe or a socket"):
        files.save(no_file, "", TURNS, overwrite=True)
    with pytest.raises(CommandError, match=f"{no_file} can't be read: it is a device, a pipe or a socket"):
        files.load(no_file)
    assert (no_file.stat().st_ino, no_file.stat().st_mode) == (before.st_ino, before.st_mode)


def test_a_link_to_itself(tmp_path):
    path = tmp_path / "a.json"
    path.symlink_to(path)
    with pytest.raises(CommandError, match="a.json can't be written: "):
        files.save(path, "", TURNS, overwrite=True)
    with pytest.raises(CommandError, match="a.json can't be read: Too many levels"):
        files.load(path)
    assert path.is_symlink() and os.listdir(tmp_path) == ["a.json"]


def test_a_file_that_is_too_large_is_not_read(tmp_path, monkeypatch):
    path = tmp_path / "large.json"
    with path.open("wb") as file:
        file.truncate(10 * 2**30)  # takes no room on the disk
    with pytest.raises(
        CommandError, match="large.json can't be read: it has 10,737,418,240 bytes, and 67,108,864 at most are read"
    ):
        files.load(path)
    monkeypatch.setattr(files, "LARGEST", 10)
    with pytest.raises(CommandError, match="it has 11 bytes, and 10 at most"):
        files.load(Path("/proc/self/status"))  # which says that it is empty


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CommandError, match="none.json can't be read: No such file"):
        files.load(tmp_path / "none.json")


def message(role, content="x"):
    return {"role": role, "content": content}


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"", "damaged"),
        (b'{"messages": [{"role": "user", "con', "damaged"),
        (b"\xff\xfe\x00", "damaged"),
        (b"[" * 100_000, "damaged"),
        ([], '"messages"'),
        ({"messages": "hello"}, '"messages"'),
        ({"messages": ["hello"]}, "message 1.*'hello'"),
        ({"messages": [message("user"), {"role": "assistant", "content": 3}]}, 'message 2.*"content"'),
        ({"messages": [message("user")]}, "no answer"),
        ({"messages": [message("system"), message("user")]}, "no answer"),
        ({"messages": [message("assistant"), message("user")]}, "message 1.*'assistant', expected 'user'"),
        ({"messages": [message("user"), message("assistant"), message("system"), message("user")]}, "message 3"),
        ({"messages": [message(["user"]), message("assistant")]}, "message 1"),
        ({"messages": [message("user", "\ud800"), message("assistant")]}, "surrogates"),
    ],
)
def test_damaged_files_are_errors(tmp_path, content, reason):
    path = tmp_path / "bad.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    with pytest.raises(CommandError, match=f"(?s)bad.json.*{reason}"):
        files.load(path)


def test_a_file_without_a_system_message(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(
        "\ufeff".encode() + json.dumps({"messages": [message("user"), message("assistant", "y")]}).encode()
    )
    assert files.load(path) == (None, [("x", "y")])
