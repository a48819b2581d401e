"""Replies as Markdown, laid out while they are written.

Blocks (paragraphs, lists, code) that are complete are printed for good, so that the terminal can scroll back to all of
them; only the last block is drawn again and again, as much of its end as the screen has room for.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Sequence

from markdown_it import MarkdownIt
from markdown_it.token import Token
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.markdown import Markdown
from rich.segment import Segment

from ..programs.printing import printable

FRAMES = 12
"""How often a second what is under way is drawn at most."""


class Reply(Markdown):
    """Markdown of which nothing is hidden and nothing drives the terminal.

    What rich would leave out or turn into control sequences is text here: tags, the addresses of links and images,
    definitions of links. Line breaks stay where they are.
    """

    def __init__(self, text: str):
        super().__init__("", hyperlinks=False)
        self.parsed = parse(printable(text))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        begun = False
        for segment in super().__rich_console__(console, options):
            begun = begun or segment != Segment.line()
            if not begun:  # lists and quotations are preceded by an empty line even where they are the first
                continue
            if isinstance(segment, Segment) and not segment.control:
                # Once more, since Markdown can spell characters: `&#x202e;`.
                segment = Segment(printable(segment.text), segment.style)
            yield segment


def parse(text: str) -> list[Token]:
    """The tokens of a Markdown text; the blocks among them are those of level 0 that know their lines (`map`)."""
    parser = MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"])
    tokens = parser.disable(["autolink", "image", "reference"]).parse(text)
    for child in (child for token in tokens for child in token.children or ()):
        if child.type == "softbreak":
            child.type = "hardbreak"
    return tokens


def complete_blocks(text: str) -> int:
    """How many characters of a text that still grows are blocks which nothing that may follow can change.

    A block is complete when a whole line has begun the next one. The last line doesn't count before it is whole: three
    hyphens may become a rule, or a word.
    """
    whole = text[: text.rfind("\n") + 1]
    first_lines = [token.map[0] for token in parse(whole) if token.level == 0 and token.map and token.nesting >= 0]
    if len(first_lines) < 2:
        return 0
    return sum(len(line) + 1 for line in whole.split("\n")[: first_lines[-1]])


class _End:
    """As many lines of the end of a reply as the screen has room for."""

    def __init__(self, text: str):
        self.text = text

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines: Sequence[Iterable[Segment]] = console.render_lines(Reply(self.text), options, pad=False)
        for line in lines[-max(options.size.height - 2, 1) :]:
            yield from line
            yield Segment.line()


class MarkdownDisplay:
    """Shows replies as Markdown, and what commands say as it is.

    Args:
        console: where.
    """

    def __init__(self, console: Console):
        self.console = console

    def show(self, texts: Iterable[str]) -> None:
        """Show a reply from its texts, each of which begins with the one before."""
        arriving = iter(texts)
        with self.console.status(""):  # whose thread draws a spinner
            first = next(arriving, "")
        text = ""
        done = looked_at = 0
        drawn = 0.0
        try:
            with self._live() as live:
                for text in itertools.chain([first], arriving):
                    if "\n" in text[looked_at:]:
                        complete = complete_blocks(printable(text[done:]))
                        block, done = text[done : done + complete], done + complete
                        live.update(_End(text[done:]), refresh=True)
                        self._print(block, first=done == complete)
                    looked_at = len(text)
                    now = time.monotonic()
                    if now - drawn >= 1 / FRAMES:
                        live.update(_End(text[done:]), refresh=True)
                        drawn = now
        finally:  # also what was written before an error
            self._print(text[done:], first=done == 0)

    def _live(self) -> Live:
        # Not refreshed by a thread: what two of them lay out they may write in another order.
        return Live(
            console=self.console, auto_refresh=False, transient=True, redirect_stdout=False, redirect_stderr=False
        )

    def _print(self, text: str, first: bool) -> None:
        if text.strip():
            if not first:
                self.console.line()
            self.console.print(Reply(text))

    def note(self, text: str) -> None:
        """Show what a command says."""
        self._print_plain(text)

    def error(self, text: str) -> None:
        """Show what went wrong."""
        self._print_plain(text, style="red")

    def _print_plain(self, text: str, style: str | None = None) -> None:
        if text:
            self.console.print(printable(text), style=style, markup=False, highlight=False, emoji=False, soft_wrap=True)
