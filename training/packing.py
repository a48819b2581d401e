"""Several examples in one row, and rows in a batch.

A row is examples laid end to end; their positions start again at 0, from which the model sees where one ends and the
next begins: no token attends to another example. The first label of each is left out, because the model would predict
it from the example before.
"""

from __future__ import annotations

import bisect
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from .examples import IGNORED, Example
from .store import Chosen, ExampleStore


def pack(examples: Sequence[Example], max_length: int, seed: int) -> list[list[int]]:
    """Group examples into rows: the longest first, each into the fullest row that still has space for it.

    Args:
        examples: each of at most `max_length` tokens.
        max_length: of a row.
        seed: of the order of rows, of examples in them, and of which of equally long ones share a row.

    Returns:
        for each row the indices of its examples; each index once.

    Raises:
        ValueError: an example that is longer than a row.
    """
    return pack_lengths(lengths_of(examples), max_length, seed)


def pack_lengths(lengths: Sequence[int], max_length: int, seed: int) -> list[list[int]]:
    """As `pack`, of examples of which the lengths are known."""
    if lengths and max(lengths) > max_length:
        index = list(lengths).index(max(lengths))
        raise ValueError(f"Example {index} has {lengths[index]} tokens, a row only {max_length}: raise max_length.")
    shuffled = random.Random(seed)
    order = list(range(len(lengths)))
    shuffled.shuffle(order)
    order.sort(key=lambda index: -lengths[index])
    rows: list[list[int]] = []
    spaces: list[int] = []  # the sizes of free space that there are, ascending
    rows_with: dict[int, list[int]] = {}
    for index in order:
        length = lengths[index]
        place = bisect.bisect_left(spaces, length)
        if place == len(spaces):
            row, space = len(rows), max_length
            rows.append([])
        else:
            space = spaces[place]
            row = rows_with[space].pop()
            if not rows_with[space]:
                del rows_with[space], spaces[place]
        rows[row].append(index)
        if space > length:
            if space - length not in rows_with:
                bisect.insort(spaces, space - length)
            rows_with.setdefault(space - length, []).append(row)
    for group in rows:
        shuffled.shuffle(group)
    shuffled.shuffle(rows)
    return rows


def lengths_of(examples: Sequence[Example]) -> list[int]:
    """Tokens of each example."""
    if isinstance(examples, (ExampleStore, Chosen)):  # which know them without reading the tokens
        return examples.lengths().tolist()
    return [len(example["input_ids"]) for example in examples]


class PackedDataset(Dataset):
    """Rows of several examples each.

    Args:
        examples: `input_ids` and `labels`.
        rows: indices of the examples in each row, as `pack` gives them.
    """

    def __init__(self, examples: Sequence[Example], rows: Sequence[Sequence[int]]):
        self.examples = examples
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """`input_ids`, `labels` and `position_ids`, (length,) each."""
        parts = [_tensors(self.examples[i]) for i in self.rows[index]]
        return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


class ExampleDataset(Dataset):
    """One example a row; arguments and items as those of `PackedDataset`."""

    def __init__(self, examples: Sequence[Example]):
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """`input_ids`, `labels` and `position_ids`, (length,) each."""
        return _tensors(self.examples[index])


def _tensors(example: Example) -> dict[str, torch.Tensor]:
    ids, labels = (torch.from_numpy(np.array(example[key], dtype=np.int64)) for key in ("input_ids", "labels"))
    labels[:1] = IGNORED
    return {"input_ids": ids, "labels": labels, "position_ids": torch.arange(len(ids))}


class Collator:
    """Makes a batch out of rows, padded on the right to the longest.

    Args:
        pad_token_id: of the padding.
        packed: whether rows hold several examples. They come without an attention mask, because the model looks for
            restarts of the positions only where there is none; the padding is one more example, without labels.
        multiple_of: pad to a multiple of so many tokens.
    """

    def __init__(self, pad_token_id: int, packed: bool, multiple_of: int = 1):
        self.pad_token_id = pad_token_id
        self.packed = packed
        self.multiple_of = multiple_of

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Rows of (length,) -> (B, longest): input_ids, labels, position_ids; attention_mask where not packed."""
        tensors = [row if isinstance(row["input_ids"], torch.Tensor) else _tensors(row) for row in rows]
        longest = max(len(row["input_ids"]) for row in tensors)
        longest += -longest % self.multiple_of
        values = {"input_ids": self.pad_token_id, "labels": IGNORED, "position_ids": 0}
        batch = {key: torch.full((len(rows), longest), value) for key, value in values.items()}
        for index, row in enumerate(tensors):
            length = len(row["input_ids"])
            for key, target in batch.items():
                target[index, :length] = row[key]
            batch["position_ids"][index, length:] = torch.arange(longest - length)
        if not self.packed:
            lengths = torch.tensor([len(row["input_ids"]) for row in tensors])
            batch["attention_mask"] = (torch.arange(longest) < lengths[:, None]).long()
        return batch
