"""The generator of the conversations that qwen-tiny-chat learns from, and of those it is examined on.

One draw decides between training and examination before anything is written: numbers, names and wordings whose hash
falls into the held-out part never occur in training.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from ...schemas_qwen import Tool
from ...tools_qwen import react_prompt
from . import tools
from .facts import COUNTRIES, ELEMENTS, OPPOSITES, WORDS
from .names import REAL_NAMES, Names
from .phrases import (
    CLOSINGS,
    FAVOURITES,
    LANGUAGES,
    OPENINGS,
    SMALL_TALK,
    SYSTEMS,
    THINGS,
    UNKNOWN,
    UNKNOWN_QUESTIONS,
)

DEFAULT_SYSTEM = "You are a helpful assistant."


@dataclass
class Dialogue:
    """A conversation; what is examined is its last reply.

    Attributes:
        kind: one of `KINDS`.
        language: of its last query.
        turns: queries and replies; a reply with calls is the whole exchange.
        system: the system message.
        tools: what the model may call in the last turn.
    """

    kind: str
    language: str
    turns: list[tuple[str, str]] = field(default_factory=list)
    system: str = DEFAULT_SYSTEM
    tools: list[Tool] = field(default_factory=list)

    def messages(self) -> list[dict[str, str]]:
        """The conversation in the `messages` format."""
        said = [{"role": "system", "content": self.system}]
        for i, (query, reply) in enumerate(self.turns):
            if self.tools and i == len(self.turns) - 1:
                query = react_prompt(query, self.tools)
            said += [{"role": "user", "content": query}, {"role": "assistant", "content": reply}]
        return said

    def prompt(self) -> str:
        """All that stands before the last reply, as a key."""
        return self.prompts()[-1]

    def prompts(self) -> list[str]:
        """All that stands before each of the replies, as keys."""
        named = ", ".join(tool.name for tool in self.tools)
        texts = [f"{named}\n{self.system}" if named else self.system, *(text for turn in self.turns for text in turn)]
        return ["\n".join(texts[: 2 * i + 2]) for i in range(len(self.turns))]


def worked(a: int, b: int, sign: str) -> str:
    """A sum or a difference with its working, digit by digit from the right, as at school.

    What is larger comes first in a difference; a digit that borrows is written with its ten.
    """
    result = a + b if sign == "+" else a - b
    equation = f"{a}{sign}{b}={result}"
    if max(a, b) < 10 and (sign == "+" or result >= 0):
        return equation
    first, second = (a, b) if sign == "+" or result >= 0 else (b, a)
    steps, carried = [], False
    for i in range(len(str(max(a, b)))):
        x, y = first // 10**i % 10, second // 10**i % 10
        if sign == "-" and x < y + carried:
            x += 10
        value = x + y + carried if sign == "+" else x - y - carried
        steps.append(f"{x}{sign}{y}{f'{sign}1' if carried else ''}={value}")
        carried = value >= 10 if sign == "+" else x >= 10
    return f"{', '.join(steps)}. {equation}"


class Generator(Names):
    """Draws conversations: `Generator(seed)` those for training, with `examination=True` those never shown there.

    Args:
        seed: as for `Names`.
        examination: as for `Names`.
        rare: as for `Names`.
        late: draw as the last part of the training does, and the examination: what the user tells begins with a
            capital letter too, and tools are more often at hand where none is needed.
        spaced: write the calculator's answer with blanks, as the last two parts do, and the examination: a result
            then has the tokens that it has in the observation, and its sign no other one.
    """

    def __init__(
        self, seed: int, examination: bool = False, rare: bool = True, late: bool = False, spaced: bool = False
    ):
        super().__init__(seed, examination, rare)
        self.late = late or examination
        self.spaced = spaced or examination
        self.fixed: str | None = None  # the language that a system message sets
        self.kinds: dict[str, Callable[[str], tuple[str, str]]] = {
            "small talk": self.small_talk,
            "arithmetic": self.two_digits,
            "three digits": self.three_digits,
            "facts": self.fact,
            "unknown": self.unknown,
        }

    def spoken(self, language: str) -> str:
        """The language of the reply to a query: that of the query, unless a system message sets one."""
        return self.fixed or language

    # Wordings

    def worded(self, text: str, language: str) -> str:
        """A question or remark with an opening and a closing, in small or capital letters."""
        text = self.random.choice(OPENINGS[language]) + text + self.random.choice(CLOSINGS[language])
        return text[0].upper() + text[1:] if self.random.random() < 0.6 else text

    def pick(self, language: str, wordings: Mapping[str, Sequence[str]], **values: str) -> str:
        """One of the wordings in a language, with an end."""
        text = self.random.choice(wordings[language]).format(**values)
        return self.worded(text, language)

    # Kinds of a single turn: (language of the question) -> (question, language-dependent reply)

    def small_talk(self, language: str) -> tuple[str, str]:
        """Greetings and questions about the model itself."""

        def produce() -> tuple[str, str]:
            topic = self.random.choice(list(SMALL_TALK))
            return self.worded(self.random.choice(SMALL_TALK[topic][language][1]), language), topic

        query, topic = self.draw(produce, key=lambda drawn: drawn[:1])
        return query, SMALL_TALK[topic][self.spoken(language)][0]

    def two_digits(self, language: str) -> tuple[str, str]:
        """Addition and subtraction of numbers up to 99."""
        return self.arithmetic(language, 100)

    def three_digits(self, language: str) -> tuple[str, str]:
        """The same with numbers up to 999."""
        return self.arithmetic(language, 1000)

    def numbers(self, below: int) -> tuple[int, int, str]:
        """Two numbers and a sign, of this generator's part; for sums in either order."""
        first, second, sign = self.draw(
            lambda: (self.random.randrange(below), self.random.randrange(below), self.random.choice("+-")),
            key=lambda drawn: (drawn[2], *(sorted(drawn[:2]) if drawn[2] == "+" else drawn[:2])),
        )
        return first, second, sign

    def arithmetic(self, language: str, below: int) -> tuple[str, str]:
        """A sum or a difference in one of many wordings."""
        a, b, sign = self.numbers(below)
        words = {"en": {"+": "plus", "-": "minus"}, "zh": {"+": "加", "-": "减"}}
        if self.random.random() < 0.4:
            query = self.random.choice(["{a}{s}{b}=?", "{a}{s}{b}", "{a}{s}{b}=", "{a} {s} {b}", "{a} {s} {b} = ?"])
            return query.format(a=a, b=b, s=sign), worked(a, b, sign)
        asked = {
            "en": [
                "what is {a} {w} {b}",
                "how much is {a} {w} {b}",
                "{a} {w} {b}",
                "what is {a}{s}{b}",
                "compute {a}{s}{b}",
            ],
            "zh": ["{a}{w}{b}等于多少", "{a}{w}{b}等于几", "{a}{w}{b}是多少", "{a}{s}{b}等于多少", "计算{a}{s}{b}"],
        }
        query = self.pick(language, asked, a=str(a), b=str(b), s=sign, w=words[language][sign])
        return query, worked(a, b, sign)

    def fact(self, language: str) -> tuple[str, str]:
        """A question about the tables of `facts.py`."""
        about = self.random.choice(
            [self.capital, self.capital, self.country, self.continent, self.symbol, self.opposite, self.translation]
        )
        query, reply = self.draw(lambda: about(language), key=lambda drawn: drawn[:1])
        return query, reply

    def _ask(self, language: str, wordings: dict[str, list[str]], replies: dict[str, str], **values) -> tuple[str, str]:
        """A question and its reply; a value is a pair of an English and a Chinese form."""
        asked, answered = LANGUAGES.index(language), LANGUAGES.index(self.spoken(language))
        query = self.pick(language, wordings, **{name: pair[asked] for name, pair in values.items()})
        reply = replies[self.spoken(language)].format(**{name: pair[answered] for name, pair in values.items()})
        return query, reply

    def capital(self, language: str) -> tuple[str, str]:
        """The capital of a country."""
        country, capital, _ = self.random.choice(COUNTRIES)
        wordings = {
            "en": [
                "what is the capital of {x}",
                "the capital of {x}",
                "which city is the capital of {x}",
                "{x}'s capital",
                "name the capital of {x}",
                "do you know the capital of {x}",
            ],
            "zh": [
                "{x}的首都是哪里",
                "{x}的首都是什么",
                "{x}的首都",
                "{x}首都是哪个城市",
                "{x}的首都是哪座城市",
                "你知道{x}的首都吗",
            ],
        }
        return self._ask(
            language, wordings, {"en": "The capital of {x} is {y}.", "zh": "{x}的首都是{y}。"}, x=country, y=capital
        )

    def country(self, language: str) -> tuple[str, str]:
        """The country of a capital."""
        country, capital, _ = self.random.choice(COUNTRIES)
        wordings = {
            "en": [
                "{y} is the capital of which country",
                "which country has the capital {y}",
                "what country is {y} in",
                "{y} is the capital of what",
            ],
            "zh": ["{y}是哪个国家的首都", "{y}是哪国的首都", "哪个国家的首都是{y}", "{y}在哪个国家"],
        }
        return self._ask(
            language, wordings, {"en": "{y} is the capital of {x}.", "zh": "{y}是{x}的首都。"}, x=country, y=capital
        )

    def continent(self, language: str) -> tuple[str, str]:
        """The continent of a country."""
        country, _, continent = self.random.choice(COUNTRIES)
        wordings = {
            "en": [
                "which continent is {x} in",
                "where is {x}",
                "on which continent is {x}",
                "{x} is on which continent",
            ],
            "zh": ["{x}在哪个洲", "{x}在哪里", "{x}位于哪个洲", "{x}属于哪个大洲"],
        }
        return self._ask(language, wordings, {"en": "{x} is in {y}.", "zh": "{x}在{y}。"}, x=country, y=continent)

    def symbol(self, language: str) -> tuple[str, str]:
        """The symbol of a chemical element."""
        element, symbol = self.random.choice(ELEMENTS)
        wordings = {
            "en": ["what is the symbol of {x}", "the chemical symbol of {x}", "what is the chemical symbol for {x}"],
            "zh": ["{x}的元素符号是什么", "{x}的化学符号", "{x}的符号是什么"],
        }
        return self._ask(
            language,
            wordings,
            {"en": "The symbol of {x} is {y}.", "zh": "{x}的符号是{y}。"},
            x=element,
            y=(symbol, symbol),
        )

    def opposite(self, language: str) -> tuple[str, str]:
        """The opposite of a word."""
        word, other = self.random.choice(OPPOSITES)
        wordings = {
            "en": ["what is the opposite of {x}", "the opposite of {x}", "which word is the opposite of {x}"],
            "zh": ["{x}的反义词是什么", "{x}的反义词", "{x}的反义词是哪个"],
        }
        return self._ask(
            language, wordings, {"en": "The opposite of {x} is {y}.", "zh": "{x}的反义词是{y}。"}, x=word, y=other
        )

    def translation(self, language: str) -> tuple[str, str]:
        """A word in the other language."""
        word = self.random.choice(WORDS)
        to_chinese = self.random.random() < 0.5
        source, target = word if to_chinese else word[::-1]
        named = {"en": "Chinese" if to_chinese else "English", "zh": "中文" if to_chinese else "英文"}
        wordings = {
            "en": ["what is {x} in {n}", "how do you say {x} in {n}", "{x} in {n}", "translate {x} into {n}"],
            "zh": ["{x}用{n}怎么说", "{x}的{n}是什么", "{x}的{n}", "把{x}翻译成{n}"],
        }
        names = (named["en"], named["zh"])
        return self._ask(
            language,
            wordings,
            {"en": "{x} in {n} is {y}.", "zh": "{x}的{n}是{y}。"},
            x=(source, source), y=(target, target), n=names,
        )  # fmt: skip

    def unknown(self, language: str) -> tuple[str, str]:
        """A question whose answer the model can't know."""

        def produce() -> tuple[str]:
            values = {
                "thing": self.random.choice(THINGS[language]),
                "place": self.random.choice(COUNTRIES)[self.random.choice((0, 1))][LANGUAGES.index(language)],
                "person": self.chinese_name() if language == "zh" else self.latin_name(),
                "nowhere": self.latin_name()
                if language == "en"
                else self.chinese_name()[::-1] + self.random.choice("国州岛"),
                "number": str(self.random.randrange(10 ** self.random.choice((2, 2, 3, 4)))),
            }
            return (self.pick(language, UNKNOWN_QUESTIONS, **values),)

        return self.draw(produce)[0], UNKNOWN[self.spoken(language)]

    # Memory

    def told(self, text: str) -> str:
        """What the user tells, with a small or, late in the training, a capital letter."""
        return text[0].upper() + text[1:] if self.late and self.random.random() < 0.6 else text

    def told_name(self, language: str, name: str) -> tuple[str, str]:
        """The user says their name."""
        wordings = {
            "en": [
                "my name is {n}",
                "I am {n}",
                "I'm {n}",
                "call me {n}",
                "hello, my name is {n}",
                "hi, I am {n}",
                "you can call me {n}",
            ],
            "zh": [
                "我叫{n}",
                "我是{n}",
                "我的名字是{n}",
                "叫我{n}吧",
                "你好，我叫{n}",
                "你好，我是{n}",
                "你可以叫我{n}",
            ],
        }
        replies = {"en": "Nice to meet you, {n}!", "zh": "很高兴认识你，{n}！"}
        ending = self.random.choice(["", ".", "!"] if language == "en" else ["", "。", "！"])
        query = self.told(self.random.choice(wordings[language]).format(n=name) + ending)
        return query, replies[self.spoken(language)].format(n=name)

    def asked_name(self, language: str, name: str | None) -> tuple[str, str]:
        """The user asks for their own name, which may be told or not."""
        wordings = {
            "en": [
                "what is my name",
                "what's my name",
                "do you remember my name",
                "who am I",
                "do you know my name",
                "tell me my name",
            ],
            "zh": ["我叫什么", "我叫什么名字", "你记得我的名字吗", "我是谁", "你知道我叫什么吗", "我的名字是什么"],
        }
        known = {"en": "Your name is {n}.", "zh": "你叫{n}。"}
        unknown = {"en": "You have not told me your name yet.", "zh": "你还没有告诉我你的名字。"}
        return self.pick(language, wordings), (known if name else unknown)[self.spoken(language)].format(n=name)

    def told_favourite(self, language: str, thing: str, value: str) -> tuple[str, str]:
        """The user says what they like best."""
        noun = FAVOURITES[thing][:2][LANGUAGES.index(language)]
        wordings = {
            "en": [
                "my favourite {t} is {v}",
                "my favorite {t} is {v}",
                "the {t} I like best is {v}",
                "for me the best {t} is {v}",
            ],
            "zh": ["我最喜欢的{t}是{v}", "我最爱的{t}是{v}", "我喜欢的{t}是{v}"],
        }
        replies = {"en": "I will remember that your favourite {t} is {v}.", "zh": "我记住了，你最喜欢的{t}是{v}。"}
        ending = self.random.choice(["", ".", "!"] if language == "en" else ["", "。", "！"])
        reply_noun = FAVOURITES[thing][:2][LANGUAGES.index(self.spoken(language))]
        query = self.told(self.random.choice(wordings[language]).format(t=noun, v=value) + ending)
        return query, replies[self.spoken(language)].format(t=reply_noun, v=value)

    def asked_favourite(self, language: str, thing: str, value: str | None) -> tuple[str, str]:
        """The user asks what they like best, which may be told or not."""
        noun = FAVOURITES[thing][:2][LANGUAGES.index(language)]
        reply_noun = FAVOURITES[thing][:2][LANGUAGES.index(self.spoken(language))]
        wordings = {
            "en": [
                "what is my favourite {t}",
                "what is my favorite {t}",
                "which {t} do I like best",
                "do you remember my favourite {t}",
            ],
            "zh": ["我最喜欢的{t}是什么", "我最爱的{t}是什么", "你记得我最喜欢的{t}吗", "我喜欢什么{t}"],
        }
        known = {"en": "Your favourite {t} is {v}.", "zh": "你最喜欢的{t}是{v}。"}
        unknown = {"en": "You have not told me your favourite {t} yet.", "zh": "你还没有告诉我你最喜欢的{t}。"}
        reply = (known if value else unknown)[self.spoken(language)].format(t=reply_noun, v=value)
        return self.pick(language, wordings, t=noun), reply

    def value(self, thing: str, language: str) -> str:
        """Something to like: mostly from the lists, at times a word never heard."""
        if self.random.random() < 0.25:
            return self.name(language)
        return self.random.choice(FAVOURITES[thing][2])[LANGUAGES.index(language)]

    def memory(self, language: str) -> list[tuple[str, str]]:
        """The user tells things, talks of others, and asks for one of them, or for one never told."""
        told: dict[str, str] = {}
        turns: list[tuple[str, str]] = []
        things = self.random.sample([*FAVOURITES, "name", "name", "name"], k=self.random.choice((1, 1, 2, 3)))
        for thing in things:
            told[thing] = self.name(language) if thing == "name" else self.value(thing, language)
            turns.append(self._told(language, thing, told[thing]))
            turns += self.chatter(language, self.random.choice((0, 0, 0, 1, 2)))
        if self.examination:  # what makes the prompt new is a name never seen
            told["name"] = told.get("name") or self.name(language)
            turns.insert(0, self.told_name(language, told["name"])) if "name" not in things else None
        for _ in range(self.random.choice((1, 1, 2))):
            asked = self.random.choice([*told] if self.random.random() < 0.8 else ["name", *FAVOURITES])
            tongue = language if self.random.random() < 0.85 else self.other(language)
            turns.append(self._asked(tongue, asked, told.get(asked)))
        return turns

    def _told(self, language: str, thing: str, value: str) -> tuple[str, str]:
        if thing == "name":
            return self.told_name(language, value)
        return self.told_favourite(language, thing, value)

    def _asked(self, language: str, thing: str, value: str | None) -> tuple[str, str]:
        if thing == "name":
            return self.asked_name(language, value)
        return self.asked_favourite(language, thing, value)

    def chatter(self, language: str, count: int) -> list[tuple[str, str]]:
        """Turns of other kinds."""
        return [self.kinds[self.random.choice(list(self.kinds))](language) for _ in range(count)]

    # Tools

    def with_tools(self, dialogue: Dialogue) -> None:
        """A question for a tool, or one that needs none; the reply is an exchange in the ReAct form."""
        names = self.random.choice((["calculator", "clock"], ["clock", "calculator"], ["calculator"], ["clock"]))
        dialogue.tools = tools.described(names, self.random)
        earlier = dialogue.turns[-1:] if self.random.random() < 0.7 else [self._called(names, dialogue.language)]
        dialogue.turns = [(query, tools.concluded(reply)) for query, reply in earlier] if dialogue.turns else []
        if self.random.random() < (0.4 if self.late else 0.2):
            dialogue.turns.append(self._without_call(dialogue.language))
        else:
            dialogue.turns.append(self._called(names, dialogue.language))

    def _called(self, names: list[str], language: str) -> tuple[str, str]:
        """A turn that calls the first of the tools, or now and then the second."""
        name = names[0] if self.random.random() < 0.8 else names[-1]
        return self.calculation(language) if name == "calculator" else self.look_at_the_clock(language)

    def _without_call(self, language: str) -> tuple[str, str]:
        """A turn of another kind, with tools at hand; none has numbers, which a calculator would be asked for."""
        while True:
            query, reply = self.random.choice([self.small_talk, self.small_talk, self.fact, self.unknown])(language)
            if not re.search(r"\d", query) and not any(words in query.lower() for words in tools.ABOUT_TIME):
                return query, tools.concluded(reply)

    def calculation(self, language: str) -> tuple[str, str]:
        """A sum that the calculator does; the answer is its equation."""

        def produce() -> tuple[str, str]:
            written, asked = tools.expression(self.random, language)
            return written, self.pick(language, tools.QUESTIONS["calculator"], x=asked)

        while True:
            written, query = self.draw(produce, key=lambda drawn: number_key(drawn[0]))
            try:
                result = tools.calculator(written)
            except ZeroDivisionError:
                continue
            answer = f"{written} = {result}" if self.spaced else f"{written}={result}"
            # What has no words counts as English; the shipped vocabulary was learnt without this rule.
            tongue = language if re.search(r"[^\W\d]", query) or not self.rare else "en"
            return query, tools.exchange("calculator", {"expression": written}, result, answer, self.spoken(tongue))

    def look_at_the_clock(self, language: str) -> tuple[str, str]:
        """A question for the time or the date."""
        asked = self.random.choice(("time", "date"))
        query = self.draw(lambda: (self.pick(language, tools.QUESTIONS[asked]),))[0]
        shown = tools.moment(self.random)
        date, time = shown.split()
        spoken = self.spoken(language)
        answer = tools.ANSWERS[asked][spoken].format(x=date if asked == "date" else time)
        return query, tools.exchange("clock", {}, shown, answer, spoken)

    # Conversations

    def dialogue(self, kind: str, name: str | None = None) -> Dialogue:
        """A conversation that ends with a turn of the kind.

        Args:
            kind: "system" sets the language of all replies by the system message; "language" changes that of the last
                query.
            name: what the user of a conversation of the kind "names" is called.
        """
        language = self.random.choice(LANGUAGES)
        dialogue = Dialogue(kind, language)
        self.fixed = None
        if kind == "system" or (kind != "language" and self.random.random() < 0.12):
            self.fixed = self.random.choice(LANGUAGES)
            dialogue.system = self.random.choice(SYSTEMS[self.fixed])
        elif self.random.random() < 0.05:
            dialogue.system = ""
        if kind == "system":
            kind = self.random.choice(["small talk", "small talk", "facts", "facts", "unknown", "memory"])
        if kind == "language":
            kind = self.random.choice(["small talk", "small talk", "facts", "facts", "unknown", "asked"])
            dialogue.turns = self.chatter(self.other(language), self.random.choice((1, 1, 1, 2, 3)))
        else:
            before = language if self.random.random() < 0.7 else self.other(language)
            dialogue.turns = self.chatter(before, self._before())
        if kind == "tools":
            self.with_tools(dialogue)
        elif kind == "asked":
            told = self.name(self.other(language))
            dialogue.turns += [self.told_name(self.other(language), told), self.asked_name(language, told)]
        elif kind == "repeating":
            dialogue.turns = dialogue.turns[-1:] + [
                self.repeating(language) for _ in range(self.random.randrange(1, 4))
            ]
        elif kind == "names":
            dialogue.turns += self.naming(language, name or self.name(language))
        else:
            dialogue.turns += self.memory(language) if kind == "memory" else [self.kinds[kind](language)]
        return dialogue

    @staticmethod
    def other(language: str) -> str:
        """The one that it isn't."""
        return LANGUAGES[1 - LANGUAGES.index(language)]

    def naming(self, language: str, name: str) -> list[tuple[str, str]]:
        """The user says their name, and may ask for it."""
        turns = [self.told_name(language, name)]
        if self.random.random() < 0.6:
            turns += self.chatter(language, self.random.choice((0, 0, 1)))
            turns.append(self.asked_name(language, name))
        return turns

    def repeating(self, language: str) -> tuple[str, str]:
        """Names to be said again, as many as it takes to learn to copy."""
        wordings = {
            "en": ["repeat: {x}", "say {x}", "repeat after me: {x}", "please repeat {x}", "say it again: {x}"],
            "zh": ["跟我说：{x}", "重复：{x}", "请重复{x}", "请说{x}", "再说一遍：{x}"],
        }
        tongues = self.random.choices(LANGUAGES, k=self.random.randrange(1, 5))
        names = self.random.choice((", ", "、", " ")).join(self.name(tongue) for tongue in tongues)
        return self.told(self.random.choice(wordings[language]).format(x=names)), names

    def _before(self) -> int:
        """How many turns come before: mostly few."""
        return self.random.choice((0, 0, 0, 0, 1, 1, 2)) if self.random.random() < 0.95 else self.random.randrange(12)


