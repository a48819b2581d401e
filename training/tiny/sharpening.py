"""Conversations for the last parts of the training: half of them are of the sorts that the parts before leave hard.

They are drawn as those of the refinement and drawn again until they are of such a sort, so that they hold nothing that
the examination keeps from training.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from ...tools_qwen import OBSERVATION
from .dialogues import Dialogue, Generator
from .phrases import FAVOURITES, GIVEN, LANGUAGES, SURNAMES, SYSTEMS

SHARPENING = {
    "small talk": 2, "arithmetic": 4, "three digits": 22, "facts": 8, "unknown": 4, "memory": 17, "system": 12,
    "language": 4, "names": 12, "tools": 11, "repeating": 4,
}  # fmt: skip
"""How often each kind is drawn, in percent."""

EQUIPPING = {
    "small talk": 2, "arithmetic": 5, "three digits": 26, "facts": 7, "unknown": 4, "memory": 13, "system": 8,
    "language": 5, "names": 13, "tools": 15, "repeating": 2,
}  # fmt: skip
"""The same for the part behind it, in which many have tools."""

HARD_SHARE = 0.5
"""Of the conversations of a kind that has hard sorts, so many are of one of them."""

_VALUES = {name for _, _, values in FAVOURITES.values() for value in values for name in value}
_USUAL = {*SURNAMES, *GIVEN, *"很高兴认识你叫记住了最喜欢的是颜色食物动物水果运动城市还没有告诉我名字，。！"}
_NO = ("know only a few", "只知道")
_WORDS = ("Chinese", "English", "opposite", "country", "中文", "英文", "反义词", "国")
_ASKED = (*_WORDS, "capital", "symbol", "continent", "Where", "where", " in ", "在", "洲", "首都", "符号")


def _negative(dialogue: Dialogue) -> bool:
    """The sign of a result has to be copied from what the calculator gave, or worked out."""
    return re.search("= ?-", dialogue.turns[-1][1].rpartition("Final Answer")[2]) is not None


def _close(dialogue: Dialogue) -> bool:
    """The first digits of two numbers are the same, so that the others tell which is the larger one."""
    return re.search(r"\b(\d)\d\d-\1\d\d ?=", dialogue.turns[-1][1]) is not None


def _long(dialogue: Dialogue) -> bool:
    """A sum of three numbers and more."""
    return len(re.findall(r"\d+(?:\.\d+)?", dialogue.turns[-1][0])) > 2


def _terse(dialogue: Dialogue) -> bool:
    """A sum in which a word or two tell that it is asked in Chinese."""
    query, reply = dialogue.turns[-1]
    return OBSERVATION in reply and 1 <= len(re.findall(r"[一-鿿]", query)) <= 3


def _stopped(dialogue: Dialogue) -> bool:
    """A sum with a full stop behind it, which is no decimal point."""
    query, reply = dialogue.turns[-1]
    return OBSERVATION in reply and re.search(r"\d\.$", query) is not None


def _wordless(dialogue: Dialogue) -> bool:
    """A sum without words whose end is Chinese, which counts as English all the same."""
    query, reply = dialogue.turns[-1]
    return OBSERVATION in reply and re.search(r"[^\W\d]", query) is None and query.endswith(tuple("。！？～…"))


def _word(dialogue: Dialogue) -> bool:
    """A question about words or countries that no tool answers."""
    query, reply = dialogue.turns[-1]
    return OBSERVATION not in reply and any(word in query for word in _WORDS)


def _idle(dialogue: Dialogue) -> bool:
    """Small talk with tools at hand, which are of no use there."""
    query, reply = dialogue.turns[-1]
    return OBSERVATION not in reply and not any(word in query for word in _ASKED) and not any(w in reply for w in _NO)


def _not_told(dialogue: Dialogue) -> bool:
    """Asked for what was never told, behind other things that were."""
    *before, (_, reply) = dialogue.turns
    missing = "have not told" in reply or "还没有告诉" in reply
    return missing and any("I will remember" in said or "我记住了" in said for _, said in before)


def _made(dialogue: Dialogue) -> bool:
    """A favourite that is no word of the lists."""
    found = re.fullmatch(r"Your favourite \w+ is (.+)\.|你最喜欢的.{2}是(.+)。", dialogue.turns[-1][1])
    return found is not None and (found[1] or found[2]) not in _VALUES


def _rare(dialogue: Dialogue) -> bool:
    """What the user told has Chinese characters that few names have."""
    reply = dialogue.turns[-1][1]
    told = "meet you" in reply or "认识你" in reply or "our name is" in reply or "你叫" in reply
    return told and any("一" <= character <= "鿿" and character not in _USUAL for character in reply)


def _crossed(dialogue: Dialogue) -> bool:
    """A fact asked for in one language and told in the other."""
    set_by_system = next((tongue for tongue in LANGUAGES if dialogue.system in SYSTEMS[tongue]), dialogue.language)
    reply = dialogue.turns[-1][1]
    return (
        set_by_system != dialogue.language and "不知道" not in reply and any(w in reply for w in (" is ", "是", "在"))
    )


def _capital(dialogue: Dialogue) -> bool:
    """A word for translation that begins with a capital letter because the question does."""
    return bool(re.match(r"[A-Z][a-z]+(?:的|用| in )", dialogue.turns[-1][0]))


HardSorts = Mapping[str, Sequence[Callable[[Dialogue], bool]]]

HARD: HardSorts = {
    "three digits": (_negative, _close),
    "facts": (_crossed, _capital),
    "memory": (_not_told, _not_told, _made, _rare),
    "system": (_not_told, _made, _rare, _crossed, _crossed, _capital),
    "names": (_rare,),
    "tools": (_negative, _negative, _long, _terse, _wordless, _word),
}
"""kind -> its hard sorts; one that stands twice is drawn twice as often."""

HARD_WITH_TOOLS = {
    **HARD,
    "three digits": (_negative, _close, _close),
    "tools": (_negative, _long, _terse, _stopped, _wordless, _word, _word, _word, _idle, _idle),
}
"""The same for the part in which many have tools."""


def sharpening_dialogues(count: int, seed: int) -> list[Dialogue]:
    """Conversations for the fourth part of the training."""
    return _drawn(Generator(seed + 3, late=True, spaced=True), count, SHARPENING, HARD)


def equipping_dialogues(count: int, seed: int) -> list[Dialogue]:
    """Conversations for the last part of the training."""
    return _drawn(Generator(seed + 4, late=True, spaced=True), count, EQUIPPING, HARD_WITH_TOOLS)


def _drawn(generator: Generator, count: int, shares: Mapping[str, int], sorts: HardSorts) -> list[Dialogue]:
    kinds = generator.random.choices(list(shares), weights=list(shares.values()), k=count)
    return [_one(generator, kind, sorts.get(kind, ())) for kind in kinds]


def _one(generator: Generator, kind: str, sorts: Sequence[Callable[[Dialogue], bool]]) -> Dialogue:
    """A conversation of the kind, or one of its hard sorts."""
    wanted = generator.random.choice(sorts) if sorts and generator.random.random() < HARD_SHARE else None
    while True:
        dialogue = generator.dialogue(kind)
        if wanted is None or wanted(dialogue):
            return dialogue
