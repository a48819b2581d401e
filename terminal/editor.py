"""Where the user types: several lines, earlier messages on the arrow keys, commands on the tabulator."""

from __future__ import annotations

import os
from pathlib import Path

from platformdirs import user_state_path
from prompt_toolkit import PromptSession
from prompt_toolkit.completion import WordCompleter
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.input import Input
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import Output
from prompt_toolkit.shortcuts import CompleteStyle

from .colon_commands import NAMES
from .files import is_readable
from .interrupts import on_ctrl_c

QUOTES = '"""'
LEAVING = "(Ctrl-C again, Ctrl-D or :exit ends the conversation.)"


def is_unfinished(text: str) -> bool:
    """Whether a message that begins with three quotation marks still lacks those at its end."""
    opened = text.strip()
    return opened.startswith(QUOTES) and not opened[len(QUOTES) :].endswith(QUOTES)


def message(text: str) -> str:
    """What is to be sent: without the quotation marks around several lines, and the blanks around a single one."""
    stripped = text.strip()
    if stripped.startswith(QUOTES) and not is_unfinished(text):
        text = stripped[len(QUOTES) : -len(QUOTES)]
    lines = text.strip("\r\n").rstrip()
    return lines if "\n" in lines else lines.strip()


def history_file() -> Path:
    """Where what was typed is kept from one conversation to the next."""
    return user_state_path("qwen1", appauthor=False) / "chat_history"


class _FileHistory(FileHistory):
    """Goes on without the file where it can't be written, as on a full disk."""

    def store_string(self, string: str) -> None:
        try:
            super().store_string(string)
        except OSError:
            pass  # still on the arrow keys, which read from memory


def open_history(path: Path) -> History:
    """The history in a file that only its owner can read, or one in memory where there can be no such file."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    except OSError:
        return InMemoryHistory()
    return _FileHistory(str(path)) if is_readable(path) else InMemoryHistory()


def _key_bindings() -> KeyBindings:
    bindings = KeyBindings()

    @bindings.add("enter")
    def send_or_go_on(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.is_cursor_at_the_end and buffer.text.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        elif is_unfinished(buffer.text):
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @bindings.add("escape", "enter")
    def new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return bindings


class Editor:
    """Reads one message after another.

    Args:
        history: earlier messages.
        keyboard, screen: where from and where to, the terminal by default.
    """

    def __init__(self, history: History, keyboard: Input | None = None, screen: Output | None = None):
        self._session: PromptSession[str] = PromptSession(
            "> ",
            multiline=True,
            prompt_continuation="  ",
            history=history,
            key_bindings=_key_bindings(),
            completer=WordCompleter([f":{name}" for name in NAMES], sentence=True),
            complete_while_typing=False,
            complete_style=CompleteStyle.READLINE_LIKE,
            enable_suspend=True,
            input=keyboard,
            output=screen,
        )

    def read(self) -> str | None:
        """The next message or command, as it was typed; None to end, by Ctrl-D or by Ctrl-C twice."""
        interrupted = False
        while True:
            try:
                with on_ctrl_c(lambda: None):  # while the terminal isn't ready for it as a key
                    text = self._session.prompt()
            except EOFError:
                return None
            except KeyboardInterrupt:
                if interrupted:
                    return None
                interrupted = True
                print(LEAVING)
                continue
            interrupted = False
            if message(text):
                return text