def number_key(written: str) -> tuple:
    """What is held out of a sum: its numbers, of which a calculator may have more than two."""
    if found := re.fullmatch(r"(\d+)([+-])(\d+)", written):
        a, b = int(found[1]), int(found[3])
        return (found[2], *(sorted((a, b)) if found[2] == "+" else (a, b)))
    return (written,)


KINDS = (
    "small talk", "arithmetic", "three digits", "facts", "unknown", "memory", "system", "language", "names", "tools"
)  # fmt: skip
"""What is examined, in the order of the model card; "names" are real ones, all of which are asked for by default."""

SHARES = {
    "small talk": 9, "arithmetic": 7, "three digits": 18, "facts": 16, "unknown": 7, "memory": 17, "system": 10,
    "language": 6, "names": 6, "tools": 4,
}  # fmt: skip
"""How often each kind is drawn for training, in percent."""

PRACTICE = {
    "small talk": 2, "arithmetic": 5, "three digits": 15, "facts": 10, "unknown": 2, "memory": 18, "system": 5,
    "language": 4, "names": 16, "tools": 9, "repeating": 14,
}  # fmt: skip
"""The same for the second part of the training, which has more of what is hard, copying above all."""

REFINEMENT = {
    "small talk": 4, "arithmetic": 5, "three digits": 12, "facts": 8, "unknown": 3, "memory": 20, "system": 9,
    "language": 5, "names": 14, "tools": 13, "repeating": 7,
}  # fmt: skip
"""The same for the third part."""


