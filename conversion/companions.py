"""The files beside the weights: code, tokenizer, chat template, generation settings, licences."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer
from transformers import Qwen2Tokenizer

from ..configuration_qwen import AUTO_MAP
from ..tokenization_qwen import (
    CHAT_TEMPLATE,
    ENDOFTEXT,
    IMEND,
    IMSTART,
    SPECIAL_TOKENS,
    QWenTokenizerFast,
    build_backend,
    load_vocabulary,
)
from .errors import CheckpointError
from .files.access import check_readable, is_present, read_json, read_text
from .files.links import CODE_FOLDER
from .writing.files import CopiedFile, PlannedFile, TextFile, json_file

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
_PUBLISHED_END = 151643
_QWEN_GENERATION = (
    "chat_format",
    "decay_bound",
    "decay_factor",
    "factual_nucleus_sampling",
    "max_context_size",
    "max_generate_size",
    "max_window_size",
    "stop_words_ids",
)
"""Keys of QWen's generation settings that only its own code knows."""


def code_files() -> list[PlannedFile]:
    """The remote code of this repository."""
    return [CopiedFile(name, CODE_FOLDER / name) for name in CODE_FILES]


def legal_files(folder: Path) -> list[PlannedFile]:
    """Licences and notices, which go wherever the weights go."""
    return [
        CopiedFile(path.name, path)
        for path in sorted(folder.iterdir())
        if _LEGAL.fullmatch(path.name) and path.is_file()
    ]


def companion_names(folder: Path) -> list[str]:
    """Names of files that go along with weights, as far as they are there."""
    known = (VOCABULARY, EXTRA_VOCABULARY, GENERATION_CONFIG, *TOKENIZER_FILES)
    return sorted(path.name for path in folder.iterdir() if path.name in known or _LEGAL.fullmatch(path.name))


def optional_json(path: Path) -> dict[str, Any] | None:
    """A JSON object, or None where the file doesn't exist.

    Raises:
        CheckpointError: a damaged file.
    """
    return read_json(path) if is_present(path) else None


# --- which tokens end a text ---


def is_chat(generation: Mapping[str, Any] | None, end_of_turn: int | None = None) -> bool:
    """Whether generation settings are those of a chat model: they say so, or say nothing and end at `<|im_end|>`."""
    settings = generation or {}
    if "chat_format" in settings:
        return settings["chat_format"] == "chatml"
    return end_of_turn is not None and end_of_turn in as_list(settings.get("eos_token_id"))


def end_ids(config: Mapping[str, Any], folder: Path) -> tuple[int, int] | None:
    """Ids of `<|endoftext|>` and `<|im_end|>`; None where the tokenizer has no such tokens.

    They are those of the vocabulary, else of `tokenizer.json`. In a folder without any tokenizer they are counted from
    `eos_token_id`, as QWen's control tokens follow one another.

    Raises:
        CheckpointError: a damaged vocabulary or tokenizer.
    """
    if is_present(folder / VOCABULARY):
        special = _load_vocabulary(folder)[1]
        return special[ENDOFTEXT], special[IMEND]
    if is_present(folder / TOKENIZER_JSON):
        ids = _added_tokens(folder / TOKENIZER_JSON)
        return (ids[ENDOFTEXT], ids[IMEND]) if {ENDOFTEXT, IMSTART, IMEND} <= ids.keys() else None
    end = config.get("eos_token_id", _PUBLISHED_END)
    if type(end) is not int or copied_tokenizer(folder, but=(TOKENIZER_CONFIG, TEMPLATE)):
        return None
    return end, end + SPECIAL_TOKENS.index(IMEND)


def _added_tokens(path: Path) -> dict[str, int]:
    added = read_json(path).get("added_tokens") or []
    try:
        return {str(token["content"]): int(token["id"]) for token in added}
    except (TypeError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path} has 'added_tokens' that are no tokens with ids. Download it again.") from error


def _load_vocabulary(folder: Path) -> tuple[dict[bytes, int], dict[str, int]]:
    extra = folder / EXTRA_VOCABULARY
    for path in (folder / VOCABULARY, *([extra] if is_present(extra) else ())):
        check_readable(path)
    try:
        return load_vocabulary(folder / VOCABULARY, extra if extra.is_file() else None)
    except (OSError, ValueError, OverflowError) as error:
        raise CheckpointError(str(error)) from error


def as_list(value: Any) -> list[int]:
    """Token ids of a setting that may be one id, a list or nothing."""
    return [] if value is None else list(value) if isinstance(value, list) else [value]


