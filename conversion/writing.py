"""Write a checkpoint so that it is there as a whole or not at all.

Everything is planned before the first byte is written: each file of the result is a `PlannedFile`. They are written
into a folder beside the target, `TARGET.partial`, which is renamed when all are there. A process that is killed leaves
that folder behind; the same command run again goes on with the files that are missing. Where the target exists already,
the plan is compared with it instead.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from filelock import FileLock, Timeout
from huggingface_hub import split_state_dict_into_shards_factory

from .errors import CheckpointError
from .files.access import check_readable
from .files.checksums import check_file, same_bytes
from .files.links import resolved
from .files.tensors import DTYPE_CODES, meta_tensors
from .files.weights import SAFETENSORS, Weights
from .formats.recipes import Recipe

JOB_FILE, LOCK_FILE = ".qwen1.job.json", ".qwen1.lock"
_SIZE = re.compile(r"(?=.*[1-9])\d+(\.\d+)? *[KMGT]B", re.IGNORECASE)
_PIECE = 2**16  # bytes; with larger writes Linux asks for larger runs of free memory, which can take its time
_SPARE = 2**20  # bytes of disk space for folders and the like


class Progress:
    """What is told of the work going on; this one keeps silent."""

    def begin(self, tensors: int, nbytes: int) -> None:
        """Work starts, over so many tensors and bytes of them."""

    def advance(self, name: str, nbytes: int, tensors: int = 1) -> None:
        """One more tensor is done, or a whole file of them."""

    def note(self, text: str) -> None:
        """Something that the user should know."""


# --- tensors ---


@dataclass(frozen=True)
class Output:
    """A tensor to write: its recipe, and what will come out of it."""

    recipe: Recipe
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def produce(self, weights: Weights) -> torch.Tensor:
        """Compute the tensor.

        Raises:
            CheckpointError: a damaged file, or a value that is not a finite number.
        """
        sources = [weights.read(name) for name in self.recipe.sources]
        tensor = self.recipe.build(*sources)
        result = tensor.to(self.dtype).contiguous()
        if not is_finite(result):
            cause = f"{self.dtype} is too narrow for its values: choose another --dtype"
            if not is_finite(tensor):
                cause = (
                    f"it is NaN or infinite in {', '.join(str(weights.infos[name]) for name in self.recipe.sources)}"
                )
            raise CheckpointError(f"{self.recipe.name!r} would not be finite: {cause}.")
        return result


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite; integers never are."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    if tensor.dtype.itemsize == 1:
        tensor = tensor.half()  # torch finds no extremes of float8
    return all(bool(extreme.isfinite()) for extreme in torch.aminmax(tensor))  # which pass NaN on


def plan_outputs(recipes: Sequence[Recipe], weights: Weights, dtype: torch.dtype | None) -> list[Output]:
    """Shapes and dtypes of what recipes will give, found by following them without values."""
    outputs = []
    for recipe in recipes:
        result = recipe.build(*meta_tensors(weights.infos, recipe.sources))
        converted = dtype if dtype is not None and result.is_floating_point() else result.dtype
        outputs.append(Output(recipe, converted, tuple(result.shape)))
    return outputs


def _ordered(outputs: Sequence[Output]) -> list[Output]:
    """Tensors of wide dtypes first, as the format demands for alignment."""
    return sorted(outputs, key=lambda output: -output.dtype.itemsize)


def safetensors_header(outputs: Sequence[Output]) -> bytes:
    """What a safetensors file of these tensors begins with."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for output in _ordered(outputs):
        end = position + output.nbytes
        code = DTYPE_CODES[output.dtype]
        header[output.recipe.name] = {"dtype": code, "shape": list(output.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_safetensors(file: BinaryIO, outputs: Sequence[Output], weights: Weights, progress: Progress) -> None:
    """Write a safetensors file a tensor at a time, so that only one is ever held; the library writes from memory only.

    Raises:
        CheckpointError: a damaged file, or a value that is not a finite number.
    """
    file.write(safetensors_header(outputs))
    for output in _ordered(outputs):
        _write_tensor(file, output.produce(weights))  # which no name here keeps alive while the next is read
        progress.advance(output.recipe.name, output.nbytes)
    weights.close()


def _write_tensor(file: BinaryIO, tensor: torch.Tensor) -> None:
    data = tensor.reshape(-1).view(torch.uint8).numpy().data
    for start in range(0, len(data), _PIECE):
        file.write(data[start : start + _PIECE])


# --- files ---


class _Different(Exception):
    pass


class _Comparison:
    """A file to write to that only compares with what another holds already."""

    def __init__(self, file: BinaryIO):
        self._file = file

    def write(self, data: Any) -> None:
        view = memoryview(data)
        if self._file.read(len(view)) != view:
            raise _Different


@dataclass(frozen=True)
class PlannedFile(ABC):
    """One file of the result; `name` is relative to its folder."""

    name: str

    @property
    def tensors(self) -> int:
        """Steps of progress that it takes. A file with any is worth keeping from an interrupted run; others are not."""
        return 0

    @property
    def kind(self) -> list[Any]:
        """What a later run must want as well to take over this file, as JSON; the source is known by other means."""
        return [self.nbytes]

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Its size in bytes."""

    @property
    def file_size(self) -> int:
        """The same with whatever the container adds."""
        return self.nbytes

    def disk_bytes(self, folder: Path) -> int:
        """Disk space that it will take in a folder."""
        return self.file_size

    @abstractmethod
    def write(self, path: Path, progress: Progress) -> None:
        """Write it under another name, which is then renamed."""

    @abstractmethod
    def equals(self, path: Path) -> bool:
        """Whether a file holds just what would be written."""


@dataclass(frozen=True)
class TextFile(PlannedFile):
    """Text, in UTF-8."""

    text: str

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return len(self.text.encode())

    def write(self, path: Path, progress: Progress) -> None:
        """Write it."""
        path.write_bytes(self.text.encode())

    def equals(self, path: Path) -> bool:
        """Whether a file holds this text."""
        return path.read_bytes() == self.text.encode()


def json_file(name: str, value: Mapping[str, Any]) -> TextFile:
    """A JSON object as a file, written as transformers writes them."""
    return TextFile(name, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@dataclass(frozen=True)
class CopiedFile(PlannedFile):
    """A file taken over as it is.

    Attributes:
        link: give the same data a second name, where the file system has such.
        weights: number of tensors in it; the checksums that are known of such a file are compared.

    Raises:
        CheckpointError: the file can't be read, or is a pointer of Git LFS.
    """

    source: Path
    link: bool = False
    weights: int = 0

    def __post_init__(self) -> None:
        check_readable(self.source)

    @property
    def tensors(self) -> int:
        """Their number."""
        return self.weights

    @property
    def kind(self) -> list[Any]:
        """Its size, and whether it is a link."""
        return [*super().kind, self.link]

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return self.source.stat().st_size

    def disk_bytes(self, folder: Path) -> int:
        """None if it can be linked."""
        linked = self.link and self.source.stat().st_dev == folder.stat().st_dev
        return 0 if linked else self.nbytes

    def write(self, path: Path, progress: Progress) -> None:
        """Link it, or copy it where that is impossible.

        Raises:
            CheckpointError: weights that a known checksum shows to be damaged.
        """
        if self.weights:
            check_file(self.source)
        if not (self.link and self._linked(path)):
            shutil.copyfile(self.source, path)
        if self.weights:
            progress.advance(self.name, self.nbytes, self.weights)

    def _linked(self, path: Path) -> bool:
        try:
            os.link(self.source.resolve(), path)
            return True
        except OSError:  # another file system, or one without links, where nobody reckoned with a copy
            _check_space(path.parent, self.nbytes)
            return False

    def equals(self, path: Path) -> bool:
        """Whether a file holds the same."""
        return same_bytes(self.source, path)


@dataclass(frozen=True)
class ShardFile(PlannedFile):
    """Tensors, converted on the way into a safetensors file."""

    outputs: tuple[Output, ...]
    weights: Weights

    @property
    def tensors(self) -> int:
        """Their number."""
        return len(self.outputs)

    @property
    def kind(self) -> list[Any]:
        """Name, dtype and shape of each tensor."""
        return [[output.recipe.name, str(output.dtype), list(output.shape)] for output in self.outputs]

    @property
    def nbytes(self) -> int:
        """Size of its tensors in bytes."""
        return sum(output.nbytes for output in self.outputs)

    @property
    def file_size(self) -> int:
        """The same with the header."""
        return len(safetensors_header(self.outputs)) + self.nbytes

    def write(self, path: Path, progress: Progress) -> None:
        """Convert and write tensor by tensor."""
        with open(path, "wb") as file:
            write_safetensors(file, self.outputs, self.weights, progress)

    def equals(self, path: Path) -> bool:
        """Whether a file holds just these tensors."""
        try:
            with open(path, "rb") as file:
                comparison: Any = _Comparison(file)
                write_safetensors(comparison, self.outputs, self.weights, Progress())
                return not file.read(1)
        except _Different:
            return False


def plan_shards(outputs: Sequence[Output], weights: Weights, max_shard_size: str) -> list[PlannedFile]:
    """Spread tensors over safetensors files of at most this size, in order, with an index where there are several.

    Args:
        max_shard_size: "5GB", "500MB"; a single tensor that is larger gets a file of its own.

    Raises:
        CheckpointError: not a size.
    """
    if not _SIZE.fullmatch(max_shard_size):
        raise CheckpointError(f"Shard size {max_shard_size!r} is not a size: write 5GB or 500MB.")
    by_name = {output.recipe.name: output for output in outputs}
    split = split_state_dict_into_shards_factory(
        by_name,
        get_storage_size=lambda output: output.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    files: list[PlannedFile] = [
        ShardFile(name, tuple(by_name[tensor] for tensor in tensors), weights)
        for name, tensors in split.filename_to_tensors.items()
    ]
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": dict(sorted(split.tensor_to_filename.items()))}
        files.append(json_file(f"{SAFETENSORS}.index.json", index))
    return files


# --- folders ---


def describe_files(paths: Sequence[Path]) -> list[list[Any]]:
    """Places, sizes and times of files, by which an interrupted job knows that its sources are still the same."""
    return [[str(path.resolve()), (stat := path.stat()).st_size, stat.st_mtime_ns] for path in paths]


def write_folder(target: Path, files: Sequence[PlannedFile], job: Mapping[str, Any], progress: Progress) -> bool:
    """Write all files into a new folder.

    Args:
        target: folder that doesn't exist, is empty, or holds the result already.
        files: what to write.
        job: all that the result depends on, as JSON; an interrupted job is taken up only if it is equal.

    Returns:
        False if the target held the result already, so that nothing was done.

    Raises:
        CheckpointError: the target holds something else, the disk is too full, or another process writes there.
    """
    target = resolved(target)
    partial = target.with_name(f"{target.name}.partial")
    if target.exists() and any(target.iterdir() if target.is_dir() else [target]):
        _check_equal(target, files)
        _finish(target)
        return False
    if os.path.ismount(target):  # which nothing can be renamed to
        raise CheckpointError(f"{target} is a mount point: name a folder in it.")
    target.parent.mkdir(parents=True, exist_ok=True)
    with work_folder(partial):
        write_files(partial, files, job, progress)
        if target.is_dir():
            target.rmdir()
        partial.replace(target)
    _finish(target)
    return True


def _finish(target: Path) -> None:
    """Take away what is left of the job once its folder has been renamed."""
    if (target / JOB_FILE).is_file():
        (target / LOCK_FILE).unlink(missing_ok=True)
        (target / JOB_FILE).unlink()


def _check_equal(target: Path, files: Sequence[PlannedFile]) -> None:
    if not target.is_dir():
        raise CheckpointError(f"{target} is a file: name a folder to write.")
    for file in files:
        path = target / file.name
        if not path.is_file() or not file.equals(path):
            state = "differs" if path.is_file() else "is missing"
            raise CheckpointError(
                f"{target} exists and holds something else ({file.name} {state}): remove it or name another folder."
            )


@contextmanager
def work_folder(folder: Path, *kept: str) -> Iterator[None]:
    """Make a folder for what is under way, or take up that of an interrupted run, and hold it against other processes.

    After an error it is removed, unless the checkpoint is fine and a later run can go on with weights that are
    complete, or with another file that the patterns `kept` match.

    Raises:
        CheckpointError: another process holds it, or nothing of this program made it.
    """
    with _locked(folder):
        try:
            yield
        except BaseException as error:
            useful = any(path for pattern in ("*.safetensors", *kept) for path in folder.glob(pattern))
            if isinstance(error, CheckpointError) or not useful:
                remove_work_folder(folder)
            raise


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    is_link = folder.is_symlink()  # to a folder that is to be emptied
    is_ours = not is_link and folder.is_dir() and ((folder / LOCK_FILE).exists() or not any(folder.iterdir()))
    if (is_link or folder.exists()) and not is_ours:
        raise CheckpointError(f"{folder} is in the way, and no interrupted job of this program left it: remove it.")
    folder.mkdir(exist_ok=True)
    lock = FileLock(folder / LOCK_FILE, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise CheckpointError(f"Another process is writing {folder}: wait for it, or end it.") from error
    try:
        yield
    finally:
        lock.release()
        if folder.is_dir():
            (folder / LOCK_FILE).touch()  # which some releases of filelock remove


def remove_work_folder(folder: Path) -> None:
    """Remove it; the lock goes last, so that one of which a part is left is still known as ours."""
    _empty(folder)
    (folder / LOCK_FILE).unlink(missing_ok=True)
    folder.rmdir()


def _empty(folder: Path, kept: Collection[str] = ()) -> None:
    for path in folder.iterdir():
        if path.name not in (LOCK_FILE, *kept):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def write_files(folder: Path, files: Sequence[PlannedFile], job: Mapping[str, Any], progress: Progress) -> None:
    """Write files into a work folder, but not the weights that an equal job has left there; all else goes.

    Raises:
        CheckpointError: a value that is not finite, or a damaged source.
        OSError: the disk is too full.
    """
    text = json.dumps(job, indent=2, sort_keys=True)
    record = folder / JOB_FILE
    if record.is_file() and record.read_bytes() == text.encode():
        progress.note(f"Going on with what an interrupted run left in {folder}.")
        _empty(folder, [JOB_FILE, *(file.name for file in files if file.tensors)])
    else:
        _empty(folder)
        replace_text(record, text)
    _write_missing(folder, files, progress)


def replace_text(path: Path, text: str) -> None:
    """Write a small file at once, under its name only when complete."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _write_missing(folder: Path, files: Sequence[PlannedFile], progress: Progress) -> None:
    missing = [file for file in files if not (file.tensors and _is_complete(folder / file.name, file))]
    _check_space(folder, sum(file.disk_bytes(folder) for file in missing))
    weights = [file for file in files if file.tensors]
    progress.begin(sum(file.tensors for file in weights), sum(file.nbytes for file in weights))
    for file in weights:
        if file not in missing:
            progress.advance(file.name, file.nbytes, file.tensors)
    for file in missing:
        path = folder / file.name
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.tmp")
        try:
            file.write(temporary, progress)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        temporary.replace(path)


def _is_complete(path: Path, file: PlannedFile) -> bool:
    """Whether a renamed file has its whole size, as after a loss of power it may not."""
    return path.is_file() and path.stat().st_size == file.file_size


def _check_space(folder: Path, wanted: int) -> None:
    free = shutil.disk_usage(folder).free
    if wanted + _SPARE > free:
        raise OSError(  # which leaves what an interrupted run wrote
            f"{wanted / 1e9:.2f} GB are needed in {folder.parent}, but only {free / 1e9:.2f} GB are free: free some "
            "space, or name a folder on another disk."
        )
