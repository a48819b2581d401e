"""The page's events without a browser, with the shipped model and with one that says what the test wants."""

import json
import re
from types import SimpleNamespace

import gradio as gr
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from qwen1 import ChatHistory
from qwen1.browser import page as layout
from qwen1.browser.conversation import Chat
from qwen1.browser.look import look
from qwen1.browser.messages import message, text_of
from qwen1.browser.page import ChatPage
from qwen1.browser.rendering import behind, shown
from qwen1.browser.words import WORDS

SAID = {"memory", "endless", "thinking", "arguments", "result", "failed", "stopped"}
"""Words of errors and of calls, not of the page itself."""
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


def happen(
    page, target, query="", messages=(), history=None, system="", settings=GREEDY, language="", tools=True, **data
):
    """All that an event shows: the question that the text field drops, and the texts behind the conversation."""
    event = SimpleNamespace(target=target, **data)
    request = SimpleNamespace(headers={"accept-language": language})
    history = ChatHistory() if history is None else history
    return [
        (sent.partition(" ")[2] if isinstance(sent, str) else None, [text_of(behind(m)) for m in grown])
        for sent, grown in page.answer(
            event, request, query, [*map(shown, messages)], history, system, tools, *settings
        )
    ]


def test_submit_takes_the_question_once_and_streams(page, monkeypatch):
    monkeypatch.setattr(layout, "SHARE_OF_DRAWING", 1)
    steps = happen(page, page.submit, "hello", said("a", "b"))
    assert steps[0] == ("hello", ["a", "b", "hello"])
    assert steps[-1] == (None, ["a", "b", "hello", "This is reply 1"])
    assert len(steps) == 5 and [sent for sent, _ in steps[1:]] == [None] * 4


def test_a_reply_that_is_long_to_draw_grows_by_several_words_and_is_whole_in_the_end(monkeypatch):
    clock = iter(range(1000))  # each look at it is a second later
    monkeypatch.setattr(layout.time, "monotonic", lambda: float(next(clock)))
    growing = [said("q", "word " * count)[1:] for count in range(1, 11)]
    drawn = [text_of(behind(messages[0])).count("word") for messages in layout.drawn_in_time(growing, None)]
    assert drawn == [1, 5, 9, 10]


@pytest.mark.parametrize("query", ["", " \n"])
def test_nothing_typed_is_nothing_asked(page, stub_model, query):
    assert [texts for _, texts in happen(page, page.query, query, said("a", "b"))] == [["a", "b"]]
    assert stub_model.asked == []


def test_regenerate_asks_the_last_question_again_and_leaves_the_field(page, stub_model):
    steps = happen(page, page.regenerate, "half typed", said("a", "b", "c", "d"))
    assert steps[-1][1] == ["a", "b", "c", "This is reply 1"]
    assert all(sent is None for sent, _ in steps)
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
        happen(page, page.submit, "hello", history=history, language="de,zh-CN;q=0.5")
    assert history.kept is None
    with pytest.raises(gr.Error, match="内存不足"):
        happen(page, page.submit, "hello", language="zh-CN,en;q=0.5")


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
    assert values == ["## stub &#60;b&#62;"]
    assert "http" not in str(look()["css"])


def test_every_word_of_the_page_is_there_in_both_languages(page):
    components = page.blocks().get_config_file()["components"]
    used = set(re.findall(r"qwen_(\w+)", json.dumps(components, default=str)))
    assert used == WORDS.keys() - SAID
    shown = [c["props"] for c in components if c["props"].get("visible") is True and c["type"] != "markdown"]
    for name in ("label", "info", "placeholder"):
        texts = [str(props[name]) for props in shown if props.get(name)]
        assert [text for text in texts if "qwen_" not in text] == []
    for english, chinese in WORDS.values():
        assert english.isascii() and any("一" <= c <= "鿿" for c in chinese)
