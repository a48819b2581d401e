"""The page in a real browser."""

import threading
import time

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

DESKTOP, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 844}
pytestmark = pytest.mark.slow

EVIL = "**bold**\n\n<script>document.title='owned'</script><img src='x' onerror=\"document.title='owned'\">\n\ndone"


def wait_until(happened, seconds=60):
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def tiny_chat(repository):
    folder = repository / "qwen-tiny-chat"
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def test_a_conversation_with_the_shipped_model(tiny_chat, serve, visit):
    visitor = visit(serve(*tiny_chat, name="qwen-tiny-chat"))
    visitor.ask("12+34=?")
    visitor.wait_for("12+34=?", "2+4=6, 1+3=4. 12+34=46")
    visitor.settle()
    visitor.type("My name is Tavolin.")
    visitor.click("submit")
    wait_until(lambda: len(visitor.texts()) == 4 and "Tavolin" in visitor.texts()[-1])
    visitor.ask("What is my name?")
    wait_until(lambda: len(visitor.texts()) == 6 and "Tavolin" in visitor.texts()[-1])


def test_a_conversation_with_a_folder_in_the_published_format(checkpoint_folder, serve, visit):
    model = AutoModelForCausalLM.from_pretrained(checkpoint_folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint_folder)
    visitor = visit(serve(model, tokenizer))
    for turn in (1, 2):
        visitor.ask("hello")
        wait_until(lambda wanted=2 * turn: len(visitor.texts()) == wanted)
        visitor.settle()
    assert visitor.texts()[0] == visitor.texts()[2] == "hello"


def test_a_reply_streams(stub_model, serve, visit):
    stub_model.go_on.clear()
    visitor = visit(serve(stub_model))
    visitor.ask("hello")
    visitor.wait_for("hello", "This")
    assert visitor.page.locator("#query textarea").input_value() == ""
    stub_model.go_on.set()
    visitor.wait_for("hello", "This is reply 1")


def test_stop_ends_the_model_and_keeps_what_is_written(stub_model, serve, visit):
    visitor = visit(serve(stub_model))
    visitor.ask("long")
    wait_until(lambda: visitor.texts()[-1:] and visitor.texts()[-1].startswith("on and on"))
    visitor.click("stop")
    assert stub_model.closed.wait(10)
    visitor.settle()  # a word that was under way still comes
    written = visitor.texts()
    assert len(written) == 2
    visitor.page.wait_for_timeout(300)
    assert visitor.texts() == written
    visitor.ask("next")
    visitor.wait_for(*written, "next", "This is reply 2")
    (turn,) = stub_model.asked[1][1]
    assert turn[0] == "long" and turn[1].strip() == written[1]


def test_regenerate_and_clear(stub_model, serve, visit):
    visitor = visit(serve(stub_model))
    visitor.ask("hello")
    visitor.wait_for("hello", "This is reply 1")
    visitor.ask("  ")
    visitor.settle()
    visitor.click("regenerate")
    visitor.wait_for("hello", "This is reply 2")
    visitor.click("clear")
    visitor.wait_for()
    visitor.ask("again")
    visitor.wait_for("again", "This is reply 3")
    assert [asked[:2] for asked in stub_model.asked] == [("hello", []), ("hello", []), ("again", [])]


def test_clear_ends_a_reply_that_is_being_written(stub_model, serve, visit):
    visitor = visit(serve(stub_model))
    visitor.ask("long")
    wait_until(lambda: len(visitor.texts()) == 2)
    visitor.click("clear")
    assert stub_model.closed.wait(10)
    visitor.wait_for()
    visitor.page.wait_for_timeout(500)
    assert visitor.texts() == []


def test_no_second_question_while_one_is_answered(stub_model, serve, visit):
    stub_model.go_on.clear()
    visitor = visit(serve(stub_model, concurrency_limit=4))
    visitor.ask("first")
    visitor.wait_for("first", "This")
    visitor.type("second")
    visitor.page.keyboard.press("Enter")
    visitor.click("regenerate")
    visitor.page.wait_for_timeout(500)
    stub_model.go_on.set()
    visitor.wait_for("first", "This is reply 1")
    assert len(stub_model.asked) == 1


def test_edited_messages(stub_model, serve, visit):
    visitor = visit(serve(stub_model))
    visitor.ask("hello")
    visitor.wait_for("hello", "This is reply 1")
    visitor.edit(1, "My own words")
    visitor.wait_for("hello", "My own words")
    visitor.ask("next")
    visitor.wait_for("hello", "My own words", "next", "This is reply 2")
    assert stub_model.asked[1][1] == [("hello", "My own words")]
    visitor.edit(0, "changed")
    visitor.wait_for("changed", "This is reply 3")
    assert stub_model.asked[2][:2] == ("changed", [])


