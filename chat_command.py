"""The `qwen1-chat` command: one question, or a conversation in the terminal."""

from __future__ import annotations

import argparse
import base64
import sys
import tempfile
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils import logging

from .configuration_qwen import QWenConfig
from .modeling_qwen import QWenLMHeadModel
from .qwen_generation_utils import DEFAULT_SYSTEM, HistoryType
from .tokenization_qwen import QWenTokenizerFast

DEMO_NOTE = (
    "No --checkpoint given: this is a tiny model with random weights, so the reply is noise. "
    "Chat with a real one through --checkpoint FOLDER."
)
_OVERRIDES = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
EXAMPLES = """examples:
  qwen1-chat "你好"                                  one answer from the random demonstration model
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
    parser.add_argument("--checkpoint", help="folder or Hub id of a chat model")
    parser.add_argument("--system", default=DEFAULT_SYSTEM, help="system message (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, help="longest reply in tokens (default: the checkpoint's)")
    parser.add_argument("--seed", type=int, help="make sampled replies repeatable")
    return parser.parse_args(arguments)


def write_demo_checkpoint(folder: Path) -> None:
    """A chat checkpoint with random weights and a vocabulary of single bytes, until a trained one ships."""
    vocabulary = folder / "qwen.tiktoken"
    vocabulary.write_bytes(b"".join(base64.b64encode(bytes([byte])) + b" %d\n" % byte for byte in range(256)))
    tokenizer = QWenTokenizerFast(str(vocabulary))
    shape = dict(n_embd=64, n_layer=2, n_head=4, kv_channels=16, ffn_hidden_size=192)
    config = QWenConfig(vocab_size=len(tokenizer), eos_token_id=tokenizer.eod_id, use_flash_attn=False, **shape)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = QWenLMHeadModel(config)
    model.generation_config = GenerationConfig(
        chat_format="chatml",
        do_sample=True,
        eos_token_id=tokenizer.eod_id,
        max_new_tokens=32,
        max_window_size=1024,
        pad_token_id=tokenizer.eod_id,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


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
        self.history: HistoryType = []

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
        self.history = [*self.history, (query, response)]


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
    with tempfile.TemporaryDirectory() as folder:
        if options.checkpoint is None:
            print(DEMO_NOTE, file=sys.stderr)
            write_demo_checkpoint(Path(folder))
        try:
            terminal = Terminal(options.checkpoint or folder, options)
            for query in read_queries() if options.query is None else [options.query]:
                terminal.reply(query)
        except (OSError, ValueError) as error:
            print(f"qwen1-chat: {error}", file=sys.stderr)
            return 1
    return 0
