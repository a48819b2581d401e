"""Replies as Markdown: what the screen shows in the end, and what it must never be sent."""

import io
import itertools
import threading
import time

import pytest
from rich.console import Console

from qwen1.terminal.markdown import FRAMES, MarkdownDisplay, Reply, complete_blocks, parse

LONG = "\n\n".join(f"Paragraph {number}." for number in range(40))
CODE = "Look:\n\n```python\n" + "\n".join(f"x{n} = {n}" for n in range(40)) + "\n```\n\nDone."
ITEMS = "\n".join(f"- item {number}" for number in range(40))
TABLE = "| a | b |\n|---|---|\n" + "\n".join(f"| {n} | 值{n} |" for n in range(30))


class TerminalFile(io.StringIO):
    """Passes what is written on to a screen."""

    def __init__(self, screen):
        super().__init__()
        self.screen = screen
        self.sent = ""

    def write(self, text):
        self.sent += text
        self.screen.feed(text.encode())
        return len(text)

    def isatty(self):
        return True


@pytest.fixture
def show(make_screen):
    """Show a reply that grows by `step` characters: -> the lines of the terminal, and all that it was sent."""

    def show_reply(text, step=3, columns=40, rows=10):
        screen = make_screen(columns, rows)
        file = TerminalFile(screen)
        console = Console(file=file, force_terminal=True, width=columns, height=rows, color_system=None)
        texts = [text[:end] for end in range(step, len(text), step)] + [text]
        MarkdownDisplay(console).show(texts)
        lines = screen.shown()
        while lines and not lines[-1]:
            lines.pop()
        return lines, file.sent

    return show_reply


def printed(text, columns=40):
    """The same reply at once, on a screen without end."""
    file = io.StringIO()
    Console(file=file, width=columns, height=1000, color_system=None).print(Reply(text))
    return [line.rstrip() for line in file.getvalue().rstrip().splitlines()]


@pytest.mark.parametrize(
    "text", [LONG, CODE, ITEMS, TABLE, "# One\n\ntext\n\n## Two\n\n> quoted\n> twice\n\n1. a\n2. b"]
)
@pytest.mark.parametrize("step", [1, 7, 10_000])
@pytest.mark.no_cover
def test_all_of_a_reply_is_left_on_the_terminal_once(show, text, step):
    lines, _ = show(text, step)
    assert lines == printed(text)


def test_one_thread_draws_a_reply(make_screen):
    """Two of them write in another order than they lay out, now and then: a block is left on the terminal twice."""
    writers = []

    class WatchedFile(TerminalFile):
        def write(self, text):
            writers.append(threading.current_thread())
            return super().write(text)

    def texts():
        time.sleep(0.3)  # meanwhile there is something to look at
        assert set(writers) - {threading.main_thread()}
        writers.clear()
        for end in range(1, len(ITEMS), 100):
            yield ITEMS[:end]
            time.sleep(0.1)

    console = Console(file=WatchedFile(make_screen(40, 10)), force_terminal=True, width=40, height=10)
    MarkdownDisplay(console).show(texts())
    assert set(writers) == {threading.main_thread()}


@pytest.mark.slow
def test_what_is_under_way_is_shown_as_it_grows(make_screen):
    screen = make_screen(40, 10)
    console = Console(file=TerminalFile(screen), force_terminal=True, width=40, height=10, color_system=None)
    seen = []

    def texts():
        for end in range(1, len(ITEMS), 20):
            yield ITEMS[:end]
            seen.append([line.strip() for line in screen.shown() if line.strip()])
            time.sleep(2 / FRAMES)

    MarkdownDisplay(console).show(texts())
    assert all("•" in lines[-1] for lines in seen[1:])
    assert all(len(lines) < 10 for lines in seen)  # the end alone: nothing has scrolled off the screen


def test_a_quick_reply_is_not_drawn_for_each_token(make_screen):
    writes = []

    class CountedFile(TerminalFile):
        def write(self, text):
            writes.append(text)
            return super().write(text)

    console = Console(file=CountedFile(make_screen(40, 10)), force_terminal=True, width=40, height=10)
    start = time.monotonic()
    MarkdownDisplay(console).show("word " * count for count in range(1, 1000))
    assert len(writes) < 30 + 2 * FRAMES * (time.monotonic() - start)


def test_chinese_and_emoji_take_two_columns(show):
    text = "我是一个很小的模型，会说中文和英文。" * 3 + "👋 再见"
    lines, _ = show(text)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert max(map(len, lines)) <= 20


