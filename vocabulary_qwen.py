"""The vocabulary of QWen-1 and its files: special tokens, reading and checking, writing, damage that is named.

The lines of `qwen.tiktoken` are `base64(token bytes) rank`. The special tokens follow the last rank: `<|endoftext|>`,
`<|im_start|>`, `<|im_end|>`, `<|extra_0|>` ... `<|extra_204|>`. An optional second file, `qwen_extra.tiktoken` (see
`qwen1-extend-vocabulary`), adds tokens after the special ones.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
from collections.abc import Iterable, Mapping

from transformers.utils import logging

logger = logging.get_logger(__name__)

VOCAB_FILES_NAMES = {"vocab_file": "qwen.tiktoken"}
EXTRA_VOCAB_FILES_NAMES = {"extra_vocab_file": "qwen_extra.tiktoken"}
# What transformers reads beside these.
SETTINGS_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")

ENDOFTEXT = "<|endoftext|>"
IMSTART = "<|im_start|>"
IMEND = "<|im_end|>"
EXTRAS = tuple(f"<|extra_{i}|>" for i in range(205))
SPECIAL_TOKENS = (ENDOFTEXT, IMSTART, IMEND, *EXTRAS)


# --- files ---

POINTER = b"version https://git-lfs.github.com/spec/"  # what a clone without Git LFS has in place of large files


def require_file(path: str | os.PathLike | None, name: str = "qwen.tiktoken") -> str | os.PathLike:
    """Return `path`, or raise an error that says why it can't be read; None is a folder without the file `name`.

    Raises:
        FileNotFoundError: there is no such file.
        OSError: it is a directory or a device, or it can't be opened.
        ValueError: it is a pointer of Git LFS.
    """
    path = name if path is None else os.fspath(path)
    if not os.path.lexists(path):
        raise FileNotFoundError(
            f"Vocabulary file {path!r} does not exist. Download {name} from the model's repository into the folder "
            "that you load, or pass the right path as `vocab_file` (or `extra_vocab_file`)."
        )
    remedy = f"put the {name} of the model's repository in its place"
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path!r} is a link to {os.readlink(path)!r}, where there is nothing: {remedy}.")
    if not os.path.isfile(path):
        kind = "a directory" if os.path.isdir(path) else "a device or a pipe"
        raise OSError(f"{path!r} is {kind}, not a file: {remedy}.")
    try:
        with open(path, "rb") as file:
            begin = file.read(len(POINTER))
    except OSError as error:
        raise type(error)(f"{path!r} can't be read ({error.strerror}): allow it, or {remedy}.") from error
    if begin == POINTER:
        folder = os.path.dirname(os.path.abspath(path))
        raise ValueError(f"{path!r} is a pointer of Git LFS, not the file itself: run `git lfs pull` in {folder!r}.")
    return path


def require_files(folder: str | os.PathLike, names: Iterable[str]) -> None:
    """Check those of the files that are in a folder; anything else, such as the name of a repository, is left alone.

    Raises:
        OSError, ValueError: as `require_file`.
    """
    for name in names:
        path = os.path.join(folder, name)
        if os.path.lexists(path):
            require_file(path, name)


def name_damaged_json(folder: str | os.PathLike, names: Iterable[str]) -> None:
    """Raise ValueError for the first of these files in a folder that is no JSON."""
    for path in (os.path.join(folder, name) for name in names if name.endswith(".json")):
        if not os.path.isfile(path):
            continue
        try:
            with open(path, encoding="utf-8") as file:
                json.load(file)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path!r} is damaged, no JSON that can be read ({error}): download it again.") from error


# --- vocabulary files ---


def load_ranks(path: str | os.PathLike) -> dict[bytes, int]:
    """Read a tiktoken file and return token bytes -> id, in the order of the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is not `base64 id`, or repeats a token or an id. The message names file, line and value.
    """
    return _read_vocabulary(path)[0]


def _read_vocabulary(path: str | os.PathLike) -> tuple[dict[bytes, int], dict[int, int]]:
    """`load_ranks`, and the line number of each id."""
    require_file(path)
    ranks: dict[bytes, int] = {}
    line_of_id: dict[int, int] = {}
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{os.fspath(path)}, line {number}"
            token, rank = _parse_vocabulary_line(line, where)
            if token in ranks:
                raise ValueError(f"{where}: token {token!r} is already on line {line_of_id[ranks[token]]}")
            if rank in line_of_id:
                raise ValueError(f"{where}: id {rank} is already on line {line_of_id[rank]}")
            ranks[token] = rank
            line_of_id[rank] = number
    return ranks, line_of_id


def _parse_vocabulary_line(line: bytes, where: str) -> tuple[bytes, int]:
    """Split one line of a tiktoken file into token bytes and id; `where` begins the message of any ValueError."""
    parts = line.split()
    if len(parts) != 2:
        raise ValueError(
            f"{where}: expected 'base64 id', got {line.strip()[:80]!r}; the file may be truncated, download it again"
        )
    try:
        token = base64.b64decode(parts[0], validate=True)
    except binascii.Error as error:
        raise ValueError(f"{where}: {parts[0][:80]!r} is not base64 ({error})") from error
    if not token:
        raise ValueError(f"{where}: the token {parts[0]!r} is empty")
    if not parts[1].isdigit() or len(parts[1]) > 9:
        raise ValueError(f"{where}: {parts[1][:80]!r} is not an id; expected a whole number from 0 to 999999999")
    return token, int(parts[1])


def load_base_ranks(path: str | os.PathLike) -> dict[bytes, int]:
    """Read the base vocabulary: like `load_ranks`, but the ids must be 0 ... n - 1 and hold every single byte.

    Raises:
        FileNotFoundError, ValueError: as `load_ranks`; also for a missing id or byte, or the text of a special token.
    """
    ranks, line_of_id = _read_vocabulary(path)
    for expected, rank in enumerate(sorted(line_of_id)):
        if rank != expected:
            raise ValueError(
                f"{os.fspath(path)}, line {line_of_id[rank]}: id {rank} leaves a gap, no line has id {expected}; "
                "the file is damaged, download it again"
            )
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise ValueError(
            f"{os.fspath(path)}, after line {max(line_of_id.values(), default=0)}: no token for the single byte "
            f"{missing[0]} ({len(missing)} of 256 are missing); the file may be truncated, download it again"
        )
    if control := next((token for token in map(str.encode, SPECIAL_TOKENS) if token in ranks), None):
        raise ValueError(
            f"{os.fspath(path)}, line {line_of_id[ranks[control]]}: {control!r} is the text of a special token, "
            "whose id follows from the number of lines; leave the line out"
        )
    return ranks


def load_extra_ranks(
    path: str | os.PathLike, ranks: Mapping[bytes, int], special_tokens: Mapping[str, int]
) -> dict[bytes, int]:
    """Read an extra vocabulary and return `ranks` with its tokens added.

    A token that the vocabulary has already is skipped with a warning, so its id stays unused.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: as `load_ranks`; also for an id that belongs to another token, and for the text of a special token.
            The message names file, line and token.
    """
    extra, line_of_id = _read_vocabulary(path)
    used = {rank: token for token, rank in ranks.items()} | {i: token.encode() for token, i in special_tokens.items()}
    first = max(special_tokens.values()) + 1
    merged = dict(ranks)
    for token, rank in extra.items():
        where = f"{os.fspath(path)}, line {line_of_id[rank]}"
        if rank in used:
            raise ValueError(
                f"{where}: id {rank} of token {token!r} belongs to {used[rank]!r}; new ids begin at {first}"
            )
        if token.decode("utf-8", "replace") in special_tokens:
            raise ValueError(f"{where}: {token!r} is the text of a special token; leave the line out")
        if token in ranks:
            logger.warning(f"{where}: token {token!r} has id {ranks[token]} already; skipping its new id {rank}")
        else:
            merged[token] = rank
    return merged


def load_vocabulary(
    vocab_file: str | os.PathLike | None, extra_vocab_file: str | os.PathLike | None = None
) -> tuple[dict[bytes, int], dict[str, int]]:
    """Read the vocabulary files and return (mergeable ranks, ids of the special tokens).

    Raises:
        FileNotFoundError, ValueError: see `load_base_ranks` and `load_extra_ranks`.
    """
    ranks = load_base_ranks(require_file(vocab_file))
    special_tokens = {token: i for i, token in enumerate(SPECIAL_TOKENS, start=len(ranks))}
    if extra_vocab_file is not None:
        ranks = load_extra_ranks(extra_vocab_file, ranks, special_tokens)
    return ranks, special_tokens


def fits_vocabulary_files(ranks: Mapping[bytes, int], special_tokens: Mapping[str, int]) -> bool:
    """Whether the special tokens and the ids before them are those that a class reads out of `qwen.tiktoken`."""
    first = special_tokens.get(ENDOFTEXT, 0)
    before = {token: rank for token, rank in ranks.items() if rank < first}
    expected = {token: i for i, token in enumerate(SPECIAL_TOKENS, start=first)}
    has_bytes = all(bytes([byte]) in before for byte in range(256))
    return special_tokens == expected and len(before) == first and has_bytes


def write_vocabulary(
    folder: str, ranks: Mapping[bytes, int], special_tokens: Mapping[str, int], prefix: str | None = None
) -> tuple[str, ...]:
    """Write `qwen.tiktoken`, and `qwen_extra.tiktoken` if there are extra tokens; return the paths.

    Args:
        folder: where they are written.
        ranks, special_tokens: as `load_vocabulary` gives them.
        prefix: what their names begin with, and a hyphen.

    Raises:
        ValueError: `folder` is not a directory, or the special tokens are not those that these files imply.
    """
    if not os.path.isdir(folder):
        raise ValueError(f"Cannot save the vocabulary: {folder!r} is not a directory")
    if not fits_vocabulary_files(ranks, special_tokens):
        raise ValueError(
            f"{VOCAB_FILES_NAMES['vocab_file']} implies that {ENDOFTEXT}, {IMSTART}, {IMEND} and {len(EXTRAS)} "
            "spare tokens follow the others, and here they don't; use `save_pretrained`, which writes "
            "tokenizer.json, and the fast class"
        )
    in_order = sorted(ranks.items(), key=lambda item: item[1])
    files = {
        VOCAB_FILES_NAMES["vocab_file"]: [item for item in in_order if item[1] < special_tokens[ENDOFTEXT]],
        EXTRA_VOCAB_FILES_NAMES["extra_vocab_file"]: [i for i in in_order if i[1] > special_tokens[ENDOFTEXT]],
    }
    paths = []
    for name, items in files.items():
        if items:
            paths.append(os.path.join(folder, f"{prefix}-{name}" if prefix else name))
            with open(paths[-1], "wb") as file:
                file.writelines(base64.b64encode(token) + b" %d\n" % rank for token, rank in items)
    return tuple(paths)
