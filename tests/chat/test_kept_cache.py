"""Keys and values from turn to turn: less is read, nothing else changes."""

import copy
import gc
import threading
import weakref

import pytest
import torch

from qwen1 import ChatHistory, QWenCache, QWenGroupedInt8Cache, make_context
from qwen1.cache_qwen import GROUPED_BACKEND
from qwen1.fingerprint_qwen import fingerprint
from qwen1.kept_qwen import _common_length
from qwen1.ntk_qwen import ntk_alpha


@pytest.fixture
def model(chat_model):
    """With a length of training that no conversation here exceeds, unless a test says otherwise."""
    chat_model.config.seq_length = 4096
    return chat_model


@pytest.fixture
def read(model, count_read):
    """How many tokens the model was given since the last call: () -> int."""
    return count_read(model)


def talk(model, tokenizer, *queries, history=None, **kwargs):
    for query in queries:
        _, history = model.chat(tokenizer, query, history, **kwargs)
    return history


def prompt_length(tokenizer, query, history) -> int:
    return len(make_context(tokenizer, query, history, "You are a helpful assistant.")[1])


def test_replies_are_those_without_it_and_only_new_tokens_are_read(model, byte_tokenizer, read):
    plain, history = None, None
    for query in ("What is this?", "你好", "And then?", "Why?"):
        expected, plain = model.chat(byte_tokenizer, query, plain, reuse_cache=False, max_new_tokens=8)
        full = read()
        reply, history = model.chat(byte_tokenizer, query, history, max_new_tokens=8)
        assert (reply, history) == (expected, plain)
        assert read() < full or len(history) == 1
    assert history.kept is not None and plain.kept is None


def test_a_reply_that_is_text_is_not_read_again(model, byte_tokenizer, forced, read):
    history = talk(model, byte_tokenizer, "a", logits_processor=forced("It is so."))
    held = history.kept._cache.get_seq_length()
    assert held == prompt_length(byte_tokenizer, "a", None) + len("It is so.")
    read()
    talk(model, byte_tokenizer, "b", history=history, logits_processor=forced("B"))
    assert read() == prompt_length(byte_tokenizer, "b", history) - held + 1


def test_streams_take_it_up_and_leave_it_behind(model, byte_tokenizer, read):
    history, plain = model.new_history(), []
    for query in ("first", "second", "third"):
        *_, expected = model.chat_stream(byte_tokenizer, query, plain, reuse_cache=False)
        full = read()
        *_, reply = model.chat_stream(byte_tokenizer, query, history)
        assert reply == expected
        assert read() < full or query == "first"
        history.append((query, reply))
        plain.append((query, reply))
        assert history.kept is not None


def test_a_stream_that_is_closed_leaves_what_was_read(model, byte_tokenizer, read):
    history = talk(model, byte_tokenizer, "first")
    first = history.kept
    stream = model.chat_stream(byte_tokenizer, "second", history, max_new_tokens=200, min_new_tokens=200)
    next(stream)
    stream.close()
    assert history.kept is not first
    expected = model.chat(byte_tokenizer, "third", history, reuse_cache=False)
    assert model.chat(byte_tokenizer, "third", history) == expected


def test_branches_of_a_conversation_are_apart(model, byte_tokenizer):
    start = talk(model, byte_tokenizer, "first", "second")
    plain = list(start)
    for queries in (("left", "on"), ("right", "on"), ("left", "on")):
        assert talk(model, byte_tokenizer, *queries, history=start) == talk(
            model, byte_tokenizer, *queries, history=plain, reuse_cache=False
        )


def test_requests_at_once_are_apart(model, byte_tokenizer):
    start = talk(model, byte_tokenizer, "first", "second")
    queries = [f"question {i}" for i in range(6)]
    expected = [model.chat(byte_tokenizer, query, list(start), reuse_cache=False)[0] for query in queries]
    replies = [None] * len(queries)

    def ask(i):
        replies[i] = model.chat(byte_tokenizer, queries[i], start)[0]

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(queries))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert replies == expected