def test_markdown_is_laid_out(show):
    lines, _ = show("**bold** `code` *slanted*\n\n- one\n- two")
    assert lines == ["bold code slanted", "", " • one", " • two"]


@pytest.mark.parametrize(
    "text",
    [
        "vector<int> x; <b>not bold</b> <script>",
        "<div>\ntags\n</div>",
        "see [the docs]\n\n[the docs]: http://example.org",
        "<http://example.org>",
        "first line\nsecond line",
        "a < b && c > d",
    ],
)
def test_nothing_is_hidden(show, text):
    lines, _ = show(text)
    assert lines == text.splitlines()


def test_addresses_are_shown(show):
    lines, sent = show("[bank](http://evil.example) ![x](http://img.example/a.png)", columns=78)
    assert "bank (http://evil.example)" in lines[0] and "http://img.example/a.png" in lines[0]
    assert "\x1b]8" not in sent


HOSTILE = [
    "\x1b]0;title\x07 \x1b[2J\x1b[31mred \x9b2J\r\x08 \u202egnp.exe \x00",
    "&#27;[2J &#x1b;]0;t&#7; &#x9b;2J &#x202e;gnp &#13; &#x2066;x",
    "```\x1b[2J\n\x1b]52;c;aGk=\x07 \u202e\n```",
    "`\x1b[2J` | **\x1b]0;x\x07** | [\x1b[2J](http://a.b/\x1b[2J)",
    "| \x1b[2J | b |\n|---|---|\n| &#x202e; | \x9b |",
    "# \x1b[2J\n- \x1b[2J\n> \x1b[2J\n\n1. \x07",
]


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("step", [1, 10_000])
def test_no_control_sequence_of_a_reply_reaches_the_terminal(show, text, step):
    _, sent = show(text, step)
    _, harmless = show("harmless\n\ntext", 3)
    for character in "\x07\x00\x08\x9b\u202e\u2066":
        assert character not in sent
    # Of ours there are: cursor up, erase line, hide and show the cursor, attributes.
    commands = {sequence.lstrip("0123456789;?")[:1] for sequence in sent.split("\x1b[")[1:]}
    assert commands <= set("AKhlm")
    assert sent.count("\x1b") == sent.count("\x1b[")
    assert "\x1b[" in harmless


def test_notes_and_errors_are_shown_as_they_are(make_screen):
    screen = make_screen(40, 10)
    console = Console(file=TerminalFile(screen), force_terminal=True, width=40, height=10)
    display = MarkdownDisplay(console)
    display.note("**a** [red]b :smile: \x1b[2J")
    display.note("")
    display.error("x\x1b]0;y\x07")
    assert screen.shown()[:3] == ["**a** [red]b :smile: \ufffd[2J", "x\ufffd]0;y\ufffd", ""]


def test_what_was_written_before_an_error_stays(make_screen):
    screen = make_screen(40, 10)
    console = Console(file=TerminalFile(screen), force_terminal=True, width=40, height=10)

    def texts():
        yield "some\n\nthing"
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        MarkdownDisplay(console).show(texts())
    assert [line for line in screen.shown() if line] == ["some", "thing"]


@pytest.mark.parametrize(
    "text, complete",
    [
        ("", ""),
        ("one", ""),
        ("one\n\n", ""),
        ("one\n\ntwo", ""),  # the second line isn't whole
        ("one\n\ntwo\n", "one\n\n"),
        ("one\n---\n", ""),  # a heading
        ("one\n***\n", "one\n"),
        ("one\n```", ""),
        ("one\n```x```\n", ""),  # code within the paragraph
        ("```\na\n\nb\n", ""),
        ("```\na\n```\nb\n", "```\na\n```\n"),
        ("- a\n\n- b\n\n  c\n", ""),
        ("- a\n\nb\n", "- a\n\n"),
        ("| a | b |\n|---|---|\n| 1 | 2 |\n", ""),
    ],
)
def test_blocks_that_nothing_can_change(text, complete):
    assert text[: complete_blocks(text)] == complete


@pytest.mark.slow
@pytest.mark.no_cover
def test_complete_blocks_never_change_as_a_text_goes_on():
    pieces = ["a\n", "\n", "- b\n", "  c\n", "```\n", "---\n", "| f |\n", "|---|\n"]

    def blocks(text):
        return [(token.type, token.content) for token in parse(text)]

    for chosen in itertools.product(pieces, repeat=4):
        text = "".join(chosen)
        if done := complete_blocks("".join(chosen[:3])):
            assert blocks(text[:done]) + blocks(text[done:]) == blocks(text), text
