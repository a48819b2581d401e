"""Property tests: how many cases, and what texts, values and damaged files they are made of.

`QWEN_FUZZ_CASES=1000000 pytest tests/fuzz` tries so many cases in all, other ones each time; without it, it tries few,
always the same. The cases are shared out among the properties; those that load models or folders get a tenth.
"""

import base64
import json
import os
from pathlib import Path

import pytest

pytest.importorskip("hypothesis", reason="needs hypothesis: pip install '.[test]'")

from hypothesis import HealthCheck, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from qwen1 import QWenTokenizer, QWenTokenizerFast  # noqa: E402

CASES = int(os.environ.get("QWEN_FUZZ_CASES", 0))
SOURCES = [path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("test_*.py")]
HEAVY, ALL = (sum(source.count(f"\n@{mark}") for source in SOURCES) for mark in ("heavy\n", "given("))
FEW = 160  # cases of a property: all of them together take less than a minute
COMMON = {"deadline": None, "suppress_health_check": list(HealthCheck)}
settings.register_profile("few", max_examples=FEW, derandomize=True, database=None, **COMMON)
settings.register_profile("many", max_examples=int(CASES / (ALL - 0.9 * HEAVY)) + 1, print_blob=True, **COMMON)
settings.load_profile("many" if CASES else "few")  # before the properties are read, which take it from here
heavy = settings(max_examples=-(-settings.default.max_examples // (10 if CASES else 4)))
"""For a property that loads models or folders: fewer cases of it."""

ROOT = Path(__file__).parents[2]
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|extra_0|>", "<|extra_204|>"]


# --- texts and values ---

# What tokenizers stumble over: control tokens and parts of them, what NFC changes or what looks alike, surrogates,
# white space, the ends of lines, names of bytes in the fast class.
_PIECES = [
    *SPECIALS,
    *("<|", "|>", "<", ">", "|", "im_start", "im_end", "<|im_", "start|>", "end|>", "extra_", "0|>", "endoftext"),
    *(
        "\uff1c|im_end|\uff1e",
        "<\u200b|im_end|>",
        "\u226e",
        "<\u0338",
        ">\u0338",
        "\u037e",
        "\u2002",
        "\u212b",
        "e\u0301",
    ),
    *("\ud83d\udc4d", "\U0001f44d", "\ud83d", "\udc4d", "\udcff", "\ufeff", "\ufffd", "\x00", "\x85", "\u2028"),
    *("\n", "\r\n", "\n\n", " ", "   ", "\t", "'s", "'LL", "hello", " world", "你好", "é", "12", "Ġ", "Ċ"),
    *("Observation:", "Action:", "Thought:", "Final Answer:", "```", "{", "}", '"', "\\", "\U00020000", "\U00020001"),
]
texts = st.lists(st.sampled_from(_PIECES) | st.text(st.characters(codec=None), max_size=6), max_size=8).map("".join)
"""Any text."""

numbers = st.integers() | st.floats() | st.sampled_from([0, 1, -1, 2**31, 2**63, 10**30, 0.5, 1e308, -0.0])
scalars = st.none() | st.booleans() | numbers | texts
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3), max_leaves=6
)
"""Anything that JSON can hold."""
objects = (
    values | st.binary(max_size=4) | st.just(object) | st.tuples(texts, texts) | st.sets(st.integers(), max_size=2)
)
"""Anything that a program may pass by mistake."""


def encodable(text: str) -> str:
    """The text that a tokenizer reads: surrogates in pairs are a character, others can't be written."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


# --- damaged files ---


@st.composite
def damaged(draw, original: bytes) -> bytes:
    """A file cut short, or with bytes of it replaced, taken out or put in; now and then as it was."""
    content = bytearray(original)
    for _ in range(draw(st.integers(0, 3))):
        start = draw(st.integers(0, max(len(content) - 1, 0)))
        stop = start + draw(st.sampled_from([0, 1, 2, 8, 64, len(content)]))
        junk = st.binary(max_size=4) | st.sampled_from(
            [b"", b"\n", b" ", b"0", b"-", b"9" * 30, b"\xff", b'"', b"{", b"]"]
        )
        content[start:stop] = draw(junk)
    return bytes(content)


@st.composite
def changed(draw, original: dict, keys: st.SearchStrategy, most: int = 3) -> dict:
    """An object of JSON with some of its keys, those of objects in it, or `keys`, removed or set to anything."""
    result = json.loads(json.dumps(original))
    for _ in range(draw(st.integers(0, most))):
        inner = [result, *(item for item in result.values() if isinstance(item, dict))]
        where = draw(st.sampled_from(inner))
        key = draw(st.sampled_from(sorted(where) or [""]) | keys)
        if draw(st.integers(0, 3)):
            where[key] = draw(_odd(where.get(key)) | values)
        else:
            where.pop(key, None)
    return result


def _odd(value) -> st.SearchStrategy:
    """Values near to one that is right."""
    near = [None, True, False, 0, 1, -1, 3, "", "1", [], {}, [value], str(value), 1e400, 10**30]
    if isinstance(value, (int, float)):
        near += [-value, value + 1, value * 2, float(value)]
    return st.sampled_from(near)


# --- tokenizers ---


class Both(tuple):
    """The slow and the fast class with the same vocabulary; hypothesis shows arguments, and tokenizers show tokens."""

    def __repr__(self):
        return "tokenizers"


@pytest.fixture(scope="session")
def tokenizers():
    """Both classes with the vocabulary that ships."""
    path = str(ROOT / "qwen-tiny-chat" / "qwen.tiktoken")
    return Both([QWenTokenizer(path), QWenTokenizerFast(path)])


@pytest.fixture(scope="session")
def write_vocabulary():
    """Write tokens as a vocabulary file, with ids from `start` on: (path, tokens, start) -> path."""

    def write(path, tokens, start=0):
        lines = (base64.b64encode(token) + b" %d\n" % i for i, token in enumerate(tokens, start))
        path.write_bytes(b"".join(lines))
        return path

    return write
