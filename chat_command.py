"""The `qwen1-chat` command: one question, or a conversation in the terminal."""

from __future__ import annotations

import argparse
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from .qwen_generation_utils import DEFAULT_SYSTEM, ChatHistory

TINY_CHAT = Path(__file__).with_name("qwen-tiny-chat")
"""The model that ships with the repository."""
_OVERRIDES = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
EXAMPLES = """examples:
  qwen1-chat "你好"                                  one answer from qwen-tiny-chat, which ships with it
  qwen1-chat --checkpoint ./Qwen-7B-Chat             a conversation; an empty line or Ctrl-D ends it
  qwen1-chat --checkpoint ./Qwen-7B-Chat --seed 1 "Tell me a story."
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
    return parser.parse_args(arguments)


def printable(text: str) -> str:
    """The text without what could drive the terminal: control characters and changes of the writing direction."""
    return "".join("\N{REPLACEMENT CHARACTER}" if _drives_terminal(c) else c for c in text)


def _drives_terminal(character: str) -> bool:
    if character in "\n\t":
        return False
    return unicodedata.category(character) in ("Cc", "Cs") or unicodedata.bidirectional(character) in _OVERRIDES


class Terminal:
    """A conversation whose replies appear while they are written."""

    def __init__(self, folder: str | Path, options: argparse.Namespace):
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, device_map="auto").eval()
        self.system = options.system
        wanted = {"max_new_tokens": options.max_new_tokens, "seed": options.seed}
        self.settings = {name: value for name, value in wanted.items() if value is not None}
        self.history = ChatHistory()

    def reply(self, query: str) -> None:
        """Print the reply to a query and remember the turn; Ctrl-C cuts the reply short."""
        shown = response = ""
        stream = self.model.chat_stream(self.tokenizer, query, self.history, self.system, **self.settings)
        try:
            for response in stream:
                text = printable(response)
                print(text.removeprefix(shown), end="", flush=True)
                shown = text
        except KeyboardInterrupt:
            stream.close()
        print()
        self.history = self.history.copy()  # with what the model keeps of the conversation
        self.history.append((query, response))


def read_queries() -> Iterator[str]:
    """What the user types, until an empty line, Ctrl-D or Ctrl-C."""
    while True:
        try:
            query = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if not query:
            return
        yield query


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    options = parse_arguments(arguments)
    logging.disable_progress_bar()
    try:
        terminal = Terminal(options.checkpoint, options)
        for query in read_queries() if options.query is None else [options.query]:
            terminal.reply(query)
    except (OSError, ValueError) as error:
        print(f"qwen1-chat: {error}", file=sys.stderr)
        return 1
    return 0
