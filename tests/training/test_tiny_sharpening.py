"""The last conversations of qwen-tiny-chat's training: of the sorts that are hard, and apart from the examination."""

import re

import pytest

from qwen1.schemas_qwen import as_tools
from qwen1.training.tiny import sharpening
from qwen1.training.tiny.dialogues import Dialogue, examination_dialogues, number_key, refinement_dialogues
from qwen1.training.tiny.names import REAL_NAMES, held_out
from qwen1.training.tiny.sharpening import (
    EQUIPPING,
    HARD,
    HARD_WITH_TOOLS,
    SHARPENING,
    equipping_dialogues,
    sharpening_dialogues,
)
from qwen1.training.tiny.tools import CONCLUSION, calculator, exchange

PARTS = {
    "sharpening": (sharpening_dialogues, SHARPENING, HARD),
    "equipping": (equipping_dialogues, EQUIPPING, {"tools": HARD_WITH_TOOLS["tools"]}),  # the others are the same
}


@pytest.fixture(scope="module", params=PARTS)
def part(request):
    """How a part is drawn, its shares and hard sorts."""
    return PARTS[request.param]


@pytest.fixture(scope="module")
def drawn(part) -> list[Dialogue]:
    return part[0](2500, seed=0)


@pytest.fixture(scope="module")
def refinement() -> list[Dialogue]:
    return refinement_dialogues(2500, 0)


@pytest.mark.slow
@pytest.mark.no_cover
def test_a_seed_gives_the_same_conversations_and_another_seed_others(part, drawn, refinement):
    draw, shares, _ = part
    assert draw(60, seed=0) == draw(60, seed=0) != draw(60, seed=1)
    assert {dialogue.kind for dialogue in drawn} == set(shares) and sum(shares.values()) == 100
    assert not {d.prompt() for d in drawn} & {d.prompt() for d in refinement if len(d.turns) > 2}


def test_nothing_is_drawn_that_the_examination_keeps(drawn):
    replies = [reply for dialogue in drawn for _, reply in dialogue.turns]
    written = [match[1] for reply in replies if (match := re.search(r"(?:^|\. |: )(\d+[+-]\d+) ?= ?\S+$", reply))]
    assert len(written) > 500
    assert not any(held_out(*number_key(sum_)) for sum_ in written)
    told = [re.fullmatch(r"Nice to meet you, (.+)!|很高兴认识你，(.+)！", reply) for reply in replies]
    names = {match[1] or match[2] for match in told if match}
    assert len(names) > 400
    assert not any(held_out(name) for name in names)
    assert not names & {name for _, name in REAL_NAMES}


def share_of(wanted, kind, dialogues):
    """How many conversations of a kind are of a sort, 0 to 1."""
    of_kind = [dialogue for dialogue in dialogues if dialogue.kind == kind]
    return sum(map(wanted, of_kind)) / len(of_kind)


def test_hard_sorts_are_drawn_more_often_than_before(part, drawn, refinement):
    for kind, sorts in part[2].items():
        for wanted in dict.fromkeys(sorts):
            now, before = (share_of(wanted, kind, those) for those in (drawn, refinement))
            assert now > 1.1 * before, (kind, wanted.__name__)


def test_the_last_parts_and_the_examination_write_results_behind_a_blank(drawn, refinement):
    for dialogues, blank in ((drawn, True), (refinement, False)):
        sums = [reply for d in dialogues for _, reply in d.turns if '{"expression"' in reply]
        assert len(sums) > 100
        assert all((" = " in reply.rpartition("Answer")[2]) == blank for reply in sums)
    examined = [d.turns[-1][1] for d in examination_dialogues(10, 1, set()) if d.tools]
    assert any('{"expression"' in reply for reply in examined)
    assert all(" = " in reply.rpartition("Answer")[2] for reply in examined if '{"expression"' in reply)


def said(query: str, reply: str, *before: tuple[str, str], system: str = "", language: str = "en") -> Dialogue:
    return Dialogue("memory", language, [*before, (query, reply)], system)


def called(query: str, expression: str, language: str = "en") -> Dialogue:
    result = calculator(expression)
    reply = exchange("calculator", {"expression": expression}, result, f"{expression}={result}", language)
    return Dialogue("tools", language, [(query, reply)], tools=list(as_tools([calculator]).values()))


FISH = ("My favourite food is fish.", "I will remember that your favourite food is fish.")


@pytest.mark.parametrize(
    ("sort", "hard", "easy"),
    [
        ("negative", called("3-8", "3-8"), called("8-3", "8-3")),
        ("negative", said("13-29", "9-3=6, 2-1=1. 13-29=-16"), said("29-13", "9-3=6, 2-1=1. 29-13=16")),
        ("negative", said("3-8", "Final Answer: 3-8 = -5"), said("8-3", "Final Answer: 8-3 = 5")),
        ("stopped", called("What is 8-3.", "8-3"), called("What is 8-3?", "8-3")),
        ("stopped", called("8-2.5.", "8-2.5"), called("8-2.5", "8-2.5")),
        ("long", called("1+2.5*3", "1+2.5*3"), called("1+2.5", "1+2.5")),
        ("terse", called("8减3?", "8-3", "zh"), called("8-3等于多少", "8-3", "zh")),
        ("terse", called("8减3?", "8-3", "zh"), called("8-3", "8-3")),
        ("wordless", called("23386*842？", "23386*842"), called("23386*842?", "23386*842")),
        ("wordless", called("8-3……", "8-3"), called("8减3……", "8-3", "zh")),
        ("close", said("206-203", "6-3=3, 0-0=0, 2-2=0. 206-203=3"),
         said("306-203", "6-3=3, 0-0=0, 3-2=1. 306-203=103")),
        ("word", said("Door用中文怎么说", f"{CONCLUSION}door的中文是门。"), called("8减3?", "8-3", "zh")),
        ("not_told", said("My favourite sport?", "You have not told me your favourite sport yet.", FISH),
         said("My favourite sport?", "You have not told me your favourite sport yet.")),
        ("made", said("My favourite food?", "Your favourite food is Ouldbor."),
         said("My favourite food?", "Your favourite food is fish.")),
        ("made", said("我喜欢什么食物？", "你最喜欢的食物是写馅吾。"), said("我喜欢什么食物", "你最喜欢的食物是鱼。")),
        ("rare", said("我叫陆游", "很高兴认识你，陆游！"), said("我叫李明", "很高兴认识你，李明！")),
        ("crossed", said("Where is Peru?", "秘鲁在南美洲。", system="Answer in Chinese."),
         said("Where is Peru?", "Peru is in South America.", system="Answer in English.")),
        ("capital", said("Door用中文怎么说", "door的中文是门。"), said("door用中文怎么说", "door的中文是门。")),
    ],
)  # fmt: skip
def test_a_sort_is_told_from_others(sort, hard, easy):
    is_of_sort = getattr(sharpening, f"_{sort}")
    assert is_of_sort(hard)
    assert not is_of_sort(easy)
