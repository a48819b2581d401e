"""Calls of tools on the page, in a real browser."""

import pytest

from .conftest import ANSWER, CALL, CallingModel
from .test_chromium import wait_until

TITLE = 'look({"at": "it"})'
pytestmark = pytest.mark.slow


def titles(visitor):
    return visitor.page.locator("#chat .thought-group .title").all_inner_texts()


def test_a_call_is_a_block_that_folds(calling_model, looking, serve, visit):
    visitor = visit(serve(calling_model, tools=[looking.tool()]), permissions=["clipboard-read", "clipboard-write"])
    visitor.ask("q")
    visitor.wait_for("q", "It is blue.")
    assert titles(visitor) == [TITLE]
    visitor.page.get_by_role("group", name="Step").wait_for()
    fold = visitor.page.get_by_role("button", name=TITLE)
    assert fold.get_attribute("aria-expanded") == "false"
    fold.focus()
    visitor.page.keyboard.press("Space")
    visitor.page.locator("#chat .thought-group .prose").wait_for()
    wait_until(lambda: fold.get_attribute("aria-expanded") == "true")
    assert [text.strip() for text in visitor.page.locator("#chat .thought-group code").all_inner_texts()] == [
        '{"at": "it"}', "blue",
    ]  # fmt: skip
    visitor.page.locator("#chat button[title='Copy message']").nth(1).click()
    visitor.page.wait_for_timeout(200)
    assert visitor.page.evaluate("navigator.clipboard.readText()") == f"{CALL}\nObservation: blue"
    visitor.page.keyboard.press("Tab")
    fold.press("Enter")
    wait_until(lambda: visitor.texts() == ["q", "It is blue."])


def test_an_edited_step_is_what_the_model_reads(looking, serve, visit):
    model = CallingModel(CALL, ANSWER, ANSWER)
    visitor = visit(serve(model, tools=[looking.tool()]))
    visitor.ask("q")
    visitor.wait_for("q", "It is blue.")
    visitor.edit(1, f"{CALL}\nObservation: green")
    visitor.settle()
    assert titles(visitor) == [TITLE]
    visitor.ask("r")
    visitor.wait_for("q", "It is blue.", "r", "It is blue.")
    assert "Observation: green\nThought: I now know" in model.read[-1][1][0][1]


def test_stop_makes_no_call_and_leaves_nothing_under_way(looking, serve, visit):
    model = CallingModel(CALL, ANSWER)
    model.go_on.clear()
    model.every = 0.05
    visitor = visit(serve(model, tools=[looking.tool()]))
    visitor.ask("q")
    assert model.written.wait(20)
    wait_until(lambda: titles(visitor) == [TITLE])
    assert visitor.page.locator("#chat .loading-spinner").count() == 1
    visitor.click("stop")
    visitor.settle()
    model.go_on.set()
    wait_until(lambda: titles(visitor) == [f"{TITLE}: stopped"])
    assert visitor.page.locator("#chat .loading-spinner").count() == 0
    assert model.closed.wait(10) and looking.made == []
    visitor.ask("r")
    wait_until(lambda: visitor.texts()[-1:] == ["It is blue."])
    assert model.read[-1] == ("r", [])


def test_the_switch_asks_without_tools(calling_model, looking, serve, visit):
    visitor = visit(serve(calling_model, tools=[looking.tool()]))
    visitor.open_settings()
    visitor.page.get_by_label("Tools").uncheck()
    visitor.ask("q")
    visitor.wait_for("q", "This is reply 1")
    assert calling_model.read == []


def test_calls_without_end_are_told(looking, serve, visit):
    visitor = visit(serve(CallingModel(*[CALL] * 5), tools=[looking.tool()]), locale="zh-CN")
    visitor.ask("q")
    visitor.page.get_by_text("多次调用工具").last.wait_for()
    assert titles(visitor) == [TITLE] * 4 + [f"{TITLE}: 已停止"]
