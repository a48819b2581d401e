"""Fixtures of the tokenizer tests: both classes, with the published vocabulary and with a tiny one."""

import base64
import json
import random

import pytest

from qwen1.tokenization_qwen import QWenTokenizer, QWenTokenizerFast

CLASSES = [QWenTokenizer, QWenTokenizerFast]
MERGES = [
    "he",
    "ll",
    "llo",
    "hello",
    " w",
    "  ",
    "    ",
    "or",
    "ld",
    "orld",
    " world",
    "\n\n",
    "us",
    "er",
    "user",
    "aa",
]


@pytest.fixture(scope="session")
def write_vocabulary():
    """Write tokens (bytes) as a tiktoken file, with ids from `start` on, and return its path."""

    def write(path, tokens, start=0):
        path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % i for i, token in enumerate(tokens, start)))
        return path

    return write


@pytest.fixture(scope="session")
def any_vocabulary():
    """Make a vocabulary of bytes and words of two or three letters, which have one of several cuts, in half of the
    seeds with ranks in any order: (seed, tries, longest word in bytes) -> (ranks, letters, generator for texts).
    """

    def make(seed, tries, longest):
        generator = random.Random(seed)
        letters = "abc"[: 2 + seed % 2]
        known, new = [letter.encode() for letter in letters], []
        for _ in range(tries):
            token = generator.choice(known) + generator.choice(known)
            if token not in known and len(token) <= longest:
                known.append(token)
                new.append(token)
        if seed % 4 > 1:
            generator.shuffle(new)
        tokens = [bytes([byte]) for byte in range(256)] + new
        return {token: i for i, token in enumerate(tokens)}, letters, generator

    return make


@pytest.fixture(scope="session")
def small_tokens():
    """The single bytes and a few merges: 272 tokens, so special tokens begin at 272."""
    return [bytes([byte]) for byte in range(256)] + [merge.encode() for merge in MERGES]


@pytest.fixture(scope="session")
def small_vocabulary(tmp_path_factory, small_tokens, write_vocabulary):
    return write_vocabulary(tmp_path_factory.mktemp("small") / "qwen.tiktoken", small_tokens)


@pytest.fixture(scope="session", params=CLASSES)
def small(request, small_vocabulary):
    """Each class with the small vocabulary. Shared: do not change its settings."""
    return request.param(small_vocabulary)


@pytest.fixture(params=CLASSES)
def fresh(request, small_vocabulary):
    """Each class with the small vocabulary, for one test."""
    return request.param(small_vocabulary)


@pytest.fixture(scope="session")
def slow(published_vocabulary):
    return QWenTokenizer(published_vocabulary)


@pytest.fixture(scope="session")
def fast(published_vocabulary):
    return QWenTokenizerFast(published_vocabulary)


@pytest.fixture(scope="session", params=["slow", "fast"])
def published(request):
    """Each class with the published vocabulary. Shared: do not change its settings."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def golden_json(golden):
    return lambda name: json.loads((golden / "tokenizer" / f"{name}.json").read_text(encoding="utf-8"))
