"""Fixtures of the terminal's tests: conversations with the shipped model, and a terminal that shows what it is sent."""

import fcntl
import os
import pty
import select
import struct
import subprocess
import sys
import termios
import time

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from qwen1.programs.shipped import TINY_CHAT
from qwen1.qwen_generation_utils import DEFAULT_SYSTEM
from qwen1.terminal.conversation import Conversation
from qwen1.terminal.settings import Settings

PROGRAM = """
import fcntl, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # so that Ctrl-C is a signal
{preparation}
from qwen1.terminal.commands import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def tiny_chat():
    """The shipped model and its tokenizer."""
    return AutoModelForCausalLM.from_pretrained(TINY_CHAT).eval(), AutoTokenizer.from_pretrained(TINY_CHAT)


@pytest.fixture
def conversation(tiny_chat):
    """A new conversation with the shipped model."""
    model, tokenizer = tiny_chat
    return Conversation(model, tokenizer, DEFAULT_SYSTEM, Settings(model, {}))


@pytest.fixture
def make_screen():
    """Make a screen that remembers what scrolled off it: (columns, rows) -> Screen."""
    pyte = pytest.importorskip("pyte", reason="pyte, which shows what a terminal would, isn't installed")

    class Screen(pyte.HistoryScreen):
        def __init__(self, columns, rows):
            super().__init__(columns, rows, history=10_000)
            self.set_mode(pyte.modes.LNM)
            self.stream = pyte.ByteStream(self)
            self.answer = lambda data: None

        def write_process_input(self, data):
            self.answer(data)

        def feed(self, data: bytes):
            self.stream.feed(data)

        def shown(self) -> list[str]:
            """All lines from the first on, also those above the screen, without blanks at the end."""
            above = ["".join(line[x].data for x in range(self.columns)) for line in self.history.top]
            return [line.rstrip() for line in (*above, *self.display)]

    return Screen


class Program:
    """`qwen1-chat` in a pseudo-terminal.

    Attributes:
        screen: what its terminal shows.
        output: all bytes that it sent there.
    """

    def __init__(self, screen, arguments, environment, preparation, python):
        self.screen = screen
        self.output = b""
        self._terminal, inner = pty.openpty()
        fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack("HHHH", screen.lines, screen.columns, 0, 0))
        screen.answer = self.type
        self._process = subprocess.Popen(
            [*python, "-c", PROGRAM.format(preparation=preparation), *map(str, arguments)],
            **dict.fromkeys(("stdin", "stdout", "stderr"), inner),
            env=environment,
            start_new_session=True,
        )
        os.close(inner)

    def type(self, text: str) -> None:
        """Press these keys."""
        os.write(self._terminal, text.encode())

    def lines(self) -> list[str]:
        return self.screen.shown()

    def wait_for(self, text: str, times: int = 1, seconds: float = 60) -> None:
        """Read what it sends until the text stands on the screen, or above it, so many times."""
        deadline = time.monotonic() + seconds
        while "\n".join(self.lines()).count(text) < times:
            assert self._read(deadline), f"no {text!r} on the screen:\n" + "\n".join(self.lines())

    def end(self, seconds: float = 60) -> int:
        """Read the rest; returns the exit status."""
        deadline = time.monotonic() + seconds
        while self._read(deadline):
            pass
        return self._process.wait(max(deadline - time.monotonic(), 0.1))

    def _read(self, deadline: float) -> bool:
        """Whether something came before the deadline and the end."""
        ready, _, _ = select.select([self._terminal], [], [], max(deadline - time.monotonic(), 0))
        try:
            data = os.read(self._terminal, 1 << 16) if ready else b""
        except OSError:  # nobody is at the other side any more
            return False
        self.output += data
        self.screen.feed(data)
        return bool(data)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._terminal)


@pytest.fixture
def start(make_screen, tmp_path, warm_with):
    """Start `qwen1-chat` in a terminal: (*arguments, preparation=code to run before, columns, rows) -> Program.

    With a preparation, which has loaded the libraries before the program begins, they are loaded already.
    """
    programs = []
    own = ("HF_", "COV_", "COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(own)}
    environment |= {"TERM": "xterm-256color", "XDG_STATE_HOME": str(tmp_path / "state"), "HF_HUB_OFFLINE": "1"}

    def start_program(*arguments, preparation="", columns=80, rows=24) -> Program:
        python = warm_with(environment) if preparation else [sys.executable]
        programs.append(Program(make_screen(columns, rows), arguments, environment, preparation, python))
        return programs[-1]

    yield start_program
    for program in programs:
        program.close()
