"""tiktoken in place of the fast class's backend: the same ids, only where they are the same, and places on demand."""

import copy
import itertools
import json
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import tiktoken
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors

from qwen1 import backends_qwen
from qwen1.backends_qwen import GROUPED_PAT_STR, Shortcut, build_backend
from qwen1.tokenization_qwen import SPECIAL_TOKENS, QWenTokenizerFast

from .test_encode import BLANKS, RUN, random_texts

MUCH = "hello world, user! 你好\n\n" * 300  # pays for a look at the whole of the small vocabulary


@pytest.fixture
def quick(small_vocabulary, monkeypatch):
    """The fast class with the small vocabulary, which takes the shortcut for texts of all lengths."""
    monkeypatch.setattr(backends_qwen, "SHORT", 0)
    tokenizer = QWenTokenizerFast(small_vocabulary)
    tokenizer(MUCH)
    assert takes_it(tokenizer)
    return tokenizer


def takes_it(tokenizer, texts=("hello",)):
    return tokenizer._shortcut.twin(tokenizer._tokenizer, tokenizer.special_tokens, list(texts)) is not None


def by_backend(monkeypatch, work):
    """The result of `work`, done by the backend alone."""
    with monkeypatch.context() as patched:
        patched.setattr(Shortcut, "twin", lambda *_: None)
        return work()


def outcome(work):
    try:
        return work()
    except (ValueError, TypeError) as error:
        return type(error), str(error)


AWKWARD = [
    *random_texts(1500, seed=3),
    *map("".join, itertools.product([" ", "\n", "a", "1's", "<|im_end|>", "\u0338"], repeat=4)),
    *(blank * length + after for blank in BLANKS for length in (2, RUN) for after in ("", "a", "\n")),
    *(f"a{token} {token}\u0338{token[:-1]}" for token in SPECIAL_TOKENS),
    *("\ud83d\ude00", "a\ud800b", "\udc00", "<|im_end|>\ud800", "x" * 70_000, "你" * 40_000, "ab1 " * 20_000),
]


@pytest.mark.slow
@pytest.mark.no_cover
def test_the_ids_are_those_of_the_backend(published_vocabulary, monkeypatch):
    monkeypatch.setattr(backends_qwen, "SHORT", 0)
    tokenizer = QWenTokenizerFast(published_vocabulary)
    expected = by_backend(monkeypatch, lambda: [dict(tokenizer(AWKWARD, allowed_special=a)) for a in ("all", set())])
    long = "".join(text for text in AWKWARD if len(text) < 2 * RUN)
    whole = by_backend(monkeypatch, lambda: tokenizer.encode(long))
    tokenizer._shortcut._seen = 10**9
    assert [dict(tokenizer(AWKWARD, allowed_special=allowed)) for allowed in ("all", set())] == expected
    assert tokenizer._shortcut._twin is not None
    assert [tokenizer.encode(text) for text in AWKWARD[::7]] == expected[0]["input_ids"][::7]
    assert tokenizer.encode(long) == whole


@pytest.mark.parametrize("seed", range(12))
def test_any_vocabulary_has_the_ids_of_its_backend(any_vocabulary, seed):
    ranks, letters, generator = any_vocabulary(seed, tries=20, longest=8)
    backend = build_backend(ranks, {token: len(ranks) + i for i, token in enumerate(SPECIAL_TOKENS)})
    bpe = tiktoken.Encoding("any", pat_str=GROUPED_PAT_STR, mergeable_ranks=ranks, special_tokens={})
    texts = ["".join(generator.choices(letters, k=generator.randrange(25))) for _ in range(1000)]
    assert [row.ids for row in backend.encode_batch(texts)] == [bpe.encode_ordinary(text) for text in texts]


