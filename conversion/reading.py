"""Weights on disk: their names, shapes and dtypes at a glance, their values one tensor at a time.

Containers: safetensors, and the zip files of `torch.save` (`*.bin`, `*.pth`, `*.pt`), which are unpickled with
`weights_only=True` and memory-mapped. Neither is ever held as a whole.
"""

from __future__ import annotations

import hashlib
import pickle
import re
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from .errors import CheckpointError
from .files import check_readable, damaged, is_present, read_json

SAFETENSORS = "model.safetensors"
PICKLE = "pytorch_model.bin"
MODEL_PARALLEL = re.compile(r"consolidated\.(\d\d)\.pth")

_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
DTYPE_CODES = {dtype: code for code, dtype in _DTYPES.items()}
"""torch dtype -> its name in a safetensors header."""

# Mapped pages count as resident memory until their files are let go, which is done before more bytes than these are.
_HELD_BYTES = 128 * 2**20
_BLOCK = 2**20


@dataclass(frozen=True)
class TensorInfo:
    """What a file says of one tensor; `same_as` is an earlier name of the file for the same memory."""

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    same_as: str | None = None

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    @property
    def memory(self) -> str:
        """The first name of the same memory."""
        return self.same_as or self.name

    def __str__(self) -> str:
        return f"{self.name!r} in {self.file}"


class SafetensorsFile:
    """One safetensors file.

    Raises:
        CheckpointError: the file is truncated or its header is damaged.
    """

    def __init__(self, path: Path):
        self.path = path
        check_readable(path)
        try:
            self._file: Any = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise damaged(path, error) from error

    def infos(self) -> list[TensorInfo]:
        """What the header says of each tensor."""
        infos = []
        for name in self._file.keys():
            entry = self._file.get_slice(name)
            code = entry.get_dtype()
            if code not in _DTYPES:
                raise CheckpointError(f"{name!r} in {self.path} has dtype {code}, which nothing here can convert.")
            infos.append(TensorInfo(name, self.path, _DTYPES[code], tuple(entry.get_shape())))
        return infos

    def tensor(self, name: str) -> torch.Tensor:
        """Values of one tensor."""
        return self._file.get_tensor(name)

    @staticmethod
    def check(path: Path) -> None:
        """The format has no checksum of its own."""


_PREFIXES = re.compile(r"^(_orig_mod\.|module\.)+")


def bare_name(name: str) -> str:
    """Name of a tensor without what compiled and wrapped modules (DDP, DeepSpeed) put before it."""
    return _PREFIXES.sub("", name)


