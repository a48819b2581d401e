"""Whether a text has ended, asked one token late: on a GPU where there is one, else of a CPU that is asked so."""

import copy
import functools
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
    TextStreamer,
)
from transformers.generation.streamers import BaseStreamer

from qwen1 import QWenConfig, QWenLMHeadModel, QWenModel, ending_qwen
from qwen1.cache_qwen import QWenCache
from qwen1.ending_qwen import Late, with_late_answers
from qwen1.qwen_generation_utils import StopWordsCriteria
from qwen1.warming_qwen import wait

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
TINY_CHAT = Path(__file__).parents[2] / "qwen-tiny-chat"
pytestmark = [pytest.mark.gpu] if ON_GPU else []


@pytest.fixture(autouse=True)
def late(monkeypatch):
    monkeypatch.setattr(ending_qwen, "DEVICE", DEVICE)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    shape = dict(vocab_size=100, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, kv_channels=32)
    model = QWenLMHeadModel(QWenConfig(**shape, ffn_hidden_size=64, eos_token_id=99)).to(DEVICE).eval()
    model.generation_config.update(pad_token_id=0, do_sample=False)
    return model


def ids_of(rows):
    return torch.randint(1, 90, (rows, 7), generator=torch.Generator().manual_seed(1)).to(DEVICE)


class Tokens(BaseStreamer):
    def __init__(self):
        self.given = []

    def put(self, value):
        assert value.device.type == "cpu"
        self.given.append(value.tolist())

    def end(self):
        self.given.append("end")


def written(model, rows, monkeypatch=None, **options):
    """Tokens, those streamed, and what the cache holds; asked at once where there is a monkeypatch."""
    cache, streamer, ids = QWenCache(config=model.config), Tokens() if rows == 1 else None, ids_of(rows)
    if monkeypatch is None:
        output = model.generate(ids, cache=cache, streamer=streamer, **options)
    else:
        with monkeypatch.context() as patch:
            patch.setattr(ending_qwen, "DEVICE", "none")
            output = model.generate(ids, cache=cache, streamer=streamer, **options)
    assert type(output) is torch.Tensor
    wait()  # for kernels of the GPU, which are compiled in the background and add up in another order
    return output.tolist(), streamer and streamer.given, [layer.keys.cpu() for layer in cache.layers]


def assert_same(found, expected):
    assert found[:2] == expected[:2]
    torch.testing.assert_close(found[2], expected[2], atol=1e-5, rtol=0)