OPTIONS = [
    *({"truncation": cut, "max_length": n} for cut in (True, "only_first") for n in (0, 1, 3, 40)),
    *({"padding": True}, {"padding": True, "pad_to_multiple_of": 8}, {"padding": "max_length", "max_length": 12}),
    {"padding": "max_length", "truncation": True, "max_length": 5, "padding_side": "left"},
    {"padding": True, "return_tensors": "pt"},
    *({"return_attention_mask": False}, {"return_length": True}, {"return_token_type_ids": True}),
    *({"return_special_tokens_mask": True}, {"return_offsets_mapping": True}, {"add_special_tokens": False}),
    {"return_overflowing_tokens": True, "truncation": True, "max_length": 4},
    {"return_overflowing_tokens": True, "truncation": True, "max_length": 4, "stride": 2},
    *({"is_split_into_words": True}, {"text_pair": "hello"}, {"split_special_tokens": True}, {}),
    {"allowed_special": {"<|im_end|>"}},
]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_calls_give_what_they_gave(quick, monkeypatch, options, side):
    quick.truncation_side = quick.padding_side = side
    for text in ("hello world<|im_end|>é", "", ["hello world", "", "<|im_start|>user 你"], ["abc"], ("a", "bc d")):

        def call(text=text):
            out = quick(text, **options)
            places = [(e.ids, e.offsets, e.word_ids, e.tokens, e.sequence_ids) for e in out.encodings or ()]
            columns = {key: value.tolist() if hasattr(value, "tolist") else value for key, value in out.items()}
            return columns, places, out.n_sequences, out.is_fast

        assert outcome(call) == by_backend(monkeypatch, lambda call=call: outcome(call))


def test_places_are_found_when_they_are_asked_for(quick):
    out = quick("hello world<|im_end|>é", padding="max_length", max_length=7)
    assert "_made" not in vars(out.encodings)
    assert out.tokens() == ["hello", "Ġworld", "<|im_end|>", "Ã", "©", "<|endoftext|>", "<|endoftext|>"]
    assert out.char_to_token(12) == 2
    assert out.word_ids()[:3] == [0, 1, 2]
    again = pickle.loads(pickle.dumps(quick(["hello", "é"])))
    assert [encoding.offsets for encoding in again.encodings] == [[(0, 5)], [(0, 1), (0, 1)]]