def qwen_generation(generation: Mapping[str, Any] | None, end_of_text: int, end_of_turn: int) -> dict[str, Any]:
    """Generation settings for our code: those that are there; chats end at `<|im_end|>` as well.

    Pipelines and servers know no stop words, so without it they would never stop.
    """
    if generation is None:
        return {"eos_token_id": end_of_text, "pad_token_id": end_of_text}
    if not is_chat(generation, end_of_turn):
        return {**generation, "eos_token_id": generation.get("eos_token_id", end_of_text)}
    ends = as_list(generation.get("eos_token_id", end_of_text))
    return {**generation, "eos_token_id": [end_of_turn, *(end for end in ends if end != end_of_turn)]}


def qwen2_generation(generation: Mapping[str, Any] | None, end_of_text: int, end_of_turn: int) -> dict[str, Any]:
    """The same for a Qwen2 model: what only QWen's code knows is left out."""
    ours = qwen_generation(generation, end_of_text, end_of_turn)
    return {name: value for name, value in ours.items() if name not in _QWEN_GENERATION}


# --- tokenizers ---


def upgraded_tokenizer_config(config: Mapping[str, Any] | None) -> dict[str, Any]:
    """`tokenizer_config.json` for our tokenizers, with what a published one lacks.

    Where only the fast class is named, there is a `tokenizer.json` whose control tokens the slow one doesn't know.
    """
    config = dict(config or {})
    config.setdefault("tokenizer_class", "QWenTokenizer")
    config.setdefault("eos_token", ENDOFTEXT)
    config.setdefault("pad_token", ENDOFTEXT)
    classes = AUTO_MAP["AutoTokenizer"]
    only_fast = [None, classes[1]]
    named = (config.get("auto_map") or {}).get("AutoTokenizer")
    auto_map = {"AutoTokenizer": only_fast if named == only_fast else classes}
    return {**config, "auto_map": {**(config.get("auto_map") or {}), **auto_map}}


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


def qwen2_tokenizer(folder: Path, chat: bool, length: int) -> list[PlannedFile]:
    """QWen's vocabulary as the `tokenizer.json` of a Qwen2 model, with identical ids.

    Args:
        folder: has `qwen.tiktoken`, and may have `qwen_extra.tiktoken`.
        chat: whether a text ends at `<|im_end|>`.
        length: longest text in tokens.

    Raises:
        CheckpointError: a damaged vocabulary.
    """
    ranks, special = _load_vocabulary(folder)
    templates = template_files(folder, plain_template())
    own = (optional_json(folder / TOKENIZER_CONFIG) or {}).get("chat_template")
    config = {
        "added_tokens_decoder": {
            str(token_id): {
                "content": token,
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": True,
            }
            for token, token_id in special.items()
        },
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": IMEND if chat else ENDOFTEXT,
        "errors": "replace",
        "model_max_length": length,
        "pad_token": ENDOFTEXT,
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    if own is not None:
        config["chat_template"] = own
    text = build_backend(ranks, special).to_str(pretty=True)
    return [TextFile(TOKENIZER_JSON, text), json_file(TOKENIZER_CONFIG, config), *templates]


def copied_tokenizer(folder: Path, but: tuple[str, ...] = ()) -> list[PlannedFile]:
    """Tokenizer files of a folder as they are."""
    return [
        CopiedFile(name, folder / name) for name in TOKENIZER_FILES if name not in but and (folder / name).is_file()
    ]


def llama_tokenizer(folder: Path) -> list[PlannedFile]:
    """LLaMA's tokenizer as it is; its original format tells nothing about it, so that is written."""
    files = copied_tokenizer(folder)
    if [file.name for file in files] != ["tokenizer.model"]:
        return files
    named = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "LlamaTokenizer", "unk_token": "<unk>"}
    return [*files, json_file(TOKENIZER_CONFIG, named)]


def qwen2_tokenizer_of_json(folder: Path) -> list[PlannedFile]:
    """The tokenizer of a QWen folder that has `tokenizer.json` and no vocabulary, for Qwen2."""
    config = {**(optional_json(folder / TOKENIZER_CONFIG) or {}), "tokenizer_class": "Qwen2Tokenizer"}
    config.pop("auto_map", None)
    own = (TOKENIZER_CONFIG, TEMPLATE)
    return [
        *copied_tokenizer(folder, own),
        json_file(TOKENIZER_CONFIG, config),
        *template_files(folder, plain_template()),
    ]


