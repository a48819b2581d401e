"""Files of training data, read and encoded one behind the other, and what the user is told of them."""

from __future__ import annotations

import random
import sys
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from .data import read_items
from .errors import DataError
from .examples import Encoder, Example
from .records import Item, ToolConversation, shown
from .store import Chosen, ExampleStore

_MOST_ITEMS, _MOST_CHARACTERS = 256, 2**18  # of a batch
_BAR_AFTER = 2.0  # seconds; what is read sooner needs no bar

Say = Callable[[str], object]


@dataclass
class Part:
    """The examples of one file that are trained on.

    Attributes:
        name: of the file.
        count: examples; they follow those of the files before.
        weight: how often each of them comes in an epoch.
    """

    name: str
    count: int
    weight: float = 1.0


@dataclass
class TrainingData:
    """What is trained and evaluated on.

    Attributes:
        examples: those to train on, of all files.
        parts: which of them are of which file.
        held_out: those to evaluate on; None where there are none.
        stores: that the examples are in.
        reports: name of a file -> what was read of it.
        folder: where the stores have their files; None in memory.
    """

    examples: Sequence[Example]
    parts: list[Part]
    held_out: Sequence[Example] | None
    stores: list[ExampleStore]
    reports: dict[str, str]
    folder: Path | None = None

    @property
    def checksum(self) -> int:
        """Of all that was read, in order."""
        return self.stores[0].checksum

    def close(self) -> None:
        """Take the files away that the examples are in."""
        _close(self.stores, self.folder)


@dataclass
class _File:
    """What has become of the items of a file.

    Attributes:
        starts: the place of the first example of each item, and that behind the last one.
        left_out: items that don't fit, and the line of the first of them.
        unread: keys of records that nothing is read from, and the line of the first of each.
    """

    name: str
    starts: array = field(default_factory=lambda: array("q", [0]))
    tokens: int = 0
    learnt: int = 0
    shortened: int = 0
    split: int = 0
    left_out: int = 0
    first_left_out: int = 0
    unread: dict[str, int] = field(default_factory=dict)

    @property
    def items(self) -> int:
        return len(self.starts) - 1

    def report(self, kind: str, max_length: int) -> str:
        """What was read, in a line."""
        limit = f"--model_max_length {max_length}"
        said = f"{counted(self.items, kind)}, {self.tokens:,} tokens, {self.learnt:,} of them with a loss."
        if self.left_out:
            first = f"the first on line {self.first_left_out}"
            said += f" {self.left_out:,} left out, because not even the first answer fits into {limit} ({first})."
        if self.shortened:
            said += f" {self.shortened:,} without their last turns, which don't fit into {limit}."
        if self.split:
            said += f" {self.split:,} cut into pieces of {limit}."
        if self.unread:
            named = ", ".join(f"{shown(key)} (line {line})" for key, line in self.unread.items())
            said += f" Keys that aren't read: {named}."
        return said


def read_data(
    tokenizer: Any,
    paths: Sequence[str],
    *,
    weights: Sequence[float] | None = None,
    eval_paths: Sequence[str] = (),
    eval_fraction: float = 0.0,
    plain_texts: bool = False,
    max_length: int,
    seed: int,
    folder: Path | None = None,
    say: Say | None = None,
) -> TrainingData:
    """Read and encode files; what is read is held as tokens only, in memory or in files of a folder.

    Args:
        tokenizer: a QWen tokenizer.
        paths, eval_paths: of files to train and to evaluate on.
        weights: of the files to train on.
        eval_fraction: part of the items of each file that is held out for evaluation, drawn by the seed.
        plain_texts: texts, not conversations.
        max_length: of an example.
        folder: for the tokens, which are more than memory holds; it must exist. None keeps them in memory.
        say: is told what was read; None for nobody, and no bars.

    Raises:
        DataError: bad data, or none of it left.
        OSError: a file can't be read, or none be written in `folder`.
    """
    reader = _Reader(Encoder(tokenizer, max_length), plain_texts, folder, say)
    try:
        store, files = reader.read(paths, "training")
        held_out: Sequence[Example] | None = reader.read(eval_paths, "evaluation")[0] if eval_paths else None
        examples: Sequence[Example] = store
        counts = [file.starts[-1] - file.starts[0] for file in files]
        if eval_fraction:
            examples, held_out, counts = _hold_out(store, files, eval_fraction, seed)
            held = f"{len(held_out):,} of {counted(len(store), 'example')}"
            reader.reports["evaluation"] = f"{held}, held out by --eval_fraction {eval_fraction:g}."
            if say is not None:
                say(f"Held out for evaluation: {held}, by --eval_fraction {eval_fraction:g}.")
    except BaseException as error:
        _close(reader.stores, folder)
        if isinstance(error, OSError) and error.filename is None and folder is not None:
            reason = f"{folder} can't hold the data: {error.strerror}"
            raise DataError(f"{reason}. Make room, or leave --streaming out.") from error
        raise
    weighted = zip(paths, counts, weights or [1.0] * len(counts), strict=True)
    return TrainingData(examples, [Part(*part) for part in weighted], held_out, reader.stores, reader.reports, folder)


