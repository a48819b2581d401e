"""Conversations as a page shows them, without the page."""

import pytest
from transformers import GenerationConfig

from qwen1 import ChatHistory
from qwen1.browser.conversation import Chat, LastUsed, Sampling
from qwen1.browser.messages import cut_at_query, message, text_of, turns_of


def said(*texts):
    """Messages, user and assistant by turns."""
    return [message(("user", "assistant")[i % 2], text) for i, text in enumerate(texts)]


def test_content_in_parts_is_one_text():
    parts = [{"type": "text", "text": "a"}, {"type": "file", "file": {}}, {"type": "text", "text": "b"}]
    assert text_of({"role": "user", "content": parts}) == "ab"


def test_messages_become_turns():
    assert turns_of(said("a", "b", "c", "d")) == [("a", "b"), ("c", "d")]


def test_a_question_without_a_reply_is_no_turn():
    stopped = [*said("a", "b", "stopped"), *said("c", "d")]
    assert turns_of(stopped) == [("a", "b"), ("c", "d")]
    assert turns_of(said("a", "", "c", "d")) == [("c", "d")]
    assert turns_of(said("a")) == []


def test_cut_at_the_last_question():
    assert cut_at_query(said("a", "b", "c", "d")) == (said("a", "b"), "c")
    assert cut_at_query(said("a", "b", "c")) == (said("a", "b"), "c")
    assert cut_at_query([]) == ([], None)


def test_defaults_are_those_of_the_checkpoint():
    config = GenerationConfig(do_sample=True, top_p=0.8, top_k=0, max_new_tokens=100_000)
    sampling = Sampling.of(config)
    assert (sampling.do_sample, sampling.top_p, sampling.top_k) == (True, 0.8, 0)
    assert sampling.max_new_tokens == Sampling.bounds("max_new_tokens").high
    assert (sampling.temperature, sampling.repetition_penalty, sampling.seed) == (1.0, 1.0, -1)


def test_settings_become_arguments():
    drawn = Sampling(True, 0.7, 0.9, 20, 1.1, 32, 5).arguments()
    assert drawn == {
        "do_sample": True,
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 20,
        "repetition_penalty": 1.1,
        "max_new_tokens": 32,
        "seed": 5,
    }
    greedy = Sampling(False, 0.7, 0.9, 20, 1.1, 32, 5).arguments()
    assert greedy["do_sample"] is False and greedy["max_new_tokens"] == 32 and greedy["repetition_penalty"] == 1.1
    assert Sampling(True).arguments()["seed"] is None
    assert "seed" not in greedy and greedy["temperature"] == 1.0


@pytest.mark.parametrize("name, value", [("temperature", 0.0), ("top_p", 1.5), ("top_k", -1), ("max_new_tokens", 0)])
def test_settings_out_of_bounds_are_errors(name, value):
    with pytest.raises(ValueError, match=f"{name}={value} must lie between"):
        Sampling(**{name: value}).arguments()


def test_a_reply_grows(stub_model):
    history = ChatHistory([("of", "old")])
    grown = list(Chat(stub_model, None).reply("c", said("a", "b"), history, "Be brief.", Sampling(max_new_tokens=9)))
    assert grown[0] == said("a", "b", "c")
    assert grown[1:] == [said("a", "b", "c", text) for text in ("This", "This is", "This is reply", "This is reply 1")]
    (asked,) = stub_model.asked
    assert asked[:3] == ("c", [("a", "b")], "Be brief.") and asked[3]["max_new_tokens"] == 9


def test_closing_a_reply_closes_the_stream(stub_model):
    reply = Chat(stub_model, None).reply("long", [], ChatHistory(), "", Sampling())
    assert [next(reply), next(reply)] == [said("long"), said("long", "on and ")]
    assert not stub_model.closed.is_set()
    reply.close()
    assert stub_model.closed.is_set()


def test_only_the_last_used_conversations_carry_keys():
    last_used = LastUsed(2)
    first, second, third = histories = [ChatHistory() for _ in range(3)]
    for history in histories:
        history.kept = "keys"
    for history in (first, second, first, third):
        last_used.use(history)
    assert [history.kept for history in histories] == ["keys", None, "keys"]
    del histories, history, first, third  # visitors who left don't count
    second.kept = "keys"
    last_used.use(second)
    last_used.use(ChatHistory())
    assert second.kept == "keys"


def test_none_carries_keys_at_a_limit_of_none(stub_model):
    history = ChatHistory()
    history.kept = "keys"
    list(Chat(stub_model, None, carried=0).reply("a", [], history, "", Sampling()))
    assert history.kept is None
