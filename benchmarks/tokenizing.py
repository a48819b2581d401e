"""How fast text becomes ids, beside bare tiktoken and the way of 2023: the sub-command `tokenizer` of `speed.py`.

Needs the published vocabulary: its path is read from the environment variable QWEN_TIKTOKEN.
"""

from __future__ import annotations

import itertools
import os
import random
import re
import unicodedata
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import tiktoken
import typer
from measuring import RESULTS, Results, Rounds, compare, report
from transformers import BatchEncoding, PreTrainedTokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from qwen1.native_tokens_qwen import TOKENS
from qwen1.tokenization_qwen import CHAT_TEMPLATE, PAT_STR, QWenTokenizer, QWenTokenizerFast, load_vocabulary
from qwen1.translating_qwen import wait_for

ROOT = Path(__file__).parent.parent
SIZE, CHATS = 10_000_000, 10_000  # bytes of the long text, conversations of the batch
EMOJI = ["😀", "👍🏽", "🎉", "👩‍💻", "❤️", "🇨🇳"]
BLANKS = [" ", "  ", "\t", "\n\n", "\r\n", "    ", "\u3000"]


# --- what is encoded ---


class Writer:
    """Writes English, Chinese, code and what stands between them; the same for the same seed.

    Words are those of the vocabulary, frequent ones (with a low rank) more often, as in Zipf's law. One English word in
    six is two of them in one, so that not every word is a single token; Chinese has no spaces, so hardly a clause is.
    """

    def __init__(self, ranks: dict[bytes, int], seed: int = 0):
        self.random = random.Random(seed)
        words = [token.decode("utf-8", "ignore") for token in sorted(ranks, key=ranks.__getitem__)]
        self.english = [word[1:] for word in words if re.fullmatch(" ([a-z]{2,}|a|I)", word)]
        self.chinese = [word for word in words if re.fullmatch("[\u4e00-\u9fa5]+", word)]
        self.weights = {
            len(some): list(itertools.accumulate(1 / (n + 20) for n in range(len(some))))
            for some in (self.english, self.chinese)
        }
        self.code = "".join(path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("*.py")))
        self.code = self.code.replace("<|", "<").replace("|>", ">")  # control tokens are for the chats to have

    def words(self, language: list[str], count: int) -> list[str]:
        """Words of `self.english` or `self.chinese`."""
        return self.random.choices(language, cum_weights=self.weights[len(language)], k=count)

    def english_sentence(self) -> str:
        """5 to 25 words, and what ends a sentence."""
        words = self.words(self.english, self.random.randrange(5, 26))
        for n in range(0, len(words), 6):
            words[n] += self.words(self.english, 1)[0]
        end = self.random.choice([". ", ".\n", ", isn't it? ", f" in {self.random.randrange(3000)}. "])
        return " ".join(words).capitalize() + end

    def chinese_sentence(self) -> str:
        """One to four clauses of 2 to 8 words."""
        clauses = [
            "".join(self.words(self.chinese, self.random.randrange(2, 9))) for _ in range(self.random.randrange(1, 5))
        ]
        return "，".join(clauses) + self.random.choice(["。", "！", "？\n"])

    def piece(self) -> str:
        """A sentence, 200 to 800 characters of code, or a few digits, an emoji and white space."""
        kind = self.random.random()
        if kind < 0.45:
            return self.english_sentence()
        if kind < 0.85:
            return self.chinese_sentence()
        if kind < 0.95:
            length = self.random.randrange(200, 801)
            start = self.random.randrange(len(self.code) - length)
            return self.code[start : start + length] + "\n"
        digits = str(self.random.randrange(10 ** self.random.randrange(1, 12)))
        return digits + self.random.choice(EMOJI) + self.random.choice(BLANKS)

    def text(self, size: int) -> str:
        """Text of at least `size` bytes, and at most one piece more."""
        pieces = []
        while size > 0:
            pieces.append(self.piece())
            size -= len(pieces[-1].encode())
        return "".join(pieces)

    def chats(self, count: int) -> list[list[dict[str, str]]]:
        """Conversations of one to three turns; questions have 100 bytes or more, replies 400 or more."""
        sizes = itertools.cycle([("user", 100), ("assistant", 400)])
        return [
            [
                {"role": role, "content": self.text(size)}
                for role, size in itertools.islice(sizes, 2 * self.random.randrange(1, 4))
            ]
            for _ in range(count)
        ]


# --- the other sides ---