@dataclass
class _Reader:
    """Reads files into stores; arguments as those of `read_data`."""

    encoder: Encoder
    plain_texts: bool
    folder: Path | None
    say: Say | None
    stores: list[ExampleStore] = field(default_factory=list)
    reports: dict[str, str] = field(default_factory=dict)

    def read(self, names: Sequence[str], into: str) -> tuple[ExampleStore, list[_File]]:
        """A store of the examples of these files, and what has become of each."""
        store = ExampleStore(None if self.folder is None else self.folder / into)
        self.stores.append(store)
        kind, limit = "text" if self.plain_texts else "conversation", self.encoder.max_length or 0
        files = []
        for name in names:
            file = _read_file(self.encoder, Path(name), store, self.plain_texts, progress=self.say is not None)
            if file.starts[0] == file.starts[-1]:
                raise DataError(f"{name}: none of it fits into --model_max_length {limit}; raise it.")
            if self.say is not None:
                self.say(f"{name}: {file.report(kind, limit)}")
            self.reports[Path(name).name + " (evaluation)" * (into != "training")] = file.report(kind, limit)
            files.append(file)
        store.finish()
        return store, files


def _close(stores: Iterable[ExampleStore], folder: Path | None) -> None:
    for store in stores:
        store.close()
    if folder is not None:
        with suppress(OSError):  # somebody else's file is in it
            folder.rmdir()


def counted(count: int, noun: str) -> str:
    """`1 text`, `2 texts`."""
    return f"{count:,} {noun}" + "s" * (count != 1)


def _read_file(encoder: Encoder, path: Path, store: ExampleStore, plain_texts: bool, *, progress: bool) -> _File:
    file = _File(str(path), array("q", [len(store)]))
    tokens, learnt = store.tokens, store.learnt
    with tqdm(
        total=path.stat().st_size,
        desc=f"Reading {path.name}",
        unit="B",
        unit_scale=True,
        delay=_BAR_AFTER,
        leave=False,
        disable=not progress,
        file=sys.stderr,
    ) as bar:
        for batch in _batches(read_items(path, plain_texts=plain_texts, advanced=bar.update, unread=file.unread)):
            encoded = encoder.encode([item for _, item in batch])
            for (line, item), (examples, was_cut) in zip(batch, encoded, strict=True):
                for example in examples:
                    store.append(example)
                file.starts.append(len(store))
                file.split += isinstance(item, str) and was_cut
                file.shortened += was_cut and bool(examples) and not isinstance(item, str)
                file.left_out += not examples
                file.first_left_out = file.first_left_out or (0 if examples else line)
    file.tokens, file.learnt = store.tokens - tokens, store.learnt - learnt
    return file


def _batches(items: Iterable[tuple[int, Item]]) -> Iterator[list[tuple[int, Item]]]:
    """So many items that encoding them at once pays, and so few that their ids take little memory."""
    batch: list[tuple[int, Item]] = []
    size = 0
    for line, item in items:
        batch.append((line, item))
        size += _characters(item)
        if len(batch) == _MOST_ITEMS or size > _MOST_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _characters(item: Item) -> int:
    if isinstance(item, str):
        return len(item)
    messages = item.messages if isinstance(item, ToolConversation) else item
    return sum(len(message["content"]) for message in messages)


def _hold_out(store: ExampleStore, files: list[_File], fraction: float, seed: int) -> tuple[Chosen, Chosen, list[int]]:
    """(examples to train on, to evaluate on, how many of the former each file has)."""
    training, evaluation, counts = array("q"), array("q"), []
    for file in files:
        held = set(random.Random(seed).sample(range(file.items), max(1, round(file.items * fraction))))
        before = len(training), len(evaluation)
        for item in range(file.items):
            (evaluation if item in held else training).extend(range(file.starts[item], file.starts[item + 1]))
        counts.append(len(training) - before[0])
        for left, what in ((counts[-1], "train"), (len(evaluation) - before[1], "evaluate")):
            if not left:
                raise DataError(f"{file.name}: --eval_fraction {fraction:g} leaves nothing to {what} on.")
    return Chosen(store, training), Chosen(store, evaluation), counts
