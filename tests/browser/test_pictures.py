"""The page with a long reply, code, a table and mathematics, on a desktop and a phone, in light and in dark.

`QWEN_PICTURES=docs/images pytest -m slow tests/browser/test_pictures.py` draws the pictures of docs/browser.md anew.
"""

import os
from pathlib import Path

import pytest

from qwen1.programs.tools import SHIPPED

from .conftest import CallingModel

Axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs axe-playwright-python").Axe

NEEDED = "Thought: I need the calculator.\nAction: calculator\nAction Input: "
CALLS = {
    "What is 1234 times 5678?": (NEEDED + '{"expression": "1234*5678"}', "Final Answer: 1234*5678 = 7006652"),
    "And 5/0?": (NEEDED + '{"expression": "5/0"}', "Final Answer: Nobody can divide by zero."),
}
DESKTOP, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 844}
pytestmark = pytest.mark.slow

TURNS = {
    "How long is the way of light through a flat glass?": r"""In glass of refractive index $n$ light is slower, and the
*optical* path of a plate of thickness $d$ at an angle $\alpha$ is

\[ L = \frac{n\,d}{\sqrt{1 - \sin^2\alpha / n^2}} \approx n d \left(1 + \frac{\alpha^2}{2n^2}\right) \]

so a plate for $5 and one for $60 differ in \(n\) alone.""",
    "比较几种玻璃": """下面是三种玻璃，价格为每片：

| Glass | Refractive index | Abbe number | Price | 用途 |
|:--|--:|--:|--:|:--|
| BK7 | 1.5168 | 64.17 | $5 | 一般透镜和窗口 |
| Flint SF11 | 1.7847 | 25.76 | $18 | 消色差双合透镜 |
| Fused silica | 1.4585 | 67.82 | $60 | `<script>` of ultraviolet light |
""",
    "As a program, please": """1. Install nothing; the standard library is enough.
2. Run this:

```python
from math import sin, sqrt

def path(n: float, d: float, alpha: float) -> float:
    \"\"\"Optical path of a plate.\"\"\"
    return n * d / sqrt(1 - sin(alpha) ** 2 / n**2)  # in the unit of d

print(f"{path(1.5168, 10, 0.3):.3f} mm is longer than this line, which is made to be too long for a phone")
```

It prints **15.464 mm**; `<b>tags</b>` and <script>alert(1)</script> are text.""",
}


class Scripted:
    """Replies what `TURNS` says, as the stub model of a test does."""

    def __init__(self, stub):
        self.generation_config = stub.generation_config

    def chat_stream(self, tokenizer, query, history, system, **settings):
        reply = TURNS[query]
        yield from (reply[:end] for end in range(40, len(reply), 40))
        yield reply


@pytest.fixture
def converse(stub_model, serve, visit):
    """A visitor who has asked all of `TURNS`: size -> visitor."""

    def start(size):
        visitor = visit(serve(Scripted(stub_model), name="Qwen-7B-Chat"), size)
        for number, query in enumerate(TURNS, 1):
            visitor.ask(query)
            visitor.page.locator("#chat .message.bot .prose").nth(number - 1).wait_for()
        visitor.page.locator("#chat .katex").first.wait_for()
        visitor.page.wait_for_timeout(700)
        return visitor

    return start


SCHEMES = ("light", "dark")


def put_on(page, scheme):
    """Have the page as for who prefers a light or a dark one, which it follows at once."""
    page.emulate_media(color_scheme=scheme)
    page.locator("body.dark" if scheme == "dark" else "body:not(.dark)").wait_for()
    page.wait_for_timeout(300)


def draw(visitor, picture, row):
    """A picture of the page with a row of the conversation in sight."""
    visitor.page.locator("#chat .message-row").nth(row).evaluate("e => e.scrollIntoView()")
    visitor.page.wait_for_timeout(500)
    visitor.page.screenshot(path=picture)
    assert picture.stat().st_size < 150_000


UNROLLED = """
#chat :is(.table, pre) { overflow: visible !important }
* { transition: none !important }
"""
NO_TEXT = ("nonBmp", "shortTextContent")  # what axe says of an arrow, and of a letter in a formula
RULES = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"]


