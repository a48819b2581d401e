"""Fixtures of the browser tests: a model that says what a test wants, the page served, visitors in Chromium."""

import json
import shutil
import threading
import time
import uuid
from contextlib import ExitStack, suppress

import httpx
import pytest
from transformers import GenerationConfig

pytest.importorskip("gradio", reason="needs gradio: pip install '.[demo]'")

from gradio_client.utils import apply_diff  # noqa: E402

from qwen1.browser.conversation import Chat  # noqa: E402
from qwen1.browser.messages import text_of  # noqa: E402
from qwen1.browser.page import ChatPage  # noqa: E402
from qwen1.browser.rendering import behind  # noqa: E402
from qwen1.browser.serving import launch  # noqa: E402
from qwen1.tools_qwen import parse_reply, run_tools  # noqa: E402

DESKTOP = {"width": 1280, "height": 800}
PATIENCE = 10
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
                time.sleep(0.02)  # whether or not a stream before this one has closed by now
            for word in f"{self.reply} {number}".split(" "):
                text = f"{text} {word}".strip()
                yield text
                assert self.go_on.wait(30)
                time.sleep(self.pause)
        finally:
            self.closed.set()


CALL = 'Thought: I look.\nAction: look\nAction Input: {"at": "it"}'
ANSWER = "Thought: I now know the final answer.\nFinal Answer: It is blue."


class CallingModel(StubModel):
    """Writes the next of `replies` each time that it is asked with tools, and waits behind the last word of a call.

    Attributes:
        read: (query, turns) of each of these times.
        written: set when a call is written.
        every: seconds after which it comes once more while it waits, as from a model that goes on writing; the page
            shows the last of several words only once another comes or there was time to draw them.
    """

    run_tools = run_tools

    def __init__(self, *replies):
        super().__init__()
        self.replies = list(replies)
        self.read = []
        self.written = threading.Event()
        self.every = 30.0

    def chat_stream(self, tokenizer, query, history, system, tools=None, **settings):
        if tools is None:
            return super().chat_stream(tokenizer, query, history, system, **settings)
        return self._write(query, list(history), tools)

    def _write(self, query, turns, tools):
        self.read.append((query, turns))
        reply = self.replies.pop(0)
        words = reply.split(" ")
        try:
            for count in range(1, len(words) + 1):
                yield " ".join(words[:count])
            if "Action:" in reply:
                self.written.set()
                while not self.go_on.wait(self.every):
                    yield reply
            yield parse_reply(reply, tools)
        finally:
            self.closed.set()


class Looking:
    """A tool, and what was asked of it."""

    def __init__(self):
        self.made = []
        self.result = "blue"

    def tool(self):
        def look(at: str) -> str:
            """
            Look at something

            Args:
                at: What
            """
            self.made.append(at)
            if isinstance(self.result, Exception):
                raise self.result
            return self.result

        return look


@pytest.fixture
def looking():
    return Looking()


@pytest.fixture
def calling_model():
    """One that makes a call and answers."""
    return CallingModel(CALL, ANSWER)


@pytest.fixture
def stub_model():
    return StubModel()


@pytest.fixture
def serve():
    """Launch the page of a model on a free port: (model, tokenizer, tools=…, **arguments of ChatPage) -> address."""
    with ExitStack() as stack:

        def start(model, tokenizer=None, name="stub", tools=(), **arguments):
            blocks = ChatPage(Chat(model, tokenizer, tools=tools), name, **arguments).blocks()
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


class Client:
    """A visitor who sends what the page's script sends, or something else."""

    def __init__(self, address):
        self.address = address
        self.http = httpx.Client(base_url=address.rstrip("/"), timeout=60, trust_env=False)
        config = self.http.get("/config").json()
        self.prefix = config["api_prefix"]
        places = {part["props"].get("elem_id"): part["id"] for part in config["components"]}
        self.submit = places["submit"]
        click = [self.submit, "click"]
        self.event = next(e for e in config["dependencies"] if click in e["targets"] and len(e["inputs"]) > 4)
        values = {part["id"]: part["props"].get("value") for part in config["components"]}
        self.values = [values[place] for place in self.event["inputs"]]
        self.session = uuid.uuid4().hex[:11]
        self.messages = []

    def ask(self, query, stop=None):
        """The conversation in the end.

        Args:
            stop: told each conversation that comes; Stop is clicked once it gives true.
        """
        data = [query, self.messages, None, *self.values[3:]]
        asked = {"data": data, "fn_index": self.event["id"], "trigger_id": self.submit, "session_hash": self.session}
        answer = self.http.post(f"{self.prefix}/queue/join", json={**asked, "event_data": None})
        event = answer.raise_for_status().json()["event_id"]
        values = []
        with self.http.stream("GET", f"{self.prefix}/queue/data", params={"session_hash": self.session}) as lines:
            for line in lines.iter_lines():
                told = json.loads(line.removeprefix("data:")) if line.startswith("data:") else {}
                if told.get("msg") == "process_generating":
                    new = told["output"]["data"]
                    values = [apply_diff(*pair) for pair in zip(values, new, strict=True)] if values else new
                    self.messages = values[1]
                    if stop is not None and stop(self.messages):
                        cancelled = {"session_hash": self.session, "fn_index": self.event["id"], "event_id": event}
                        self.http.post(f"{self.prefix}/cancel", json=cancelled).raise_for_status()
                        stop = None
                elif told.get("msg") == "process_completed":
                    return [text_of(behind(held)) for held in self.messages]


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
        """Ask until the question is sent: until the answer before has ended for the page too, it sends none."""
        from playwright.sync_api import TimeoutError as TooLate

        self.settle()
        self.type(text)
        for _ in range(PATIENCE):
            with suppress(TooLate):
                with self.page.expect_request(lambda request: "/queue/join" in request.url, timeout=5000):
                    self.page.keyboard.press("Enter")
                return
        raise AssertionError(f"the page didn't send {text!r}")

    def settle(self):
        """Until an answer whose last word is there has ended for the page too, which shows nothing of that."""
        self.page.wait_for_timeout(300)

    def open_settings(self):
        """Until they are there and hold what they shall: as they come, Gradio sets them once more."""
        self.page.get_by_text("Settings").click()
        self.page.locator("#seed input").wait_for()
        self.page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")

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