def tokenizer_for_qwen(folder: Path) -> tuple[list[PlannedFile], str | None]:
    """The tokenizer of any folder that becomes a QWen one, and a note where it can't chat.

    What its files hold decides, not the architecture of the model: QWen's vocabulary goes with weights under LLaMA's
    names as well, and LLaMA's tokenizer with Qwen2's.

    Raises:
        CheckpointError: a damaged tokenizer.
    """
    if is_present(folder / VOCABULARY):
        _load_vocabulary(folder)
        names = [name for name in (VOCABULARY, EXTRA_VOCABULARY) if (folder / name).is_file()]
        config = json_file(TOKENIZER_CONFIG, upgraded_tokenizer_config(_settings_of_qwen(folder)))
        return [*(CopiedFile(name, folder / name) for name in names), config, *template_files(folder)], None
    if is_present(folder / TOKENIZER_JSON) or (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return qwen_tokenizer(folder)
    if files := llama_tokenizer(folder):
        return files, "LLaMA's tokenizer is kept as it is, and can't chat."
    return [], "There is no tokenizer, so none is written."


def _settings_of_qwen(folder: Path) -> dict[str, Any]:
    """Tokenizer settings without the names of other programs' classes, for which a folder may have been made ready."""
    config = optional_json(folder / TOKENIZER_CONFIG) or {}
    return {name: value for name, value in config.items() if name not in ("tokenizer_class", "auto_map")}


def qwen_tokenizer(folder: Path) -> tuple[list[PlannedFile], str | None]:
    """The tokenizer of a Qwen2 folder for our code, with identical ids; and a note where it isn't possible.

    Qwen2.5 has other control tokens behind `<|im_end|>` than QWen has. `qwen.tiktoken` doesn't name them, so there is
    none for those: the fast class reads them from `tokenizer.json`.

    Raises:
        CheckpointError: a damaged tokenizer.
    """
    names = {name for name in TOKENIZER_FILES if (folder / name).is_file()}
    if TOKENIZER_JSON not in names and not {"vocab.json", "merges.txt"} <= names:
        return [], "There is no tokenizer, so none is written."
    backend = _load_backend(folder)
    _name_control_tokens(backend)
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    if not {ENDOFTEXT, IMSTART, IMEND} <= known or not _is_byte_level(backend):
        lacks = f"has no {IMSTART}" if IMSTART not in known else "is not QWen's"
        return copied_tokenizer(folder), f"The tokenizer {lacks}: it is kept as it is, and can't chat."
    tokenizer = QWenTokenizerFast(tokenizer_object=backend)
    config = optional_json(folder / TOKENIZER_CONFIG) or {}
    kept = {name: value for name, value in config.items() if name in ("model_max_length", "chat_template", "eos_token")}
    vocabulary = list(_vocabulary_files(tokenizer))
    slow = AUTO_MAP["AutoTokenizer"][0] if vocabulary else None
    auto_map = {"AutoTokenizer": [slow, AUTO_MAP["AutoTokenizer"][1]]}
    written = {"auto_map": auto_map, "pad_token": ENDOFTEXT, **kept, "tokenizer_class": "QWenTokenizer"}
    files = [TextFile(TOKENIZER_JSON, backend.to_str(pretty=True)), json_file(TOKENIZER_CONFIG, written), *vocabulary]
    return [*files, *template_files(folder)], None


def _name_control_tokens(backend: Tokenizer) -> None:
    """Make tokens of the vocabulary control tokens that only the settings of other classes call so."""
    vocabulary = backend.get_vocab(with_added_tokens=False)
    added = {token.content for token in backend.get_added_tokens_decoder().values()}
    names = [token for token in SPECIAL_TOKENS if token in vocabulary and token not in added]
    if {ENDOFTEXT, IMSTART, IMEND} <= added.union(names):
        backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])


def _is_byte_level(backend: Tokenizer) -> bool:
    """Whether tokens are made of bytes, as QWen's are, and not of characters, as LLaMA's."""
    content = json.loads(backend.to_str())
    return content["model"].get("type") == "BPE" and "ByteLevel" in json.dumps(content.get("decoder"))


def _load_backend(folder: Path) -> Tokenizer:
    for name in (TOKENIZER_JSON, "vocab.json", "merges.txt"):
        if is_present(folder / name):
            check_readable(folder / name)
    try:
        if (folder / TOKENIZER_JSON).is_file():
            return Tokenizer.from_file(str(folder / TOKENIZER_JSON))
        return Qwen2Tokenizer.from_pretrained(folder).backend_tokenizer
    except Exception as error:  # the library raises its bare base class
        raise CheckpointError(f"The tokenizer in {folder} can't be read: {error}") from error


def _vocabulary_files(tokenizer: QWenTokenizerFast) -> Iterator[PlannedFile]:
    """`qwen.tiktoken` and the extra tokens, if the control tokens are QWen's."""
    first = tokenizer.eod_id
    if tokenizer.special_tokens != {token: first + i for i, token in enumerate(SPECIAL_TOKENS)}:
        return
    for name, wanted in ((VOCABULARY, lambda rank: rank < first), (EXTRA_VOCABULARY, lambda rank: rank > first)):
        lines = [
            f"{base64.b64encode(token).decode()} {rank}\n"
            for token, rank in tokenizer.mergeable_ranks.items()
            if wanted(rank)
        ]
        if lines:
            yield TextFile(name, "".join(lines))
