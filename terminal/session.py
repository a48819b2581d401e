"""The conversation itself: who says what is read, passed to the model, and shown."""

from __future__ import annotations

import argparse
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Protocol

from ..programs.starting import INTERRUPTED
from ..programs.tools import find_tools
from .colon_commands import Commands, Leave, is_command
from .conversation import Conversation, open_conversation
from .errors import CommandError
from .interrupts import on_ctrl_c
from .plain import PlainDisplay

try:
    import termios
except ImportError:  # Windows, where consoles echo nothing that isn't being read
    termios = None  # type: ignore[assignment]


class Display(Protocol):
    """What shows replies, the words of commands, and errors."""

    def show(self, texts: Iterable[str]) -> None: ...

    def note(self, text: str) -> None: ...

    def error(self, text: str) -> None: ...


def run(options: argparse.Namespace) -> int:
    """Answer the question of the command line or those of a pipe, or hold a conversation in the terminal.

    Returns:
        the exit status.

    Raises:
        OSError, ValueError: the checkpoint can't be loaded; without a terminal also what a command or a question of the
            user made impossible.
    """
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # what the terminal's encoding lacks must not end a reply
    if options.query is not None:
        return _answer(options, [options.query], commanded=False)
    if sys.stdin.isatty() and sys.stdout.isatty():
        return _converse(options)
    return _answer(options, _lines_of_stdin(), commanded=True)


def _open(options: argparse.Namespace) -> Conversation:
    given = (options.system, options.max_new_tokens, options.seed, options.bits, options.cpu_only)
    tools = find_tools(options.tools or [])
    conversation = open_conversation(options.checkpoint, *given)
    conversation.tools = tools
    return conversation


def _lines_of_stdin() -> Iterator[str]:
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(encoding="utf-8", errors="replace")
    for line in sys.stdin:
        if line.strip():
            yield line.rstrip("\r\n")


def _answer(options: argparse.Namespace, lines: Iterable[str], commanded: bool) -> int:
    """Answer line by line in plain text; the first thing that goes wrong ends it."""
    conversation = _open(options)
    display = PlainDisplay()
    commands = Commands(conversation, clear_screen=lambda: None, show_statistics=options.stats)
    for line in lines:
        if commanded and is_command(line):
            try:
                display.note(commands.run(line))
            except Leave:
                break
            continue
        if talk(conversation, line.strip(), display):
            return INTERRUPTED
        if commands.show_statistics and conversation.statistics:
            print(conversation.statistics, file=sys.stderr)
    return 0


def _converse(options: argparse.Namespace) -> int:
    """Converse in the terminal until the user leaves."""
    from prompt_toolkit.history import InMemoryHistory  # imported here: a single question needs none of these
    from prompt_toolkit.shortcuts import clear
    from rich.console import Console

    from .editor import Editor, history_file, open_history
    from .markdown import MarkdownDisplay

    console = Console()
    plain = options.plain or console.is_dumb_terminal
    display: Display = PlainDisplay() if plain else MarkdownDisplay(console)
    with ExitStack() as stack:
        if not plain:
            stack.enter_context(console.status("Loading …"))
        conversation = _open(options)
    history = InMemoryHistory() if options.no_history else open_history(history_file())
    commands = Commands(conversation, clear, options.stats)
    display.note(f"{Path(options.checkpoint).name}: Enter sends, Alt-Enter begins a new line, Ctrl-C stops a reply.")
    display.note("`:help` lists the commands, Ctrl-D ends.")
    converse(conversation, commands, Editor(history), display)
    return 0


class Reader(Protocol):
    """What the user types at."""

    def read(self) -> str | None: ...


def converse(conversation: Conversation, commands: Commands, reader: Reader, display: Display) -> None:
    """Read, answer and show until the user leaves; nothing that goes wrong on the way ends it."""
    from .editor import message

    while (typed := reader.read()) is not None:
        try:
            if is_command(typed):
                display.note(commands.run(typed))
                continue
            turns = len(conversation.history)
            if talk(conversation, message(typed), display):
                kept = len(conversation.history) > turns
                display.note("(Stopped.)" if kept else "(Stopped without an answer; the question is forgotten.)")
            if commands.show_statistics and conversation.statistics:
                display.note(str(conversation.statistics))
        except Leave:
            break
        except (CommandError, ValueError, RuntimeError) as error:
            display.error(str(error))
        except KeyboardInterrupt:  # pressed for a reply that had just ended
            display.note("")


def talk(conversation: Conversation, query: str, display: Display) -> bool:
    """Show the reply to a query; returns whether Ctrl-C has stopped it. What was shown is part of the conversation."""
    stop = threading.Event()
    with on_ctrl_c(stop.set), _without_echo(), closing(conversation.reply(query, stop)) as texts:
        display.show(texts)
    return stop.is_set()


@contextmanager
def _without_echo() -> Iterator[None]:
    """Keep what is typed meanwhile off the screen, where it would be in the way; it is there at the next prompt."""
    if termios is None or not sys.stdin.isatty():
        yield
        return
    terminal = sys.stdin.fileno()
    before = termios.tcgetattr(terminal)
    silent = [*before]
    silent[3] &= ~(termios.ECHO | termios.ICANON)  # nor let Ctrl-D get lost
    termios.tcsetattr(terminal, termios.TCSANOW, silent)
    try:
        yield
    finally:
        termios.tcsetattr(terminal, termios.TCSANOW, before)
