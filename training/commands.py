"""The command `qwen1-finetune`, which is also that of `finetune.py`.

Its options keep the names of the published `finetune.py`; all of transformers' `TrainingArguments` are options too.
Exit codes: 0 done, 1 failed (the reason is on standard error), 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from ..programs.starting import heavy_imports
from ..programs.version import version
from .noise import quiet
from .options import help_at_once


def main(argv: Sequence[str] | None = None) -> None:
    """Run the program; ends the process with its exit status where it isn't 0.

    Args:
        argv: words of the command line; None for those of this process.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if words and not words[0].startswith("-"):  # the model comes first, as in the other commands
        words.insert(0, "--model_name_or_path")
    if "--version" in words:
        print(f"qwen1-finetune {version()}")
        return
    if {"-h", "--help"} & set(words) and (text := help_at_once()) is not None:
        print(text, end="")
        return
    with quiet():
        with heavy_imports():
            from . import finetuning  # here, for it imports torch and transformers, which take seconds

        finetuning.main(words)
