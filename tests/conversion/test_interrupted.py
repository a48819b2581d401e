"""Runs that are killed: at changes of the file system, after tensors, and from outside at any time.

`QWEN_EVERY_KILL=1 pytest -m slow tests/conversion/test_interrupted.py` kills at every change and tensor, which takes
minutes; without it at every third to eleventh.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import traceback
from contextlib import contextmanager
from itertools import count

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen1.conversion.command_line.upgrade import upgrade_in_place
from qwen1.conversion.errors import CheckpointError
from qwen1.conversion.formats.qwen import qwen_shapes, read_qwen
from qwen1.conversion.opening.sources import MOVES_FILE, WORK_FOLDER, open_source
from qwen1.conversion.planning.conversion import plan_conversion
from qwen1.conversion.planning.upgrade import plan_upgrade
from qwen1.conversion.writing.plans import write_plan
from qwen1.conversion.writing.progress import Progress
from qwen1.conversion.writing.work_folder import JOB_FILE, LOCK_FILE

pytestmark = pytest.mark.slow

SHARD = "6KB"
CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link"}
"""Audit events that come before a change of the file system."""
MARKS = {LOCK_FILE, JOB_FILE}
"""What a complete target may hold besides until the next run takes it away."""

EVERY = bool(os.environ.get("QWEN_EVERY_KILL"))

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forks of this process")


class Bomb(Progress):
    """Kills this process at its n-th step: before a change of the file system, with a file just opened, after a tensor.

    What Python has not written yet is lost then.
    """

    def __init__(self, steps):
        self.steps = steps
        sys.addaudithook(self.audit)

    def audit(self, event, arguments):
        if event == "open":
            path, _, flags = arguments
            writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if writes and not str(path).endswith(".pyc"):
                self.step(lambda: os.open(path, flags, 0o600))
        elif event in CHANGES:
            self.step()

    def advance(self, name, nbytes, tensors=1):
        self.step()

    def step(self, begin=lambda: None):
        self.steps -= 1
        if self.steps == -1:
            begin()  # an audit event again
            os.kill(os.getpid(), signal.SIGKILL)


def killed(run, steps):
    """Run in a fork of this process that kills itself after so many steps; False if it came to its end before."""
    child = os.fork()
    if not child:
        try:
            run(Bomb(steps))
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.waitstatus_to_exitcode(status) == 0
    return False


@contextmanager
def paused(run):
    """Run in a fork that waits when half of its tensors are done, until the function that this yields is called."""
    (ready, say_ready), (wait, say_go_on) = os.pipe(), os.pipe()

    class Pause(Progress):
        left = 6

        def advance(self, name, nbytes, tensors=1):
            self.left -= 1
            if not self.left:
                os.write(say_ready, b".")
                os.read(wait, 1)

    child = os.fork()
    if not child:
        try:
            run(Pause())
            os._exit(0)
        finally:
            os._exit(1)

    def go_on():
        os.write(say_go_on, b".")
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    os.read(ready, 1)
    try:
        yield go_on
    finally:
        for end in (ready, say_ready, wait, say_go_on):
            os.close(end)


def release_of_2023(folder, vocabulary, width=16, layers=1, suffix=".bin", shards=3, nan_in=None, seed=0):
    """A folder as released in 2023-08, with random weights."""
    config = dict(
        model_type="qwen",
        vocab_size=464,
        n_embd=width,
        n_layer=layers,
        n_head=2,
        kv_channels=8,
        ffn_hidden_size=2 * width,
        seq_length=32,
        n_positions=64,
        eos_token_id=256,
        tie_word_embeddings=False,
        auto_map={"AutoConfig": "configuration_qwen.QWenConfig"},
    )
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"chat_format": "chatml", "eos_token_id": 256}))
    for name in ("modeling_qwen.py", "configuration_qwen.py", "cpp_kernels.py"):
        (folder / name).write_text("raise ImportError('code of 2023')\n")
    (folder / "LICENSE").write_text("licence")
    (folder / "assets").mkdir()
    (folder / "assets" / "logo.png").write_bytes(b"\x89PNG")
    shutil.copy(vocabulary, folder)
    torch.manual_seed(seed)
    tensors = {name: torch.randn(shape) for name, shape in qwen_shapes(read_qwen(config)).items()}
    if nan_in is not None:
        tensors[nan_in][-1] = torch.nan
    save_shards(folder, tensors, suffix, shards)
    return folder


def save_shards(folder, tensors, suffix, count):
    stem, save = ("pytorch_model", torch.save) if suffix == ".bin" else ("model", save_file)
    placed = {name: f"{stem}-{1 + i % count:05d}-of-{count:05d}{suffix}" for i, name in enumerate(tensors)}
    for file in set(placed.values()):
        save({name: tensor for name, tensor in tensors.items() if placed[name] == file}, folder / file)
    (folder / f"{stem}{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))


@pytest.fixture(scope="module")
def pickled(tmp_path_factory, byte_vocabulary):
    return release_of_2023(tmp_path_factory.mktemp("pickled") / "source", byte_vocabulary)


@pytest.fixture(scope="module")
def safe(tmp_path_factory, byte_vocabulary):
    return release_of_2023(tmp_path_factory.mktemp("safe") / "source", byte_vocabulary, suffix=".safetensors")


def run_upgrade(source, target, progress, **options):
    origin = open_source(source)
    return write_plan(plan_upgrade(origin, SHARD, **options), target, progress)


def run_copy(source, target, progress):
    return run_upgrade(source, target, progress, link=False)


def run_convert(source, target, progress, dtype=None):
    origin = open_source(source)
    return write_plan(plan_conversion(origin, "qwen2", dtype, SHARD), target, progress)


def contents(folder):
    """Content of each file, and that empty folders are there."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
        if path.is_file() or not any(path.iterdir())
    }


