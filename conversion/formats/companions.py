"""Names of the files beside the weights, in every format."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ..files.access import is_present, read_json
from ..files.links import CODE_FOLDER

CODE_FILES = tuple(sorted(path.name for path in CODE_FOLDER.glob("*qwen*.py")))
"""What a checkpoint with remote code carries."""

OLD_CODE = (
    "cache_autogptq_cuda_256.cpp",
    "cache_autogptq_cuda_kernel_256.cu",
    "cpp_kernels.py",
)
"""Code of 2023 that has no counterpart here."""

VOCABULARY, EXTRA_VOCABULARY, TOKENIZER_JSON = "qwen.tiktoken", "qwen_extra.tiktoken", "tokenizer.json"
TOKENIZER_CONFIG, GENERATION_CONFIG, TEMPLATE = "tokenizer_config.json", "generation_config.json", "chat_template.jinja"
TOKENIZER_FILES = (
    TOKENIZER_CONFIG,
    TOKENIZER_JSON,
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    TEMPLATE,
)
_LEGAL = re.compile(r"(LICENSE|LICENCE|NOTICE|USE_POLICY)(\b.*)?", re.IGNORECASE)


def companion_names(folder: Path) -> list[str]:
    """Names of files that go along with weights, as far as they are there."""
    known = (VOCABULARY, EXTRA_VOCABULARY, GENERATION_CONFIG, *TOKENIZER_FILES)
    return sorted(path.name for path in folder.iterdir() if path.name in known or is_legal(path.name))


def is_legal(name: str) -> bool:
    """Whether a file is a licence or a notice, which go wherever the weights go."""
    return _LEGAL.fullmatch(name) is not None


def optional_json(path: Path) -> dict[str, Any] | None:
    """A JSON object, or None where the file doesn't exist.

    Raises:
        CheckpointError: a damaged file.
    """
    return read_json(path) if is_present(path) else None
