"""Numbers and lists in sentences."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

NAMED = 3  # of many tensors or files


def first_of(names: Sequence[str], separator: str = ", ") -> str:
    """The first few of many names, and how many more there are."""
    more = len(names) - NAMED
    return separator.join(names[:NAMED]) + (f" and {more:,} more" if more > 0 else "")


def quoted(names: Iterable[str]) -> str:
    """The same with quotation marks, for names that come out of files."""
    return first_of([repr(name) for name in names])


def plural(count: int, noun: str) -> str:
    """ "1 file", "2 files"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def are(items: Sequence[str]) -> str:
    """The verb for so many items."""
    return "is" if len(items) == 1 else "are"


def size_text(nbytes: int) -> str:
    """A size for people, in powers of 1000 with three digits: "15.4 GB"."""
    value, unit = float(nbytes), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 999.5:
            break
        value, unit = value / 1000, larger
    digits = 0 if unit == "B" or value >= 99.95 else 1 if value >= 9.995 else 2
    return f"{value:.{digits}f} {unit}"


def short_count(count: int) -> str:
    for size, word in ((10**9, "billion"), (10**6, "million")):
        if count >= size:
            return f"{count / size:.3g} {word}"
    return f"{count:,}"
