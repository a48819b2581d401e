"""The command `qwen1-chat`: one question, or a conversation in the terminal."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from ..programs.printing import printable
from ..programs.shipped import TINY_CHAT
from ..programs.version import add_version
from .interrupts import INTERRUPTED

SYSTEM = "You are a helpful assistant."
"""`DEFAULT_SYSTEM` of the chats, which lies beside what imports torch."""
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
    parser.add_argument("--system", default=SYSTEM, help="system message (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, help="longest reply in tokens (default: the checkpoint's)")
    parser.add_argument("--seed", type=int, help="make sampled replies repeatable")
    parser.add_argument(
        "--bits",
        type=int,
        choices=(8, 4),
        help="round the weights to so many bits, on the processor (default: as stored)",
    )
    parser.add_argument("--stats", action="store_true", help="tokens per second, time and memory after each reply")
    parser.add_argument("--plain", action="store_true", help="show replies as they are written, not as Markdown")
    parser.add_argument("--no-history", action="store_true", help="keep what is typed out of the history file")
    add_version(parser)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    options = parse_arguments(arguments)
    try:
        from transformers.utils import logging  # here, for --help needs neither it nor the session's torch

        from .session import run

        logging.disable_progress_bar()
        return run(options)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return INTERRUPTED
    except (ImportError, OSError, ValueError) as error:
        print(f"qwen1-chat: {printable(str(error))}", file=sys.stderr)
        return 1
