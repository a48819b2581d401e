"""Text to ids by the library, which are tiktoken's wherever it gives any; and where it gives none, tiktoken does."""

import copy
import gc
import itertools
import pickle
import random
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import tiktoken

from qwen1 import native_tokens_qwen, translating_qwen
from qwen1.native_tokens_qwen import TOKENS, NativeVocabulary
from qwen1.tokenization_qwen import PAT_STR, SPECIAL_TOKENS, QWenTokenizer, QWenTokenizerFast

LIBRARY = translating_qwen.wait_for(TOKENS)
needs_compiler = pytest.mark.skipif(LIBRARY is None, reason="needs g++ or clang++ on Linux")
needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="kernels are made on Linux only")
BYTES = [bytes([byte]) for byte in range(256)]
KINDS = native_tokens_qwen._kinds()
LONGEST = 4096  # bytes of a piece
NUMBERED = {token: 1000 + n for n, token in enumerate(SPECIAL_TOKENS)}


class Both:
    """A vocabulary in the library and in tiktoken, with the published pattern."""

    def __init__(self, ranks, special_tokens):
        self.native = NativeVocabulary(LIBRARY, ranks, special_tokens)
        self.tiktoken = tiktoken.Encoding("both", pat_str=PAT_STR, mergeable_ranks=ranks, special_tokens=special_tokens)

    def agree(self, text, allowed=frozenset()):
        """Whether the library gave ids; if so, they are those of tiktoken."""
        ids = self.native.encode(text, allowed)
        assert ids is None or ids == self.tiktoken.encode(text, allowed_special=set(allowed), disallowed_special=())
        return ids is not None


@pytest.fixture(scope="module")
def bytes_only():
    """Ids are bytes: whatever differs differs in how text was cut."""
    pieces = [bytes([first, second]) for first in (32, 10, 39, 46, 97, 49) for second in (32, 10, 39, 46, 97, 49)]
    return Both({token: i for i, token in enumerate([*BYTES, *pieces])}, NUMBERED)


@pytest.fixture(scope="module")
def published_both(slow):
    return Both(slow.mergeable_ranks, slow.special_tokens)