def shards_in(folder):
    """Inode and time of each complete safetensors file."""
    files = folder.glob("*.safetensors") if folder.is_dir() else ()
    return {file.name: (file.stat().st_ino, file.stat().st_mtime_ns) for file in files}


def partial_of(target):
    return target.with_name(f"{target.name}.partial")


def refused(run, *arguments):
    with pytest.raises(CheckpointError) as error:
        run(*arguments)
    return str(error.value)


def contents_after_upgrade(folder):
    """What is in a folder after an upgrade in place, which leaves nothing to do."""
    upgrade_in_place(folder, SHARD, Progress())
    found = contents(folder)
    assert upgrade_in_place(folder, SHARD, Progress())[1] == [] and contents(folder) == found
    return found


def lost(before, folder):
    """Names of files whose content is neither under that name nor under that of a backup."""
    found = contents(folder)
    return [name for name, content in before.items() if content not in (found.get(name), found.get(f"{name}.bak"))]


def complete(target, whole):
    """Whether a target is there; if it is, it must be whole."""
    if target.exists():
        found = contents(target)
        assert {name: found[name] for name in found if name not in MARKS} == whole
    return target.exists()


# --- into a new folder ---


@needs_fork
@pytest.mark.parametrize(
    "release, run, stride", [("pickled", run_upgrade, 3), ("safe", run_upgrade, 5), ("pickled", run_convert, 4)]
)
@pytest.mark.no_cover
def test_wherever_a_run_is_killed_the_next_one_finishes_it(request, tmp_path, release, run, stride):
    source = request.getfixturevalue(release)
    run(source, tmp_path / "whole", Progress())
    before, whole, reused = contents(source), contents(tmp_path / "whole"), set()
    for step in count(0, 1 if EVERY else stride):
        target = tmp_path / str(step) / "target"
        was_killed = killed(lambda progress, target=target: run(source, target, progress), step)
        assert contents(source) == before
        was_complete, left = complete(target, whole), shards_in(partial_of(target))
        assert run(source, target, Progress()) is not was_complete
        assert contents(target) == whole and contents(source) == before
        assert [path.name for path in target.parent.iterdir()] == ["target"]
        assert left.items() <= shards_in(target).items()
        reused.add(len(left))
        if not was_killed:
            break
    assert step > 40 and was_complete
    assert reused == set(range(len(shards_in(target)) + 1))


@needs_fork
@pytest.mark.parametrize("run", [run_upgrade, run_convert])
@pytest.mark.no_cover
def test_a_run_that_is_killed_again_and_again_gets_on(pickled, tmp_path, run):
    """Each kill comes a little later than the one before, in the same folder."""
    run(pickled, tmp_path / "whole", Progress())
    before, whole, target = contents(pickled), contents(tmp_path / "whole"), tmp_path / "new" / "target"
    left = {}
    for step in count(1, 4):
        was_killed = killed(lambda progress: run(pickled, target, progress), step)
        now = shards_in(target if complete(target, whole) else partial_of(target))
        assert left.items() <= now.items()
        left = now
        if not was_killed:
            break
    assert contents(target) == whole and contents(pickled) == before and step > 20
    assert [path.name for path in target.parent.iterdir()] == ["target"]