def test_indentation_stays(stub_model, serve, visit):
    visitor = visit(serve(stub_model))
    code = "def f():\n    return 1"
    visitor.ask(code)
    wait_until(lambda: visitor.texts()[-1:] == ["This is reply 1"])
    visitor.ask("next")
    wait_until(lambda: visitor.texts()[-1:] == ["This is reply 2"])
    assert stub_model.asked[1][1] == [(code, "This is reply 1")]


def test_examples_and_settings(stub_model, serve, visit):
    visitor = visit(serve(stub_model))
    visitor.open_settings()
    visitor.page.locator("#system textarea").fill("Be brief.")
    visitor.page.get_by_label("Sample").check()
    visitor.page.get_by_label("Seed").fill("7")
    visitor.page.get_by_text("12+34=?").click()
    visitor.wait_for("12+34=?", "This is reply 1")
    (asked,) = stub_model.asked
    assert asked[:3] == ("12+34=?", [], "Be brief.") and asked[3]["do_sample"] and asked[3]["seed"] == 7


@pytest.mark.no_cover
def test_visitors_do_not_see_each_other_and_a_reload_starts_anew(stub_model, serve, visit):
    address = serve(stub_model)
    first, second = visit(address), visit(address)
    first.ask("mine")
    first.wait_for("mine", "This is reply 1")
    second.ask("yours")
    second.wait_for("yours", "This is reply 2")
    first.ask("more")
    first.wait_for("mine", "This is reply 1", "more", "This is reply 3")
    assert [asked[1] for asked in stub_model.asked] == [[], [], [("mine", "This is reply 1")]]
    second.page.reload()
    second.page.locator("#query textarea").wait_for()
    assert second.texts() == []
    second.ask("anew")
    second.wait_for("anew", "This is reply 4")
    assert stub_model.asked[-1][1] == []
    assert len(first.texts()) == 4


def test_a_visitor_who_leaves_ends_the_reply(stub_model, serve, visit):
    visitor = visit(serve(stub_model))
    visitor.ask("long")
    wait_until(lambda: len(visitor.texts()) == 2)
    visitor.page.goto("about:blank")
    assert stub_model.closed.wait(30)
    visitor.complaints.clear()  # of the page that lost its connection


def test_the_queue_has_a_limit(stub_model, serve, visit):
    stub_model.go_on.clear()
    address = serve(stub_model, queue_size=1)
    answered, waiting, refused = (visit(address) for _ in range(3))
    answered.ask("one")
    answered.wait_for("one", "This")
    waiting.ask("two")
    waiting.page.wait_for_timeout(500)
    refused.ask("three")
    refused.page.get_by_text("busy").wait_for()
    refused.complaints.clear()  # the browser logs the refusal
    wait_until(refused.page.locator("#stop").is_disabled)
    assert refused.page.locator("#query textarea").input_value() == "three"
    stub_model.go_on.set()
    waiting.wait_for("two", "This is reply 2")


def test_html_is_shown_and_not_run(serve, visit, stub_model):
    stub_model.reply = EVIL
    visitor = visit(serve(stub_model))
    visitor.ask(EVIL)
    wait_until(lambda: visitor.texts()[-1:] and visitor.texts()[-1].endswith("1"))
    visitor.page.wait_for_timeout(300)
    assert visitor.page.title() == "stub"
    assert visitor.page.locator("#chat script, #chat img").count() == 0
    assert visitor.page.locator("#chat strong").count() == 2
    for text in visitor.texts():
        assert "<script>document.title='owned'</script><img src='x'" in text


def test_mathematics_is_drawn_and_money_is_not(serve, visit, stub_model):
    stub_model.reply = r"""\(a_1\), $\frac{1}{2}$ and

$$
x
= y
$$

cost $5 and $6; `$z$`"""
    visitor = visit(serve(stub_model))
    for turn in (1, 2):
        visitor.ask("hello")
        visitor.page.locator("#chat .katex").nth(3 * turn - 1).wait_for()
        visitor.settle()
    drawn = visitor.page.locator("#chat .katex annotation").all_text_contents()
    assert drawn == ["a_1", r"\frac{1}{2}", "x\n= y"] * 2
    assert visitor.page.locator("#chat .katex-display").count() == 2
    assert "cost $5 and $6; $z$" in visitor.texts()[-1]
    assert stub_model.asked[1][1] == [("hello", stub_model.reply + " 1")]


