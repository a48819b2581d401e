"""The zip files of `torch.save` (`*.bin`, `*.pth`, `*.pt`): unpickled with `weights_only=True`, memory-mapped."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError
from .access import BLOCK, check_readable, damaged, refuse_gguf
from .tensors import TensorInfo

_PREFIXES = re.compile(r"^(_orig_mod\.|module\.)+")
_SUFFIXES = (".bin", ".ckpt", ".pt", ".pth")


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
        refuse_gguf(path)
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


def _refuse_others(path: Path) -> None:
    """Refuse a file that neither its name nor its first bytes make one of `torch.save`, of whatever release.

    Raises:
        CheckpointError: it is something else.
    """
    with open(path, "rb") as file:
        begins = file.read(2)
    if path.suffix not in _SUFFIXES and begins != b"PK" and begins[:1] != b"\x80":
        raise CheckpointError(f"{path} is no checkpoint, and no file of one: name the folder of a model.")


def _check_records(path: Path, tensors: bool) -> None:
    """Compare the checksums of the records in a zip file of `torch.save`, of tensors only if told to.

    Raises:
        CheckpointError: one differs, or the file is something else.
    """
    try:
        if not zipfile.is_zipfile(path):
            _refuse_others(path)
            raise CheckpointError(
                f"{path} is truncated, damaged, or older than torch 1.6: download it again, or load it with "
                "torch.load(..., weights_only=True) and save it anew."
            )
        with zipfile.ZipFile(path) as archive:
            _refuse_records(path, archive.infolist())
            for record in archive.infolist():
                if tensors or "/data/" not in record.filename:
                    with archive.open(record) as content:
                        while content.read(BLOCK):
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
