"""Files of a result: safetensors written a tensor at a time, shards, folders that are there as a whole or not."""

import errno
import json
import os
import shutil
import weakref
from collections import namedtuple
from functools import partial
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from qwen1 import QWenLMHeadModel
from qwen1.conversion.errors import CheckpointError
from qwen1.conversion.files.tensors import DTYPE_CODES, is_finite
from qwen1.conversion.files.weights import Weights
from qwen1.conversion.formats.recipes import Recipe, concatenate, keep, take_rows
from qwen1.conversion.planning.companions import json_file
from qwen1.conversion.planning.weights import plan_outputs, plan_shards
from qwen1.conversion.writing.files import CopiedFile, ShardFile, TextFile
from qwen1.conversion.writing.folders import describe_files, write_folder
from qwen1.conversion.writing.progress import Progress
from qwen1.conversion.writing.tensors import write_safetensors
from qwen1.conversion.writing.work_folder import JOB_FILE, LOCK_FILE

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e5m2]
SHARD = "1KB"


class Interruption(Progress):
    """Raises an error when so many steps are done, or half-way through the last of them."""

    def __init__(self, steps, error=KeyboardInterrupt):
        self.steps, self.error = steps, error

    def advance(self, name, nbytes, tensors=1):
        self.steps -= tensors
        if self.steps < 0:
            raise self.error


class Counter(Progress):
    """Keeps what it is told."""

    def __init__(self):
        self.total, self.done, self.notes = None, [0, 0], []

    def begin(self, tensors, nbytes):
        self.total = [tensors, nbytes]

    def advance(self, name, nbytes, tensors=1):
        self.done = [self.done[0] + tensors, self.done[1] + nbytes]

    def note(self, text):
        self.notes.append(text)


@pytest.fixture
def opened(tmp_path):
    """Write tensors into a file and open it: (tensors by name, file name) -> weights."""

    def save(tensors, name="source.safetensors"):
        path = tmp_path / "source" / name
        path.parent.mkdir(exist_ok=True)
        path.unlink(missing_ok=True)
        save_file(tensors, path, metadata={"format": "pt"})
        return Weights([path])

    return save


@pytest.fixture
def target(tmp_path):
    return tmp_path / "target"


@pytest.fixture
def weights(opened):
    """Six tensors of 500 bytes, of which two go into a shard."""
    return opened(numbered())


@pytest.fixture
def write(target):
    """Write six tensors and some text: (weights, text, files, progress) -> what write_folder returns."""

    def run(weights, text="text", files=(), progress=None):
        planned = [*plan(weights, text), *files]
        return write_folder(target, planned, job(weights), progress or Progress())

    return run


@pytest.fixture
def interrupted(write, weights, target):
    """What a run leaves that ended in the third of three shards."""
    with pytest.raises(KeyboardInterrupt):
        write(weights, progress=Interruption(4))
    assert not target.exists()
    return partial_of(target)


@pytest.fixture
def disk(monkeypatch):
    """Say how many bytes are free."""

    def set_free(free):
        usage = namedtuple("usage", "total used free")(2**50, 2**50 - free, free)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)

    return set_free


def numbered(offset=0):
    return {f"tensor.{i}": torch.arange(125, dtype=torch.float32) + i + offset for i in range(6)}


def mixed():
    """A tensor of every dtype, and of odd shapes: without dimensions, without entries, of three bytes."""
    torch.manual_seed(0)
    tensors = {str(dtype): (100 * torch.randn(3, 5)).to(dtype) for dtype in DTYPE_CODES}
    odd = {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 4), "bytes": torch.arange(3, dtype=torch.uint8)}
    return {**odd, **tensors}


def kept(weights, dtype=None):
    return plan_outputs([Recipe(name, (name,), keep) for name in weights.infos], weights, dtype)


def plan(weights, text="text"):
    shards = plan_shards(kept(weights), weights, SHARD)
    return [*shards, json_file("config.json", {"text": text}), TextFile("notes/read.txt", text)]