def judged(page, nodes, *but):
    """What axe finds against WCAG 2.2, A and AA.

    Args:
        page: playwright's; it is made high, for axe can't judge what is rolled out of sight.
        nodes: with text whose contrast it has to measure, at least.
        but: selectors of what it can't judge, for things lie over one another there; they are judged elsewhere.
    """
    size = page.viewport_size
    page.set_viewport_size({**size, "height": 4000})
    style = page.add_style_tag(content=UNROLLED)
    page.wait_for_timeout(500)
    results = Axe().run(page, {"exclude": [[".katex"], *([selector] for selector in but)]}, {"runOnly": RULES}).response
    style.evaluate("e => e.remove()")
    page.set_viewport_size(size)
    measured = [len(rule["nodes"]) for rule in results["passes"] if rule["id"] == "color-contrast"]
    assert measured and measured[0] >= nodes
    return [
        f"{rule['id']}: {node['html'][:200]} {node.get('failureSummary')}"
        for rule in results["violations"] + results["incomplete"]
        for node in rule["nodes"]
        if not any((check["data"] or {}).get("messageKey") in NO_TEXT for check in node["any"])
    ]


@pytest.fixture
def pictures(tmp_path):
    """Folder of the pictures."""
    return Path(os.environ.get("QWEN_PICTURES", tmp_path))


@pytest.mark.parametrize(("size", "name", "rows"), [(DESKTOP, "desktop", (2, 0)), (PHONE, "phone", (2, 5))])
@pytest.mark.no_cover
def test_everyone_can_read_it(converse, pictures, size, name, rows):
    """With pictures of different rows in light and in dark."""
    visitor = converse(size)
    for scheme, row, ending in zip(SCHEMES, rows, ("", "-dark"), strict=True):
        put_on(visitor.page, scheme)
        draw(visitor, pictures / f"browser-{name}{ending}.png", row)
        assert visitor.page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        assert visitor.page.locator("#chat .katex").count() == 5
    visitor.page.locator("#settings button").first.click()
    visitor.page.wait_for_timeout(300)
    for scheme in SCHEMES:
        put_on(visitor.page, scheme)
        assert judged(visitor.page, 40, *([] if size is DESKTOP else [".table", "pre"])) == [], scheme


@pytest.mark.no_cover
def test_everyone_can_read_what_passes(stub_model, serve, visit):
    """Examples, a reply that is written, a message that is edited, an error."""
    visitor = visit(serve(stub_model))

    def judge(nodes, *but):
        for scheme in SCHEMES:
            put_on(visitor.page, scheme)
            assert judged(visitor.page, nodes, *but) == [], scheme

    visitor.page.get_by_text("12+34=?").wait_for()
    judge(8)
    visitor.ask("long")
    visitor.page.locator("#stop:enabled").wait_for()
    judge(4, "#chat")
    visitor.click("stop")
    visitor.settle()
    visitor.page.locator("#chat button[title=Edit]").nth(1).click()
    visitor.type("error: of the model")
    visitor.page.keyboard.press("Enter")
    visitor.page.locator(".toast-body").wait_for()
    visitor.page.wait_for_timeout(500)
    judge(6)


@pytest.fixture
def calls(serve, visit):
    """A visitor whose first question made a call, and the second one that failed: size -> visitor, model."""

    def start(size):
        model = CallingModel(*[reply for replies in CALLS.values() for reply in replies], NEEDED + "{}")
        visitor = visit(serve(model, name="qwen-tiny-chat", tools=[*SHIPPED.values()]), size)
        for query, (_, answer) in CALLS.items():
            visitor.ask(query)
            visitor.page.get_by_text(answer.removeprefix("Final Answer: ")).last.wait_for()
        visitor.settle()
        return visitor, model

    return start


def unfold(visitor, number):
    visitor.page.locator("#chat .thought-group .title").nth(number).click()
    visitor.page.wait_for_timeout(700)


@pytest.mark.parametrize(
    ("size", "name", "scheme", "row"), [(DESKTOP, "tools", "light", 0), (PHONE, "tools-phone", "dark", 1)]
)
@pytest.mark.no_cover
def test_everyone_can_read_a_call(calls, pictures, size, name, scheme, row):
    """Folded, unfolded, failed and stopped; the settings with the switch."""
    visitor, model = calls(size)
    put_on(visitor.page, scheme)
    unfold(visitor, 0)
    draw(visitor, pictures / f"browser-{name}.png", row)
    unfold(visitor, 1)
    model.go_on.clear()
    model.every = 0.05
    visitor.ask("more")
    visitor.page.get_by_text("calculator({})").wait_for()
    visitor.click("stop")
    model.go_on.set()
    visitor.page.get_by_text("calculator({}): stopped").wait_for()
    visitor.page.locator("#settings button").first.click()
    visitor.page.wait_for_timeout(700)
    for scheme in SCHEMES:
        put_on(visitor.page, scheme)
        assert judged(visitor.page, 30, *([] if size is DESKTOP else ["pre"])) == [], scheme
        assert visitor.page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
