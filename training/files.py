"""Files of records and texts, read a piece at a time: none is held as a whole, however large it is."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from .errors import DataError

Advanced = Callable[[int], object]
"""Told how many bytes more have been read."""

_PIECE = 2**20  # bytes
_BLANKS = re.compile(r"[ \t\r\n]*")  # what JSON takes for white space
_LONGEST_MARK = 12  # characters of "\ud83d\ude00", which an end of the window may cut
_DECODER = json.JSONDecoder()


def records_in(path: Path, advanced: Advanced = lambda count: None) -> Iterator[tuple[int, Any]]:
    """(line, record) of a JSON list, told by its first character, or of JSON Lines.

    Raises:
        DataError: no UTF-8, or no JSON, by its line; or nothing at all.
        OSError: the file can't be read.
    """
    with path.open("rb") as file:
        yield from (_list if _first_character(path, file) == "[" else _lines)(path, file, advanced)


def texts_in(path: Path, advanced: Advanced = lambda count: None) -> Iterator[tuple[int, str]]:
    """(line of its first character, text) of the texts with blank lines between them.

    Raises:
        DataError: no UTF-8, or a NUL character, by its line; or nothing at all.
        OSError: the file can't be read.
    """
    held: list[str] = []
    number = 0
    with path.open("rb") as file:
        _first_character(path, file)
        for number, line in _decoded_lines(path, file, advanced):
            if "\0" in line:
                raise DataError(f"{path}, line {number}: a NUL character; is this a text file?")
            text = line.removesuffix("\r")
            if text.strip(" \t"):
                held.append(text)
            elif held:
                yield number - len(held), "\n".join(held)
                held = []
    if held:
        yield number + 1 - len(held), "\n".join(held)


def _first_character(path: Path, file: BinaryIO) -> str:
    """The first that is not white space; the file is at its start again."""
    blanks = b"\xef\xbb\xbf \t\r\n"
    while piece := file.read(_PIECE):
        if start := piece.lstrip(blanks):
            file.seek(0)
            return start[:1].decode("latin-1")
    raise DataError(f"{path} is empty.")


def _not_text(path: Path, line: int, error: UnicodeDecodeError) -> DataError:
    return DataError(f"{path}, line {line}: not UTF-8 ({error.reason}); convert the file.")


# --- lines ---


def _decoded_lines(path: Path, file: BinaryIO, advanced: Advanced) -> Iterator[tuple[int, str]]:
    for number, raw in enumerate(file, start=1):  # at b"\n" alone, as JSON Lines are
        advanced(len(raw))
        try:
            line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise _not_text(path, number, error) from error
        yield number, line.removesuffix("\n")


def _lines(path: Path, file: BinaryIO, advanced: Advanced) -> Iterator[tuple[int, Any]]:
    for number, line in _decoded_lines(path, file, advanced):
        if line.strip(" \t\r"):
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{path}, line {number}: invalid JSON ({error.msg} at column {error.colno}); expected a JSON list, "
                    "or one JSON object a line."
                ) from error
            except (RecursionError, ValueError) as error:  # nested too deep, or a number of too many digits
                raise DataError(f"{path}, line {number}: invalid JSON ({error})") from error


# --- a list ---


def _list(path: Path, file: BinaryIO, advanced: Advanced) -> Iterator[tuple[int, Any]]:
    """The records of a JSON list, decoded one by one so that each has its line."""
    text = _Window(path, file, advanced)
    text.skip()
    text.at += 1
    text.skip()
    while not text.has("]"):
        line = text.line()
        yield line, text.decode()
        text.skip()
        if text.has("]"):
            break
        if not text.has(","):
            raise DataError(f"{path}, line {text.line()}: invalid JSON (expected ',' or ']' after a record)")
        text.at += 1
        text.skip()
        if text.has("]"):  # a comma before the end
            text.decode()
    text.at += 1
    text.skip()
    if not text.is_at_the_end():
        raise DataError(f"{path}, line {text.line()}: there is more behind the JSON list")


class _Window:
    """The part of a file's text that has been read and not yet been taken.

    Attributes:
        at: where in the part the next thing begins.
    """

    def __init__(self, path: Path, file: BinaryIO, advanced: Advanced):
        self._path, self._file, self._advanced = path, file, advanced
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._text = ""
        self._lines, self._columns = 1, 0  # line of the part's first character, and what is in front of it there
        self._ended = False
        self.at = 0

    def line(self, at: int | None = None) -> int:
        return self._lines + self._text.count("\n", 0, self.at if at is None else at)

    def has(self, character: str) -> bool:
        return self._text.startswith(character, self.at)

    def is_at_the_end(self) -> bool:
        return self._ended and self.at >= len(self._text)

    def skip(self) -> None:
        """Pass over white space."""
        while True:
            blanks = _BLANKS.match(self._text, self.at)
            self.at = self.at if blanks is None else blanks.end()
            if self.at < len(self._text) or self._ended:
                return
            self._read()

    def decode(self) -> Any:
        """Take a value."""
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self.at)
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated string") or error.pos + _LONGEST_MARK >= len(self._text)
                if self._ended or not cut:
                    raise self._invalid(error) from error
            except (RecursionError, ValueError) as error:
                raise DataError(f"{self._path}, line {self.line()}: invalid JSON ({error})") from error
            else:
                if end < len(self._text) or self._ended:  # else a number may go on
                    self.at = end
                    return value
            self._read()

    def _invalid(self, error: json.JSONDecodeError) -> DataError:
        newline = self._text.rfind("\n", 0, error.pos)
        column = error.pos - newline if newline >= 0 else self._columns + error.pos + 1
        where = f"{self._path}, line {self.line(error.pos)}"
        return DataError(f"{where}: invalid JSON ({error.msg} at column {column})")

    def _read(self) -> None:
        """Drop what was taken, and read on: twice as much each time, where a record needs it."""
        left = self._text[self.at :]
        raw = self._file.read(max(_PIECE, len(left)))
        self._advanced(len(raw))
        newline = self._text.rfind("\n", 0, self.at)
        self._columns = self.at - newline - 1 if newline >= 0 else self._columns + self.at
        self._lines, self._text, self.at = self.line(), left, 0
        try:
            self._text += self._decoder.decode(raw, final=not raw)
        except UnicodeDecodeError as error:
            line = self._lines + left.count("\n") + error.object.count(b"\n", 0, error.start)
            raise _not_text(self._path, line, error) from error
        self._ended = not raw
