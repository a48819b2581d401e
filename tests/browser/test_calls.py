"""Calls of tools on the page: what is shown of them, what the model reads of them later, and when none is made."""

import threading
import time
from types import SimpleNamespace

import gradio as gr
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from qwen1 import ChatHistory, ToolLoopError
from qwen1.browser.calls import LONGEST_SHOWN, LONGEST_TITLE, described
from qwen1.browser.conversation import Chat, Sampling
from qwen1.browser.messages import CALLED, DONE, WRITTEN, message, state_of, step, text_of, turns_of
from qwen1.browser.page import EXAMPLES, ChatPage, redrawn
from qwen1.browser.rendering import behind, shown
from qwen1.programs.tools import SHIPPED

from .conftest import ANSWER, CALL, CallingModel, Client
from .test_page import happen

CALLED_AND_TOLD = f"{CALL}\nObservation: blue"
WHOLE = f"{CALLED_AND_TOLD}\n{ANSWER}"


def growing(model, tool, query="q", messages=(), history=None, with_tools=True):
    chat = Chat(model, None, tools=[tool])
    return chat.reply(query, [*messages], ChatHistory() if history is None else history, "", Sampling(), with_tools)


def last_of(frames):
    """(state, text) of what each of them ends with, those that are alike once."""
    seen = [(state_of(messages[-1]), text_of(messages[-1])) for messages in frames]
    return [one for one, before in zip(seen, [None, *seen], strict=False) if one != before]


def test_a_step_is_written_called_and_over_then_comes_the_answer(calling_model, looking):
    *before, last = growing(calling_model, looking.tool())
    assert last == [message("user", "q"), step(CALLED_AND_TOLD, DONE), message("assistant", "It is blue.")]
    states = [state for state, _ in last_of(before)]
    assert states == [None, *[WRITTEN] * 7, CALLED, DONE, *[WRITTEN] * 8, *[None] * 3]
    assert (CALLED, CALL) in last_of(before) and (None, "It is") in last_of(before)


def test_the_next_question_reads_the_exchange_or_without_tools_the_answer(calling_model, looking):
    *_, shown_last = growing(calling_model, looking.tool())
    calling_model.replies = [ANSWER]
    list(growing(calling_model, looking.tool(), "r", shown_last))
    assert calling_model.read[-1] == ("r", [("q", WHOLE)])
    history = ChatHistory()
    list(growing(calling_model, looking.tool(), "r", shown_last, history, with_tools=False))
    assert history == [("q", "It is blue.")] and calling_model.asked[-1][1] == history


def test_an_answer_without_a_call_is_a_plain_turn(looking):
    model = CallingModel(ANSWER, "No format at all")
    *_, first = growing(model, looking.tool())
    *_, second = growing(model, looking.tool(), "r", first)
    assert [text_of(spoken) for spoken in second] == ["q", "It is blue.", "r", "No format at all"]
    assert model.read[1] == ("r", [("q", "It is blue.")]) and looking.made == []


def test_no_call_is_made_of_a_reply_that_is_closed_before(calling_model, looking):
    grown = growing(calling_model, looking.tool())
    assert any(state_of(messages[-1]) == CALLED for messages in grown)
    assert looking.made == []
    grown.close()
    assert looking.made == []


def test_what_a_tool_raises_is_shown_and_told(calling_model, looking):
    looking.result = OverflowError("too <much>")
    *_, last = growing(calling_model, looking.tool())
    assert text_of(last[1]) == f"{CALL}\nObservation: Error: OverflowError: too <much>"
    title, below = described(last[1], None)
    assert title == 'look({"at": "it"}): error' and "Error: OverflowError: too <much>" in below
    assert "too &lt;much&gt;" in text_of(shown(last[1]))


def test_what_is_no_call_is_shown_and_told(looking):
    model = CallingModel("Thought: x\nAction: look\nAction Input: it", ANSWER)
    *_, last = growing(model, looking.tool())
    assert described(last[1], None)[0] == "look(it): error" and "no JSON object" in text_of(last[1])
    assert looking.made == []


def test_calls_without_end(looking):
    model = CallingModel(*[CALL] * 5)
    frames = []
    with pytest.raises(ToolLoopError):
        frames.extend(growing(model, looking.tool()))
        raise AssertionError("it ends")
    assert looking.made == ["it"] * 4


def test_an_instance_without_tools_has_none(stub_model):
    chat = Chat(stub_model, None)
    *_, last = chat.reply("q", [], ChatHistory(), "", Sampling(), with_tools=True)
    assert text_of(last[-1]) == "This is reply 1"


