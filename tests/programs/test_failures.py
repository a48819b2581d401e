"""What the machine refuses - space, rights, memory - in the words of each program."""

import errno
import io
import json
import os
import re

import pytest
import torch
import typer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import qwen1_commands
from qwen1.conversion.command_line.terminal import reported
from qwen1.programs.failures import is_of_machine, naming, told
from qwen1.programs.models import ModelError, check_model
from qwen1.training.tiny import commands as tiny_chat
from qwen1.training.tiny import journey
from qwen1.vocabulary.commands import main as extend_vocabulary

NO_MEMORY = (
    MemoryError(),
    MemoryError("std::bad_alloc"),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096000 bytes. Error code 12"),
    RuntimeError("unable to mmap 1380904 bytes from file <model.safetensors>: Cannot allocate memory (12)"),
    RuntimeError("can't start new thread"),
    SafetensorError("Cannot allocate memory (os error 12)"),
)
NO_SPACE = (
    OSError(errno.ENOSPC, "No space left on device", "out/model"),
    OSError(errno.EDQUOT, "Disk quota exceeded", "out/model"),
    OSError(errno.ENOSPC, "No space left on device", "source", None, "out/model"),
)


@pytest.mark.parametrize("error", NO_MEMORY, ids=repr)
def test_too_little_memory_is_one_sentence_with_what_helps(error):
    said = told(error, memory="add --bits 8")
    assert is_of_machine(error)
    assert re.fullmatch(r"There isn't enough memory( for another [\d.]+ [kMG]B)?: add --bits 8\.", said)


def test_the_memory_that_was_asked_for_is_named():
    assert "for another 4.1 MB" in told(NO_MEMORY[4]) and "for another 2.0 GiB" not in told(NO_MEMORY[3])


@pytest.mark.parametrize("error", NO_SPACE, ids=repr)
def test_a_full_disk_is_one_sentence_that_names_the_file_that_was_written(error):
    said = told(error)
    assert said.startswith("out/model can't be written") and "Errno" not in said
    assert re.search(r": free some, or write (to another disk|elsewhere)\.$", said)


def test_what_has_no_name_may_be_standard_output():
    said = told(OSError(errno.ENOSPC, "No space left on device"))
    assert said.startswith("A file or standard output can't be written") and "folder" not in said


@pytest.mark.parametrize(
    "number, remedy",
    [
        (errno.EACCES, "give yourself the right"),
        (errno.EPERM, "give yourself the right"),
        (errno.EROFS, "write elsewhere"),
        (errno.EFBIG, "ulimit -f"),
        (errno.EMFILE, "ulimit -n"),
        (errno.EIO, "look after its disk"),
        (errno.ENOENT, "name one that does"),
        (errno.EISDIR, "name another"),
    ],
)
def test_what_else_the_system_refuses(number, remedy):
    said = told(OSError(number, os.strerror(number), "some/file"))
    assert said.startswith("some/file ") and remedy in said and said.count("\n") == 0 and "Errno" not in said


def test_an_error_that_was_put_into_words_before_stays_as_it_is():
    assert told(OSError("name another port.")) == "name another port."
    assert told(ValueError("a value\n  of two lines")) == "a value of two lines"
    assert not is_of_machine(RuntimeError("shapes differ")) and not is_of_machine(ValueError("12 tokens"))


def test_what_followed_from_too_little_memory_is_known_by_its_cause():
    error = RuntimeError("the weights were not loaded")
    error.__cause__ = MemoryError()
    assert is_of_machine(error) and told(error).startswith("There isn't enough memory")


def test_errors_of_writing_get_the_name_of_the_file(tmp_path):
    with pytest.raises(OSError) as full, naming(tmp_path / "result"), open("/dev/full", "wb", buffering=0) as file:
        file.write(b"x")
    assert told(full.value).startswith(f"{tmp_path / 'result'} can't be written")
    with pytest.raises(OSError) as refused, naming(tmp_path / "weights"):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert told(refused.value).startswith(f"{tmp_path / 'weights'} can't be written")
    with pytest.raises(OSError) as named, naming(tmp_path / "result"):
        open(tmp_path / "other")
    assert named.value.filename == str(tmp_path / "other")


# --- in the programs ---


@pytest.mark.parametrize("program", ["browser", "chat", "checkpoint", "extend_vocabulary", "finetune", "tiny_chat"])
@pytest.mark.parametrize("error", [MemoryError(), OSError(errno.ENOSPC, "No space left on device", "out")], ids=repr)
def test_every_program_ends_with_a_sentence_and_no_traceback(program, error, monkeypatch):
    class Door:
        @staticmethod
        def main():
            raise error

    door = qwen1_commands.import_door
    monkeypatch.setattr(qwen1_commands, "import_door", lambda name: Door if name.endswith("commands") else door(name))
    with pytest.raises(SystemExit) as end:
        getattr(qwen1_commands, program)()
    name = "qwen1-" + program.replace("_", "-")
    assert str(end.value.code).startswith(f"{name}: ") and str(end.value.code).endswith(".")


