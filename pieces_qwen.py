"""Pieces of text before they become ids: surrogates, special tokens, NFC, long white space, places to cut long text."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator

from tokenizers import normalizers

NFC = normalizers.NFC()  # of the library that the fast class uses, so that Unicode versions cannot differ

# White space (Unicode White_Space, which is what \s means to tiktoken) other than \r and \n.
BLANKS = "\t\x0b\x0c \x85\xa0\u1680" + "".join(map(chr, range(0x2000, 0x200B))) + "\u2028\u2029\u202f\u205f\u3000"

# tiktoken's regex engine keeps one stack entry per character of such a run, unless the run ends in a line break, and
# overflows between 100,000 and 1,000,000 entries.
LONG_BLANK = re.compile(f"[{BLANKS}]{{10000,}}")

# Where long text may be cut without a change of ids, also before it is normalised: `PAT_STR` lets no piece go on from a
# letter or digit into what is none, and the character behind the cut composes with none before it. Special tokens hold
# no such place.
CUT = re.compile("(?<=[0-9A-Za-z\u4e00-\u9fa5])(?=[ \n,.\uff0c\u3002\u3001])")
CHUNK = 32_768  # characters that a thread encodes at a time

# Characters that may change under NFC, or change or join a character before them. Left out are those that most text is
# made of, in blocks or parts of blocks that have no such characters: text without a match is NFC already.
UNSTABLE = re.compile(
    "[^\x00-\u02ff\u0391-\u0482\u048a-\u052f\u1e00-\u1eff\u2002-\u205f\u20a0-\u20c0\u2190-\u2328\u232b-\u2426\u2460-\u2adb"
    "\u3000-\u3029\u3041-\u3096\u30a0-\u30ff\u3400-\u9fff\uac00-\ud7a3\ufe0e\ufe0f\uff01-\uffee\U0001f000-\U0001faff]"
)


def repair_surrogates(text: str) -> str:
    """Join surrogate pairs and replace lone surrogates by U+FFFD; neither can be written as UTF-8."""
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


@functools.lru_cache(maxsize=64)
def split_pattern(literals: frozenset[str]) -> re.Pattern[str]:
    """A pattern whose `split` gives text, literal, text, ..., text; it matches nothing if there are no literals."""
    return re.compile("(" + ("|".join(map(re.escape, sorted(literals, key=len, reverse=True))) or "(?!)") + ")")


def has_long_blank(text: str) -> bool:
    """Whether there is a match of `LONG_BLANK`; mostly found out without a look at each character.

    A run of 10,000 characters or more covers 16 of them from a multiple of 5000 on.
    """
    maybe = any(text[start : start + 16].isspace() for start in range(0, len(text), 5000))
    return maybe and LONG_BLANK.search(text) is not None


def split_long_blanks(text: str) -> Iterator[tuple[str, bool]]:
    r"""Cut long runs of white space out of NFC text, at places where `PAT_STR` cuts too.

    Yields (part, is_run). A part that is a run is one piece of the pattern; the others are to be split by the pattern,
    and together the pieces are those of the whole text. A run B without line breaks is looked at only if none follows
    it (else `\s*[\r\n]+` takes it, which needs no stack). What comes before B ends at a piece boundary, as no
    alternative goes on from a non-space or line break into B. Of B, `\s+(?!\S)` takes everything at the end of the
    text, and all but the last character before a non-space: that character may belong to the next word.
    """
    start = 0
    for run in LONG_BLANK.finditer(text):
        if text[run.end() : run.end() + 1] in ("\r", "\n"):
            continue
        end = run.end() if run.end() == len(text) else run.end() - 1
        yield text[start : run.start()], False
        yield text[run.start() : end], True
        start = end
    yield text[start:], False


def is_long(text: str) -> bool:
    """Whether `cut_text` may cut this text."""
    return len(text) > CHUNK


def cut_text(text: str) -> list[str]:
    """Cut text into chunks of `CHUNK` characters or little more, which have the ids of the whole one after another.

    Where nothing can be cut the rest is one chunk.
    """
    chunks, start = [], 0
    while len(text) - start > CHUNK and (place := CUT.search(text, start + CHUNK)):
        chunks.append(text[start : place.start()])
        start = place.start()
    return [*chunks, text[start:]]


def normalise(text: str, specials: re.Pattern[str]) -> str:
    """Repair surrogates, and bring what is between special tokens to NFC; `specials` is a `split_pattern`."""
    if text.isascii() or not UNSTABLE.search(text):
        return text
    parts = specials.split(repair_surrogates(text))  # text, special, text, ..., text
    parts[::2] = [NFC.normalize_str(part) if UNSTABLE.search(part) else part for part in parts[::2]]
    return "".join(parts)


def jobs_of(chunks: list[str]) -> list[list[str]]:
    """Put neighbours together that have `CHUNK` characters in all; a longer one stays alone."""
    jobs, start, characters = [], 0, 0
    for n, chunk in enumerate(chunks):
        if n > start and characters + len(chunk) > CHUNK:
            jobs.append(chunks[start:n])
            start, characters = n, 0
        characters += len(chunk)
    return [*jobs, chunks[start:]] if chunks else []