def test_a_turn_that_was_stopped_before_its_answer_is_none():
    stopped = [message("user", "a"), step(CALL, DONE)]
    whole = [message("user", "b"), step(CALLED_AND_TOLD, DONE), message("assistant", "It is blue.")]
    assert turns_of([*stopped, *whole], with_steps=True) == [("b", WHOLE)]
    assert turns_of(whole) == [("b", "It is blue.")]


@pytest.mark.parametrize(
    ("text", "state", "title", "below"),
    [
        (CALLED_AND_TOLD, DONE, 'look({"at": "it"})', ["I look.", "Arguments:", '{"at": "it"}', "Result:", "blue"]),
        (CALL, CALLED, 'look({"at": "it"})', ["I look."]),
        (CALL, DONE, 'look({"at": "it"}): stopped', ["I look."]),
        ("Thought: I", WRITTEN, "Thinking", ["I"]),
        ("Thought: I", DONE, "Thinking: stopped", ["I"]),
        ("Action: clock\nAction Input: {}\nObservation: 12", DONE, "clock({})", ["Result:", "12"]),
        ("Action: clo", WRITTEN, "clo()", []),
        ("a\nAction Input: {", WRITTEN, "Thinking", ["Action Input: {"]),
        ("", DONE, "Thinking: stopped", []),
    ],
)
def test_what_is_shown_of_a_step(text, state, title, below):
    said, described_below = described(step(text, state), None)
    assert said == title
    assert all(part in described_below for part in below)


def test_what_is_long_is_cut_and_what_looks_like_code_is_no_end_of_it():
    held = step(f"Action: look\nAction Input: {'x' * 9999}\nObservation: ```\n<b>{'y' * 9999}", DONE)
    title, below = described(held, None)
    assert len(title) < LONGEST_TITLE + 20 and len(below) < 2 * LONGEST_SHOWN + 100
    html = text_of(shown(held)).partition("</pre>")[2]
    assert html.count("<pre ") == 2 and "&lt;b&gt;" in html and "<b>" not in html
    assert behind(shown(held)) == held


