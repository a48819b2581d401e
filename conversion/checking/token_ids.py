"""Token ids to compare logits on: random ones, or those that a user gave."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError
from ..files.access import read_value


def random_ids(vocabulary: int, tokens: int, rows: int, seed: int) -> torch.Tensor:
    """Token ids below `vocabulary`, (rows, tokens) int64, the same for the same seed.

    Raises:
        CheckpointError: no tokens.
    """
    if tokens < 1 or rows < 1:
        raise CheckpointError(f"{rows} rows of {tokens} tokens can't be compared: use 1 or more.")
    return torch.randint(vocabulary, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def parse_ids(text: str) -> torch.Tensor:
    """Token ids that a user gave, (rows, tokens) int64.

    Args:
        text: "1,2,3", or the path of a JSON file with a list of ids or a list of such lists, all of one length.

    Raises:
        CheckpointError: anything else; the message names the value.
    """
    path = Path(text)
    if path.suffix != ".json" and not path.is_file():
        words = [word.strip() for word in text.split(",")]
        return _as_rows([int(word) if word.isdecimal() else word for word in words], text)
    try:
        value = read_value(path)
    except CheckpointError as error:
        raise CheckpointError(f"{text} is not a JSON file of token ids: {error}") from error
    return _as_rows(value, text)


def _as_rows(value: Any, origin: str) -> torch.Tensor:
    rows = value if isinstance(value, list) and value and isinstance(value[0], list) else [value]
    for row in rows:
        if not isinstance(row, list) or not row:
            raise CheckpointError(f"{origin!r} has {row!r} where a list of token ids is wanted.")
        for item in row:
            if type(item) is not int or not 0 <= item < 2**63:
                raise CheckpointError(f"{item!r} in {origin!r} is not a token id: use whole numbers, 1,2,3.")
    lengths = sorted({len(row) for row in rows})
    if len(lengths) > 1:
        raise CheckpointError(f"{origin!r} has rows of {lengths[0]} and of {lengths[-1]} ids: make them equally long.")
    return torch.tensor(rows)
