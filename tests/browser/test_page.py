"""The page's events without a browser, with the shipped model and with one that says what the test wants."""

from types import SimpleNamespace

import gradio as gr
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from qwen1 import ChatHistory
from qwen1.browser.conversation import Chat, message, text_of
from qwen1.browser.page import ChatPage, look

GREEDY = (False, 1.0, 1.0, 0, 1.0, 64, -1)


def said(*texts):
    """Messages, user and assistant by turns."""
    return [message(("user", "assistant")[i % 2], text) for i, text in enumerate(texts)]


@pytest.fixture
def page(stub_model):
    page = ChatPage(Chat(stub_model, None), "stub <b>")
    page.blocks()
    return page


@pytest.fixture(scope="session")
def tiny_chat(repository):
    """The model that ships and its tokenizer."""
    folder = repository / "qwen-tiny-chat"
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def happen(page, target, query="", messages=(), history=None, system="", settings=GREEDY, **data):
    """All that an event shows: what becomes of the text field, and the texts of the conversation."""
    event = SimpleNamespace(target=target, **data)
    history = ChatHistory() if history is None else history
    return [
        (rest, [text_of(m) for m in grown])
        for rest, grown in page.answer(event, query, list(messages), history, system, *settings)
    ]


def test_submit_empties_the_field_and_streams(page):
    steps = happen(page, page.submit, "hello", said("a", "b"))
    assert steps[0] == ("", ["a", "b", "hello"])
    assert steps[-1] == ("", ["a", "b", "hello", "This is reply 1"])
    assert len(steps) == 5


@pytest.mark.parametrize("query", ["", " \n"])
def test_nothing_typed_is_nothing_asked(page, stub_model, query):
    assert [texts for _, texts in happen(page, page.query, query, said("a", "b"))] == [["a", "b"]]
    assert stub_model.asked == []


def test_regenerate_asks_the_last_question_again_and_leaves_the_field(page, stub_model):
    steps = happen(page, page.regenerate, "half typed", said("a", "b", "c", "d"))
    assert steps[-1][1] == ["a", "b", "c", "This is reply 1"]
    assert all(rest != "half typed" and rest != "" for rest, _ in steps)
    assert stub_model.asked[0][:2] == ("c", [("a", "b")])
    assert happen(page, page.regenerate, "half typed")[-1][1] == []


def test_an_edited_question_is_answered_and_what_followed_goes(page, stub_model):
    steps = happen(page, page.chatbot, messages=said("a", "b", "changed", "d", "e", "f"), index=2, value="changed")
    assert steps[-1][1] == ["a", "b", "changed", "This is reply 1"]
    assert stub_model.asked[0][:2] == ("changed", [("a", "b")])


def test_an_edited_reply_is_read_by_the_next_turn(page, stub_model):
    edited = said("a", "changed")
    assert happen(page, page.chatbot, messages=edited, index=1, value="changed")[-1][1] == ["a", "changed"]
    happen(page, page.submit, "c", edited)
    assert stub_model.asked[0][:2] == ("c", [("a", "changed")])


def test_an_example_is_asked(page):
    assert happen(page, page.chatbot, index=0, value={"text": "12+34=?"})[-1][1] == ["12+34=?", "This is reply 1"]


def test_what_can_not_be_asked_is_told_and_escaped(page):
    with pytest.raises(gr.Error) as error:
        happen(page, page.submit, "error: <img src=x>")
    assert error.value.message == "error: &lt;img src=x&gt;"


def test_a_query_beyond_the_window_is_answered(tiny_chat):
    page = ChatPage(Chat(*tiny_chat), "tiny")
    page.blocks()
    assert happen(page, page.submit, "long " * 500)[-1][1][0] == "long " * 500


def test_memory_that_is_not_enough_is_told(page, stub_model, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("CUDA out of memory. Tried to allocate")
        yield

    monkeypatch.setattr(stub_model, "chat_stream", fail)
    history = ChatHistory()
    history.kept = "keys"
    with pytest.raises(gr.Error, match="no memory left .* clear it"):
        happen(page, page.submit, "hello", history=history)
    assert history.kept is None


def test_other_failures_are_not_hidden(page, stub_model, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("a bug")
        yield

    monkeypatch.setattr(stub_model, "chat_stream", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        happen(page, page.submit, "hello")


def test_the_shipped_model_remembers_and_reads_only_what_is_new(tiny_chat):
    page = ChatPage(Chat(*tiny_chat), "tiny")
    page.blocks()
    history = ChatHistory()
    first = happen(page, page.submit, "My name is Tavolin.", history=history)[-1][1]
    read = history.kept
    second = happen(page, page.submit, "What is my name?", said(*first), history)[-1][1]
    assert "Tavolin" in second[-1]
    assert history == [tuple(first)] and history.kept is not read
    edited = happen(
        page, page.chatbot, messages=said("My name is Zorvandel.", *second[1:]), history=history, index=0,
        value="My name is Zorvandel.",
    )[-1][1]  # fmt: skip
    assert happen(page, page.submit, "What is my name?", said(*edited), history)[-1][1][-1] == second[-1].replace(
        "Tavolin", "Zorvandel"
    )


def test_sampling_settings_reach_the_shipped_model(tiny_chat):
    page = ChatPage(Chat(*tiny_chat), "tiny")
    page.blocks()

    def reply(seed, length=64):
        return happen(page, page.submit, "hello", settings=(True, 2.0, 1.0, 0, 1.0, length, seed))[-1][1][-1]

    assert reply(1) == reply(1)
    assert len({reply(seed) for seed in range(4)}) > 1
    assert len(reply(1, length=2)) < len(reply(1))
    assert happen(page, page.submit, "Hello!", system="Answer in Chinese.")[-1][1][-1] > "一"


def test_the_page_waits_in_a_queue_with_a_limit(stub_model):
    blocks = ChatPage(Chat(stub_model, None), "stub", concurrency_limit=3, queue_size=5).blocks()
    assert blocks._queue.max_size == 5
    assert [fn.concurrency_limit for fn in blocks.fns.values() if fn.name == "answer"] == [3]


def test_nothing_is_an_open_endpoint(page):
    blocks = page.blocks()
    assert {fn.api_visibility for fn in blocks.fns.values()} == {"private"}


def test_the_heading_is_text_and_the_look_is_local(page):
    values = [str(block.value) for block in page.blocks().blocks.values() if isinstance(block, gr.Markdown)]
    assert values == ["## stub &lt;b&gt;"]
    assert "http" not in str(look()["css"])