def kinds_by_tiktoken(characters):
    """What tiktoken takes each character for, found out by patterns that match nothing else."""
    ranks = {token: i for i, token in enumerate(BYTES)}
    kinds = {}
    for kind, pattern in enumerate([r"[^\s\p{L}\p{N}]", r"\p{L}", r"\p{N}", r"[^\S\r\n]", r"[\r\n]"]):
        finder = tiktoken.Encoding(f"kind{kind}", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
        for character in characters:  # what isn't matched becomes no ids
            if finder.encode_ordinary(character):
                assert character not in kinds
                kinds[character] = kind
    return kinds


@needs_compiler
@pytest.mark.no_cover
def test_every_character_is_of_the_kind_that_tiktoken_knows():
    known = [chr(code) for code, kind in enumerate(KINDS) if kind != native_tokens_qwen._UNKNOWN]
    known = [character for character in known if not "\ud800" <= character <= "\udfff"]  # which no UTF-8 has
    assert len(known) > 60_000 and "\u017f" not in known
    assert kinds_by_tiktoken(known) == {character: KINDS[ord(character)] for character in known}


@needs_compiler
def test_text_is_cut_as_by_the_pattern(bytes_only):
    """All that the alternatives tell apart, in every order."""
    alphabet = ["a", "Ω", "你", "1", "²", ".", "'", "s", "L", " ", "\t", "\u3000", "\n", "\r", "😀", "<|im_end|>"]
    generator = random.Random(0)
    texts = ["".join(generator.choices(alphabet, k=generator.randrange(1, 12))) for _ in range(20_000)]
    contractions = ["'s", "'S", "'t", "'re", "'rE", "'VE", "'m", "'ll", "'lL", "'d", "'r", "'l", "'", "'x", "''s"]
    texts += map("".join, itertools.product(("", "a", " ", "."), contractions, ("", "a", " ")))
    assert all(bytes_only.agree(text) for text in texts)
    assert all(bytes_only.agree(text, frozenset(SPECIAL_TOKENS)) for text in texts)


@needs_compiler
def test_special_tokens(bytes_only):
    texts = ["", "<", "<|", "<||>", "<|im_end", "a<|im_end|", "<|extra_1|>0|>", "<|extra_205|>", f"<|{'x' * 80}|>"]
    texts += ["<|<|im_end|>|>", " <|im_end|> ", "a  <|im_end|>", "\n<|im_end|>\n", "".join(SPECIAL_TOKENS)]
    for allowed in (SPECIAL_TOKENS, SPECIAL_TOKENS[2:4], SPECIAL_TOKENS[:1], ()):
        assert all(bytes_only.agree(text, frozenset(allowed)) for text in texts)


@needs_compiler
@pytest.mark.parametrize("character", ["\u017f", "\u08a0", "\U00020000", "\U0001e900", "\u0378"])
def test_what_versions_of_unicode_may_disagree_about_is_left_to_tiktoken(bytes_only, character):
    for before, after in itertools.product(("", "a", " ", "'", "1", ".", "\n", "<|im_end|>"), ("", "a", " ", "\n")):
        assert not bytes_only.agree(before + character + after, frozenset(SPECIAL_TOKENS))


@needs_compiler
@pytest.mark.parametrize("seed", range(6))
def test_any_vocabulary_joins_as_tiktoken(any_vocabulary, seed):
    """Pieces at every edge: of a vector, of two, of the bits of a word, of the longest."""
    ranks, letters, generator = any_vocabulary(seed, tries=60, longest=19)
    both = Both(ranks, NUMBERED)
    lengths = [*range(1, 140), 255, 256, 257, 1000, LONGEST - 1, LONGEST]
    for length in lengths * 3:
        assert both.agree("".join(generator.choices(letters, k=length)))
    assert both.native.encode("ab" * (LONGEST // 2) + "a", ()) is None


@needs_compiler
def test_published_vocabulary(published_both, golden_json):
    """Golden texts, and every token of the vocabulary that is text, alone and behind others."""
    for example in golden_json("encode"):
        published_both.agree(example["text"], frozenset(SPECIAL_TOKENS))
    ranks = list(published_both.tiktoken._mergeable_ranks)
    texts = [token.decode("utf-8", "ignore") for token in ranks[256:]]
    told = sum(published_both.agree("".join(texts[n : n + 7])) for n in range(0, len(texts), 7))
    assert told > 0.97 * len(texts) / 7


@needs_compiler
@pytest.mark.parametrize("kind", [QWenTokenizer, QWenTokenizerFast])
def test_tokenizers_give_the_same_with_it(small_vocabulary, kind, monkeypatch):
    text = "hello world, isn't it? 敏捷的狐狸，12345。\n\n  café e\u0301 ሰላም <|im_end|>\ud83d " * 3000
    batch = [text[n : n + 700] for n in range(0, len(text), 700)]
    monkeypatch.setenv(translating_qwen.SWITCH, "0")
    plain = kind(small_vocabulary)
    expected = [plain(given)["input_ids"] for given in (text, batch)]
    monkeypatch.delenv(translating_qwen.SWITCH)
    used = count_calls(monkeypatch)
    monkeypatch.setattr(native_tokens_qwen, "PAYS", 1000)
    tokenizer = kind(small_vocabulary)
    assert [tokenizer(given)["input_ids"] for given in (text, batch)] == expected
    assert sum(used) > 10


def count_calls(monkeypatch):
    """A list that gets, for each call of the library, whether it gave ids."""
    used, encode = [], NativeVocabulary.encode

    def counted(self, *given):
        ids = encode(self, *given)
        used.append(ids is not None)
        return ids

    monkeypatch.setattr(NativeVocabulary, "encode", counted)
    return used


@needs_compiler
def test_little_text_does_without(small_vocabulary, monkeypatch):
    used = count_calls(monkeypatch)
    tokenizer = QWenTokenizer(small_vocabulary)
    monkeypatch.setattr(native_tokens_qwen, "PAYS", 100)
    assert tokenizer.encode("hello" * 19) == [259] * 19
    assert not used
    assert tokenizer.encode("hello") == [259]
    assert used == [True]


@needs_compiler
@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda tokenizer: pickle.loads(pickle.dumps(tokenizer))])
def test_copies_begin_anew(small_vocabulary, monkeypatch, again):
    monkeypatch.setattr(native_tokens_qwen, "PAYS", 100)
    tokenizer = QWenTokenizer(small_vocabulary)
    tokenizer.encode("hello" * 30)
    other = again(tokenizer)
    del tokenizer
    gc.collect()
    used = count_calls(monkeypatch)
    assert other.encode("hello" * 30) == [259] * 30 and used == [True]


@needs_compiler
def test_the_library_forgets_a_vocabulary_that_nobody_has(small_tokens):
    freed = []

    def free(handle):
        freed.append(handle.value)
        LIBRARY.tokens_free(handle)

    spied = SimpleNamespace(tokens_new=LIBRARY.tokens_new, tokens_encode=LIBRARY.tokens_encode, tokens_free=free)
    native = NativeVocabulary(spied, {token: i for i, token in enumerate(small_tokens)}, NUMBERED)
    handle = native._handle.value
    assert native.encode("hello", ()) == [259] and not freed
    del native
    gc.collect()
    assert freed == [handle]


@needs_compiler
def test_threads_share_it(published_both, slow):
    texts = [f"{n} hello world 你好世界, isn't it? {n * 'ab'}" * 20 for n in range(64)]
    expected = [slow._bpe.encode_ordinary(text) for text in texts]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda text: published_both.native.encode(text, ()), texts * 5)) == expected * 5


@needs_compiler
@pytest.mark.parametrize(
    ("tokens", "first", "special"),
    [(BYTES[:-1], 0, "<|a|>"), (BYTES, 2**24, "<|a|>"), (BYTES, 0, "<|a|b|>"), (BYTES, 0, "end"), (BYTES, 0, "<|end")],
)
def test_other_vocabularies_are_left_to_tiktoken(tokens, first, special):
    def told(tokens, first, special):
        ranks = {token: i for i, token in enumerate(tokens, first)}
        return native_tokens_qwen.NativeTokens().vocabulary(10**9, ranks, {special: 300}) is not None

    assert told(BYTES, 0, "<|a|>")
    assert not told(tokens, first, special)


@needs_compiler
def test_without_room_tiktoken_does_it(small_vocabulary, monkeypatch):
    monkeypatch.setattr(native_tokens_qwen, "PAYS", 0)
    full = SimpleNamespace(tokens_new=lambda *_: None, tokens_encode=SimpleNamespace(), tokens_free=SimpleNamespace())
    monkeypatch.setattr(native_tokens_qwen, "library_of", lambda _: full)
    used = count_calls(monkeypatch)
    tokenizer = QWenTokenizer(small_vocabulary)
    assert tokenizer.encode("hello") == tokenizer.encode("hello") == [259] and not used


@needs_linux
def test_without_a_compiler(small_vocabulary, monkeypatch, tmp_path, forget_libraries):
    monkeypatch.setattr(native_tokens_qwen, "PAYS", 0)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    forget_libraries()
    used = count_calls(monkeypatch)
    tokenizer = QWenTokenizer(small_vocabulary)
    assert tokenizer.encode("hello world") == [259, 266] and not used