def test_the_pencil_and_the_copy_button_have_the_text_behind(serve, visit, stub_model):
    stub_model.reply = "**bold** <b> $x$\nline"
    visitor = visit(serve(stub_model), permissions=["clipboard-read", "clipboard-write"])
    visitor.ask("hello")
    wait_until(lambda: visitor.texts()[-1:] and visitor.texts()[-1].endswith("1"))
    visitor.settle()
    visitor.page.locator("#chat button[title='Copy message']").last.click()
    visitor.page.wait_for_timeout(200)
    assert visitor.page.evaluate("navigator.clipboard.readText()") == stub_model.reply + " 1"
    visitor.page.locator("#chat button[title=Edit]").nth(1).click()
    field = visitor.page.get_by_role("textbox", name="Reply")
    assert field.input_value() == stub_model.reply + " 1"
    visitor.page.locator("#chat button[title=Submit]").click()
    visitor.settle()
    visitor.ask("next")
    wait_until(lambda: len(stub_model.asked) == 2)
    assert stub_model.asked[1][1] == [("hello", stub_model.reply + " 1")]


def test_what_is_typed_while_a_reply_streams_stays(serve, visit, stub_model):
    stub_model.reply = " ".join(f"word{number}" for number in range(60))
    stub_model.pause = 0.05
    visitor = visit(serve(stub_model))
    field = visitor.page.locator("#query textarea")
    visitor.ask("hello")
    wait_until(lambda: visitor.texts()[-1:] and "word0" in visitor.texts()[-1])
    field.press_sequentially("a next question", delay=40)
    assert visitor.texts()[-1] != stub_model.reply + " 1"
    assert field.input_value() == "a next question"
    visitor.page.keyboard.press("Enter")  # takes no second question
    wait_until(lambda: visitor.texts()[-1] == stub_model.reply + " 1")
    visitor.settle()
    assert field.input_value() == "a next question"
    visitor.page.keyboard.press("Enter")
    wait_until(lambda: len(visitor.texts()) == 4)
    assert field.input_value() == ""
    assert [asked[0] for asked in stub_model.asked] == ["hello", "a next question"]


# In one task of the page: at once, before Gradio has read the field.
TYPE_ON = """async way => {
  const field = document.querySelector("#query textarea");
  const options = { key: "Enter", code: "Enter", bubbles: true, cancelable: true };
  const send = () => {
    if (way === "click") return document.querySelector("#submit").click();
    field.dispatchEvent(new KeyboardEvent("keydown", options));
    field.dispatchEvent(new KeyboardEvent("keypress", options));
  };
  send();
  field.value += " and more";
  field.dispatchEvent(new Event("input", { bubbles: true }));
}"""


@pytest.mark.parametrize("way", ["key", "click"])
@pytest.mark.no_cover
def test_what_is_typed_behind_enter_is_no_part_of_the_question(serve, visit, stub_model, way):
    visitor = visit(serve(stub_model))
    for turn, query in enumerate(("hello", "again"), 1):
        visitor.settle()
        visitor.type(query)
        visitor.page.evaluate(TYPE_ON, way)
        wait_until(lambda turn=turn: visitor.texts()[-1:] == [f"{stub_model.reply} {turn}"])
        visitor.settle()
        assert visitor.page.locator("#query textarea").input_value() == " and more"
    assert [asked[0] for asked in stub_model.asked] == ["hello", "again"]


def test_what_is_typed_while_a_question_waits_stays(serve, visit, stub_model):
    stub_model.go_on.clear()
    address = serve(stub_model)
    first, waiting = visit(address), visit(address)
    first.ask("one")
    first.wait_for("one", "This")
    waiting.ask("two")
    waiting.page.wait_for_timeout(300)
    waiting.page.keyboard.type(" and more")
    waiting.page.wait_for_timeout(300)
    stub_model.go_on.set()
    waiting.wait_for("two", "This is reply 2")
    assert waiting.page.locator("#query textarea").input_value() == " and more"


def test_the_same_question_twice_leaves_the_field_twice(serve, visit, stub_model):
    visitor = visit(serve(stub_model))
    for turn in (1, 2):
        visitor.ask("hello")
        wait_until(lambda turn=turn: len(visitor.texts()) == 2 * turn)
        wait_until(lambda: visitor.page.locator("#query textarea").input_value() == "")