def calls_of(model, **options):
    """What was written, and how often the model was called for it."""
    calls, forward = [], QWenModel.forward

    def counted(self, *args, **kwargs):
        calls.append(1)
        return forward(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(QWenModel, "forward", functools.wraps(forward)(counted))
        output = model.generate(ids_of(1), **options)
    return output[0, 7:].tolist(), len(calls)


@pytest.mark.parametrize("sampled", [{}, {"do_sample": True, "seed": 5}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("most", [1, 2, 12])
def test_the_same_is_written_streamed_and_kept(model, monkeypatch, rows, most, sampled):
    common = dict(max_new_tokens=most, **sampled)
    tokens = {token for row in written(model, rows, **common)[0] for token in row[7:]}
    for end in (None, 98, *sorted(tokens)[:4], sorted(tokens)):
        options = dict(common, eos_token_id=end)
        assert_same(written(model, rows, **options), written(model, rows, monkeypatch, **options))


def test_a_text_that_ends_by_itself_costs_one_call_more(model, monkeypatch):
    tokens, calls = calls_of(model, max_new_tokens=12, eos_token_id=None)
    assert len(tokens) == calls == 12, "that it has its greatest length is known without the GPU"
    end = tokens[5]
    options = dict(max_new_tokens=12, eos_token_id=end)
    assert calls_of(model, **options) == (tokens[: tokens.index(end) + 1], tokens.index(end) + 2)
    monkeypatch.setattr(ending_qwen, "DEVICE", "none")
    assert calls_of(model, **options) == (tokens[: tokens.index(end) + 1], tokens.index(end) + 1)


def test_stop_words_are_asked_for_late_too(model, monkeypatch):
    tokens, _ = calls_of(model, max_new_tokens=12, eos_token_id=None)
    options = dict(max_new_tokens=12, eos_token_id=None, stop_words_ids=[tokens[3:5]])
    assert_same(written(model, 1, **options), written(model, 1, monkeypatch, **options))
    found, calls = calls_of(model, **options)
    assert len(found) < 12 and calls == len(found) + 1


class Never(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


class Nothing(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores


@pytest.mark.parametrize(
    "options",
    [
        {"stopping_criteria": StoppingCriteriaList([Never()])},
        {"logits_processor": [Nothing()]},
        {"prefix_allowed_tokens_fn": lambda row, ids: list(range(100))},
        {"return_dict_in_generate": True},
        {"num_beams": 2},
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"prompt_lookup_num_tokens": 2},
    ],
    ids=lambda options: next(iter(options)),
)
def test_who_could_notice_is_asked_at_once(model, monkeypatch, options):
    asked = []
    monkeypatch.setattr(Late, "ended", lambda *arguments: asked.append(arguments))
    model.generate(ids_of(1), max_new_tokens=3, eos_token_id=98, **options)
    assert not asked


WATCHED = {
    "model": lambda model, hook: model.register_forward_hook(hook),
    "block": lambda model, hook: model.transformer.h[1].register_forward_pre_hook(hook),
    "head": lambda model, hook: model.lm_head.register_forward_hook(hook),
    "every module": lambda model, hook: nn.modules.module.register_module_forward_hook(
        lambda module, *given: hook() if module is model.lm_head else None
    ),
}


@pytest.mark.parametrize("watched", WATCHED)
def test_hooks_see_no_call_too_many(model, watched):
    tokens, _ = calls_of(model, max_new_tokens=12, eos_token_id=None)
    seen = []
    handle = WATCHED[watched](model, lambda *arguments: seen.append(1))
    try:
        model.generate(ids_of(1), max_new_tokens=12, eos_token_id=tokens[5])
    finally:
        handle.remove()
    assert len(seen) == tokens.index(tokens[5]) + 1


def test_a_forward_in_the_place_of_a_modules_is_called_as_often_as_before(model, monkeypatch):
    tokens, _ = calls_of(model, max_new_tokens=12, eos_token_id=None)
    seen, forward = [], model.lm_head.forward
    monkeypatch.setattr(model.lm_head, "forward", lambda states: seen.append(1) or forward(states))
    model.generate(ids_of(1), max_new_tokens=12, eos_token_id=tokens[5])
    assert len(seen) == tokens.index(tokens[5]) + 1


def test_the_environment_has_all_calls_asked_at_once(model, monkeypatch):
    monkeypatch.setenv("QWEN_NATIVE", "0")
    monkeypatch.setattr(Late, "ended", lambda *arguments: pytest.fail("asked late"))
    model.generate(ids_of(1), max_new_tokens=3)


def test_a_cache_goes_on_in_its_own_memory(model):
    tokens, _ = calls_of(model, max_new_tokens=12, eos_token_id=None)
    cache = QWenCache(config=model.config)
    ids = model.generate(ids_of(1), cache=cache, max_new_tokens=12, eos_token_id=tokens[2])
    length, places = cache.get_seq_length(), [layer.keys.data_ptr() for layer in cache.layers]
    assert length == ids.shape[1] - 1
    longer = torch.cat([ids, ids_of(1)], dim=1)
    output = model.generate(longer, cache=cache, max_new_tokens=4, eos_token_id=None)
    assert [layer.keys.data_ptr() for layer in cache.layers] == places
    assert output.tolist() == model.generate(longer, max_new_tokens=4, eos_token_id=None).tolist()


def test_a_token_is_given_up_in_a_copy_without_touching_the_other():
    cache = QWenCache()
    cache.update(torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 4), 0)
    other = copy.copy(cache)
    other.layers = [copy.copy(layer) for layer in cache.layers]
    other.update(torch.full((1, 2, 1, 4), 2.0), torch.full((1, 2, 1, 4), 2.0), 0)
    cache.layers[0].forget_last()  # whose view is the newest no longer
    cache.update(torch.full((1, 2, 1, 4), 3.0), torch.full((1, 2, 1, 4), 3.0), 0)
    assert cache.layers[0].keys[0, 0, :, 0].tolist() == [1, 1, 3]
    assert other.layers[0].keys[0, 0, :, 0].tolist() == [1, 1, 1, 2]
    other.layers[0].forget_last()
    assert other.layers[0].keys[0, 0, :, 0].tolist() == other.layers[0].values[0, 0, :, 0].tolist() == [1, 1, 1]
    other.reset()
    assert other.get_seq_length() == 0


def test_tensors_that_are_made_elsewhere_by_default(model):
    expected = written(model, 1, max_new_tokens=4)
    with torch.device("meta"):
        held = ending_qwen._Copy(torch.ones(2, device=DEVICE)).read()
    assert held.device.type == "cpu" and held.tolist() == [1, 1]
    assert_same(written(model, 1, max_new_tokens=4), expected)


@pytest.mark.parametrize("wrong", [{"max_new_token": 3}, {"max_new_tokens": -1}])
def test_a_call_that_is_refused_streams_nothing(model, wrong):
    streamer = Tokens()
    with pytest.raises(ValueError):
        model.generate(ids_of(1), streamer=streamer, **wrong)
    assert not streamer.given


def test_a_call_that_fails_streams_what_it_had_written(model, monkeypatch):
    calls, forward = [], QWenModel.forward

    def failing(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            raise MemoryError("no room")
        return forward(self, *args, **kwargs)

    expected = model.generate(ids_of(1), max_new_tokens=3, eos_token_id=None)[0, 7:].tolist()
    monkeypatch.setattr(QWenModel, "forward", functools.wraps(forward)(failing))
    streamer = Tokens()
    with pytest.raises(MemoryError, match="no room"):
        model.generate(ids_of(1), streamer=streamer, max_new_tokens=12, eos_token_id=None)
    assert streamer.given == [ids_of(1).tolist(), *([token] for token in expected)]


def test_stop_words_may_be_changed():
    criteria = StopWordsCriteria([[5]], 0)
    ids = torch.tensor([[1, 5], [1, 6]])
    assert criteria(ids, None).tolist() == [True, False]
    criteria.stop_words_ids = [[6]]
    assert criteria(ids, None).tolist() == [False, True]


def test_criteria_that_transformers_adds_are_asked_at_once_and_a_stream_goes_on(model, monkeypatch):
    options = dict(max_new_tokens=5, eos_token_id=98, max_time=100.0)
    expected = written(model, 1, monkeypatch, **options)
    monkeypatch.setattr(Late, "ended", lambda *arguments: pytest.fail("asked late"))
    assert_same(written(model, 1, **options), expected)
    assert expected[1] == [*([ids_of(1).tolist()]), *([token] for token in expected[0][0][7:]), "end"]


@pytest.mark.parametrize("rows", [1, 2])
def test_a_stream_of_several_replies_is_refused_as_before(model, rows):
    options = dict(max_new_tokens=3, do_sample=True, num_return_sequences=3 - rows)
    with pytest.raises(ValueError, match="one reply|batch size 1"):
        model.generate(ids_of(rows), streamer=TextStreamer(None), **options)


def test_several_replies_to_a_prompt_are_those_that_are_asked_for_at_once(model, monkeypatch):
    options = dict(max_new_tokens=6, do_sample=True, seed=3, num_return_sequences=3, eos_token_id=[*range(1, 40)])
    found = model.generate(ids_of(2), **options)
    monkeypatch.setattr(ending_qwen, "DEVICE", "none")
    assert found.shape[0] == 6 and found.tolist() == model.generate(ids_of(2), **options).tolist()


def test_another_loop_than_the_known_one_gets_plain_answers():
    asked = Late(torch.tensor([[1]]))
    criteria = with_late_answers(StoppingCriteriaList([StopWordsCriteria([[5]], 1), asked]))
    ids = torch.tensor([[1, 5], [1, 2]])
    done = criteria(ids, None)
    assert type(done | done) is type(done.sum()) is type(done.all()) is type(done[0]) is torch.Tensor
    assert bool(done[0]) and not bool(done[1]) and not bool(done.all())
    going = torch.ones(2, dtype=torch.long) & ~done
    assert type(going * 3) is type(1 - going) is torch.Tensor and going.tolist() == [0, 1]
    assert bool(going.max() > 0) and bool(going.max() == 1) and not bool(going.max() == 2) and not asked.overran
    ended = torch.zeros(2, dtype=torch.long) & ~done
    assert not bool(ended.max() == 0), "a token ago nothing was known to have ended"
    assert not bool(ended.max() == 0), "nor if it is asked twice"
    again = torch.zeros(2, dtype=torch.long) & ~criteria(torch.tensor([[1, 5, 0], [1, 2, 0]]), None)
    assert bool(again.max() == 0) and asked.overran


@pytest.mark.parametrize("streamed", [False, True])
def test_a_conversation_goes_on_from_what_was_kept(streamed, monkeypatch):
    tokenizer = AutoTokenizer.from_pretrained(TINY_CHAT)
    model = AutoModelForCausalLM.from_pretrained(TINY_CHAT).to(DEVICE).eval()

    def turns():
        history, replies = None, []
        for query in ("My name is Zorvandel.", "What is 12 + 30?", "What is my name?"):
            if streamed:
                *_, reply = model.chat_stream(tokenizer, query, history=history)
                history = [*(history or []), (query, reply)]
            else:
                reply, history = model.chat(tokenizer, query, history=history)
            replies.append(reply)
        return replies, [] if streamed else history.kept._ids

    found, overran = turns(), []
    finish = Late.finish
    monkeypatch.setattr(Late, "finish", lambda self, *rest: overran.append(self.overran) or finish(self, *rest))
    assert turns() == found and overran == [True] * 3
    monkeypatch.setattr(ending_qwen, "DEVICE", "none")
    assert turns() == found and len(overran) == 3
    assert found[0][0] == "Nice to meet you, Zorvandel!" and found[0][2] == "Your name is Zorvandel."


@pytest.mark.gpu
@pytest.mark.parametrize("streamed", [False, True])
def test_no_token_waits_for_the_gpu(model, waits, streamed):
    def write(new):
        options = {"streamer": Tokens()} if streamed else {}
        model.generate(ids_of(1), max_new_tokens=new, eos_token_id=98, **options)

    _, few, many = [waits(model, lambda new=new: write(new)) for new in (8, 10, 30)]
    assert len(few) == len(many), many[len(few) :]
