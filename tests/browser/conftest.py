"""Fixtures of the browser tests: a model that says what a test wants, the page served, visitors in Chromium."""

import shutil
import threading
import time
from contextlib import ExitStack

import pytest
from transformers import GenerationConfig

pytest.importorskip("gradio", reason="needs gradio: pip install '.[demo]'")

from qwen1.browser.conversation import Chat  # noqa: E402
from qwen1.browser.page import ChatPage  # noqa: E402
from qwen1.browser.serving import launch  # noqa: E402

DESKTOP = {"width": 1280, "height": 800}
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


class StubModel:
    """Replies `reply` with a number, a word at a time; to "long" without end, until the stream is closed.

    Attributes:
        asked: (query, turns, system, settings) of each call.
        closed: set when a stream has ended or was closed.
        go_on: words after the first wait for it.
        pause: seconds after each word.
    """

    def __init__(self, reply="This is reply"):
        self.reply = reply
        self.generation_config = GenerationConfig(max_new_tokens=64, do_sample=False)
        self.asked = []
        self.closed = threading.Event()
        self.go_on = threading.Event()
        self.go_on.set()
        self.pause = 0

    def chat_stream(self, tokenizer, query, history, system, **settings):
        if query.startswith("error:"):
            raise ValueError(query)
        self.asked.append((query, list(history), system, settings))
        return self._words(query, len(self.asked))

    def _words(self, query, number):
        text = ""
        try:
            while query == "long":
                text += "on and "
                yield text
                self.closed.wait(0.02)
            for word in f"{self.reply} {number}".split(" "):
                text = f"{text} {word}".strip()
                yield text
                assert self.go_on.wait(30)
                time.sleep(self.pause)
        finally:
            self.closed.set()


@pytest.fixture
def stub_model():
    return StubModel()


@pytest.fixture
def serve():
    """Launch the page of a model on a free port: (model, tokenizer, **arguments of ChatPage) -> address."""
    with ExitStack() as stack:

        def start(model, tokenizer=None, name="stub", **arguments):
            blocks = ChatPage(Chat(model, tokenizer), name, **arguments).blocks()
            stack.callback(blocks.close)
            launch(blocks, wait=False)
            return blocks.local_url

        yield start


@pytest.fixture(scope="module")
def chromium():
    """Debian's Chromium, headless, with an empty profile."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install '.[test]'")
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=list(FLAGS))
        yield browser
        browser.close()


class Visitor:
    """Someone at the page, in a browser of their own.

    Attributes:
        page: playwright's page.

    Args:
        browser: Chromium.
        address: of the page.
        size: of its window.
        options: of playwright's `new_context`, such as `locale` and `color_scheme`.
    """

    def __init__(self, browser, address, size=DESKTOP, **options):
        self.context = browser.new_context(viewport=size, **options)
        self.page = self.context.new_page()
        self.complaints = []
        self.foreign = []
        self.page.on("console", self._listen)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self._watch(request.url, address))
        self.page.goto(address)
        self.page.locator("#query textarea").wait_for()

    def _listen(self, message):
        if message.type == "error":
            self.complaints.append(message.text)

    def _watch(self, url, address):
        if not url.startswith((address, "data:", "blob:")):
            self.foreign.append(url)

    def type(self, text):
        self.page.locator("#query textarea").fill(text)

    def ask(self, text):
        self.settle()
        self.type(text)
        self.page.keyboard.press("Enter")

    def settle(self):
        """Until an answer whose last word is there has ended for the page too, which shows nothing of that."""
        self.page.wait_for_timeout(300)

    def click(self, name):
        self.page.locator(f"#{name}").click()

    def edit(self, index, text):
        """Change a message of the conversation, as its pencil does."""
        self.settle()
        self.page.locator("#chat button[title=Edit]").nth(index).click()
        self.page.locator("#chat textarea").fill(text)
        self.page.locator("#chat button[title=Submit]").click()

    def texts(self):
        """What the conversation shows, in turn."""
        return [text.strip() for text in self.page.locator("#chat .message .prose").all_inner_texts()]

    def wait_for(self, *texts):
        """Until the conversation is this."""
        script = """texts => JSON.stringify([...document.querySelectorAll("#chat .message .prose")].map(
            e => e.innerText.trim())) === JSON.stringify(texts)"""
        try:
            self.page.wait_for_function(script, arg=list(texts), timeout=20_000)
        except Exception as error:
            raise AssertionError(f"the page shows {self.texts()} instead of {list(texts)}") from error


@pytest.fixture
def visit(chromium):
    """A new visitor at an address; in the end, none may have seen an error or asked another server for anything."""
    visitors = []

    def arrive(address, size=DESKTOP, **options):
        visitors.append(Visitor(chromium, address, size, **options))
        return visitors[-1]

    yield arrive
    for visitor in visitors:
        visitor.context.close()
    assert [visitor.complaints for visitor in visitors if visitor.complaints] == []
    assert [visitor.foreign for visitor in visitors if visitor.foreign] == []
