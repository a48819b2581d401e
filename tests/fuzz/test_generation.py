"""Any settings of a generation: refused by a ValueError that says why, or a reply as long as was asked for."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import GenerationConfig

from qwen1 import QWenConfig, QWenLMHeadModel, QWenTokenizer

from .conftest import ROOT, heavy, objects, texts

TINY = {"n_embd": 8, "n_layer": 1, "n_head": 2, "kv_channels": 4, "ffn_hidden_size": 16, "seq_length": 512}
small = st.integers(-2, 3) | st.sampled_from(
    [0.0, 0.5, 1.0, 1.5, -0.5, float("nan"), float("inf"), True, False, None, "1", ""]
)
NUMBERS = ("temperature", "top_p", "top_k", "repetition_penalty", "seed", "num_beams", "num_return_sequences")
SWITCHES = ("do_sample", "use_cache", "reuse_cache", "append_history", "keep_stop_words")
OTHERS = ("min_new_tokens", "no_repeat_ngram_size", "max_window_size", "max_length")
settings_ = st.lists(
    st.tuples(st.sampled_from(NUMBERS), small | objects)
    | st.tuples(st.sampled_from((*SWITCHES, *OTHERS)), small)
    | st.tuples(st.just("max_new_tokens"), st.integers(-1, 4))
    | st.tuples(st.just("stop_words_ids"), st.lists(st.lists(st.integers(0, 2100), max_size=2), max_size=2) | objects)
    | st.tuples(st.just("stop_strings"), st.lists(texts, max_size=2) | texts)
    | st.tuples(st.just("eos_token_id"), st.integers(-1, 2100) | st.lists(st.integers(0, 2100), max_size=2))
    | st.tuples(st.just("cache_implementation"), st.sampled_from([None, "dynamic", "static", "quantized", "x", ""])),
    max_size=3,
).map(dict)
"""A few settings, of which most are possible."""


class Pair(tuple):
    """A model and its tokenizer."""

    def __repr__(self):
        return "chat"


@pytest.fixture(scope="module")
def chat():
    tokenizer = QWenTokenizer(ROOT / "qwen-tiny-chat" / "qwen.tiktoken")
    torch.manual_seed(0)
    config = QWenConfig(vocab_size=len(tokenizer), **TINY, use_flash_attn=False, eos_token_id=tokenizer.eod_id)
    model = QWenLMHeadModel(config).eval()
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=4,
        eos_token_id=tokenizer.eod_id,
        pad_token_id=tokenizer.eod_id,
        chat_format="chatml",
    )
    return Pair([model, tokenizer])


def attempt(function):
    """What a call gives, or the kind of its error."""
    try:
        return function()
    except (ValueError, TypeError, ImportError) as error:  # the last one names a package that isn't installed
        assert str(error)
        return type(error)


@heavy
@given(texts, st.lists(st.tuples(texts, texts), max_size=2), settings_)
def test_chat(chat, query, history, options):
    model, tokenizer = chat
    given_history = list(history)
    result = attempt(lambda: model.chat(tokenizer, query, given_history, **options))
    assert given_history == history
    if isinstance(result, tuple):
        reply, said = result
        assert isinstance(reply, str) and len(said) in (len(history), len(history) + 1)


@heavy
@given(texts, settings_)
def test_streams(chat, query, options):
    """The last text is the reply of `chat`, and each one before is its beginning."""
    model, tokenizer = chat
    options = {**options, "do_sample": False}
    options.pop("append_history", None)
    streamed = attempt(lambda: list(model.chat_stream(tokenizer, query, None, **options)))
    if isinstance(streamed, list):
        reply = attempt(lambda: model.chat(tokenizer, query, None, **options)[0])
        assert streamed[-1] == reply
        assert all(reply.startswith(text) for text in streamed)


@heavy
@given(st.lists(texts, max_size=3) | objects, settings_)
def test_batches(chat, queries, options):
    model, tokenizer = chat
    options = {name: value for name, value in options.items() if name != "reuse_cache"}
    result = attempt(lambda: model.batch_chat(tokenizer, queries, **options))
    if isinstance(result, tuple):
        assert len(result[0]) == len(result[1]) == len(list(queries))


@heavy
@given(st.lists(st.integers(0, 2047), min_size=1, max_size=6), settings_)
@example([0], {"num_beams": 0})  # divided by in transformers
def test_generate(chat, ids, options):
    model, tokenizer = chat
    prompt = torch.tensor([ids])
    options = {name: value for name, value in options.items() if name not in ("reuse_cache", "append_history")}
    options = {name: value for name, value in options.items() if name not in ("keep_stop_words", "max_window_size")}
    if "stop_strings" in options:
        options["tokenizer"] = tokenizer
    result = attempt(lambda: model.generate(prompt, **options))
    if isinstance(result, torch.Tensor):
        assert result[:, : len(ids)].tolist() == [ids] * len(result)
        assert result.shape[1] - len(ids) <= max(options.get("max_new_tokens", 4), 0)
