"""The conversations and texts of qwen-tiny-chat: right, repeatable, and apart from the examination."""

import re

import pytest

from qwen1.training.tiny.dialogues import (
    KINDS,
    Dialogue,
    Generator,
    examination_dialogues,
    number_key,
    training_dialogues,
    worked,
)
from qwen1.training.tiny.facts import COUNTRIES
from qwen1.training.tiny.names import CHARACTERS, REAL_NAMES, Names, held_out
from qwen1.training.tiny.phrases import SMALL_TALK, SYSTEMS, UNKNOWN
from qwen1.training.tiny.texts import training_texts

SUM = re.compile(r"(?:^|\. )(\d+)([+-])(\d+)=(-?\d+)$", re.M)
CHINESE = re.compile(r"[\u4e00-\u9fff]")


@pytest.fixture(scope="module")
def learnt() -> list[Dialogue]:
    return training_dialogues(4000, seed=0)


@pytest.fixture(scope="module")
def examined() -> list[Dialogue]:
    return examination_dialogues(40, seed=1, seen=set())


def sums(text: str) -> list[tuple[int, str, int, int]]:
    return [(int(a), sign, int(b), int(c)) for a, sign, b, c in SUM.findall(text)]


def key(a: int, sign: str, b: int) -> tuple:
    return (sign, *(sorted((a, b)) if sign == "+" else (a, b)))


def test_a_seed_gives_the_same_conversations_and_another_seed_others(learnt):
    assert training_dialogues(200, seed=0) == training_dialogues(200, seed=0)
    assert training_dialogues(200, seed=0) != training_dialogues(200, seed=1)
    assert training_texts(50, seed=0) == training_texts(50, seed=0)


def test_every_kind_is_drawn(learnt, examined):
    assert {dialogue.kind for dialogue in learnt} == set(KINDS)
    counts = {kind: sum(dialogue.kind == kind for dialogue in examined) for kind in KINDS}
    assert counts == dict.fromkeys(KINDS, 40) | {"names": 80}


def test_sums_are_right(learnt, examined):
    found = [s for dialogue in learnt + examined for _, reply in dialogue.turns for s in sums(reply)]
    found += [s for text in training_texts(300, seed=0) for s in sums(text)]
    assert len(found) > 3000
    assert all(c == (a + b if sign == "+" else a - b) for a, sign, b, c in found)


def test_held_out_numbers_are_never_trained_and_always_examined(learnt, examined):
    trained = [s for dialogue in learnt for _, reply in dialogue.turns for s in sums(reply)]
    trained += [s for text in training_texts(300, seed=0) for s in sums(text)]
    assert not any(held_out(*key(a, sign, b)) for a, sign, b, _ in trained)
    asked = [sums(d.turns[-1][1])[0] for d in examined if d.kind in ("arithmetic", "three digits")]
    assert all(held_out(*key(a, sign, b)) for a, sign, b, _ in asked)


def test_no_held_out_name_is_trained():
    generator, examiner = Generator(0), Generator(0, examination=True)
    assert not any(held_out(generator.name("en")) for _ in range(300))
    assert all(held_out(examiner.name("zh")) for _ in range(100))


def test_the_real_names_are_two_hundred_and_all_examined():
    assert len(set(REAL_NAMES)) == 200
    assert [language for language, _ in REAL_NAMES].count("zh") == 100
    prompts = [d.turns[-1] for d in examination_dialogues(100, seed=1, seen=set()) if d.kind == "names"]
    assert {name for _, name in REAL_NAMES if any(name in reply for _, reply in prompts)} == {n for _, n in REAL_NAMES}


@pytest.mark.slow
def test_no_real_name_is_trained(learnt):
    generator = Generator(0)
    generator.latin_name = lambda: generator.random.choice(["Björk", "Zoe"])
    assert {generator.name("en") for _ in range(60)} - {generator.chinese_name()} >= {"Zoe"}
    assert "Björk" not in {generator.name("en") for _ in range(200)}
    said = "\n".join(text for d in learnt for turn in d.turns for text in turn)
    for name in (name for _, name in REAL_NAMES if len(name) > 2):
        assert not re.search(rf"\b{name}\b", said), name


def test_names_are_made_of_far_more_than_the_vocabulary_holds():
    assert len(set(CHARACTERS)) == 3755 + 3008
    names = Names(0)
    drawn = "".join(names.name("zh") for _ in range(3000))
    assert len({c for c in drawn if CHINESE.match(c)}) > 2500
    plain = Names(0, rare=False)
    assert len({c for c in "".join(plain.name("zh") for _ in range(3000)) if CHINESE.match(c)}) < 300