def test_stop_is_there_while_there_is_something_to_stop(serve, visit, stub_model):
    visitor = visit(serve(stub_model))
    stop = visitor.page.locator("#stop")
    assert stop.is_disabled() and "stop" not in stop.get_attribute("class").split()
    for end in ("stop", "clear"):
        stub_model.closed.clear()
        visitor.ask("long")
        wait_until(stop.is_enabled)
        wait_until(lambda: "stop" in stop.get_attribute("class").split())
        wait_until(lambda: visitor.texts()[-1:] and "on and" in visitor.texts()[-1])
        visitor.click(end)
        wait_until(stop.is_disabled)
    for text in ("hello", " ", "error: of the model"):
        visitor.ask(text)
        visitor.settle()
        wait_until(stop.is_disabled)
        wait_until(lambda: "stop" not in stop.get_attribute("class").split())


@pytest.mark.parametrize(
    "locale, query, settings, seed, language",
    [
        ("en-GB", "Question", "Settings", "Seed", "en"),
        ("zh-CN", "问题", "设置", "随机种子", "zh-CN"),
        ("zh", "问题", "设置", "随机种子", "zh-CN"),
        ("zh-Hans-SG", "问题", "设置", "随机种子", "zh-CN"),
        ("zh-HK", "问题", "设置", "随机种子", "zh-TW"),
    ],
)
def test_the_page_speaks_the_language_of_the_browser(serve, visit, stub_model, locale, query, settings, seed, language):
    visitor = visit(serve(stub_model), locale=locale)
    visitor.page.get_by_role("textbox", name=query, exact=True).wait_for()
    visitor.page.get_by_text(settings, exact=True).click()
    visitor.page.get_by_label(seed).wait_for()
    assert visitor.page.evaluate("document.documentElement.lang") == language
    names = " ".join(visitor.page.locator("#buttons button, #settings label").all_inner_texts())
    assert any("一" <= c <= "鿿" for c in names) == (language != "en")
    if language != "en":
        assert not {"Submit", "Stop", "Regenerate", "Clear", "Temperature", "Sample"} & set(names.split())


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_a_wide_table_scrolls_and_breaks_no_word(serve, visit, stub_model, size):
    words = ["Wavelength", "Refractive", "Temperature", "Absorption", "Manufacturer"]
    rows = ["|".join(words), "|".join(["--"] * 5), "|".join(words), "|".join(["折射率和温度"] * 5)]
    stub_model.reply = "\n".join(f"|{row}|" for row in rows) + "\n\nend"
    visitor = visit(serve(stub_model), size)
    visitor.ask("hello")
    wait_until(lambda: visitor.texts()[-1:] and visitor.texts()[-1].endswith("end 1"))
    heights = visitor.page.evaluate(
        "[...document.querySelectorAll('#chat .table th')].map(e => e.getBoundingClientRect().height)"
    )
    assert len(heights) == 5 and max(heights) < 50
    assert visitor.page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    scrolls = visitor.page.evaluate("(e => e.scrollWidth > e.clientWidth)(document.querySelector('#chat .table'))")
    assert scrolls == (size is PHONE)


def test_errors_are_told_as_text(stub_model, serve, visit):
    visitor = visit(serve(stub_model))
    visitor.ask("error: <img src=x onerror=\"document.title='owned'\"> shorten it")
    visitor.page.get_by_text("shorten it").last.wait_for()
    toast = visitor.page.locator(".toast-body")
    assert "<img src=x" in toast.inner_text()
    assert visitor.page.title() == "stub"
    assert visitor.texts() == []
    assert visitor.page.locator("#query textarea").input_value().startswith("error:")


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_everything_fits(stub_model, serve, visit, size):
    visitor = visit(serve(stub_model), size)
    visitor.ask("你好 " * 30 + "x" * 200)
    wait_until(lambda: visitor.texts()[-1:] == ["This is reply 1"])
    script = "document.documentElement.scrollWidth <= window.innerWidth"
    assert visitor.page.evaluate(script)
    for name in ("submit", "stop", "regenerate", "clear", "query"):
        box = visitor.page.locator(f"#{name}").bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= visitor.page.viewport_size["width"], name
        assert box["y"] + box["height"] <= visitor.page.viewport_size["height"], name
        inner = f"(e => e.scrollWidth <= e.clientWidth)(document.querySelector('#{name}'))"
        assert visitor.page.evaluate(inner), name


def test_no_stream_is_left():
    assert [thread for thread in threading.enumerate() if thread.name == "qwen-chat-stream"] == []
