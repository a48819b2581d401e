"""Examples by the million: in memory, or in a file, of which memory holds nothing but where each of them ends."""

from __future__ import annotations

import os
import zlib
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .examples import IGNORED, Example

_WIDTH = 4  # bytes of a code
_BUFFER = 2**18  # bytes


class ExampleStore(Sequence[Example]):
    """Examples, written once and then read at any place.

    A token is a 32-bit number: its id, or the complement of it, which is below 0, where it has no loss.

    Args:
        path: of the file that holds the tokens; None for memory. It is read without being mapped, so that what was read
            isn't held, and opened anew by each process.

    Attributes:
        path: that of the file.
        learnt: tokens with a loss.
        checksum: of all tokens, in order.
    """

    def __init__(self, path: Path | None = None):
        self.path = path
        self.learnt = 0
        self.checksum = 0
        self._ends = array("q", [0])  # in tokens
        self._codes = array("i")
        self._file: Any = None if path is None else path.open("w+b", buffering=_BUFFER)
        self._owner = os.getpid()

    def append(self, example: Example) -> None:
        """Add an example, whose labels are its ids or `IGNORED`."""
        ids = np.asarray(example["input_ids"], dtype=np.int32)
        learnt = np.asarray(example["labels"]) != IGNORED
        codes = np.where(learnt, ids, ~ids).tobytes()
        self.learnt += int(learnt[1:].sum())  # nothing predicts the first one
        self.checksum = zlib.crc32(codes, self.checksum)
        self._ends.append(self._ends[-1] + len(ids))
        if self._file is None:
            self._codes.frombytes(codes)
        else:
            self._file.write(codes)

    def finish(self) -> None:
        """Make all that was appended readable."""
        if self._file is not None:
            self._file.flush()

    @property
    def tokens(self) -> int:
        return self._ends[-1]

    def lengths(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Tokens of the examples from `start` to `stop`, (count,)."""
        ends = np.frombuffer(self._ends, dtype=np.int64)[start : (len(self) if stop is None else stop) + 1]
        return np.diff(ends)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: Any) -> Any:
        """`input_ids` and `labels`, (length,) int32 each."""
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        place = range(len(self))[index]
        start, end = self._ends[place], self._ends[place + 1]
        codes = np.frombuffer(self._read(start, end), dtype=np.int32)
        learnt = codes >= 0
        ids = np.where(learnt, codes, ~codes)
        return {"input_ids": ids, "labels": np.where(learnt, ids, IGNORED)}

    def _read(self, start: int, end: int) -> bytes:
        if self.path is None:
            return self._codes[start:end].tobytes()
        if self._file is None or self._owner != os.getpid():  # a worker, which has a place in the file of its own
            self._file, self._owner = self.path.open("rb"), os.getpid()
        self._file.seek(start * _WIDTH)
        return self._file.read((end - start) * _WIDTH)

    def close(self) -> None:
        """Take the file away; nothing can be read then."""
        if self.path is not None:
            if self._file is not None:
                self._file.close()
            self.path.unlink(missing_ok=True)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | ({} if self.path is None else {"_file": None})


class Chosen(Sequence[Example]):
    """Some of the examples of a store, by their places in it."""

    def __init__(self, store: ExampleStore, places: array):
        self._store = store
        self._places = places

    def lengths(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """As those of the store."""
        return self._store.lengths()[np.frombuffer(self._places, dtype=np.int64)[start:stop]]

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: Any) -> Any:
        places = self._places[index]
        return [self._store[place] for place in places] if isinstance(index, slice) else self._store[places]