@pytest.mark.parametrize("kind", ["small talk", "facts", "unknown", "language"])
def test_the_reply_is_in_the_language_of_the_last_message(learnt, kind):
    """Small talk and what isn't known have replies without words of the other language."""
    fixed = {UNKNOWN["en"], UNKNOWN["zh"]} | {texts[0] for topic in SMALL_TALK.values() for texts in topic.values()}
    system = {text for texts in SYSTEMS.values() for text in texts}
    asked = [d.turns[-1] for d in learnt if d.kind == kind and d.system not in system]
    asked = [(query, reply) for query, reply in asked if reply in fixed]
    assert len(asked) > 30 or kind == "facts"
    for query, reply in asked:
        assert bool(CHINESE.search(reply)) == bool(CHINESE.search(query.replace("×", "乘"))), (query, reply)


def test_the_language_changes_in_the_last_message(learnt):
    changed = [d for d in learnt if d.kind == "language"]
    assert len(changed) > 100
    assert {d.language for d in changed} == {"en", "zh"}
    assert all(len(d.turns) > 1 for d in changed)


def test_sums_for_a_calculator_are_held_out_as_others_are():
    assert number_key("12+34") == number_key("34+12") == ("+", 12, 34)
    assert number_key("34-12") == ("-", 34, 12)
    assert number_key("2*3+4") == ("2*3+4",)


def test_examined_prompts_differ_from_the_seen_and_from_one_another(learnt):
    first = examination_dialogues(20, seed=1, seen=set())
    seen = {dialogue.prompt() for dialogue in first[:10]}
    second = examination_dialogues(20, seed=1, seen=seen)
    prompts = [dialogue.prompt() for dialogue in second]
    assert not seen & set(prompts)
    assert len(set(prompts)) == len(prompts)
    assert not {p for dialogue in learnt for p in dialogue.prompts()} & set(prompts)


def test_a_prompt_is_all_that_stands_before_a_reply():
    dialogue = Dialogue("facts", "en", [("a", "b"), ("c", "d")], "s")
    assert dialogue.prompts() == ["s\na", "s\na\nb\nc"]
    assert dialogue.messages()[0] == {"role": "system", "content": "s"}
    assert [message["content"] for message in dialogue.messages()] == ["s", "a", "b", "c", "d"]


@pytest.mark.parametrize(("language", "chinese"), [("en", False), ("zh", True)])
def test_the_system_message_sets_the_language(learnt, language, chinese):
    replies = [d.turns[-1][1] for d in learnt if d.kind == "system" and d.system in SYSTEMS[language]]
    fixed = [reply for reply in replies if reply in (UNKNOWN["en"], UNKNOWN["zh"])]
    assert len(replies) > 50 and fixed
    assert all(bool(CHINESE.search(reply)) == chinese for reply in fixed)


def test_what_is_remembered_was_said_before(learnt):
    asked = 0
    for dialogue in learnt:
        for i, (_, reply) in enumerate(dialogue.turns):
            if found := re.fullmatch(r"Your name is (.+)\.|你叫(.+)。", reply):
                name = found[1] or found[2]
                asked += 1
                assert any(name in query for query, _ in dialogue.turns[:i])
    assert asked > 100


def test_the_table_has_each_country_and_capital_once():
    for column in (0, 1):
        for language in (0, 1):
            assert len({row[column][language] for row in COUNTRIES}) == len(COUNTRIES)


@pytest.mark.parametrize(
    ("a", "sign", "b", "written"),
    [
        (3, "+", 4, "3+4=7"),
        (7, "+", 8, "7+8=15"),
        (27, "+", 48, "7+8=15, 2+4+1=7. 27+48=75"),
        (99, "+", 1, "9+1=10, 9+0+1=10. 99+1=100"),
        (9, "-", 3, "9-3=6"),
        (3, "-", 9, "9-3=6. 3-9=-6"),
        (345, "-", 178, "15-8=7, 14-7-1=6, 3-1-1=1. 345-178=167"),
        (12, "-", 30, "10-2=8, 3-1-1=1. 12-30=-18"),
        (50, "-", 50, "0-0=0, 5-5=0. 50-50=0"),
    ],
)
def test_working_is_that_of_school(a, sign, b, written):
    assert worked(a, b, sign) == written
