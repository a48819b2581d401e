"""The small files beside the weights of a result: settings, code, licences, chat template, tokenizers as they are."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...tokenization_qwen import CHAT_TEMPLATE
from ..files.access import read_text
from ..files.links import CODE_FOLDER
from ..formats.companions import CODE_FILES, TEMPLATE, TOKENIZER_CONFIG, TOKENIZER_FILES, is_legal, optional_json
from ..writing.files import CopiedFile, PlannedFile, TextFile


def json_file(name: str, value: Mapping[str, Any]) -> TextFile:
    """A JSON object as a file, written as transformers writes them."""
    return TextFile(name, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def code_files() -> list[PlannedFile]:
    """The remote code of this repository."""
    return [CopiedFile(name, CODE_FOLDER / name) for name in CODE_FILES]


def legal_files(folder: Path) -> list[PlannedFile]:
    """Licences and notices, which go wherever the weights go."""
    return [CopiedFile(path.name, path) for path in sorted(folder.iterdir()) if is_legal(path.name) and path.is_file()]


def template_files(folder: Path, template: str = CHAT_TEMPLATE) -> list[PlannedFile]:
    """The chat template of a folder; this one in place of ours, whichever form of it is there, and where is none."""
    if (folder / TEMPLATE).is_file():
        text = read_text(folder / TEMPLATE)
        return [TextFile(TEMPLATE, template if text in (CHAT_TEMPLATE, plain_template()) else text)]
    if "chat_template" in (optional_json(folder / TOKENIZER_CONFIG) or {}):
        return []  # goes along in tokenizer_config.json
    return [TextFile(TEMPLATE, template)]


def plain_template() -> str:
    """Our chat template in the Jinja that every engine knows: without the marks around what the assistant says."""
    return re.sub(r" *\{%- (end)?generation %\}\n", "", CHAT_TEMPLATE)


def copied_tokenizer(folder: Path, but: tuple[str, ...] = ()) -> list[PlannedFile]:
    """Tokenizer files of a folder as they are."""
    return [
        CopiedFile(name, folder / name) for name in TOKENIZER_FILES if name not in but and (folder / name).is_file()
    ]
