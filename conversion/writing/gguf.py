"""A GGUF to write: what it begins with, then its tensors one at a time.

Source: the package `gguf`, which writes what stands before the tensors and quantises. Its own writer of tensors can
write to a new file only, and here a file is also compared with one that is there.
"""

from __future__ import annotations

import hashlib
import struct
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ..errors import CheckpointError
from ..files.weights import Weights
from ..formats.gguf import BLOCK, BLOCK_BYTES, Encoding, gguf_package
from .files import PlannedFile, holds
from .progress import Progress
from .tensors import Output, write_tensor

_ALIGNMENT = 32  # bytes, of the place of each tensor
_MOST = 127 * torch.finfo(torch.float16).max  # that a block of q8_0, whose scale is of float16, can hold
_AT_ONCE = 2**22  # values that are quantised together


def _padding(nbytes: int) -> bytes:
    return bytes(-nbytes % _ALIGNMENT)


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of a GGUF: how it comes about, and how its values are stored.

    Attributes:
        output: under the name that it has there; of the dtype to store, or of any floating one where it is quantised.
    """

    output: Output
    encoding: Encoding

    @property
    def nbytes(self) -> int:
        """Size in bytes, without what aligns the next."""
        if self.encoding is Encoding.Q8_0:
            return torch.Size(self.output.shape).numel() // BLOCK * BLOCK_BYTES
        return self.output.nbytes

    def tell(self, writer: Any) -> None:
        """Tell a `gguf.GGUFWriter` its name, shape and encoding; the values follow what it writes."""
        kind: Any = gguf_package().GGMLQuantizationType[self.encoding.name]
        writer.add_tensor_info(self.output.recipe.name, self.output.shape, None, self.nbytes, raw_dtype=kind)

    def write(self, file: BinaryIO, weights: Weights) -> None:
        """Compute it and write its bytes.

        Raises:
            CheckpointError: a damaged file, or values that can't be stored so.
        """
        tensor = self.output.produce(weights)
        for part in self._quantised(tensor) if self.encoding is Encoding.Q8_0 else [tensor]:
            write_tensor(file, part)

    def _quantised(self, tensor: torch.Tensor) -> Iterator[torch.Tensor]:
        quants: Any = gguf_package().quants
        for rows in tensor.split(max(1, _AT_ONCE // tensor.shape[-1])):
            values = rows.float()
            if (most := float(values.abs().max())) > _MOST:
                raise CheckpointError(
                    f"{self.output.recipe.name!r} has values up to {most:.3g}, and q8_0 holds none beyond {_MOST:.3g}: "
                    "choose --outtype bf16."
                )
            yield torch.from_numpy(quants.quantize(values.numpy(), quants.GGMLQuantizationType.Q8_0))


@dataclass(frozen=True)
class GgufFile(PlannedFile):
    """A GGUF.

    Attributes:
        header: all that stands before the tensors.
        parts: the tensors, in their order.
    """

    header: bytes
    parts: tuple[GgufTensor, ...]
    weights: Weights

    @property
    def tensors(self) -> int:
        """Their number."""
        return len(self.parts)

    @property
    def kind(self) -> list[Any]:
        """What stands before the tensors, which tells their names, shapes and encodings, by its checksum."""
        return [hashlib.sha256(self.header).hexdigest()]

    @property
    def nbytes(self) -> int:
        """Size of its tensors in bytes."""
        return sum(part.nbytes for part in self.parts)

    @property
    def file_size(self) -> int:
        """The same with what stands before them and between them."""
        return sum(size + len(_padding(size)) for size in (len(self.header), *(part.nbytes for part in self.parts)))

    def write(self, path: Path, progress: Progress) -> None:
        """Convert and write tensor by tensor."""
        with open(path, "wb") as file:
            self._write(file, progress)

    def equals(self, path: Path) -> bool:
        """Whether a file is just this one."""
        return path.stat().st_size == self.file_size and holds(path, lambda file: self._write(file, Progress()))

    def _write(self, file: BinaryIO, progress: Progress) -> None:
        file.write(self.header + _padding(len(self.header)))
        for part in self.parts:
            part.write(file, self.weights)
            file.write(_padding(part.nbytes))
            progress.advance(part.output.recipe.name, part.nbytes)
        self.weights.close()


def gguf_header(writer: Any) -> bytes:
    """What a GGUF begins with: all that a `gguf.GGUFWriter` was told of the model, its tokenizer and its tensors.

    Raises:
        CheckpointError: it was told something that a GGUF can't hold.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "header.gguf"
        try:
            writer.write_header_to_file(path)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
        except (struct.error, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(
                f"A GGUF can't hold what README.md or generation_config.json say of the model ({error}): mend them."
            ) from error
        finally:
            writer.close()
        return path.read_bytes()
