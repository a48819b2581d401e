"""The `qwen1-chat` command: one question, or a conversation in the terminal. The latter's parts are in `terminal/`."""

from __future__ import annotations

import argparse
import importlib
import sys
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from transformers.utils import logging

from .qwen_generation_utils import DEFAULT_SYSTEM

TINY_CHAT = Path(__file__).with_name("qwen-tiny-chat")
"""The model that ships with the repository."""
INTERRUPTED = 130
_OVERRIDES = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
EXAMPLES = """examples:
  qwen1-chat "你好"                                  one answer from qwen-tiny-chat, which ships with it
  qwen1-chat --checkpoint ./Qwen-7B-Chat             a conversation; :help lists its commands, Ctrl-D ends it
  qwen1-chat --checkpoint ./Qwen-7B-Chat --seed 1 "Tell me a story."
  qwen1-chat < questions.txt                         one conversation, each line of the file a question
"""


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Command line of `qwen1-chat`, sys.argv where None."""
    parser = argparse.ArgumentParser(
        prog="qwen1-chat",
        description="Chat with a QWen (Qwen-1) checkpoint.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("query", nargs="?", help="ask this, print the reply and end; a conversation without it")
    parser.add_argument(
        "--checkpoint", default=TINY_CHAT, help="folder or Hub id (default: the qwen-tiny-chat that ships)"
    )
    parser.add_argument("--system", default=DEFAULT_SYSTEM, help="system message (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, help="longest reply in tokens (default: the checkpoint's)")
    parser.add_argument("--seed", type=int, help="make sampled replies repeatable")
    parser.add_argument("--stats", action="store_true", help="tokens per second, time and memory after each reply")
    parser.add_argument("--plain", action="store_true", help="show replies as they are written, not as Markdown")
    parser.add_argument("--no-history", action="store_true", help="keep what is typed out of the history file")
    return parser.parse_args(arguments)


def printable(text: str) -> str:
    """The text without what could drive the terminal: control characters and changes of the writing direction."""
    return "".join("\N{REPLACEMENT CHARACTER}" if _drives_terminal(c) else c for c in text)


def _drives_terminal(character: str) -> bool:
    if character in "\n\t":
        return False
    return unicodedata.category(character) in ("Cc", "Cs") or unicodedata.bidirectional(character) in _OVERRIDES


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    options = parse_arguments(arguments)
    logging.disable_progress_bar()
    try:
        status: int = importlib.import_module(f"{__package__}.terminal.session").run(options)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return INTERRUPTED
    except (ImportError, OSError, ValueError) as error:
        print(f"qwen1-chat: {printable(str(error))}", file=sys.stderr)
        return 1
    return status
