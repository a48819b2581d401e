"""The options of `qwen1-finetune` as a table, for a `--help` that needn't import transformers, which has most of them.

`options.json` holds the table for the releases of transformers and torch that it names; with others, the help takes its
time. `python -m qwen1.training.options > training/options.json` writes it anew.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

from ..programs.version import add_version

TABLE = Path(__file__).with_name("options.json")

# In place of a list of more than a hundred options.
_USAGE = "%(prog)s MODEL --data_path FILE --output_dir FOLDER [options]; --help lists them"

_EXAMPLES = """Fine-tune a QWen model on your own conversations or texts.

All weights:  qwen1-finetune Qwen-1_8B-Chat --data_path data.json --output_dir out --bf16
LoRA:         ... --use_lora          then: qwen1-checkpoint merge-lora Qwen-1_8B-Chat out merged
QLoRA:        ... --use_lora --q_lora
Many devices: accelerate launch finetune.py ...
Taken up:     ... --resume_from_checkpoint True
"""


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults behind each option, and the examples as they are."""


LOOKS: Mapping[str, Any] = {
    "prog": "qwen1-finetune",
    "usage": _USAGE,
    "description": _EXAMPLES,
    "formatter_class": _HelpFormatter,
    "allow_abbrev": False,
}
"""What every parser of the command is made with."""


def versions() -> dict[str, str]:
    """The installed releases that decide on the options; local parts as of `2.13.0+cpu` are left out."""
    try:
        return {name: installed(name).partition("+")[0] for name in ("torch", "transformers")}
    except PackageNotFoundError:
        return {}


def describe(parser: argparse.ArgumentParser) -> dict[str, Any]:
    """All that the help shows of a parser's options, as JSON can hold it: title of a group -> its options."""
    groups = {}
    for group in parser._action_groups:
        options = [_describe(action) for action in group._group_actions if action.dest not in ("help", "version")]
        if options:
            groups[group.title or ""] = options
    return groups


def _describe(action: argparse.Action) -> dict[str, Any]:
    shown = {
        "flags": list(action.option_strings),
        "help": action.help,
        "default": str(action.default),
        "nargs": action.nargs,
        "choices": None if action.choices is None else [str(choice) for choice in action.choices],
    }
    return {name: value for name, value in shown.items() if value is not None}


def restore(groups: Mapping[str, Any]) -> argparse.ArgumentParser:
    """A parser with the help of the one that was described; of no other use, for it knows no types."""
    parser = argparse.ArgumentParser(**LOOKS)
    for title, options in groups.items():
        group = parser.add_argument_group(title)
        for option in options:
            more = {name: value for name, value in option.items() if name != "flags"}
            if more.get("nargs") == 0:
                more = {name: more[name] for name in ("help", "default") if name in more} | {"action": "store_true"}
            group.add_argument(*option["flags"], **more)
    return parser


def help_at_once() -> str | None:
    """The help, or None where the table is of other releases than those installed."""
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    if table["of"] != versions():
        return None
    parser = restore(table["groups"])
    add_version(parser)
    return parser.format_help()


if __name__ == "__main__":
    from .finetuning import make_parser

    json.dump({"of": versions(), "groups": describe(make_parser())}, sys.stdout, indent=1, ensure_ascii=False)
    print()