def job(weights):
    return {"source": describe_files(weights.files)}


def write_file(path, outputs, weights, progress=None):
    with open(path, "wb") as file:
        write_safetensors(file, outputs, weights, progress or Progress())
    return path


def header_of(path):
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return length, json.loads(data[8 : 8 + length])


def identical(first, second):
    """Equal to the bit, in names, shapes and dtypes."""
    return first.keys() == second.keys() and all(
        tensor.dtype == second[name].dtype
        and tensor.shape == second[name].shape
        and torch.equal(tensor.reshape(-1).view(torch.uint8), second[name].reshape(-1).view(torch.uint8))
        for name, tensor in first.items()
    )


def partial_of(target):
    return target.with_name(f"{target.name}.partial")


def state(folder):
    """Content, inode and time of each file."""
    return {
        path.relative_to(folder).as_posix(): (path.read_bytes(), path.stat().st_ino, path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def shards_in(folder):
    return {name: entry for name, entry in state(folder).items() if name.endswith(".safetensors")}


def refusal(run, *arguments, **options):
    with pytest.raises(CheckpointError) as error:
        run(*arguments, **options)
    return str(error.value)


# --- a safetensors file ---


def test_a_file_loads_as_one_that_the_safetensors_library_wrote(opened, tmp_path):
    tensors = mixed()
    weights = opened(tensors)
    ours = write_file(tmp_path / "ours.safetensors", kept(weights), weights)
    save_file(tensors, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    assert identical(load_file(ours), load_file(tmp_path / "theirs.safetensors"))
    assert ours.stat().st_size == (tmp_path / "theirs.safetensors").stat().st_size
    with safe_open(ours, "pt") as file, safe_open(tmp_path / "theirs.safetensors", "pt") as theirs:
        assert file.metadata() == theirs.metadata() == {"format": "pt"}


def test_every_tensor_begins_at_a_multiple_of_its_entry_size(opened, tmp_path):
    tensors = mixed()
    weights = opened(tensors)
    length, header = header_of(write_file(tmp_path / "file", kept(weights), weights))
    assert length % 8 == 0
    for name, tensor in tensors.items():
        assert header[name]["data_offsets"][0] % tensor.dtype.itemsize == 0


def test_tensors_that_recipes_turn_cut_and_join_are_written_in_order(opened, tmp_path):
    tensors = {"a": torch.arange(24.0).view(4, 6), "b": torch.ones(2, 6)}
    weights = opened(tensors)
    recipes = [
        Recipe("turned", ("a",), torch.t),
        Recipe("cut", ("a",), partial(take_rows, start=1, stop=3)),
        Recipe("columns", ("a",), lambda tensor: tensor[:, ::2]),
        Recipe("repeated", ("a",), lambda tensor: tensor[:1].expand(3, 6)),
        Recipe("joined", ("a", "b"), concatenate),
        Recipe("fresh", (), partial(torch.zeros, (2, 2), dtype=torch.float16)),
    ]
    loaded = load_file(write_file(tmp_path / "file", plan_outputs(recipes, weights, None), weights))
    assert loaded.keys() == {recipe.name for recipe in recipes}
    for recipe in recipes:
        expected = recipe.build(*(tensors[name] for name in recipe.sources))
        assert loaded[recipe.name].dtype == expected.dtype and torch.equal(loaded[recipe.name], expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_floats_are_rounded_to_the_dtype_asked_for_and_nothing_else_is(opened, tmp_path, dtype):
    tensors = mixed()
    weights = opened(tensors)
    loaded = load_file(write_file(tmp_path / "file", kept(weights, dtype), weights))
    rounded = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    assert identical(loaded, rounded)


def test_only_one_tensor_is_held_at_a_time(opened, tmp_path):
    weights = opened({f"tensor.{i}": torch.randn(64, 64) for i in range(8)})
    read, alive = weights.read, []

    def read_alone(name):
        assert [ref for ref in alive if ref() is not None] == []
        tensor = read(name)
        alive.append(weakref.ref(tensor))
        return tensor

    weights.read = read_alone
    for dtype in (None, torch.float16):
        write_file(tmp_path / "file", kept(weights, dtype), weights)
    assert len(alive) == 16


# --- values that are no numbers ---


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", FLOATS)
def test_nan_and_infinity_are_errors_that_name_tensor_and_file(opened, tmp_path, dtype, value):
    tensor = torch.ones(4, 4)
    tensor[2, 1] = value
    weights = opened({"fine": torch.ones(3), "broken.weight": tensor.to(dtype)})
    message = refusal(write_file, tmp_path / "file", kept(weights), weights)
    assert "'broken.weight'" in message and "source.safetensors" in message and "NaN or infinite" in message


@pytest.mark.parametrize("value", [65536.0, -1e30])
def test_values_that_a_narrower_dtype_cannot_hold_are_an_error_that_names_it(opened, tmp_path, value):
    weights = opened({"large.weight": torch.tensor([1.0, value])})
    message = refusal(write_file, tmp_path / "file", kept(weights, torch.float16), weights)
    assert "'large.weight'" in message and "torch.float16 is too narrow" in message and "--dtype" in message
    write_file(tmp_path / "file", kept(weights, torch.bfloat16), weights)


def test_every_ordinary_value_is_finite():
    assert all(is_finite(tensor) for tensor in mixed().values())
    assert is_finite(torch.tensor([torch.finfo(torch.float16).max], dtype=torch.float16))


# --- shards ---


@pytest.mark.parametrize("size", ["20KB", "0.1 MB", "5gb"])
def test_transformers_loads_the_shards_and_writes_the_same(tmp_path, tiny_model, size):
    model = tiny_model()
    model.save_pretrained(tmp_path / "theirs", max_shard_size=size.replace(" ", "").upper())
    model.save_pretrained(tmp_path / "whole")
    weights = Weights([tmp_path / "whole" / "model.safetensors"])
    outputs = plan_outputs([Recipe(name, (name,), keep) for name in model.state_dict()], weights, None)
    files = [*plan_shards(outputs, weights, size), CopiedFile("config.json", tmp_path / "whole" / "config.json")]
    assert write_folder(tmp_path / "ours", files, {}, Progress())
    loaded, info = QWenLMHeadModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert identical(loaded.state_dict(), model.state_dict())
    ours, theirs = (shards_in(tmp_path / name) for name in ("ours", "theirs"))
    assert len(ours) > 1 or size == "5gb"
    assert ours.keys() == theirs.keys()
    assert all(identical(load_file(tmp_path / "ours" / name), load_file(tmp_path / "theirs" / name)) for name in ours)


def test_the_index_is_that_of_transformers(tmp_path, tiny_model):
    model = tiny_model()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    theirs = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    weights = Weights(sorted(tmp_path.glob("*.safetensors")))
    outputs = plan_outputs([Recipe(name, (name,), keep) for name in model.state_dict()], weights, None)
    ours = json.loads(plan_shards(outputs, weights, "20KB")[-1].text)
    assert ours["weight_map"] == theirs["weight_map"]
    assert ours["metadata"]["total_size"] == theirs["metadata"]["total_size"] == weights.nbytes


def test_shards_are_no_larger_than_asked_for_except_with_a_single_tensor(opened):
    weights = opened({**numbered(), "large": torch.zeros(1000)})
    shards = [file for file in plan_shards(kept(weights), weights, SHARD) if isinstance(file, ShardFile)]
    assert sorted((shard.tensors, shard.nbytes) for shard in shards) == [(1, 4000)] + [(2, 1000)] * 3
    assert sorted(output.recipe.name for shard in shards for output in shard.outputs) == sorted(weights.infos)


@pytest.mark.parametrize(
    "size", ["", "5", "GB", "5GiB", "five GB", "-5GB", "0GB", "0.0MB", "nanGB", "infGB", "1e999GB"]
)
def test_what_is_no_size_is_refused(weights, size):
    assert repr(size) in refusal(plan_shards, kept(weights), weights, size)


# --- files taken over ---


def test_a_linked_file_shares_its_data_with_the_source(weights, tmp_path):
    file = CopiedFile("model.safetensors", weights.files[0], link=True, weights=1)
    assert file.disk_bytes(tmp_path) == 0
    file.write(tmp_path / "linked", Progress())
    assert (tmp_path / "linked").samefile(weights.files[0])


def test_a_link_to_a_link_shares_its_data_too(weights, tmp_path):
    (tmp_path / "link.safetensors").symlink_to(weights.files[0])
    CopiedFile("model.safetensors", tmp_path / "link.safetensors", link=True, weights=1).write(
        tmp_path / "linked", Progress()
    )
    assert not (tmp_path / "linked").is_symlink() and (tmp_path / "linked").samefile(weights.files[0])


def test_a_file_on_another_file_system_is_copied(weights, tmp_path, monkeypatch):
    def refuse(*arguments, **options):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    file = CopiedFile("model.safetensors", weights.files[0], link=True, weights=1)
    progress = Counter()
    file.write(tmp_path / "copied", progress)
    assert not (tmp_path / "copied").samefile(weights.files[0]) and file.equals(tmp_path / "copied")
    assert progress.done == [1, file.nbytes]


def test_a_copy_that_was_to_be_a_link_needs_free_space_as_well(weights, tmp_path, monkeypatch, disk):
    """On a file system without links, which doesn't show before the first."""

    def refuse(*arguments, **options):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    disk(100)
    file = CopiedFile("model.safetensors", weights.files[0], link=True, weights=1)
    with pytest.raises(OSError, match="are needed"):
        file.write(tmp_path / "copied", Progress())
    assert not (tmp_path / "copied").exists()


def test_without_links_files_are_copied(weights, tmp_path):
    file = CopiedFile("model.safetensors", weights.files[0], weights=1)
    assert file.disk_bytes(tmp_path) == file.nbytes == weights.files[0].stat().st_size
    file.write(tmp_path / "copied", Progress())
    assert not (tmp_path / "copied").samefile(weights.files[0]) and file.equals(tmp_path / "copied")


# --- a new folder ---


@pytest.mark.parametrize("existing", [False, True])
def test_a_folder_holds_what_was_planned_and_nothing_else(write, weights, tmp_path, existing):
    if existing:
        (tmp_path / "target").mkdir()
    assert write(weights, files=[CopiedFile("taken.bin", weights.files[0])]) is True
    target = tmp_path / "target"
    planned = [*plan(weights), CopiedFile("taken.bin", weights.files[0])]
    assert set(state(target)) == {file.name for file in planned} and len(planned) == 7
    assert all(file.equals(target / file.name) for file in planned)
    assert identical({k: v for name in shards_in(target) for k, v in load_file(target / name).items()}, numbered())
    assert (target / "notes" / "read.txt").read_text() == "text"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "target"]


def test_folders_above_the_target_are_made(weights, tmp_path):
    assert write_folder(tmp_path / "a" / "b" / "c", plan(weights), job(weights), Progress())
    assert shards_in(tmp_path / "a" / "b" / "c") and list((tmp_path / "a" / "b").iterdir()) == [tmp_path / "a/b/c"]


@pytest.mark.parametrize("spelling", [".", "../new", "sub/.."])
def test_the_target_may_be_the_empty_folder_that_one_is_in(weights, tmp_path, monkeypatch, spelling):
    folder = tmp_path / "new"
    (folder / "sub").mkdir(parents=True)
    monkeypatch.chdir(folder)
    if spelling != "sub/..":
        (folder / "sub").rmdir()
        assert write_folder(Path(spelling), plan(weights), job(weights), Progress())
        assert shards_in(folder) and sorted(path.name for path in tmp_path.iterdir()) == ["new", "source"]
    else:
        assert "holds something else" in refusal(write_folder, Path(spelling), plan(weights), job(weights), Progress())


@pytest.mark.parametrize("existing", [False, True])
def test_the_target_may_be_a_link_to_a_folder_elsewhere(weights, tmp_path, target, existing):
    (tmp_path / "disk").mkdir()
    if existing:
        (tmp_path / "disk" / "model").mkdir()
    target.symlink_to(tmp_path / "disk" / "model")
    assert write_folder(target, plan(weights), job(weights), Progress())
    assert target.is_symlink() and shards_in(tmp_path / "disk" / "model")
    assert list((tmp_path / "disk").iterdir()) == [tmp_path / "disk" / "model"]


def test_progress_ends_at_all_tensors_and_all_bytes(write, weights, interrupted):
    progress = Counter()
    copied = CopiedFile("more.safetensors", weights.files[0], weights=1)
    linked = CopiedFile("link.safetensors", weights.files[0], link=True, weights=1)
    write(weights, files=[copied, linked], progress=progress)
    assert progress.total == progress.done == [8, 6 * 500 + 2 * copied.nbytes]


# --- a folder that is there already ---


def test_an_equal_folder_is_left_as_it_is(write, weights, target):
    assert write(weights) is True
    before = state(target)
    assert write(weights) is False
    assert state(target) == before


@pytest.mark.parametrize("name", ["config.json", "notes/read.txt", "model-00002-of-00003.safetensors"])
@pytest.mark.parametrize("change", ["one byte", "shorter", "longer", "missing"])
def test_a_folder_that_differs_is_refused_and_left_as_it_is(write, weights, target, name, change):
    write(weights)
    data = (target / name).read_bytes()
    changed = {"one byte": data[:-1] + bytes([data[-1] ^ 1]), "shorter": data[:-1], "longer": data + b" "}
    (target / name).unlink() if change == "missing" else (target / name).write_bytes(changed[change])
    before = state(target)
    message = refusal(write, weights)
    assert name in message and str(target) in message
    assert state(target) == before and not partial_of(target).exists()


def test_somebody_elses_folder_keeps_its_hidden_files(write, weights, target):
    target.mkdir()
    for name in (JOB_FILE, LOCK_FILE, "thesis.txt"):
        (target / name).write_text("mine")
    before = state(target)
    assert "holds something else" in refusal(write, weights)
    assert state(target) == before


def test_a_folder_with_other_weights_is_refused(write, weights, opened, target):
    write(weights)
    before = state(target)
    other = {**numbered(), "tensor.3": numbered()["tensor.3"].clone()}
    other["tensor.3"][17] += 1e-3
    assert "model-00002-of-00003.safetensors differs" in refusal(write, opened(other))
    assert state(target) == before


def test_a_copy_that_differs_is_refused(write, weights, target, tmp_path):
    (tmp_path / "extra.bin").write_bytes(b"first")
    write(weights, files=[CopiedFile("extra.bin", tmp_path / "extra.bin")])
    (tmp_path / "extra.bin").write_bytes(b"other")
    assert "extra.bin differs" in refusal(write, weights, files=[CopiedFile("extra.bin", tmp_path / "extra.bin")])


def test_a_file_in_the_place_of_the_target_is_refused_and_kept(write, weights, target):
    target.write_text("mine")
    assert "is a file" in refusal(write, weights)
    assert target.read_text() == "mine" and not partial_of(target).exists()


def test_somebody_elses_folder_of_that_name_is_refused_and_kept(write, weights, target):
    partial_of(target).mkdir()
    for name in ("thesis.txt", ".lock"):
        (partial_of(target) / name).write_text("mine")
    before = state(partial_of(target))
    assert "in the way" in refusal(write, weights)
    assert state(partial_of(target)) == before and not target.exists()


def test_a_file_of_that_name_is_refused_and_kept(write, weights, target):
    partial_of(target).write_text("mine")
    assert "in the way" in refusal(write, weights)
    assert partial_of(target).read_text() == "mine" and not target.exists()


def test_an_empty_folder_of_that_name_is_used(write, weights, target):
    """A run that is killed at once leaves such a one."""
    partial_of(target).mkdir()
    assert write(weights) and not partial_of(target).exists()


# --- going on with what was interrupted ---


def test_an_interrupted_run_leaves_complete_shards_and_nothing_half_written(interrupted):
    assert set(state(interrupted)) - {LOCK_FILE} == {
        JOB_FILE,
        "model-00001-of-00003.safetensors",
        "model-00002-of-00003.safetensors",
    }


def test_the_same_run_goes_on_with_complete_shards(interrupted, write, weights, target):
    before, progress = shards_in(interrupted), Counter()
    assert write(weights, progress=progress)
    after = shards_in(target)
    assert len(before) == 2 and all(after[name] == entry for name, entry in before.items())
    assert all(file.equals(target / file.name) for file in plan(weights))
    assert set(state(target)) == {file.name for file in plan(weights)} and not interrupted.exists()
    assert any("Going on" in note for note in progress.notes)


def test_what_was_taken_over_is_not_taken_over_again(weights, target):
    """Neither links nor copies, which take longest."""
    files = [CopiedFile(f"{i}.safetensors", weights.files[0], link=i == 1, weights=1) for i in range(3)]
    with pytest.raises(KeyboardInterrupt):
        write_folder(target, files, job(weights), Interruption(2))
    before = shards_in(partial_of(target))
    write_folder(target, files, job(weights), Progress())
    assert len(before) == 2 and all(shards_in(target)[name] == entry for name, entry in before.items())


@pytest.mark.parametrize("change", ["content", "time"])
def test_shards_of_a_source_that_changed_are_not_mixed_in(interrupted, write, weights, opened, target, change):
    times = weights.files[0].stat()
    changed = numbered(1000) if change == "content" else numbered()
    weights = opened(changed)
    seconds = 0 if change == "content" else 10**9
    os.utime(weights.files[0], ns=(times.st_atime_ns, times.st_mtime_ns + 1 + seconds))
    before, progress = shards_in(interrupted), Counter()
    assert write(weights, progress=progress) and progress.notes == []
    assert identical({k: v for name in shards_in(target) for k, v in load_file(target / name).items()}, changed)
    assert all(shards_in(target)[name][1:] != entry[1:] for name, entry in before.items())


def test_shards_of_another_source_of_the_same_size_and_time_are_not_mixed_in(interrupted, write, weights, target):
    times = weights.files[0].stat()
    other = weights.files[0].parent.parent / "other" / weights.files[0].name
    other.parent.mkdir()
    save_file(numbered(1000), other, metadata={"format": "pt"})
    os.utime(other, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert write(Weights([other]))
    loaded = {k: v for name in shards_in(target) for k, v in load_file(target / name).items()}
    assert identical(loaded, numbered(1000))


def test_text_of_an_interrupted_run_is_written_anew(interrupted, write, weights, target):
    (interrupted / "config.json").write_text("{}")
    assert write(weights, text="other")
    assert json.loads((target / "config.json").read_text()) == {"text": "other"}
    assert (target / "notes" / "read.txt").read_text() == "other"


def test_what_is_no_longer_planned_goes(interrupted, write, weights, target):
    """A template of the first run, say, in whose place the second takes that of the tokenizer's settings."""
    (interrupted / "chat_template.jinja").write_text("template")
    (interrupted / "notes").mkdir()
    (interrupted / "notes" / "old.txt").write_text("old")
    (interrupted / "model-00003-of-00003.safetensors.tmp").write_bytes(b"half")
    assert write(weights)
    assert set(state(target)) == {file.name for file in plan(weights)}


def test_a_damaged_record_of_the_job_means_a_fresh_start(interrupted, write, weights, target):
    (interrupted / JOB_FILE).write_bytes(b'{"source": \xff')
    before = shards_in(interrupted)
    assert write(weights)
    assert all(shards_in(target)[name][1:] != entry[1:] for name, entry in before.items())


def test_releases_of_filelock_that_remove_the_lock_do_no_harm(write, weights, target, monkeypatch):
    def release_and_remove(lock, release=FileLock.release):
        release(lock)
        Path(lock.lock_file).unlink(missing_ok=True)

    monkeypatch.setattr(FileLock, "release", release_and_remove)
    with pytest.raises(KeyboardInterrupt):
        write(weights, progress=Interruption(4))
    before = shards_in(partial_of(target))
    assert len(before) == 2 and write(weights)
    assert all(shards_in(target)[name] == entry for name, entry in before.items())


@pytest.mark.parametrize("left", [[JOB_FILE], [JOB_FILE, LOCK_FILE]])
def test_a_run_that_was_killed_after_the_last_step_is_finished(write, weights, target, left):
    write(weights)
    before = state(target)
    for name in left:
        (target / name).write_text(json.dumps(job(weights)))
    assert write(weights) is False
    assert state(target) == before


# --- errors ---


@pytest.mark.parametrize("steps", [0, 3, 5])
def test_an_error_in_the_weights_leaves_nothing(write, weights, target, tmp_path, steps):
    with pytest.raises(CheckpointError, match="broken"):
        write(weights, progress=Interruption(steps, CheckpointError("broken")))
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_nan_in_the_last_tensor_leaves_nothing(opened, write, tmp_path):
    tensors = numbered()
    tensors["tensor.5"][100] = float("nan")
    assert "'tensor.5'" in refusal(write, opened(tensors))
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_an_error_of_the_system_leaves_complete_shards_and_nothing_half_written(write, weights, target):
    with pytest.raises(OSError, match="No space left"):
        write(weights, progress=Interruption(3, OSError(errno.ENOSPC, "No space left on device")))
    assert set(state(partial_of(target))) - {LOCK_FILE} == {JOB_FILE, "model-00001-of-00003.safetensors"}
    assert write(weights)


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt])
def test_an_error_before_the_first_shard_is_complete_leaves_nothing(write, weights, target, tmp_path, error):
    with pytest.raises(type(error) if isinstance(error, OSError) else error):
        write(weights, progress=Interruption(1, error))
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


# --- a full disk ---


def test_a_full_disk_is_noticed_before_anything_is_written(write, weights, tmp_path, disk):
    disk(2**20 + 1000)
    progress = Counter()
    with pytest.raises(OSError, match=r"[\d.,]+ kB are needed in .*, but only 1\.0 MB are free"):
        write(weights, progress=progress)
    assert [path.name for path in tmp_path.iterdir()] == ["source"] and progress.total is None


def test_a_full_disk_leaves_what_an_interrupted_run_wrote(interrupted, write, weights, target, disk, monkeypatch):
    before = shards_in(interrupted)
    disk(2**20)
    with pytest.raises(OSError, match="are needed"):
        write(weights)
    assert shards_in(interrupted) == before and not target.exists()
    monkeypatch.undo()
    assert write(weights)
    assert all(shards_in(target)[name] == entry for name, entry in before.items())


def test_only_what_is_missing_needs_space(interrupted, write, weights, disk):
    disk(2**20 + 2000)  # a shard of 1 KB and the texts, but not three shards
    assert write(weights)


def test_links_need_no_space(weights, target, opened, disk):
    large = opened({"large": torch.zeros(10**5)}, "large.safetensors")
    disk(2**20 + 10**5)
    copied = CopiedFile("model.safetensors", large.files[0], weights=1)
    with pytest.raises(OSError, match="are needed"):
        write_folder(target, [copied], {}, Progress())
    assert write_folder(target, [CopiedFile("model.safetensors", large.files[0], link=True, weights=1)], {}, Progress())


# --- two processes ---


def test_a_folder_that_another_process_writes_is_refused_and_left_alone(interrupted, write, weights, target):
    with FileLock(interrupted / LOCK_FILE):
        before = state(interrupted)
        assert "Another process" in refusal(write, weights)
        after = state(interrupted)
        assert not before.pop(LOCK_FILE)[0] and not after.pop(LOCK_FILE)[0]  # some releases of filelock touch it
        assert after == before and not target.exists()
    assert write(weights)
