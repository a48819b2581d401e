"""Rows of several files, each file with a weight of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import TrainerCallback, TrainingArguments

from .examples import Example
from .packing import ExampleDataset, PackedDataset, lengths_of, pack, pack_lengths
from .sources import Part, counted

_ROUNDING = 1e-6  # of the epoch that the trainer counts in steps


def make_rows(
    examples: Sequence[Example], parts: Sequence[Part], *, packing: bool, max_length: int, seed: int
) -> ExampleDataset | PackedDataset | WeightedRows:
    """Rows of one example each or, with `packing`, of several; of parts with weights, only of one and the same part.

    Raises:
        ValueError: an example is longer than `max_length`, and they are to be packed.
    """
    weighted = any(part.weight != 1 for part in parts)
    if not packing:
        rows = ExampleDataset(examples)
        return WeightedRows(rows, parts, seed) if weighted else rows
    if not weighted:
        return PackedDataset(examples, pack(examples, max_length, seed))
    packed: list[list[int]] = []
    counts, first, lengths = [], 0, lengths_of(examples)
    for part in parts:
        groups = pack_lengths(lengths[first : first + part.count], max_length, seed)
        packed += [[first + index for index in group] for group in groups]
        counts.append(Part(part.name, len(groups), part.weight))
        first += part.count
    return WeightedRows(PackedDataset(examples, packed), counts, seed)


class WeightedRows(Dataset):
    """Rows, of which those of each part come so often in an epoch as its weight says.

    The rows of a part are in an order drawn by the seed, and an epoch goes on in it where the one before ended, from
    the end to the start again. So a weight of 0.5 takes the one half in the first epoch and the other in the second,
    2 takes each row twice in every epoch, and 1.5 each row once and a half of them, in turn, once more.

    Args:
        rows: of all parts, one part behind the other.
        parts: their names, how many rows each of them has, and their weights.
        seed: of the orders.
    """

    def __init__(self, rows: ExampleDataset | PackedDataset, parts: Sequence[Part], seed: int):
        self.rows = rows
        self.parts = list(parts)
        self.taken = [max(1, round(part.count * part.weight)) for part in parts]
        generator = torch.Generator().manual_seed(seed)
        self._orders = [torch.randperm(part.count, generator=generator) for part in parts]
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # workers that live on see it too

    def begin_epoch(self, epoch: int) -> None:
        """Choose the rows of an epoch, counted from 0."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return sum(self.taken)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """A row, as `rows` gives it."""
        index = range(len(self))[index]
        first = 0
        for part, taken, order in zip(self.parts, self.taken, self._orders, strict=True):
            if index < taken:
                return self.rows[first + int(order[(int(self._epoch) * taken + index) % part.count])]
            index, first = index - taken, first + part.count
        raise IndexError(index)

    def report(self) -> str:
        """A line for the user about each part."""
        return "\n".join(
            f"{part.name}: weight {part.weight:g}, {taken:,} of {counted(part.count, 'row')} in each epoch."
            for part, taken in zip(self.parts, self.taken, strict=True)
        )


class EpochOfRows(TrainerCallback):
    """Tells weighted rows which epoch begins; accelerate would do so for some ways of loading only."""

    def __init__(self, rows: WeightedRows):
        self._rows = rows

    def on_epoch_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Also in an epoch that is taken up in its middle."""
        self._rows.begin_epoch(int((state.epoch or 0.0) + _ROUNDING))