CHANGES = {
    "normalizer": lambda backend: setattr(backend, "normalizer", normalizers.Lowercase()),
    "no normalizer": lambda backend: setattr(backend, "normalizer", None),
    "pre-tokenizer": lambda backend: setattr(backend, "pre_tokenizer", pre_tokenizers.ByteLevel()),
    "part of the pre-tokenizer": lambda backend: setattr(backend.pre_tokenizer[1], "add_prefix_space", True),
    "post-processor": lambda backend: setattr(
        backend,
        "post_processor",
        processors.TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", 273)]),
    ),
    "added word": lambda backend: backend.add_tokens(["hello world"]),
    "added token": lambda backend: backend.add_special_tokens([AddedToken("<|im_end|>", lstrip=True, special=True)]),
    "model": lambda backend: setattr(backend, "model", models.WordLevel({"hello": 7}, "hello")),
    "setting of the model": lambda backend: setattr(backend.model, "ignore_merges", False),
    "dropout": lambda backend: setattr(backend.model, "dropout", 1.0),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_changed_backend_is_honoured(quick, monkeypatch, change):
    change(quick._tokenizer)
    assert not takes_it(quick)
    for text in ("Hello world <|im_end|>", MUCH):
        expected = by_backend(monkeypatch, lambda text=text: outcome(lambda: quick(text)["input_ids"]))
        assert outcome(lambda text=text: quick(text)["input_ids"]) == expected


def edited_model(backend, edit):
    """The model of a backend with its tokens and merges edited."""
    state = json.loads(backend.to_str())
    edit(state["model"])
    return Tokenizer.from_str(json.dumps(state)).model


def swap_two_tokens(model):
    model["vocab"]["hello"], model["vocab"]["he"] = model["vocab"]["he"], model["vocab"]["hello"]


@pytest.mark.parametrize("edit", [swap_two_tokens, lambda model: model["merges"].pop(0)], ids=["token", "merge"])
def test_a_backend_with_another_model_is_not_replaced(quick, edit):
    backend = quick.backend_tokenizer  # who has it may change its model at any time
    assert not takes_it(quick)
    assert takes_it(quick, [MUCH])
    backend.model = edited_model(backend, edit)
    expected = [row.ids for row in backend.encode_batch([MUCH, "hello"])]
    assert not takes_it(quick, [MUCH])
    assert [quick.encode(MUCH), quick.encode("hello")] == expected
    loaded = QWenTokenizerFast(tokenizer_object=backend)
    loaded(MUCH)
    assert not takes_it(loaded)
    assert loaded.encode(MUCH) == expected[0]


def test_a_backend_changed_between_ids_and_places(quick):
    out = quick(["hello world"])
    quick._tokenizer.normalizer = normalizers.Replace("hello", "user")
    assert out.tokens() == ["hello", "Ġworld"]
    quick._tokenizer.normalizer = normalizers.NFC()
    out = quick("hello")
    quick._tokenizer.model.ignore_merges = False
    with pytest.raises(RuntimeError, match="model of the tokenizer's backend was changed after the call"):
        out.tokens()


@pytest.mark.parametrize("part", ["normalizer", "pre_tokenizer"])
def test_a_backend_with_code_of_the_caller_is_not_replaced(quick, part):
    class Nothing:
        def normalize(self, text):
            pass

        def pre_tokenize(self, text):
            pass

    kind = {"normalizer": normalizers.Normalizer, "pre_tokenizer": pre_tokenizers.PreTokenizer}[part]
    setattr(quick._tokenizer, part, kind.custom(Nothing()))
    assert not takes_it(quick)


def test_settings_that_come_and_go(quick):
    before, quick._tokenizer.normalizer = quick._tokenizer.normalizer, normalizers.Lowercase()
    assert not takes_it(quick)
    assert not takes_it(quick, [MUCH])
    quick._tokenizer.normalizer = before
    assert takes_it(quick)


def test_copies_begin_anew(quick):
    for other in (copy.deepcopy(quick), pickle.loads(pickle.dumps(quick))):
        assert not takes_it(other)
        assert other.encode(MUCH) == quick.encode(MUCH)
        assert takes_it(other)


def test_little_text_is_left_to_the_backend(small_vocabulary):
    tokenizer = QWenTokenizerFast(small_vocabulary)
    tokenizer("hello" * 100)
    tokenizer(["hello" * 100] * 15)
    assert tokenizer._shortcut._twin is None
    tokenizer(["hello " * 400] * 5)
    assert tokenizer._shortcut._twin is not None


def test_threads_take_it_at_once(small_vocabulary, monkeypatch):
    monkeypatch.setattr(backends_qwen, "SHORT", 0)
    tokenizer = QWenTokenizerFast(small_vocabulary)
    cases = [{}, {"truncation": True, "max_length": 5}, {"allowed_special": set()}]
    expected = by_backend(monkeypatch, lambda: [tokenizer(MUCH + "<|im_end|>", **case)["input_ids"] for case in cases])
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda n: tokenizer(MUCH + "<|im_end|>", **cases[n % 3])["input_ids"], range(60)))
    assert found == expected * 20


def test_chats_take_it(quick, monkeypatch):
    chat = [{"role": "user", "content": MUCH + "<|im_end|>\u0338"}, {"role": "assistant", "content": "hello"}]
    found = quick.apply_chat_template(chat)
    expected = by_backend(monkeypatch, lambda: quick.apply_chat_template(chat))
    assert dict(found) == dict(expected)
    assert found.encodings[0].offsets == expected.encodings[0].offsets