@needs_fork
def test_a_run_that_is_killed_while_it_cleans_up_after_an_error_is_cleaned_up_by_the_next(tmp_path, byte_vocabulary):
    source = release_of_2023(tmp_path / "source", byte_vocabulary, nan_in="transformer.ln_f.weight")
    for step in count(0, 2):
        target = tmp_path / str(step) / "target"
        if not killed(lambda progress, target=target: refused(run_upgrade, source, target, progress), step):
            break
        assert "'transformer.ln_f.weight'" in refused(run_upgrade, source, target, Progress())
        assert list(target.parent.iterdir()) == []
    assert step > 20 and list(target.parent.iterdir()) == []


# --- in place ---


@needs_fork
@pytest.mark.parametrize("release, strides", [("pickled", (7, 3)), ("safe", (11, 5))])
@pytest.mark.no_cover
def test_wherever_an_upgrade_in_place_is_killed_no_byte_is_lost_and_the_next_finishes_it(
    request, tmp_path, release, strides
):
    """Strides of steps while new files are written, as into a new folder, and of those around their moving."""
    source = request.getfixturevalue(release)
    before = contents(source)
    whole = contents_after_upgrade(shutil.copytree(source, tmp_path / "whole"))
    step = moving = 0
    writing, around_moving = (1, 1) if EVERY else strides
    was_killed, stride = True, writing
    while was_killed:
        folder = shutil.copytree(source, tmp_path / str(step))
        was_killed = killed(lambda progress, folder=folder: upgrade_in_place(folder, SHARD, progress), step)
        assert lost(before, folder) == []
        left = {**shards_in(folder), **shards_in(folder / WORK_FOLDER)}
        if (folder / WORK_FOLDER / "generation_config.json").is_file():
            stride = around_moving
        if (folder / WORK_FOLDER / MOVES_FILE).is_file():
            moving += 1
            assert "upgrade --in-place again" in refused(run_upgrade, folder, tmp_path / "elsewhere", Progress())
        upgrade_in_place(folder, SHARD, Progress())
        assert contents(folder) == whole and left.items() <= shards_in(folder).items()
        step += stride
    assert step > 50 and moving > 20 / stride
    assert contents_after_upgrade(folder) == whole


@needs_fork
@pytest.mark.no_cover
def test_an_upgrade_in_place_that_is_killed_again_and_again_gets_on(pickled, tmp_path):
    before = contents(pickled)
    whole = contents_after_upgrade(shutil.copytree(pickled, tmp_path / "whole"))
    folder = shutil.copytree(pickled, tmp_path / "folder")
    left = {}
    for step in count(1, 4):
        was_killed = killed(lambda progress: upgrade_in_place(folder, SHARD, progress), step)
        now = {**shards_in(folder), **shards_in(folder / WORK_FOLDER)}
        assert lost(before, folder) == [] and left.items() <= now.items()
        left = now
        if not was_killed:
            break
    assert contents(folder) == whole and step > 20


# --- from outside ---


@needs_fork
@pytest.mark.parametrize("in_place", [False, True])
def test_a_kill_from_outside_at_any_time_does_no_harm(pickled, tmp_path, in_place):
    before, expected = contents(pickled), None
    for number in range(5):
        folder = shutil.copytree(pickled, tmp_path / f"source-{number}")
        target = tmp_path / f"target-{number}"

        def run(folder=folder, target=target):
            return upgrade_in_place(folder, SHARD, Progress()) if in_place else run_upgrade(folder, target, Progress())

        child = os.fork()
        if not child:
            try:
                run()
            finally:
                os._exit(0)
        time.sleep(random.random() * 0.06)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert lost(before, folder) == [] and (in_place or contents(folder) == before)
        run()
        result = contents(folder if in_place else target)
        assert result == (expected or result) and "model.safetensors.index.json" in result
        expected = result


@pytest.mark.no_cover
def test_the_program_itself_can_be_killed_and_started_again(repository, tmp_path, byte_vocabulary):
    source = release_of_2023(tmp_path / "source", byte_vocabulary, width=64, layers=40)
    before, target = contents(source), tmp_path / "target"
    command = [sys.executable, repository / "convert_checkpoint.py", "upgrade", source, target]
    process = subprocess.Popen([*map(str, command), "--max-shard-size", SHARD], stderr=subprocess.DEVNULL)
    while process.poll() is None and len(shards_in(partial_of(target))) < 20:
        time.sleep(0.001)
    time.sleep(random.random() * 0.02)
    process.kill()
    assert process.wait() == -signal.SIGKILL and not target.exists() and contents(source) == before
    left = shards_in(partial_of(target))
    assert len(left) >= 20
    assert run_upgrade(source, target, Progress()) and contents(source) == before
    assert left.items() < shards_in(target).items()
    run_upgrade(source, tmp_path / "whole", Progress())
    assert contents(target) == contents(tmp_path / "whole")


