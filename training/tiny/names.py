"""Names: made ones to learn copying from, and a list of real ones that training never shows.

A name heard for the first time can only be copied, so the made ones use far more characters, letters and pieces of
words than any list of names has.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Callable
from pathlib import Path

from .phrases import CONSONANTS, GIVEN, KNOWN_NAMES, SMALL_TALK, SURNAMES, SYLLABLES, VOWELS

HELD_OUT_SHARE = 10
"""One in so many numbers, names and wordings is never shown in training."""

_REAL = json.loads(Path(__file__).with_name("names.json").read_text(encoding="utf-8"))
REAL_NAMES: list[tuple[str, str]] = [("en", name) for name in _REAL["latin"]] + [("zh", n) for n in _REAL["chinese"]]
"""Language and name of people who live or lived, two hundred; only for the examination."""

ACCENTED = "áàâäãåąæçćčéèêëęíìîïłñńóòôöõøśšßúùûüýźžż"
_LETTERS = "aaabcddeeefghiiijklmnooopqrrssttuuvwxyz"
_PARTICLES = ("de", "van", "von", "al", "da", "bin")


def _common_characters() -> str:
    """Those of GB 2312: 3,755 common ones, then 3,008 rarer ones, half as many times."""
    rows = [bytes([0xA0 + row, 0xA0 + cell]) for row in range(16, 88) for cell in range(1, 95)]
    return "".join(pair.decode("gb2312", "ignore") for pair in [*rows[: 40 * 94], *rows])


CHARACTERS = _common_characters()
"""What rare Chinese names are made of."""

_PIECES = sorted(
    {
        word[start : start + length].lower()
        for topic in SMALL_TALK.values()
        for word in re.findall(r"[A-Za-z]{3,}", topic["en"][0] + " " + " ".join(topic["en"][1]))
        for start in range(len(word))
        for length in (2, 3, 4)
        if start + length <= len(word)
    }
)


def held_out(*parts: object) -> bool:
    """Whether numbers, a name or a wording is kept for examination; the same in every run."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % HELD_OUT_SHARE == 0


class Names:
    """Draws what belongs to training, or to the examination, and names above all.

    Args:
        seed: of the draws.
        examination: draw what training never shows.
        rare: take names from all characters, accents and pieces; without it from the few that the vocabulary holds.
    """

    def __init__(self, seed: int, examination: bool = False, rare: bool = True):
        self.random = random.Random(f"{seed}/{examination}")
        self.examination = examination
        self.rare = rare
        self._real = {name for _, name in REAL_NAMES}

    def draw(self, produce: Callable[[], tuple], key: Callable[[tuple], tuple] = lambda drawn: drawn):
        """Draw until the key of what is drawn belongs to this generator's part."""
        while True:
            drawn = produce()
            if held_out(*key(drawn)) == self.examination:
                return drawn

    def name(self, language: str) -> str:
        """A name that belongs to this generator's part, and is none of the real ones."""
        chinese = self.random.random() < (0.8 if language == "zh" else 0.1)
        while True:
            name = self.draw(lambda: (self.chinese_name() if chinese else self.latin_name(),))[0]
            if name not in self._real:
                return name

    def chinese_name(self) -> str:
        """A surname and one or two characters, or what friends say; half of them with rare characters."""
        first = self.random.choice(SURNAMES if self.random.random() < 0.85 else "小阿大老")
        if self.rare and self.random.random() < 0.6:
            first = first if self.random.random() < 0.5 else "".join(self._characters((1, 1, 1, 2)))
            return first + "".join(self._characters((1, 2, 2)))
        return first + "".join(self.random.choices(GIVEN, k=self.random.choice((1, 2, 2))))

    def _characters(self, counts: tuple[int, ...]) -> list[str]:
        return self.random.choices(CHARACTERS, k=self.random.choice(counts))

    def latin_name(self) -> str:
        """A name as may be met, or one of several made words."""
        if not self.rare:
            return self._latin_word()
        if self.random.random() < 0.06:
            return self.random.choice(KNOWN_NAMES)
        words = [self._latin_word() for _ in range(self.random.choice((1, 1, 1, 2, 2, 3)))]
        if len(words) > 1 and self.random.random() < 0.15:
            words.insert(1, self.random.choice(_PARTICLES))
        name = self.random.choice((" ", " ", " ", " ", "-")).join(words)
        return name.lower() if self.random.random() < 0.06 else name

    def _latin_word(self) -> str:
        chance = self.random.random()
        if chance < 0.25 or not self.rare:
            return "".join(self.random.choices(SYLLABLES, k=self.random.choice((2, 2, 3, 3, 4)))).capitalize()
        if chance < 0.45:  # letters in orders that no list of syllables has
            pairs = [self.random.choice(CONSONANTS) + self.random.choice(VOWELS) for _ in range(self._few())]
            return self._accented("".join(pairs) + self.random.choice(["", "", *CONSONANTS[:20]])).capitalize()
        if chance < 0.7:
            return self._accented("".join(self.random.choices(_LETTERS, k=self.random.randrange(2, 11)))).capitalize()
        word = "".join(self.random.choices(_PIECES, k=self._few())).capitalize()
        if self.random.random() < 0.12:
            word = self.random.choice(("O'", "Mc", "D'", "Mac")) + word
        return self._accented(word)

    def _few(self) -> int:
        return self.random.choice((1, 2, 2, 2, 3))

    def _accented(self, word: str) -> str:
        """Now and then a letter with an accent in place of one without."""
        if self.random.random() < 0.75:
            return word
        place = self.random.randrange(len(word))
        return word[:place] + self.random.choice(ACCENTED) + word[place + 1 :]
