"""Files that can't be read: every command says at once what is wrong with which file."""

import errno
import json
import os
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from qwen1.conversion import commands
from qwen1.conversion.errors import CheckpointError
from qwen1.conversion.files.access import check_readable, read_json, read_text
from qwen1.conversion.files.weights import Weights
from qwen1.conversion.formats.architecture import MOST_LAYERS
from qwen1.conversion.inspecting.inspection import inspect
from qwen1.conversion.opening.adapters import open_adapter

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'4d' * 32}\nsize 12345\n"
COMMANDS = ["inspect {0}", "upgrade {0} {1}", "convert {0} {1} --to qwen2", "verify {0} {0}", "push {0} me/model"]
BOMBS = {
    "lists": "[" * 100_000 + "]" * 100_000,
    "lists without an end": "[" * 100_000,
    "objects": '{"a":' * 100_000 + "1" + "}" * 100_000,
    "deep enough to be read": '{"a":' * 300 + "1" + "}" * 300,
}


@pytest.fixture
def folder(checkpoint_folder):
    return checkpoint_folder


@pytest.fixture
def sharded(folder):
    """The same with an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(tensors, "model-00001-of-00001.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture
def adapter(tmp_path):
    path = tmp_path / "adapter"
    path.mkdir()
    (path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "task_type": "CAUSAL_LM"}))
    save_file({"a": torch.zeros(1)}, path / "adapter_model.safetensors")
    return path


@pytest.fixture
def denied(monkeypatch):
    """(path): from now on the system refuses to open it, whoever asks; modes mean nothing to root."""
    real = open

    def deny(path, number=errno.EACCES):
        def fake(file, *arguments, **options):
            if str(file) == str(path):
                raise OSError(
                    number, "Permission denied" if number == errno.EACCES else "Input/output error", str(file)
                )
            return real(file, *arguments, **options)

        monkeypatch.setattr("builtins.open", fake)
        monkeypatch.setattr("io.open", fake)

    return deny


def run(*arguments):
    """Exit code and output, on one line, of a command that must be quick."""
    start = time.perf_counter()
    done = CliRunner().invoke(commands.app, [str(argument) for argument in arguments], env={"COLUMNS": "1000"})
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    assert time.perf_counter() - start < 20
    return done.exit_code, " ".join(done.output.split())


def edit(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


# --- JSON that is no setting ---


@pytest.mark.parametrize("text", BOMBS.values(), ids=BOMBS)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("command", COMMANDS)
def test_deep_json_is_refused_for_its_depth(folder, tmp_path, name, text, command):
    (folder / name).write_text(text)
    if command.startswith("verify") and name != "config.json":
        return
    code, output = run(*command.format(folder, tmp_path / "new").split())
    assert code in (1, 3), output
    assert name in output and "deep" in output and "Traceback" not in output


@pytest.mark.parametrize("text", BOMBS.values(), ids=BOMBS)
def test_a_deep_index(sharded, tmp_path, text):
    (sharded / "model.safetensors.index.json").write_text(text)
    for command in COMMANDS:
        code, output = run(*command.format(sharded, tmp_path / "new").split())
        assert code in (1, 3) and "index.json" in output and "deep" in output


def test_deep_json_of_adapters_tokens_and_llama(folder, adapter, golden, tmp_path):
    (tmp_path / "ids.json").write_text(BOMBS["lists"])
    assert (
        "ids.json" in (output := run("verify", folder, folder, "--ids", tmp_path / "ids.json")[1]) and "deep" in output
    )
    (adapter / "adapter_config.json").write_text(BOMBS["objects"])
    assert "deep" in run("merge-lora", folder, adapter, tmp_path / "new")[1]
    assert "deep" in run("inspect", adapter)[1]
    meta = shutil.copytree(golden / "llama_meta" / "mp1", tmp_path / "meta")
    (meta / "params.json").write_text(BOMBS["objects"])
    assert "deep" in run("convert", meta, tmp_path / "new", "--to", "qwen")[1]


HUGE = int("9" * 400)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("key", ["n_layer", "n_embd", "seq_length", "vocab_size", "rotary_emb_base", "surprise"])
def test_a_number_of_400_digits(folder, tmp_path, command, key):
    edit(folder / "config.json", **{key: HUGE})
    code, output = run(*command.format(folder, tmp_path / "new").split())
    assert code in (1, 3) and "config.json holds a whole number of 400 digits" in output


def test_a_number_of_10000_digits(tmp_path):
    (tmp_path / "a.json").write_text('{"a": ' + "1" * 10_000 + "}")
    with pytest.raises(CheckpointError, match="10,000 digits"):
        read_json(tmp_path / "a.json")


def test_such_a_number_in_an_index_and_in_headers(sharded, tmp_path):
    index = sharded / "model.safetensors.index.json"
    edit(index, metadata={"total_size": HUGE})
    assert "index.json holds a whole number of 400 digits" in run("inspect", sharded)[1]
    assert "index.json holds a whole number of 400 digits" in run("upgrade", sharded, tmp_path / "new")[1]
    edit(index, metadata={"total_size": 1})
    header = f'{{"a":{{"dtype":"F32","shape":[{HUGE}],"data_offsets":[0,4]}}}}'.encode()
    (sharded / "model-00001-of-00001.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    for command in COMMANDS:
        output = run(*command.format(sharded, tmp_path / "new").split())[1]
        assert "model-00001-of-00001.safetensors" in output and "number out of range" in output


def test_what_is_common_is_read(tmp_path):
    (tmp_path / "a.json").write_text('{"model_max_length": 1000000000000000019884624838656, "x": 1e400, "y": -5}')
    assert read_json(tmp_path / "a.json")["model_max_length"] == int(1e30)


# --- sizes that no model has ---


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("layers", [MOST_LAYERS + 1, 10**9, 10**30])
def test_layers_without_end(folder, tmp_path, command, layers):
    edit(folder / "config.json", n_layer=layers, num_hidden_layers=layers)
    code, output = run(*command.format(folder, tmp_path / "new").split())
    assert code in (1, 3) and "more than 10,000" in output


@pytest.mark.parametrize("case", ["llama_gqa", "qwen2_gqa_tied"])
def test_layers_without_end_in_other_architectures(golden, tmp_path, case):
    source = shutil.copytree(golden / "native" / case, tmp_path / "source")
    edit(source / "config.json", num_hidden_layers=10**9)
    for command in ("inspect {0}", "convert {0} {1} --to qwen", "verify {0} {0}", "push {0} me/model"):
        code, output = run(*command.format(source, tmp_path / "new").split())
        assert code in (1, 3) and "more than 10,000" in output


@pytest.mark.parametrize("key", ["n_layers", "dim", "n_heads", "n_kv_heads", "head_dim", "max_seq_len"])
def test_endless_sizes_in_params(golden, tmp_path, key):
    source = shutil.copytree(golden / "llama_meta" / "mp2", tmp_path / "source")
    edit(source / "params.json", **{key: 2**40})
    for command in ("inspect {0}", "convert {0} {1} --to qwen"):
        assert run(*command.format(source, tmp_path / "new").split())[0] in (1, 3)


@pytest.mark.parametrize("key", ["n_embd", "n_head", "kv_channels", "ffn_hidden_size", "vocab_size", "seq_length"])
def test_other_endless_sizes(folder, tmp_path, key):
    edit(folder / "config.json", **{key: 2**40})
    for command in COMMANDS[:2]:
        assert run(*command.format(folder, tmp_path / "new").split())[0] in (1, 3)


# --- files that the system doesn't open ---


FILES = ["config.json", "model.safetensors", "generation_config.json", "tokenizer_config.json", "qwen.tiktoken"]


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_may_not_be_read(folder, tmp_path, denied, name):
    denied(folder / name)
    for command in ("inspect {0}", "upgrade {0} {1}", "convert {0} {1} --to qwen2"):
        code, output = run(*command.format(folder, tmp_path / "new").split())
        assert code in (1, 3) and f"{name} may not be read (Permission denied)" in output, output
        assert "ownload it again" not in output and "damaged" not in output


def test_pickles_and_adapters_that_may_not_be_read(folder, adapter, denied):
    torch.save({"a": torch.zeros(1)}, folder / "pytorch_model.bin")
    denied(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="may not be read"):
        Weights([folder / "pytorch_model.bin"])
    denied(adapter / "adapter_config.json")
    with pytest.raises(CheckpointError, match="adapter_config.json may not be read"):
        open_adapter(adapter)


def test_a_broken_disk(folder, denied):
    denied(folder / "config.json", errno.EIO)
    with pytest.raises(CheckpointError, match=r"can't be read \(Input/output error\): look after its disk"):
        read_json(folder / "config.json")


@pytest.mark.parametrize("name", FILES)
def test_a_folder_in_the_place_of_a_file(folder, tmp_path, name):
    (folder / name).unlink()
    (folder / name).mkdir()
    for command in ("inspect {0}", "upgrade {0} {1}", "convert {0} {1} --to qwen2"):
        code, output = run(*command.format(folder, tmp_path / "new").split())
        assert code in (1, 3) and f"{name} is a folder, where a file is wanted" in output, output


def test_a_shard_and_an_adapter_that_are_folders(sharded, adapter, tmp_path):
    shard = sharded / "model-00001-of-00001.safetensors"
    shard.unlink()
    shard.mkdir()
    for command in ("inspect {0}", "upgrade {0} {1}"):
        assert "is a folder" in run(*command.format(sharded, tmp_path / "new").split())[1]
    (adapter / "adapter_model.safetensors").unlink()
    (adapter / "adapter_model.safetensors").mkdir()
    with pytest.raises(CheckpointError, match="is a folder"):
        open_adapter(adapter)


def test_text_that_is_none(tmp_path):
    (tmp_path / "a").write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match="damaged"):
        read_text(tmp_path / "a")


def test_devices_and_pipes_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="device or a pipe"):
        check_readable(tmp_path / "pipe")


def test_json_that_would_fill_the_memory(tmp_path):
    with open(tmp_path / "config.json", "wb") as file:
        file.truncate(2**40)
    with pytest.raises(CheckpointError, match="1099.5 GB"):
        read_json(tmp_path / "config.json")


# --- pointers of Git LFS ---


@pytest.mark.parametrize("name", [*FILES, "LICENSE", "chat_template.jinja"])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_pointer_in_the_place_of_a_file(folder, tmp_path, name, command):
    if command.startswith("verify") and name not in ("config.json", "model.safetensors"):
        return
    (folder / name).write_text(POINTER)
    code, output = run(*command.format(folder, tmp_path / "new").split())
    assert code in (1, 3) and "git lfs pull" in output and name in output, output
    assert "damaged" not in output and not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_an_adapter_that_is_a_pointer(folder, adapter, tmp_path, name):
    (adapter / name).write_text(POINTER)
    for command in (f"merge-lora {folder} {adapter} {tmp_path / 'new'}", f"inspect {adapter}"):
        code, output = run(*command.split())
        assert code in (1, 3) and "git lfs pull" in output and name in output


@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.json", "merges.txt"])
def test_a_tokenizer_of_qwen2_that_is_a_pointer(golden, tmp_path, name):
    source = shutil.copytree(golden / "native" / "qwen2_gqa_tied", tmp_path / "source")
    for other in ("vocab.json", "merges.txt"):
        (source / other).write_text("{}")
    (source / name).write_text(POINTER)
    code, output = run("convert", source, tmp_path / "new", "--to", "qwen")
    assert code == 1 and "git lfs pull" in output and name in output


def test_pickles_shards_and_params_that_are_pointers(folder, golden, tmp_path):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_text(POINTER)
    assert "git lfs pull" in run("upgrade", folder, tmp_path / "new")[1]
    meta = shutil.copytree(golden / "llama_meta" / "mp1", tmp_path / "meta")
    (meta / "consolidated.00.pth").write_text(POINTER)
    assert "git lfs pull" in run("convert", meta, tmp_path / "new", "--to", "qwen")[1]
    assert inspect(meta).problems


def test_pointers_that_are_not_needed_stop_nothing(folder, tmp_path):
    """As after git lfs pull --include "*.safetensors"."""
    (folder / "pytorch_model.bin").write_text(POINTER)
    assert run("upgrade", folder, tmp_path / "new")[0] == 0