# --- two processes ---


@needs_fork
@pytest.mark.parametrize("in_place", [False, True])
def test_two_processes_do_not_get_in_each_others_way(pickled, tmp_path, in_place):
    folder, target = shutil.copytree(pickled, tmp_path / "source"), tmp_path / "target"

    def run(progress):
        return upgrade_in_place(folder, SHARD, progress) if in_place else run_upgrade(folder, target, progress)

    with paused(run) as go_on:
        work = folder / WORK_FOLDER if in_place else partial_of(target)
        seen = contents(work)
        assert "Another process" in refused(run, Progress())
        assert contents(work) == seen and shards_in(work)
        assert go_on() == 0
    assert contents(folder if in_place else target).keys() >= {"modeling_qwen.py", "model.safetensors.index.json"}
    assert not run(Progress())[1] if in_place else run(Progress()) is False


# --- other requests ---


@needs_fork
@pytest.mark.parametrize("run", [run_upgrade, run_convert])
def test_shards_of_weights_that_changed_are_not_mixed_in(pickled, tmp_path, byte_vocabulary, run):
    source, target = shutil.copytree(pickled, tmp_path / "source"), tmp_path / "target"
    assert killed(lambda progress: run(source, target, progress), 24)
    left = shards_in(partial_of(target))
    other = release_of_2023(tmp_path / "other", byte_vocabulary, seed=1)
    for file in other.glob("*.bin"):
        shutil.copyfile(file, source / file.name)
    run(source, target, Progress())
    run(other, tmp_path / "whole", Progress())
    assert left and left.items().isdisjoint(shards_in(target).items())
    assert contents(target) == contents(tmp_path / "whole")


@needs_fork
def test_shards_of_another_dtype_are_not_mixed_in(pickled, tmp_path):
    target = tmp_path / "target"
    run_convert(pickled, tmp_path / "whole", Progress(), torch.bfloat16)
    assert killed(lambda progress: run_convert(pickled, target, progress, torch.float16), 24)
    left = shards_in(partial_of(target))
    run_convert(pickled, target, Progress(), torch.bfloat16)
    assert left and left.items().isdisjoint(shards_in(target).items())
    assert contents(target) == contents(tmp_path / "whole")
    loaded = [load_file(file) for file in target.glob("*.safetensors")]
    assert {tensor.dtype for tensors in loaded for tensor in tensors.values()} == {torch.bfloat16}


@needs_fork
def test_links_of_an_interrupted_run_do_not_become_copies(safe, tmp_path):
    target = tmp_path / "target"
    assert killed(lambda progress: run_upgrade(safe, target, progress), 14)
    assert shards_in(partial_of(target)).items() & shards_in(safe).items()
    run_upgrade(safe, target, Progress(), link=False)
    assert len(shards_in(target)) == 3 and shards_in(target).items().isdisjoint(shards_in(safe).items())


@needs_fork
@pytest.mark.parametrize("size", ["5GB", "8KB"])
def test_shards_of_another_size_are_not_mixed_in(pickled, tmp_path, size):
    assert killed(lambda progress: run_upgrade(pickled, tmp_path / "target", progress), 24)
    assert shards_in(partial_of(tmp_path / "target"))
    for target in ("target", "whole"):
        origin = open_source(pickled)
        assert write_plan(plan_upgrade(origin, size), tmp_path / target, Progress())
    assert contents(tmp_path / "target") == contents(tmp_path / "whole")


@needs_fork
@pytest.mark.no_cover
def test_settings_that_changed_after_a_kill_are_those_of_the_second_run(pickled, tmp_path):
    """The weights are still the same, so they are kept; a template and a licence are gone, the vocabulary is new."""
    source = shutil.copytree(pickled, tmp_path / "source")
    for step in count(60, 2):
        target = tmp_path / str(step) / "target"
        assert killed(lambda progress, target=target: run_upgrade(source, target, progress), step)
        if {"LICENSE", "chat_template.jinja"} <= contents(partial_of(target)).keys():
            break
    left = shards_in(partial_of(target))
    (source / "LICENSE").unlink()
    (source / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    (source / "generation_config.json").write_text(json.dumps({"chat_format": "raw", "eos_token_id": 256}))
    run_upgrade(source, target, Progress())
    run_upgrade(source, tmp_path / "whole", Progress())
    assert contents(target) == contents(tmp_path / "whole") and left == shards_in(target)
    assert not {"LICENSE", "chat_template.jinja"} & contents(target).keys()
