"""Learn tokens for new words, to be loaded with `extra_vocab_file`.

    qwen1-extend-vocabulary qwen.tiktoken words.txt qwen_extra.tiktoken

`words.txt` (UTF-8) has one word per line, with its frequency after a tab. New tokens are pairs of tokens that follow
one another in the words, learned by byte-pair encoding: the most frequent pair first, until each word is one token.
Their ids begin after the special tokens, at 151851 for the published vocabulary. A word is skipped, with a warning, if
it is one token already, or if the tokenizer's pattern would split it ("new words", "don't"), for no token ever reaches
across such a split. Put the result beside qwen.tiktoken as qwen_extra.tiktoken, or pass its path as `extra_vocab_file`,
then resize the embeddings of the model (`model.resize_token_embeddings(len(tokenizer))`) and train them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from ..programs.failures import told
from ..programs.starting import heavy_imports
from ..programs.version import add_version


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Command line of `qwen1-extend-vocabulary`, sys.argv where None."""
    parser = argparse.ArgumentParser(
        prog="qwen1-extend-vocabulary",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("vocab_file", help="the base vocabulary, qwen.tiktoken")
    parser.add_argument("words_file", help="lines of word<TAB>frequency")
    parser.add_argument("output", help="where to write the new tokens, for example qwen_extra.tiktoken")
    add_version(parser)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; ends the process with 2 where it fails."""
    options = parse_arguments(arguments)
    with heavy_imports():  # here, for --help needs none of them
        from .learning import extend_vocabulary

    try:
        count = extend_vocabulary(options.vocab_file, options.words_file, options.output)
    except (OSError, ValueError) as error:
        print(f"qwen1-extend-vocabulary: {told(error)}", file=sys.stderr)
        sys.exit(2)
    print(f"{count} new tokens in {options.output}", file=sys.stderr)
