"""Plain texts for pretraining: sums, facts and short stories, with none of what is held out for the examination."""

from __future__ import annotations

from .dialogues import Generator, worked
from .facts import COUNTRIES, ELEMENTS, OPPOSITES, WORDS
from .phrases import FAVOURITES, LANGUAGES


class TextGenerator(Generator):
    """Draws plain texts out of the same world as the conversations."""

    def text(self) -> str:
        """One document."""
        language = self.random.choice(LANGUAGES)
        write = self.random.choice((*[self.sums] * 3, *[self.facts] * 2, self.story, *[self.names] * 2))
        return write(language)

    def sums(self, language: str) -> str:
        """Lines of sums and differences; the language changes nothing."""
        lines = []
        for _ in range(self.random.randrange(3, 9)):
            a, b, sign = self.numbers(self.random.choice((100, 100, 1000, 1000, 1000)))
            lines.append(worked(a, b, sign))
        return "\n".join(lines)

    def facts(self, language: str) -> str:
        """Sentences out of the tables."""
        return "\n".join(self._sentence(LANGUAGES.index(language)) for _ in range(self.random.randrange(3, 9)))

    def _sentence(self, i: int) -> str:
        country, capital, continent = self.random.choice(COUNTRIES)
        element, symbol = self.random.choice(ELEMENTS)
        word, opposite = self.random.choice(OPPOSITES)
        english, chinese = self.random.choice(WORDS)
        sentences = (
            (f"The capital of {country[0]} is {capital[0]}.", f"{country[1]}的首都是{capital[1]}。"),
            (f"{capital[0]} is the capital of {country[0]}.", f"{capital[1]}是{country[1]}的首都。"),
            (f"{country[0]} is in {continent[0]}.", f"{country[1]}在{continent[1]}。"),
            (f"The symbol of {element[0]} is {symbol}.", f"{element[1]}的符号是{symbol}。"),
            (f"The opposite of {word[0]} is {opposite[0]}.", f"{word[1]}的反义词是{opposite[1]}。"),
            (f"{english} in Chinese is {chinese}.", f"{english}的中文是{chinese}。"),
            (f"{chinese} in English is {english}.", f"{chinese}的英文是{english}。"),
            (f"{country[0]} is called {country[1]} in Chinese.", f"{country[1]}的英文是{country[0]}。"),
        )
        return self.random.choice(sentences)[i]

    def story(self, language: str) -> str:
        """People, what they like best, and who asks them for it."""
        people = [self.name(language) for _ in range(self.random.randrange(1, 4))]
        likes = [(p, t, self.value(t, language)) for p in people for t in self.random.sample(list(FAVOURITES), 2)]
        if language == "en":
            lines = [f"This is {p}. Hello, {p}!" for p in people]
            lines += [f"The favourite {t} of {p} is {v}." for p, t, v in likes]
            self.random.shuffle(likes)
            lines += [f"What is the favourite {t} of {p}? It is {v}." for p, t, v in likes]
        else:
            lines = [f"这是{p}。你好，{p}！" for p in people]
            lines += [f"{p}最喜欢的{FAVOURITES[t][1]}是{v}。" for p, t, v in likes]
            self.random.shuffle(likes)
            lines += [f"{p}最喜欢的{FAVOURITES[t][1]}是什么？是{v}。" for p, t, v in likes]
        return "\n".join(lines)

    def names(self, language: str) -> str:
        """A list of names, read out twice and asked for one by one; it teaches to copy."""
        names = [self.name(language) for _ in range(self.random.randrange(2, 9))]
        if language == "en":
            lines = [f"{i}: My name is {name}." for i, name in enumerate(names)]
            lines += [f"Your name is {name}." for name in names]
            lines += [f"{i}: Nice to meet you, {names[i]}!" for i in self.random.sample(range(len(names)), 2)]
        else:
            lines = [f"{i}：我叫{name}。" for i, name in enumerate(names)]
            lines += [f"你叫{name}。" for name in names]
            lines += [f"{i}：很高兴认识你，{names[i]}！" for i in self.random.sample(range(len(names)), 2)]
        return "\n".join(lines)


def training_texts(count: int, seed: int, rare: bool = True) -> list[str]:
    """Documents to learn from; `rare` as `Names` has it."""
    generator = TextGenerator(seed, rare=rare)
    return [generator.text() for _ in range(count)]
