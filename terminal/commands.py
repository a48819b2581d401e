"""The command `qwen1-chat`: one question, or a conversation in the terminal."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ..programs.failures import is_of_machine, told
from ..programs.few_bits import LESS_MEMORY
from ..programs.models import ModelError, is_model_folder, leading, names_model
from ..programs.packages import explain
from ..programs.printing import end_with_reader, printable
from ..programs.shipped import TINY_CHAT
from ..programs.starting import INTERRUPTED, heavy_imports
from ..programs.version import add_version

SYSTEM = "You are a helpful assistant."
"""`DEFAULT_SYSTEM` of the chats, which lies beside what imports torch."""
EXAMPLES = """examples:
  qwen1-chat "你好"                          one answer from qwen-tiny-chat, which ships with it
  qwen1-chat ./Qwen-7B-Chat                  a conversation; :help lists its commands, Ctrl-D ends it
  qwen1-chat ./Qwen-7B-Chat "Tell me a story." --seed 1
  qwen1-chat "What is 1234 times 5678?" --tool calculator
  qwen1-chat ./Qwen-7B-Chat < questions.txt  one conversation, each line of the file a question

The first word is the checkpoint if there is such a folder, if it begins as a path does (./, ../, /, ~/), if it has the
form organisation/name, if it is one word with "qwen" in it, or nearly the name of a model's folder here; else all words
are a question to qwen-tiny-chat. -c and -m leave nothing to guess: -m "and/or" asks, whatever the words look like.
"""


def make_parser() -> argparse.ArgumentParser:
    """Options of `qwen1-chat`, those of the published `cli_demo.py` among them."""
    parser = argparse.ArgumentParser(
        prog="qwen1-chat",
        usage="%(prog)s [CHECKPOINT] [MESSAGE ...] [options]",
        description="Chat with a QWen (Qwen-1) checkpoint.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("words", nargs="*", metavar="CHECKPOINT MESSAGE", help="folder or Hub id; then what to ask")
    parser.add_argument(
        *("-c", "--checkpoint", "--checkpoint-path"),
        metavar="CHECKPOINT",
        help="the same as an option (default: the qwen-tiny-chat that ships)",
    )
    parser.add_argument(
        *("-m", "--message"), dest="query", help="ask this, print the reply and end; a conversation without it"
    )
    parser.add_argument("--system", default=SYSTEM, help="system message (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, help="longest reply in tokens (default: the checkpoint's)")
    parser.add_argument("-s", "--seed", type=int, help="make sampled replies repeatable")
    parser.add_argument("--cpu-only", action="store_true", help="leave accelerators alone")
    parser.add_argument(
        "--bits",
        type=int,
        choices=(8, 4),
        help="round the weights to so many bits, on the processor (default: as stored)",
    )
    parser.add_argument(
        "--tool",
        dest="tools",
        action="append",
        metavar="TOOL",
        help="a function that the model may call: calculator, clock, or FILE.py:FUNCTION; repeat it for several",
    )
    parser.add_argument("--stats", action="store_true", help="tokens per second, time and memory after each reply")
    parser.add_argument("--plain", action="store_true", help="show replies as they are written, not as Markdown")
    parser.add_argument("--no-history", action="store_true", help="keep what is typed out of the history file")
    add_version(parser)
    return parser


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Command line of `qwen1-chat`, sys.argv where None: `checkpoint`, `query` or None, and the options.

    Raises:
        SystemExit: two checkpoints, two questions, or a question in front of the checkpoint, with status 2.
    """
    parser = make_parser()
    given = list(sys.argv[1:] if arguments is None else arguments)
    end = given.index("--") if "--" in given else len(given)
    options = parser.parse_intermixed_args(given[:end])  # which itself makes nothing of "--"
    words, options.guessed = [*options.words, *given[end + 1 :]], False
    if options.checkpoint is None:
        options.checkpoint, words = leading(words)
        options.guessed = options.checkpoint is not None and not Path(options.checkpoint).exists()
    elif words and (is_model_folder(words[0]) or names_model(words[0]) and len(words) > 1):
        both = f"{options.checkpoint} and {words[0]}"
        parser.error(f"two checkpoints, {both}: leave one out, or ask with -m {words[0]!r}")
    for word in words[1:]:
        if is_model_folder(word):
            parser.error(f"{word} is the folder of a model: name it first, as in qwen1-chat {word} {words[0]!r}")
    if words and options.query is not None:
        parser.error(f"two questions, {' '.join(words)!r} and {options.query!r} of -m: leave one out")
    if options.query is not None and is_model_folder(options.query):
        print(
            f"qwen1-chat: note: the question {options.query!r} is the name of a folder with a model; to chat with "
            f"that, leave -m out: qwen1-chat {options.query}",
            file=sys.stderr,
        )
    options.query = " ".join(words) if words else options.query
    options.checkpoint = TINY_CHAT if options.checkpoint is None else options.checkpoint
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    options = parse_arguments(arguments)
    try:
        with heavy_imports():  # here, for --help needs none of them
            from transformers.utils import logging

            from .session import run

        logging.disable_progress_bar()
        return run(options)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        end_with_reader()
    except Exception as error:
        if not isinstance(error, (ImportError, OSError, ValueError)) and not is_of_machine(error):
            raise
        said = explain(error) if isinstance(error, ImportError) else told(error, LESS_MEMORY)
        if options.guessed and isinstance(error, ModelError):
            said += f" If it is a question: qwen1-chat -m {options.checkpoint!r}"
        print(f"qwen1-chat: {printable(said)}", file=sys.stderr)
        return 1