class PickleFile:
    """One file of `torch.save` that holds tensors by name, memory-mapped; `extras` are other plain values beside them.

    A training checkpoint keeps its tensors under "model" (or "state_dict", "model_state_dict", "module"), and compiled
    or wrapped modules put a prefix before each name; both are seen through here, but not by transformers.

    Attributes:
        disguise: what is seen through, as a part of a sentence; None for a bare state dict.

    Raises:
        CheckpointError: the file is truncated, or holds anything but tensors, plain values and containers.
    """

    _WRAPPERS = ("model", "state_dict", "model_state_dict", "module")

    def __init__(self, path: Path):
        self.path = path
        check_readable(path)
        _check_records(path, tensors=False)  # a damaged pickle can say anything
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except pickle.UnpicklingError as error:
            raise CheckpointError(
                f"{path} is refused: it pickles more than tensors ({_culprit(error)}), which could run code. Save the "
                "bare state dict, or use safetensors."
            ) from error
        except Exception as error:  # nor is it known what a strange pickle raises
            raise damaged(path, error) from error
        self.disguise: str | None = None
        self.extras, self._tensors = self._unwrap(loaded)

    def _unwrap(self, loaded: Any) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        extras: dict[str, Any] = {}
        wrapper = None
        if isinstance(loaded, dict):
            wrapper = next((key for key in self._WRAPPERS if isinstance(loaded.get(key), dict)), None)
            if wrapper is not None:
                self.disguise = f"keeps its tensors under {wrapper!r}"
                extras = {key: value for key, value in loaded.items() if key != wrapper}
                loaded = loaded[wrapper]
        if not isinstance(loaded, dict):
            raise CheckpointError(f"{self.path} holds a {type(loaded).__name__}, not tensors by name.")
        tensors: dict[str, torch.Tensor] = {}
        for key, value in loaded.items():
            if not isinstance(key, str):
                raise CheckpointError(f"{key!r} in {self.path} is no name of a tensor.")
            if not _is_plain(value):
                raise CheckpointError(f"{key!r} in {self.path} names no dense tensor, but a {_description(value)}.")
            name = bare_name(key)
            if name != key and wrapper is None:
                self.disguise = f"has {key.removesuffix(name)!r} before its names"
            if name in tensors:
                raise CheckpointError(f"{name!r} is twice in {self.path}, with and without prefix: delete one of them.")
            tensors[name] = value.detach()
        return extras, tensors

    def infos(self) -> list[TensorInfo]:
        """Name, dtype and shape of each tensor, in the order of the file."""
        seen: dict[tuple, str] = {}
        infos = []
        for name, tensor in self._tensors.items():
            first = seen.setdefault((tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype), name)
            same_as = first if first != name and tensor.numel() else None
            infos.append(TensorInfo(name, self.path, tensor.dtype, tuple(tensor.shape), same_as))
        return infos

    def tensor(self, name: str) -> torch.Tensor:
        """Values of one tensor."""
        return self._tensors[name]

    @staticmethod
    def check(path: Path) -> None:
        """Compare the checksum of every record in the zip file.

        Raises:
            CheckpointError: one differs.
        """
        _check_records(path, tensors=True)


def _check_records(path: Path, tensors: bool) -> None:
    """Compare the checksums of the records in a zip file of `torch.save`, of tensors only if told to.

    Raises:
        CheckpointError: one differs, or the file is something else.
    """
    try:
        if not zipfile.is_zipfile(path):
            raise CheckpointError(
                f"{path} is truncated, damaged, or older than torch 1.6: download it again, or load it with "
                "torch.load(..., weights_only=True) and save it anew."
            )
        with zipfile.ZipFile(path) as archive:
            _refuse_records(path, archive.infolist())
            for record in archive.infolist():
                if tensors or "/data/" not in record.filename:
                    with archive.open(record) as content:
                        while content.read(_BLOCK):
                            pass
    except CheckpointError:
        raise
    except Exception as error:  # zipfile raises whatever a damaged field leads to
        raise damaged(path, error) from error


def _refuse_records(path: Path, records: Sequence[zipfile.ZipInfo]) -> None:
    for record in records:
        if record.filename.endswith("/constants.pkl"):
            raise CheckpointError(f"{path} is refused: it is a TorchScript program. Save its state dict.")
    for record in records:
        if record.compress_type != zipfile.ZIP_STORED:  # its bytes would be mapped as they are
            raise CheckpointError(
                f"{record.filename!r} in {path} is compressed: load it with torch.load(..., weights_only=True) and "
                "save it anew."
            )


def _culprit(error: pickle.UnpicklingError) -> str:
    """What a pickle asked for in vain; the rest of torch's message is advice on how to allow it."""
    text = str(error)
    found = re.search(r"GLOBAL ([\w.]+)", text) or re.search(r"WeightsUnpickler error: ([^\n]+)", text)
    return found[1] if found else text.partition("\n")[0]


def _is_plain(value: Any) -> bool:
    if not isinstance(value, torch.Tensor):
        return False
    return value.layout == torch.strided and value.device.type == "cpu" and not value.is_quantized