def test_faults_of_ours_keep_their_traceback(monkeypatch):
    class Door:
        @staticmethod
        def main():
            raise RuntimeError("a fault")

    door = qwen1_commands.import_door
    monkeypatch.setattr(qwen1_commands, "import_door", lambda name: Door if name.endswith("commands") else door(name))
    with pytest.raises(RuntimeError, match="a fault"):
        qwen1_commands.chat()


def test_qwen1_checkpoint_says_it_in_a_sentence(capsys):
    def command():
        raise NO_MEMORY[4]

    with pytest.raises(typer.Exit) as end:
        reported(command)()
    assert end.value.exit_code == 1
    said = " ".join(capsys.readouterr().err.split())
    assert said.startswith("qwen1-checkpoint: There isn't enough memory for another 4.1 MB: ")


def test_qwen1_tiny_chat_says_it_in_a_sentence(monkeypatch, tmp_path):
    def run(*arguments):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(journey, "run", run)
    done = CliRunner().invoke(tiny_chat.app, ["make", str(tmp_path / "model"), "--quick"])
    assert done.exit_code == 1 and "no space is left on its disk" in done.output and "Traceback" not in done.output


def test_new_words_leave_the_old_file_where_there_is_no_space(monkeypatch, tmp_path, byte_vocabulary, capsys):
    (tmp_path / "words").write_text("interruption\t3\n")
    (tmp_path / "new").write_bytes(b"as it was")
    real = io.open

    def full(file, *arguments, **options):
        opened = real(file, *arguments, **options)
        return real("/dev/full", "wb", buffering=0) if "w" in getattr(opened, "mode", "") else opened

    monkeypatch.setattr("builtins.open", full)
    with pytest.raises(SystemExit) as end:
        extend_vocabulary([str(byte_vocabulary), str(tmp_path / "words"), str(tmp_path / "new")])
    monkeypatch.undo()
    assert end.value.code == 2 and "new" in (said := capsys.readouterr().err) and "no space is left" in said
    assert (tmp_path / "new").read_bytes() == b"as it was"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "words"]


def test_weights_that_may_not_be_read_are_named_by_every_program_that_opens_a_model(checkpoint_folder, monkeypatch):
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: "model.safetensors" not in str(path) and real(path, mode))
    with pytest.raises(ModelError, match=r"model\.safetensors may not be read: give yourself the right \(chmod u\+r\)"):
        check_model(checkpoint_folder)


def cut(path, length=1000):
    path.write_bytes(path.read_bytes()[:length])
    return path


def refusal(folder):
    with pytest.raises(ModelError) as refused:
        check_model(folder)
    return str(refused.value)


@pytest.mark.parametrize("length", [0, 5, 1000, -1])
def test_weights_that_are_cut_short_are_named_by_every_program_that_opens_a_model(checkpoint_folder, length):
    path = cut(checkpoint_folder / "model.safetensors", length)
    assert re.fullmatch(
        re.escape(f"{path} is truncated or damaged (") + r".+\)\. Download it again\.", refusal(path.parent)
    )


def test_a_pointer_in_the_place_of_weights_is_told_from_damage(checkpoint_folder):
    (checkpoint_folder / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    assert "git lfs pull" in refusal(checkpoint_folder)


def test_pickles_that_are_cut_short(checkpoint_folder):
    weights = load_file(checkpoint_folder / "model.safetensors")
    (checkpoint_folder / "model.safetensors").unlink()
    for old_format in (True, False):
        torch.save(weights, checkpoint_folder / "pytorch_model.bin", _use_new_zipfile_serialization=not old_format)
        check_model(checkpoint_folder)
    path = cut(checkpoint_folder / "pytorch_model.bin")
    assert refusal(checkpoint_folder) == f"{path} is truncated or damaged (no end of its archive). Download it again."


def test_an_adapter_and_its_base_are_looked_at(checkpoint_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("qwen1.programs.models.find_spec", lambda name: name)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(checkpoint_folder)}))
    save_file({"a": torch.zeros(2)}, adapter / "adapter_model.safetensors")
    check_model(adapter)
    base = cut(checkpoint_folder / "model.safetensors")
    assert refusal(adapter).startswith(f"{base} is truncated")
    own = cut(adapter / "adapter_model.safetensors", 20)
    assert refusal(adapter).startswith(f"{own} is truncated")


@pytest.mark.parametrize(
    "error",
    [
        SafetensorError("Error while deserializing header: header too large"),
        RuntimeError("PytorchStreamReader failed reading zip archive: failed finding central directory."),
    ],
    ids=repr,
)
def test_damage_that_is_met_later_is_a_sentence_too(error):
    assert is_of_machine(error)
    assert re.fullmatch(r"A file of the weights is truncated or damaged \(.+\)\. Download it again\.", told(error))
    assert not is_of_machine(SafetensorError("File does not contain tensor lm_head.weight"))


def test_files_are_written_as_before(tmp_path):
    with naming(tmp_path / "model.safetensors"):
        save_file({"a": torch.zeros(2)}, tmp_path / "model.safetensors")
    assert (tmp_path / "model.safetensors").exists()