def change_turns(model, history):
    history[0] = ("other", "words")
    return {}


def change_weights(model, history):
    for weight in model.transformer.h[0].parameters():
        weight.add_(0.05)
    return {}


def replace_weights(model, history):
    model.transformer.wte = torch.nn.Embedding(*model.transformer.wte.weight.shape)
    return {}


def train_by_fused_optimizer(model, history):
    """As the Trainer does by default: such an optimizer doesn't raise the version of a tensor."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, fused=True)
    ids = torch.arange(20)[None]
    with torch.enable_grad():
        model(ids, labels=ids).loss.backward()
    optimizer.step()
    return {}


def edit_by_numpy(model, history):
    model.transformer.wte.weight.numpy()[:64] += 0.5
    return {}


CHANGES = {
    "turns": change_turns,
    "system": lambda model, history: {"system": "Be brief."},
    "window": lambda model, history: {"max_window_size": 90},
    "trained weights": change_weights,
    "replaced weights": replace_weights,
    "a fused optimizer": train_by_fused_optimizer,
    "numpy": edit_by_numpy,
    "a setting": lambda model, history: setattr(model.transformer.h[0].ln_1, "eps", 0.5) or {},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@torch.no_grad()
def test_what_has_changed_is_read_anew(model, byte_tokenizer, change):
    history = talk(model, byte_tokenizer, "first", "second")
    unchanged = model.chat(byte_tokenizer, "third", list(history))
    settings = change(model, history)
    expected = model.chat(byte_tokenizer, "third", list(history), **settings)
    assert expected != unchanged
    assert model.chat(byte_tokenizer, "third", history, **settings) == expected


def test_nothing_is_kept_where_a_function_may_change_what_is_computed(model, byte_tokenizer):
    """What a hook does the next time, nobody can tell."""
    scale = [1.0]
    hook = model.transformer.h[0].register_forward_hook(lambda module, inputs, output: scale[0] * output)
    history = talk(model, byte_tokenizer, "first")
    assert history.kept is None
    scale[0] = 3.0
    expected = model.chat(byte_tokenizer, "second", list(history))
    assert model.chat(byte_tokenizer, "second", history) == expected
    hook.remove()
    assert talk(model, byte_tokenizer, "third", history=history).kept is not None


def test_weights_that_change_while_a_turn_is_written_end_what_it_keeps(model, byte_tokenizer):
    history = model.new_history()
    for _ in model.chat_stream(byte_tokenizer, "first", history, max_new_tokens=8, min_new_tokens=8):
        model.lm_head.weight.data[0] += 1e-3
    assert history.kept is not None
    history.append(("first", "reply"))
    assert history.kept.branch(model, fingerprint(model), history.kept._ids) is None


def test_another_model_reads_anew(model, byte_tokenizer, tiny_model, read):
    history = talk(model, byte_tokenizer, "first")
    other = tiny_model("sdpa", seed=5, seq_length=4096)
    other.generation_config = model.generation_config
    assert other.chat(byte_tokenizer, "second", history) == other.chat(byte_tokenizer, "second", list(history))


def test_another_ntk_band_reads_anew(model, byte_tokenizer, read):
    model.config.seq_length = 100
    history = talk(model, byte_tokenizer, "first", max_new_tokens=4)
    read()
    query = "x" * 20
    length = prompt_length(byte_tokenizer, query, history)
    assert 100 < length < 200
    reply, longer = model.chat(byte_tokenizer, query, history, max_new_tokens=4)
    assert read() >= length
    assert reply == model.chat(byte_tokenizer, query, list(history), reuse_cache=False, max_new_tokens=4)[0]
    read()
    model.chat(byte_tokenizer, "y", longer, max_new_tokens=4)  # the same band again
    assert read() < prompt_length(byte_tokenizer, "y", longer)


def test_dynamic_scaling_reads_anew_once_it_has_begun(model, byte_tokenizer, tiny_model, read):
    """What a key was rotated by is the length that the text had then."""
    rope = {"rope_type": "dynamic", "factor": 2.0}
    scaled = tiny_model("sdpa", use_dynamic_ntk=False, n_positions=120, rope_parameters=rope)
    scaled.generation_config = model.generation_config
    history = talk(scaled, byte_tokenizer, "first", max_new_tokens=4)
    assert history.kept.branch(scaled, fingerprint(scaled), history.kept._ids) is not None
    query = "x" * 20
    assert prompt_length(byte_tokenizer, query, history) > 120
    reply, longer = scaled.chat(byte_tokenizer, query, history, max_new_tokens=4)
    assert reply == scaled.chat(byte_tokenizer, query, list(history), reuse_cache=False, max_new_tokens=4)[0]
    # Short again, but these keys are stretched.
    assert longer.kept.branch(scaled, fingerprint(scaled), longer.kept._ids[:100]) is None


@pytest.mark.parametrize(
    "settings",
    [
        {"reuse_cache": False},
        {"num_beams": 2},
        {"cache_implementation": "static"},
        {"use_cache": False},
        {"prompt_lookup_num_tokens": 3},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_other_caches_are_not_carried(model, byte_tokenizer, settings):
    history = talk(model, byte_tokenizer, "first")
    _, history = model.chat(byte_tokenizer, "second", history, max_new_tokens=4, **settings)
    assert isinstance(history, ChatHistory) and history.kept is None


def test_published_int8_keys_are_not_carried(model, byte_tokenizer):
    """What they are depends on what was read together."""
    model.config.use_cache_quantization = True
    assert talk(model, byte_tokenizer, "first").kept is None


GROUPED = {"cache_implementation": "quantized", "cache_config": {"backend": GROUPED_BACKEND}}


@pytest.mark.parametrize("by", ["configuration", "arguments", "settings"])
@pytest.mark.no_cover
def test_grouped_int8_keys_are_carried(model, byte_tokenizer, read, by):
    """Replies are those of a conversation that is read anew with the same cache, in streams and batches too."""
    model.double()
    asked = GROUPED if by == "arguments" else {}
    if by == "configuration":
        model.config.use_cache_quantization = "grouped"
    elif by == "settings":
        model.generation_config.update(**GROUPED)
    plain, history = None, None
    for query in ("What is this?", "你好", "And then?"):
        expected, plain = model.chat(byte_tokenizer, query, plain, reuse_cache=False, max_new_tokens=8, **asked)
        full = read()
        before = None if history is None else history.copy()
        reply, history = model.chat(byte_tokenizer, query, history, max_new_tokens=8, **asked)
        assert (reply, history) == (expected, plain)
        assert read() < full or len(history) == 1
        assert type(history.kept._cache) is QWenGroupedInt8Cache
        assert list(model.chat_stream(byte_tokenizer, query, before, max_new_tokens=8, **asked))[-1] == expected
        read()
    earlier = plain[:-1]
    replies, _ = model.batch_chat(byte_tokenizer, ["And then?", "Hi"], [earlier, None], max_new_tokens=8, **asked)
    assert replies[0] == expected


@pytest.mark.parametrize(("first", "second"), [({}, GROUPED), (GROUPED, {})], ids=["fewer bits", "more bits"])
def test_keys_in_other_bits_are_read_anew(model, byte_tokenizer, read, first, second):
    history = talk(model, byte_tokenizer, "first", max_new_tokens=4, **first)
    read()
    history = talk(model, byte_tokenizer, "second", history=history, max_new_tokens=4, **second)
    assert read() >= prompt_length(byte_tokenizer, "second", history[:1])
    assert type(history.kept._cache) is (QWenGroupedInt8Cache if second else QWenCache)


def test_groups_of_another_size_are_read_anew(model, byte_tokenizer, read):
    history = talk(model, byte_tokenizer, "first", max_new_tokens=4, **GROUPED)
    read()
    smaller = {**GROUPED, "cache_config": {"backend": GROUPED_BACKEND, "q_group_size": 8}}
    history = talk(model, byte_tokenizer, "second", history=history, max_new_tokens=4, **smaller)
    assert read() >= prompt_length(byte_tokenizer, "second", history[:1])


def test_another_ntk_band_reads_grouped_keys_anew(model, byte_tokenizer, read):
    model.config.seq_length = 200
    history = talk(model, byte_tokenizer, "a" * 100, max_new_tokens=4, **GROUPED)
    read()
    expected, _ = model.chat(byte_tokenizer, "b" * 100, list(history), max_new_tokens=4, reuse_cache=False, **GROUPED)
    full = read()
    assert model.chat(byte_tokenizer, "b" * 100, history, max_new_tokens=4, **GROUPED)[0] == expected
    assert read() == full


def test_it_goes_with_the_history_and_on_request(model, byte_tokenizer):
    history = talk(model, byte_tokenizer, "first")
    kept = weakref.ref(history.kept)
    del history
    gc.collect()
    assert kept() is None
    history = talk(model, byte_tokenizer, "first")
    history.drop_cache()
    assert history.kept is None and len(history) == 1


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, ChatHistory.copy], ids=["copy", "deepcopy", "method"])
def test_copies_carry_it(model, byte_tokenizer, copied):
    history = talk(model, byte_tokenizer, "first")
    other = copied(history)
    assert other == history and other is not history and other.kept is history.kept
    other.append(("a", "b"))
    assert len(history) == 1


def test_the_model_is_not_kept_alive(model, byte_tokenizer, tiny_model):
    other = tiny_model("sdpa")
    other.generation_config = model.generation_config
    history, gone = talk(other, byte_tokenizer, "first"), weakref.ref(other)
    del other
    gc.collect()
    assert gone() is None
    assert model.chat(byte_tokenizer, "second", history) == model.chat(byte_tokenizer, "second", list(history))


@pytest.mark.parametrize(
    ("first", "second", "length"), [([], [1], 0), ([1, 2], [1, 2, 3], 2), ([1, 2, 3], [1, 2], 2), ([1, 2], [1, 3], 1)]
)
def test_common_length(first, second, length):
    assert _common_length(first, second) == length


@pytest.mark.parametrize("beyond", [-1, 0, 1, 2])
@pytest.mark.parametrize("edge", [1, 2, 4])
def test_every_length_around_every_edge(chat_model, byte_tokenizer, edge, beyond, forced):
    """A prompt one token beyond an edge asks for another stretch, which a single position would not tell."""
    chat_model.config.seq_length = 128
    history = talk(chat_model, byte_tokenizer, "a", logits_processor=forced("b"))
    query = "q" * (edge * 128 + beyond - prompt_length(byte_tokenizer, "", history))
    expected = chat_model.chat(byte_tokenizer, query, history, reuse_cache=False)
    assert chat_model.chat(byte_tokenizer, query, history) == expected


def test_the_stretch_of_kept_keys_is_that_of_the_prompt(chat_model, byte_tokenizer, forced):
    """Whatever the length, what is kept is used exactly where a prompt of it asks for the same stretch."""
    chat_model.config.seq_length = 64
    history = talk(chat_model, byte_tokenizer, "a" * 8, logits_processor=forced("b"))
    held = history.kept._cache.qwen_ntk.alpha.item()
    ids, made_by = history.kept._ids, fingerprint(chat_model)
    for length in range(len(ids) + 1, 300):
        asked = ntk_alpha(torch.tensor([length]), 64).item()
        branch = history.kept.branch(chat_model, made_by, ids + [7] * (length - len(ids)))
        assert (branch is not None) == (asked == held), length
