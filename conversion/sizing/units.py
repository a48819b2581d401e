"""Sizes of memory as people write them: "24GB", "80GiB", "40G"."""

from __future__ import annotations

import re

from accelerate.utils import convert_file_size_to_int

from ..errors import CheckpointError

_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([KMGT]?)(i?)B?", re.IGNORECASE)
_MOST = 2**60


def read_size(text: str, what: str) -> int:
    """Bytes of a size with a unit: powers of 1000 in "24GB" or "24G", of 1024 in "24GiB".

    Args:
        what: the size is of, for the message.

    Raises:
        CheckpointError: no such size, none without a unit, nothing, or more than any device has.
    """
    found = _SIZE.fullmatch(text.strip())
    if found is None or (found[3] and not found[2]) or found[0][-1].isdigit():
        raise CheckpointError(f"{what} {text!r} is no size: write it like 24GB, 24GiB or 500MB.")
    number, unit, binary = found[1], found[2].upper(), found[3]
    scale = 1000 if unit == "T" else 1  # a unit that accelerate doesn't know
    if unit == "T" and binary:
        scale = 1024
    unit = "G" if unit == "T" else unit
    nbytes = scale * convert_file_size_to_int(f"{number}{unit}{binary}B") if unit else int(float(number))
    if not 0 < nbytes <= _MOST:
        raise CheckpointError(f"{what} {text!r} is {nbytes:,} bytes: write a size above 0, like 24GB.")
    return nbytes