def training_dialogues(
    count: int, seed: int, rare: bool = True, shares: Mapping[str, int] | None = None, late: bool = False
) -> list[Dialogue]:
    """Conversations to learn from; without rare names they are what the vocabulary is learnt from."""
    generator = Generator(seed, rare=rare, late=late)
    shares = shares or SHARES
    kinds = generator.random.choices(list(shares), weights=list(shares.values()), k=count)
    return [generator.dialogue(kind) for kind in kinds]


def practice_dialogues(count: int, seed: int) -> list[Dialogue]:
    """Conversations for the second part of the training."""
    return training_dialogues(count, seed + 1, shares=PRACTICE)


def refinement_dialogues(count: int, seed: int) -> list[Dialogue]:
    """Conversations for the third part of the training."""
    return training_dialogues(count, seed + 2, shares=REFINEMENT, late=True)


def examination_dialogues(per_kind: int, seed: int, seen: set[str]) -> list[Dialogue]:
    """Conversations to be examined on; none has a prompt that occurs in `seen`.

    Of each kind there are `per_kind`, of names twice as many, one for each of the list at most.
    """
    generator = Generator(seed, examination=True)
    drawn: list[Dialogue] = []
    for kind in KINDS:
        names = generator.random.sample(REAL_NAMES, min(2 * per_kind, len(REAL_NAMES))) if kind == "names" else []
        mine: dict[str, Dialogue] = {}
        while len(mine) < (len(names) or per_kind):
            dialogue = generator.dialogue(kind, names[len(mine)][1] if names else None)
            if dialogue.prompt() not in seen:
                mine[dialogue.prompt()] = dialogue
        drawn += mine.values()
    return drawn