def _description(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return type(value).__name__
    return f"tensor of {value.dtype}, {value.layout}, on {value.device}"


def _container(path: Path) -> type[SafetensorsFile] | type[PickleFile]:
    return SafetensorsFile if path.suffix == ".safetensors" else PickleFile


def known_checksum(path: Path) -> tuple[str, str] | None:
    """(hash algorithm, hex digest) that the origin published for a file, where a record of it is at hand.

    Such records are the blob that a file of the Hub's cache points to, the metadata that `hf download --local-dir`
    leaves behind (unless the file was written later), `SHA256SUMS`, and LLaMA's `checklist.chk`.
    """
    blob = path.resolve().name
    if path.is_symlink() and re.fullmatch(r"[0-9a-f]{64}", blob):
        return "sha256", blob
    record = path.parent / ".cache" / "huggingface" / "download" / f"{path.name}.metadata"
    if record.is_file():
        found = re.fullmatch(r"\S+\s+([0-9a-f]{64})\s+(\d+(?:\.\d+)?)\s*", record.read_text(errors="replace"))
        if found and path.stat().st_mtime <= float(found[2]) + 1:
            return "sha256", found[1]
    for algorithm, listing in (("sha256", "SHA256SUMS"), ("md5", "checklist.chk")):
        if (path.parent / listing).is_file():
            for line in (path.parent / listing).read_text(errors="replace").splitlines():
                digest, _, name = line.partition(" ")
                if name.strip().removeprefix("*").removeprefix("./") == path.name:
                    return algorithm, digest.lower()
    return None


def check_file(path: Path) -> None:
    """Read a whole file and compare the checksums that are known for it.

    Raises:
        CheckpointError: one differs; the message names the file.
    """
    _container(path).check(path)
    known = known_checksum(path)
    if known is not None:
        digest = hashlib.new(known[0])
        with open(path, "rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
        found = digest.hexdigest()
        if found != known[1]:
            raise CheckpointError(
                f"{path} is damaged: its {known[0]} is {found}, published was {known[1]}. Download it again."
            )


class Weights:
    """The tensors of a checkpoint, over all its files.

    Attributes:
        infos: name -> what is known of the tensor. In LLaMA's original format each model-parallel file holds a part of
            most tensors; there a name begins with the number of the file, "00/norm.weight".
        files: where they are.
        extras: plain values stored beside the tensors of a training checkpoint.
        disguises: file -> what hides its tensors from transformers, see `PickleFile`.
    """

    def __init__(self, files: Iterable[Path], numbered: bool = False):
        self.files = list(files)
        self.infos: dict[str, TensorInfo] = {}
        self.extras: dict[str, Any] = {}
        self.disguises: dict[Path, str] = {}
        self._stored: dict[str, str] = {}
        self._checked: set[Path] = set()
        self._open: dict[Path, SafetensorsFile | PickleFile] = {}
        self._held = 0
        for number, path in enumerate(self.files):
            container = _container(path)(path)
            prefix = f"{number:02d}/" if numbered else ""
            for info in container.infos():
                self._add(prefix, info)
            if isinstance(container, PickleFile):
                self.extras |= container.extras
                if container.disguise is not None:
                    self.disguises[path] = container.disguise

    def _add(self, prefix: str, info: TensorInfo) -> None:
        name = prefix + info.name
        if name in self.infos:
            raise CheckpointError(f"{info} is in {self.infos[name].file.name} as well: delete the file that is stale.")
        self._stored[name] = info.name
        same_as = None if info.same_as is None else prefix + info.same_as
        self.infos[name] = replace(info, name=name, same_as=same_as)

    def read(self, name: str) -> torch.Tensor:
        """Values of one tensor, mapped from its file, whose checksums are compared before the first tensor is read.

        Raises:
            CheckpointError: the file is damaged.
        """
        info = self.infos[name]
        if info.file not in self._checked:
            check_file(info.file)
            self._checked.add(info.file)
        if self._held + info.nbytes > _HELD_BYTES:
            self.close()
        if info.file not in self._open:
            self._open[info.file] = _container(info.file)(info.file)
        self._held += info.nbytes
        try:
            return self._open[info.file].tensor(self._stored[name])
        except (SafetensorError, OSError, RuntimeError, KeyError) as error:
            raise damaged(info.file, error) from error

    def close(self) -> None:
        """Let go of all files."""
        self._open, self._held = {}, 0

    @property
    def nbytes(self) -> int:
        """Size of all tensors in bytes, each memory counted once."""
        return sum(info.nbytes for info in self.infos.values() if info.same_as is None)

    @property
    def dtypes(self) -> dict[torch.dtype, int]:
        """dtype -> number of parameters, most first."""
        counts: dict[torch.dtype, int] = {}
        for info in self.infos.values():
            if info.same_as is None:
                counts[info.dtype] = counts.get(info.dtype, 0) + torch.Size(info.shape).numel()
        return dict(sorted(counts.items(), key=lambda item: -item[1]))


def read_index(index: Path) -> tuple[dict[str, str], Any]:
    """The map of an index from tensors to file names, and what it says of their size in bytes.

    Names are those that files are read with: bare for pickles.

    Raises:
        CheckpointError: no map, or a name that is not that of a file in the same folder.
    """
    content = read_json(index)
    listed = content.get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise CheckpointError(f"{index} has no 'weight_map'. Download it again.")
    for tensor, name in listed.items():
        if not isinstance(name, str) or not re.fullmatch(r"(?!\.)[^/\\:\0]+", name):
            raise CheckpointError(f"{index} places {tensor!r} in {name!r}, which is not a file of the same folder.")
    if index.name.startswith(PICKLE):
        listed = {bare_name(tensor): name for tensor, name in listed.items()}
    metadata = content.get("metadata")
    return listed, metadata.get("total_size") if isinstance(metadata, dict) else None


def _open_indexed(index: Path) -> Weights:
    listed = read_index(index)[0]
    files = [index.parent / name for name in sorted(set(listed.values()))]
    for path in files:
        if not is_present(path):
            raise CheckpointError(f"{path} doesn't exist, but {index.name} names it. Download it.")
    weights = Weights(files)
    for name, file in listed.items():
        if name not in weights.infos:
            raise CheckpointError(f"{name!r} is missing: {index} places it in {file}, which doesn't have it.")
    for name, info in weights.infos.items():
        if listed.get(name) != info.file.name:
            raise CheckpointError(f"{info} isn't there according to {index.name}: delete the file that is stale.")
    return weights


def _model_parallel_files(folder: Path) -> list[Path]:
    numbers = sorted(match[1] for file in folder.iterdir() if (match := MODEL_PARALLEL.fullmatch(file.name)))
    for expected, number in enumerate(numbers):
        if int(number) != expected:
            raise CheckpointError(f"consolidated.{expected:02d}.pth is missing in {folder}. Download it.")
    return [folder / f"consolidated.{number}.pth" for number in numbers]


def open_weights(path: Path) -> Weights:
    """Find the weights of a folder, or open a single file; safetensors come before pickles, as in transformers.

    Raises:
        CheckpointError: none are there, or they contradict their index; see also the containers.
    """
    if not path.is_dir():
        weights = Weights([path])
        return Weights([path], numbered=True) if "tok_embeddings.weight" in weights.infos else weights
    for name in (SAFETENSORS, PICKLE):
        index = path / f"{name}.index.json"
        if is_present(index):
            weights = _open_indexed(index)
            if (path / name).is_file() and path / name not in weights.files:
                raise CheckpointError(
                    f"{name} and {index.name} in {path} are two versions of the weights: delete the one that is stale."
                )
            return weights
        if is_present(path / name):
            return Weights([path / name])
    if parts := _model_parallel_files(path):
        return Weights(parts, numbered=True)
    raise CheckpointError(
        f"No weights in {path}: looked for {SAFETENSORS}, {PICKLE} (or their .index.json) and consolidated.00.pth."
    )


def same_bytes(first: Path, second: Path) -> bool:
    """Whether two files hold the same."""
    if first.stat().st_size != second.stat().st_size:
        return False
    if first.samefile(second):
        return True
    with open(first, "rb") as a, open(second, "rb") as b:
        while block := a.read(_BLOCK):
            if block != b.read(_BLOCK):
                return False
    return True


def meta_tensors(infos: Mapping[str, TensorInfo], names: Iterable[str]) -> list[torch.Tensor]:
    """Tensors without values, of the shapes and dtypes that files announce."""
    return [torch.empty(infos[name].shape, dtype=infos[name].dtype, device="meta") for name in names]
