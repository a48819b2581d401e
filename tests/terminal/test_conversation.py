"""A conversation: turns kept, replies stopped, statistics."""

import threading

import pytest
import torch

from qwen1.terminal.conversation import Meter


@pytest.fixture
def stop():
    return threading.Event()


def say(conversation, query):
    return list(conversation.reply(query, threading.Event()))[-1]


def test_turns_are_kept_with_what_the_model_has_read(conversation):
    say(conversation, "My name is Tavolin.")
    assert "Tavolin" in say(conversation, "What is my name?")
    assert [query for query, _ in conversation.history] == ["My name is Tavolin.", "What is my name?"]
    assert conversation.history.kept is not None


def test_the_next_turn_reads_only_what_is_new(conversation, monkeypatch):
    read = []
    forward = type(conversation.model).forward

    def record(model, input_ids=None, **kwargs):
        read.append(input_ids.shape[1])
        return forward(model, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(type(conversation.model), "forward", record)
    say(conversation, "My name is Tavolin.")
    whole = read[0]
    read.clear()
    say(conversation, "What is my name?")
    assert conversation.statistics.prompt_tokens > whole
    assert read[0] < conversation.statistics.prompt_tokens - whole + 2


def test_a_stopped_reply_is_kept_as_far_as_it_went(conversation, stop):
    texts = []
    for text in conversation.reply("你好", stop):
        texts.append(text)
        if len(texts) == 3:
            stop.set()
    assert len(texts) == 3 and conversation.history == [("你好", texts[-1])]
    assert conversation.history.kept is not None
    assert conversation.statistics.tokens < 15  # as long as the whole reply is
    assert say(conversation, "12+34=?").endswith("46")


def test_the_meter_ends_generation_after_the_step_under_way(stop):
    meter = Meter(stop)
    ids = torch.zeros(1, 8, dtype=torch.long)
    assert meter(ids, None).tolist() == [False]
    stop.set()
    assert meter(ids, None).tolist() == [True]


def test_a_reply_stopped_before_it_began_leaves_no_turn(conversation, stop):
    stop.set()
    assert list(conversation.reply("你好", stop)) == []
    assert conversation.history == []


def test_a_closed_reply_is_kept(conversation, stop):
    reply = conversation.reply("你好", stop)
    text = next(reply)
    reply.close()
    assert conversation.history == [("你好", text)]


def test_a_failed_reply_leaves_no_turn(conversation, stop, monkeypatch):
    def refuse(*args, **kwargs):
        raise ValueError("no room")

    say(conversation, "你好")
    with monkeypatch.context() as patched:
        patched.setattr(type(conversation.model), "chat_stream", refuse)
        with pytest.raises(ValueError, match="no room"):
            list(conversation.reply("hello", stop))
    assert len(conversation.history) == 1
    say(conversation, "hello")
    assert len(conversation.history) == 2


def test_an_error_in_the_middle_leaves_no_turn(conversation, stop, monkeypatch):
    def stream(*arguments, **settings):
        yield "some"
        raise RuntimeError("out of memory")

    monkeypatch.setattr(type(conversation.model), "chat_stream", stream)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(conversation.reply("hello", stop))
    assert conversation.history == []


def test_bytes_that_are_no_text_are_replaced(conversation, stop):
    list(conversation.reply("caf\udce9 \udcf0", stop))
    assert conversation.history[0][0] == "caf\N{REPLACEMENT CHARACTER} \N{REPLACEMENT CHARACTER}"


def test_statistics_count_tokens_and_time(conversation):
    assert conversation.statistics is None
    reply = say(conversation, "12+34=?")
    cost = conversation.statistics
    assert cost.tokens == len(conversation.tokenizer.encode(reply)) + 1  # what ended it
    assert 0 < cost.first_token < 60 and cost.rate > 0
    assert 50e6 < cost.memory < 1e12
    assert f"{cost.tokens} tokens" in str(cost) and "tokens/s" in str(cost) and "memory" in str(cost)


def test_statistics_of_a_single_token_have_no_rate(conversation):
    conversation.settings.change({"max_new_tokens": "1"})
    say(conversation, "你好")
    assert conversation.statistics.tokens == 1 and conversation.statistics.rate is None
    assert "tokens/s" not in str(conversation.statistics)


def test_a_seed_makes_sampled_replies_repeatable(conversation):
    conversation.settings.change({"do_sample": "true", "temperature": "3.0", "top_k": "0"})

    def sampled(seed):
        conversation.restart()
        conversation.seed = seed
        return say(conversation, "hello")

    assert sampled(1) == sampled(1) != sampled(2)