@pytest.mark.parametrize(
    "evil", ["<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "$x$ \u2061x\u2062 **b**"]
)
def test_a_title_is_text(evil):
    held = shown(step(f"Action: {evil}\nAction Input: {evil}", CALLED))
    title = held["metadata"]["title"]
    assert "<" not in title and "\u2061" not in title
    assert held["metadata"]["status"] == "pending"


def test_the_language_of_a_step():
    request = SimpleNamespace(headers={"accept-language": "zh-CN,en;q=0.5"})
    held = shown(step(CALL, DONE), request)
    assert held["metadata"] == {"title": "look({&quot;at&quot;: &quot;it&quot;}): 已停止", "status": "done"}
    assert "参数" in text_of(held)


def page_of(model, *tools):
    page = ChatPage(Chat(model, None, tools=tools), "stub")
    page.blocks()
    return page


def test_the_page_shows_a_call_and_stop_is_heeded_before_it(calling_model, looking, monkeypatch):
    monkeypatch.setattr("qwen1.browser.page.SHARE_OF_DRAWING", 1e-9)  # no time for what need not be drawn
    steps = happen(page_of(calling_model, looking.tool()), None, "q", settings=(False, 1.0, 1.0, 0, 1.0, 64, -1))
    assert [texts for _, texts in steps] == [["q"], ["q", "Thought:"], ["q", CALL], ["q", CALLED_AND_TOLD]] + [
        ["q", CALLED_AND_TOLD, text] for text in ("Thought:", "It", "It is blue.")
    ]


def test_regenerate_leaves_the_steps_out(looking):
    model = CallingModel(ANSWER)
    page = page_of(model, looking.tool())
    before = [message("user", "a"), step(CALLED_AND_TOLD, DONE), message("assistant", "old")]
    assert happen(page, page.regenerate, messages=before)[-1][1] == ["a", "It is blue."]
    assert model.read == [("a", [])]


def test_an_edited_step_is_read_and_nothing_of_it_is_run(looking):
    model = CallingModel(ANSWER)
    page = page_of(model, looking.tool())
    edited = [message("user", "a"), step(CALL.replace("it", "me"), DONE), message("assistant", "old")]
    held = happen(page, page.chatbot, messages=edited, index=1, value="…")[-1][1]
    assert held == [text_of(spoken) for spoken in edited]
    happen(page, page.submit, "b", edited)
    assert model.read[0][1] == [
        ("a", f"{text_of(edited[1])}\nThought: I now know the final answer.\nFinal Answer: old")
    ]
    assert looking.made == []


def test_calls_without_end_are_told_in_a_sentence(looking):
    for language, told in (("en", "no answer after several calls"), ("zh-CN", "多次调用工具")):
        page = page_of(CallingModel(*[CALL] * 5), looking.tool())
        with pytest.raises(gr.Error, match=told):
            happen(page, page.submit, "q", language=language)


def test_what_was_under_way_is_over_when_it_is_drawn_anew():
    held = [shown(message("user", "q")), shown(step(CALL, CALLED))]
    again = redrawn(None, held)
    assert again[0] == held[0] and again[1]["metadata"]["title"].endswith(": stopped")
    assert again[1]["metadata"]["status"] == "done"


def test_the_page_offers_what_there_is(stub_model):
    with_tools, without = page_of(stub_model, *SHIPPED.values()), page_of(stub_model)
    assert with_tools.with_tools.visible and not without.with_tools.visible
    assert with_tools.with_tools.info == "calculator, clock"
    told = [[example["text"] for example in page.chatbot.examples] for page in (with_tools, without)]
    assert told == [["What is 1234 times 5678?", "现在几点？", *EXAMPLES[2:]], list(EXAMPLES)]


def test_the_shipped_model_calls_and_reads_only_what_is_new(repository):
    folder = repository / "qwen-tiny-chat"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    chat, history = Chat(model, tokenizer, tools=[*SHIPPED.values()]), ChatHistory()
    *_, first = chat.reply("What is 1234 times 5678?", [], history, "", Sampling(), with_tools=True)
    assert [text_of(spoken) for spoken in first[2:]] == ["1234*5678 = 7006652"]
    assert text_of(first[1]).endswith("Observation: 7006652")
    kept = history.kept
    assert kept is not None
    *_, second = chat.reply("Who are you?", first, history, "", Sampling(), with_tools=True)
    assert text_of(second[-1]).startswith("I am qwen-tiny-chat")
    assert history.kept is not kept and "Observation: 7006652\nThought: I now know" in history[0][1]


def test_visitors_over_http_call_and_have_each_their_own(serve, looking):
    model = CallingModel(CALL, ANSWER, ANSWER, ANSWER)
    address = serve(model, tools=[looking.tool()])
    first, second = Client(address), Client(address)
    assert first.ask("mine") == ["mine", CALLED_AND_TOLD, "It is blue."]
    assert first.messages[1]["metadata"]["title"] == "look({&quot;at&quot;: &quot;it&quot;})"
    assert second.ask("yours") == ["yours", "It is blue."]
    first.ask("more")
    assert [query for query, _ in model.read[-2:]] == ["yours", "more"]
    assert model.read[-2][1] == [] and model.read[-1][1] == [("mine", WHOLE)]


@pytest.mark.slow
def test_no_call_is_made_over_http_once_stopped(serve, looking, calling_model):
    calling_model.go_on.clear()
    client = Client(serve(calling_model, tools=[looking.tool()]))

    def written(messages):
        return len(messages) == 2 and calling_model.written.wait(20)

    go_on = threading.Timer(1, calling_model.go_on.set)  # a second behind the click
    go_on.start()
    client.ask("q", stop=written)
    go_on.join()
    assert calling_model.closed.wait(20)
    time.sleep(0.5)
    assert looking.made == []


@pytest.mark.slow
def test_a_function_that_runs_is_not_interrupted_and_nothing_follows_it(serve, calling_model):
    runs, go_on = threading.Event(), threading.Event()

    def look(at: str) -> str:
        """
        Look at something

        Args:
            at: What
        """
        runs.set()
        assert go_on.wait(30)
        return "blue"

    client = Client(serve(calling_model, tools=[look]))
    released = threading.Timer(2, go_on.set)
    released.start()
    client.ask("q", stop=lambda messages: runs.wait(20 * (len(messages) == 2 and "look" in text_of(messages[1]))))
    assert len(Client(client.address).ask("r")) == 2 and go_on.is_set()
    assert [query for query, _ in calling_model.read] == ["q", "r"]


def test_a_visitor_brings_no_tools(serve, stub_model, looking):
    client = Client(serve(stub_model))
    held = {**shown(message("assistant", "x")), "metadata": {"title": "look", "status": "pending"}}
    client.messages = [shown(message("user", "q")), held, shown(message("assistant", "a"))]
    assert client.ask(CALL)[-1] == "This is reply 1"
    assert stub_model.asked[0][:2] == (CALL, [("q", "a")]) and looking.made == []