class Detour(QWenTokenizer):
    """The way of December 2023: tiktoken gives ids, which become tokens, which transformers asks to have as ids.

    Written anew from what that class does: a list of tokens out of a table, and for each of them a look among the
    special tokens and one among the ranks, both in plain loops; all else is transformers' class for slow tokenizers.
    Texts of a batch come one after another, and tiktoken has the published pattern as it is.
    """

    def __init__(self, vocabulary: str):
        super().__init__(vocabulary)
        self._bpe = bare_tiktoken(vocabulary)

    def tokenize(self, text: str, **_: Any) -> list[bytes | str]:  # type: ignore[override]
        """Text -> ids -> tokens."""
        normal = unicodedata.normalize("NFC", text)
        return [self.decoder[i] for i in self._bpe.encode(normal, allowed_special="all", disallowed_special=())]

    def convert_tokens_to_ids(self, tokens: Any) -> Any:
        """Tokens -> ids again."""
        ids = []
        for token in tokens:
            if token in self.special_tokens:
                ids.append(self.special_tokens[token])
            else:
                ids.append(self.mergeable_ranks.get(token))
        return ids

    def _encode_plus(self, *arguments: Any, **options: Any) -> BatchEncoding:  # type: ignore[override]
        return PreTrainedTokenizer._encode_plus(self, *arguments, **options)


def bare_tiktoken(vocabulary: str) -> tiktoken.Encoding:
    """tiktoken with this vocabulary and the published pattern, and nothing around it."""
    ranks, special_tokens = load_vocabulary(vocabulary)
    return tiktoken.Encoding("bare", pat_str=PAT_STR, mergeable_ranks=ranks, special_tokens=special_tokens)


def render(chats: list[list[dict[str, str]]]) -> list[str]:
    """The texts of conversations, by transformers' own function."""
    texts, _ = render_jinja_template(conversations=chats, chat_template=CHAT_TEMPLATE)
    return texts


# --- the sub-command ---


def comparisons(vocabulary: str) -> Iterator[tuple[str, Callable[[], Any], Callable[[], Any], float | None]]:
    """(name, ours, theirs, aim) of all that is measured; both sides give the same ids, which is checked once."""
    bare, detour = bare_tiktoken(vocabulary), Detour(vocabulary)
    writer = Writer(load_vocabulary(vocabulary)[0])
    text, chats = writer.text(SIZE), writer.chats(CHATS)
    chat_texts = render(chats)
    one = partial(bare.encode, text, allowed_special="all")
    many = partial(bare.encode_batch, chat_texts, allowed_special="all", num_threads=os.cpu_count() or 1)
    encoded = {"one": one(), "many": many()}
    for kind, ours in (("slow", QWenTokenizer(vocabulary)), ("fast", QWenTokenizerFast(vocabulary))):
        aims = (0.2, 1.2) if kind == "slow" else (None, 2.0)
        if [ours(text)["input_ids"], ours(chat_texts)["input_ids"]] != [encoded["one"], encoded["many"]]:
            raise RuntimeError(f"The ids of the {kind} class are not those of tiktoken.")
        for theirs, sides, aim in (
            ("the detour of 2023", (partial(detour, text), partial(detour, chat_texts)), aims[0]),
            ("bare tiktoken", (one, many), aims[1]),
        ):
            yield f"encode 10 MB of mixed text, {kind} class / {theirs}", partial(ours, text), sides[0], aim
            yield f"10,000 chats, {kind} class / {theirs}", partial(ours, chat_texts), sides[1], aim
        mine, other = (partial(side.decode, encoded["one"]) for side in (ours, bare))
        yield f"decode 10 MB of mixed text, {kind} class / bare tiktoken", mine, other, None
        name = f"10,000 conversations through the chat template, {kind} class / rendering them and bare tiktoken"
        floor = partial(rendered_bare, bare, chats)
        yield name, partial(ours.apply_chat_template, chats), floor, None


def rendered_bare(bare: tiktoken.Encoding, chats: list[list[dict[str, str]]]) -> list[list[int]]:
    """Render, then encode with all special tokens, also those in users' text: the least work, but open to injection."""
    return bare.encode_batch(render(chats), allowed_special="all", num_threads=os.cpu_count() or 1)


def tokenizer(rounds: Rounds = 5, results: Results = RESULTS) -> None:
    """Encode 10 MB of mixed text, and 10,000 chats as a batch of texts and as conversations, with both classes; decode.

    The other sides are the detour of 2023 in one thread, and bare tiktoken: `encode` in one thread for the long text,
    `encode_batch` with a thread for each core for the chats.
    """
    wait_for(TOKENS)
    vocabulary = os.environ.get("QWEN_TIKTOKEN", "")
    if not os.path.isfile(vocabulary):
        raise typer.BadParameter("Set QWEN_TIKTOKEN to the path of the published qwen.tiktoken.")
    for name, ours, theirs, aim in comparisons(vocabulary):
        report(compare(name, ours, theirs, rounds, aim), results)
