"""The files beside the weights, as far as `inspect` has something to say about them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...tokenization_qwen import IMEND
from ..errors import CheckpointError
from ..files.access import is_pointer, is_present, read_json
from ..formats.architecture import Architecture
from ..formats.companions import (
    EXTRA_VOCABULARY,
    GENERATION_CONFIG,
    TEMPLATE,
    TOKENIZER_CONFIG,
    TOKENIZER_FILES,
    TOKENIZER_JSON,
    VOCABULARY,
)
from ..formats.endings import as_list, end_ids, is_chat
from ..formats.kinds import Kind
from ..opening.sources import MOVES_FILE, WORK_FOLDER
from .report import Findings
from .words import first_of

_OLD_KINDS = (Kind.QWEN_2023_08, Kind.QWEN_2023_12)
_ID = re.compile(r"[0-9]{1,18}")
_VOCABULARIES = (VOCABULARY, TOKENIZER_JSON, "tokenizer.model", "vocab.json")


def tokenizer_files(folder: Path) -> list[str]:
    """Tokenizer files that are there."""
    return [name for name in (VOCABULARY, EXTRA_VOCABULARY, *TOKENIZER_FILES) if (folder / name).is_file()]


class CompanionChecks:
    """Checks of the files beside the weights of a model; what they find goes to `findings`.

    Args:
        config: `config.json` or `params.json`.
        architecture: None where it can't be read.
    """

    def __init__(
        self,
        folder: Path,
        kind: Kind,
        config: Mapping[str, Any],
        architecture: Architecture | None,
        findings: Findings,
    ):
        self._folder = folder
        self._kind = kind
        self._is_qwen = kind.is_qwen
        self._config = config
        self._architecture = architecture
        self._findings = findings
        self._settings: dict[str, dict[str, Any]] = {}

    def check(self) -> None:
        """Look at all of them."""
        if (self._folder / WORK_FOLDER / MOVES_FILE).is_file():
            self._findings.problems.append(
                "An upgrade was interrupted: run upgrade --in-place again, which finishes it."
            )
        for name in (GENERATION_CONFIG, *TOKENIZER_FILES):
            path = self._folder / name
            if path.suffix == ".json" and is_present(path) and not is_pointer(path):
                self._settings[name] = self._findings.attempt(_read_settings, path) or {}
        self._remark_on_tokenizer()
        if self._kind is not Kind.LLAMA_ORIGINAL:
            self._remark_on_generation()
        if self._is_qwen:
            self._check_vocabulary()
            self._remark_on_code()

    @property
    def _template(self) -> str | None:
        """The chat template; None if there is none."""
        path = self._folder / TEMPLATE
        if path.is_file():
            return path.read_text(encoding="utf-8", errors="replace")
        template = self._settings.get(TOKENIZER_CONFIG, {}).get("chat_template")
        return None if template is None else str(template)

    def _remark_on_tokenizer(self) -> None:
        remarks = self._findings.remarks
        if not set(_VOCABULARIES) & set(tokenizer_files(self._folder)):
            remarks.append("There is no tokenizer, so the model reads token ids only.")
        elif self._kind is Kind.LLAMA_ORIGINAL or self._template is not None:
            return
        elif not self._is_qwen:
            remarks.append("There is no chat template.")
        elif is_chat(self._settings.get(GENERATION_CONFIG)):
            remarks.append("There is no chat template, which other programs need: upgrade adds it.")

    def _remark_on_generation(self) -> None:
        if not (self._folder / GENERATION_CONFIG).is_file():
            self._findings.remarks.append(f"{GENERATION_CONFIG} is missing, so defaults take its place.")
        end = self._qwen_end_of_turn() if self._is_qwen else self._template_end_of_turn()
        generation = self._settings.get(GENERATION_CONFIG, {})
        ends = as_list(generation.get("eos_token_id", self._config.get("eos_token_id")))
        if end is not None and end not in ends:
            remedy = "upgrade adds it" if self._is_qwen else f"add it to {GENERATION_CONFIG}"
            self._findings.remarks.append(
                f"{IMEND}, {end}, is not in eos_token_id={ends}, so pipelines and servers don't stop after an answer: "
                f"{remedy}."
            )

    def _qwen_end_of_turn(self) -> int | None:
        """Id of `<|im_end|>` in a chat model of QWen."""
        if not is_chat(self._settings.get(GENERATION_CONFIG)):
            return None
        try:
            ends = end_ids(self._config, self._folder)
        except CheckpointError:  # a damaged vocabulary, which is reported by itself
            return None
        if ends is None:
            return None
        end = ends[1]
        return end if self._architecture is None or end < self._architecture.rows else None

    def _template_end_of_turn(self) -> int | None:
        """Id of `<|im_end|>` if the chat template writes it."""
        known = self._settings.get(TOKENIZER_CONFIG, {}).get("added_tokens_decoder")
        if IMEND not in (self._template or "") or not isinstance(known, dict):
            return None
        tokens = {key: token for key, token in known.items() if _ID.fullmatch(key) and isinstance(token, dict)}
        return next((int(key) for key, token in tokens.items() if token.get("content") == IMEND), None)

    def _check_vocabulary(self) -> None:
        path = self._folder / VOCABULARY
        if not is_present(path) or is_pointer(path):
            return
        ends = self._findings.attempt(end_ids, self._config, self._folder)
        if ends is not None and self._architecture is not None and ends[1] >= self._architecture.rows:
            self._findings.problems.append(
                f"{IMEND} is token {ends[1]:,}, but the embedding has {self._architecture.rows:,} rows: {VOCABULARY} "
                "belongs to another checkpoint."
            )

    def _remark_on_code(self) -> None:
        auto_map = self._config.get("auto_map")
        if not isinstance(auto_map, dict):
            return
        targets = [target for value in auto_map.values() for target in _as_texts(value)]
        named = {f"{target.split('.')[0]}.py" for target in targets if "--" not in target}  # else another repository's
        there = sorted(name for name in named if (self._folder / name).is_file())
        loads = "" if self._findings.problems else " This package loads the folder as it is."
        absent = sorted(named.difference(there))
        if self._kind in _OLD_KINDS and there:
            self._findings.remarks.append(
                f"The code beside the weights ({first_of(there)}) is that of 2023, which loads on no current "
                f"transformers: upgrade replaces it.{loads}"
            )
        elif absent:
            self._findings.remarks.append(
                f"auto_map names code that isn't there ({first_of(absent)}), so trust_remote_code=True finds none: "
                f"upgrade adds it.{loads}"
            )


def _read_settings(path: Path) -> dict[str, Any]:
    values = read_json(path)
    if path.name == TOKENIZER_JSON and not isinstance(values.get("model"), dict):
        raise CheckpointError(f"{path} has no 'model', so it is no tokenizer. Download it again.")
    return values


def _as_texts(value: Any) -> list[str]:
    return [text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str)]
