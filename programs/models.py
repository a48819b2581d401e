"""The name of a model on a command line: which words are one, and why it can't be opened, before anything is loaded."""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

from .failures import is_damaged, told

CONFIG, ADAPTER = "config.json", "adapter_config.json"

_ID = re.compile(r"[A-Za-z][\w.-]*/[\w.-]+", re.ASCII)
_PATH = re.compile(r"((~|\.{1,2})?[/\\]|[A-Za-z]:[/\\]).*", re.DOTALL)
_WORD = re.compile(r"[\w.-]+")
_NAME = re.compile(r"[\w./\\-]*qwen[\w./\\-]*", re.ASCII | re.IGNORECASE)
_VOCABULARIES = ("qwen.tiktoken", "tokenizer.json")
_END, _END_OF_TURN = "<|endoftext|>", "<|im_end|>"
_SETTINGS = ("generation_config.json", "tokenizer_config.json")
"""Of which transformers passes over the first where it is damaged, and doesn't say which is."""
_POINTER = b"version https://git-lfs"
_READ = ("qwen2", "llama")
"""Types of models that `qwen1-checkpoint convert` makes QWen of."""


class ModelError(OSError):
    """A name that leads to no model that can be opened here; the message says which command helps."""


def names_model(word: str) -> bool:
    """Whether a word where both may stand is a model and not a question.

    It is one if there is such a folder or file, if it begins as a path does, or if it has the form `organisation/name`.
    A single word is also one, mistyped, if it has `qwen` in it or is nearly the name of a model's folder here.
    """
    if not word.strip():
        return False
    if _exists(Path(word)) or any(pattern.fullmatch(word) for pattern in (_PATH, _ID, _NAME)):
        return True
    near = _nearest(Path(word)) if _WORD.fullmatch(word) else None
    return near is not None and is_model_folder(near)


def is_model_folder(word: str | Path) -> bool:
    """Whether there is a folder of that name with a model or an adapter in it."""
    return any(_exists(Path(word, name)) for name in (CONFIG, ADAPTER))


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a question is longer than any name, or has characters that none has
        return False


def check_model(name: str | os.PathLike[str], *, adapters: bool = True) -> None:
    """Say what is wrong with a name that leads to no QWen model, in one sentence; ids of the Hub are left to the Hub.

    Args:
        name: folder, or id on the Hub.
        adapters: whether a folder that peft wrote will do.

    Raises:
        ModelError: no such path, a file, a folder without a model, a model of another type, no vocabulary, files that
            are damaged, or an adapter that peft is missing for.
    """
    path = Path(name)
    if not os.fspath(name):  # as a path, the current folder
        raise ModelError("The name of the model is empty, as that of a variable that isn't set: name a folder.")
    if not _exists(path):
        return _check_id(str(name))
    if not path.is_dir():
        raise ModelError(_about_file(path))
    if not (path / CONFIG).is_file():
        if not (path / ADAPTER).is_file():
            raise ModelError(_about_folder(path))
        return _check_adapter(path, adapters)
    kind = _read(path / CONFIG).get("model_type", "qwen")
    if kind != "qwen":
        convert = f", or make a QWen folder of it: qwen1-checkpoint convert {path} NEW --to qwen"
        raise ModelError(
            f"{path} is a model of the type {kind!r}, not QWen (Qwen-1): open it with transformers alone"
            f"{convert if kind in _READ else ''}."
        )
    _check_readable(path)
    if not any((path / vocabulary).exists() for vocabulary in _VOCABULARIES):
        raise ModelError(
            f"{path} has no vocabulary ({' or '.join(_VOCABULARIES)}): copy that of the model it was made from into it."
        )
    for settings in _SETTINGS:
        if (path / settings).is_file():
            _read(path / settings)
    check_weights(path)


def _check_readable(folder: Path) -> None:
    """Say which file may not be read; safetensors would say that it doesn't exist."""
    for path in sorted(folder.iterdir()):
        if path.is_file() and not os.access(path, os.R_OK):
            raise ModelError(f"{path} may not be read: give yourself the right (chmod u+r), or ask its owner.")


def check_weights(folder: Path) -> None:
    """Say which file of weights is cut short, or no such file at all; only the beginning and the end are looked at.

    Raises:
        ModelError: the first such file.
    """
    from safetensors import SafetensorError, safe_open

    stored = sorted(folder.glob("*model*.safetensors"))
    for path in stored:
        _refuse_pointer(path)
        try:
            safe_open(path, framework="numpy")
        except SafetensorError as error:
            if is_damaged(error):
                raise ModelError(told(error, file=str(path))) from error
            raise
    for path in [] if stored else sorted(folder.glob("*model*.bin")):
        _refuse_pointer(path)
        with open(path, "rb") as file:
            is_cut = file.read(2) in (b"", b"P", b"PK") and not is_zipfile(file)
        if is_cut:
            raise ModelError(f"{path} is truncated or damaged (no end of its archive). Download it again.")


def _check_id(name: str) -> None:
    parent = Path(name).parent
    if _ID.fullmatch(name) and not (parent.is_dir() and name.count("/") == 1 and likely(Path(name))):
        return
    raise ModelError(
        f"{name} doesn't exist{likely(Path(name))}: name the folder of a model, or its id on the Hub as "
        "organisation/name."
    )


def likely(path: Path) -> str:
    """The folder beside a path that may be meant, for a sentence."""
    near = _nearest(path)
    return f" (did you mean {near}?)" if near else ""


def _nearest(path: Path) -> Path | None:
    """The folder whose name is nearest to that of a path, beside it."""
    try:
        folders = [entry.name for entry in os.scandir(path.parent) if entry.is_dir() and entry.name != path.name]
    except (OSError, ValueError):
        return None
    found = get_close_matches(path.name, folders, n=1, cutoff=0.7)
    return path.parent / found[0] if found else None


def _about_file(path: Path) -> str:
    if path.suffix.lower() == ".gguf":
        return f"{path} is a GGUF, which llama.cpp and Ollama run: name the folder that it was made of."
    return f"{path} is a file: name the folder of a model ({path.parent})."


def _about_folder(path: Path) -> str:
    steps = [entry.parent for name in (CONFIG, ADAPTER) for entry in path.glob(f"checkpoint-*/{name}")]
    if steps:
        last = max(steps, key=lambda step: int(step.name.partition("-")[2]) if step.name[11:].isdigit() else -1)
        return f"{path} holds checkpoints of a training that hasn't ended: go on with it, or name {last}."
    if inside := sorted(entry.parent for name in (CONFIG, ADAPTER) for entry in path.glob(f"*/{name}")):
        return f"{path} is no model, but has some in it: name {inside[0]}, for example."
    if (path / "params.json").is_file():
        return (
            f"{path} has no config.json, as Meta wrote LLaMA: make a QWen folder of it: qwen1-checkpoint convert "
            f"{path} NEW --to qwen"
        )
    return f"{path} has no config.json, so it is no model{likely(path)}: name the folder with config.json and weights."


def _check_adapter(path: Path, allowed: bool) -> None:
    base = _read(path / ADAPTER).get("base_model_name_or_path")
    merge = f"qwen1-checkpoint merge-lora {base or 'BASE'} {path} NEW"
    if not allowed:
        raise ModelError(f"{path} is an adapter: name its base ({base}) here, or join the two first: {merge}")
    if find_spec("peft") is None:
        raise ModelError(f"{path} is an adapter, which needs peft: pip install peft (or join it to its base: {merge}).")
    if base is None or not (_exists(Path(base)) or _ID.fullmatch(base)):
        raise ModelError(
            f"{path} is an adapter of {base}, which isn't there: write where its base is into {path / ADAPTER} "
            f"(base_model_name_or_path), or join the two: qwen1-checkpoint merge-lora BASE {path} NEW"
        )
    for folder in (path, Path(base)):
        if _exists(folder):
            _check_readable(folder)
            check_weights(folder)


def _read(path: Path) -> dict[str, Any]:
    try:
        _refuse_pointer(path)
        values = json.loads(path.read_bytes())
    except ModelError:
        raise
    except OSError as error:
        raise ModelError(f"{path} can't be read ({error.strerror or error}): mend that, or name another.") from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is damaged ({error}): get it again from where it came.") from error
    if not isinstance(values, dict):
        raise ModelError(f"{path} is damaged (no JSON object): get it again from where it came.")
    return values


def _refuse_pointer(path: Path) -> None:
    with open(path, "rb") as file:
        if file.read(len(_POINTER)) == _POINTER:
            raise ModelError(
                f"{path} is a pointer of Git LFS, not the file itself: run `git lfs pull` in {path.parent}."
            )


def open_model(name: str | os.PathLike[str], **options: Any) -> tuple[Any, Any]:
    """Load (model in evaluation, tokenizer) from a folder, an adapter's too, or from the Hub.

    Args:
        options: of `AutoModelForCausalLM.from_pretrained`.

    Raises:
        ModelError: see `check_model`, `load_complete` and `check_vocabulary`; nothing of that name on the Hub, no
            connection to it, or no QWen model there.
        ImportError, OSError, ValueError: a package or a file is missing, or values can't be.
    """
    from transformers import AutoTokenizer

    check_model(name)
    if not _exists(Path(name)):
        _check_published(str(name))
    place = _with_vocabulary(Path(name))
    tokenizer = AutoTokenizer.from_pretrained(place)
    model = load_complete(name, **options).eval()
    check_vocabulary(place, tokenizer, model.config, model.generation_config)
    return model, tokenizer


def load_complete(name: str | os.PathLike[str], **options: Any) -> Any:
    """Load a model that has all its weights; transformers puts random ones in the place of those that aren't stored.

    Args:
        options: of `AutoModelForCausalLM.from_pretrained`.

    Raises:
        ModelError: weights are missing; see also `from_pretrained`.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import find_adapter_config_file

    if find_adapter_config_file(str(name)) is not None:
        return _load_adapted(str(name), **options)
    loaded: Any = AutoModelForCausalLM.from_pretrained(name, output_loading_info=True, **options)
    model, found = loaded
    is_whole = not getattr(model, "is_quantized", False)  # else libraries differ in what they store beside the weights
    missing = sorted(key for key in map(str, found["missing_keys"]) if is_whole or key.endswith(".weight"))
    if missing:
        raise ModelError(
            f"{name} lacks {len(missing)} of the weights that its config.json asks for, first {missing[0]}: mend "
            "config.json (number of layers), or download the weights again."
        )
    return model


def _load_adapted(name: str, **options: Any) -> Any:
    """A base with an adapter in it, put there by peft.

    transformers looks for some of it under other names, and leaves that at random: 5.4 for all of it, as no model of
    ours is called `model`, 5.24 for the magnitudes of DoRA.
    """
    from peft import PeftConfig, PeftModel

    settings = PeftConfig.from_pretrained(name)
    if settings.is_prompt_learning:
        raise ModelError(
            f"{name} is an adapter of the kind {settings.peft_type.value}, which has no layers in the model: open it "
            "with peft (AutoPeftModelForCausalLM)."
        )
    base: Any = load_complete(settings.base_model_name_or_path, **options)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Found missing adapter keys")
        try:
            return PeftModel.from_pretrained(base, name).get_base_model()
        except UserWarning as lacking:
            raise ModelError(f"{name} lacks tensors that {ADAPTER} asks for: download it again. {lacking}") from None


def check_vocabulary(place: str | os.PathLike[str], tokenizer: Any, config: Any, generation: Any = None) -> None:
    """Say that a vocabulary is cut short, or another model's: the control tokens, which follow the others, tell it.

    Args:
        place: folder or id that the tokenizer is from.
        tokenizer: of any class; of others than QWen's nothing is known.
        config, generation: settings of the model, as far as they are read.

    Raises:
        ModelError: config.json names another token as the end of a text, generation_config.json one that is no control
            token, or `qwen.tiktoken` has other ids.
    """
    special = getattr(tokenizer, "special_tokens", {})
    if not {_END, _END_OF_TURN} <= special.keys():
        return
    told = {"config.json": config, "generation_config.json": generation}
    ends = {name: getattr(values, "eos_token_id", None) for name, values in told.items()}
    if reason := wrong_end(f"the vocabulary in {place}", special, config.vocab_size, ends, tokenizer.eos_token_id):
        raise ModelError(reason)
    file = Path(place, _VOCABULARIES[0])
    if file.is_file() and (lines := _count_lines(file)) != special[_END]:
        raise ModelError(
            f"{_shown(special)} by tokenizer.json, but {file} has {lines:,} tokens in front of them: one of the two is "
            "truncated or another model's. Download both again."
        )


def wrong_end(
    vocabulary: str, special: Mapping[str, int], rows: Any, told: Mapping[str, Any], taught: int | None
) -> str | None:
    """What is wrong with a vocabulary whose control tokens end no text by the settings beside it; None if one does.

    The ids of control tokens follow from the length of `qwen.tiktoken`, so one that is cut short shifts them all.

    Args:
        vocabulary: how it is called.
        special: its control tokens.
        rows: `vocab_size` of the model; an end beyond it is of no token, such as the default.
        told: `eos_token_id` in config.json and generation_config.json, by these names. By the latter a model may have
            been taught to end with any control token.
        taught: id that the tokenizer's settings let texts end with, or None.
    """
    ends = {special[_END], special[_END_OF_TURN], taught}
    for name, value in told.items():
        listed = value if isinstance(value, list) else [value]
        named = [end for end in listed if type(end) is int and (type(rows) is not int or end < rows)]
        known = ends if name == "config.json" else {*ends, *special.values()}
        if named and not known.intersection(named):
            return (
                f"{_shown(special)} by {vocabulary}, but {name} has eos_token_id={value}: the vocabulary is truncated "
                "or another model's. Download it again."
            )
    return None


def _shown(special: Mapping[str, int]) -> str:
    return f"{_END} is token {special[_END]:,} and {_END_OF_TURN} {special[_END_OF_TURN]:,}"


def _count_lines(path: Path) -> int:
    """Lines that aren't empty."""
    return sum(1 for line in path.read_bytes().split(b"\n") if line.strip())


def _with_vocabulary(path: Path) -> Path | str:
    """The folder or id to take the tokenizer from: of an adapter without one, its base."""
    if not (path / ADAPTER).is_file() or any((path / vocabulary).exists() for vocabulary in _VOCABULARIES):
        return path if _exists(path) else path.as_posix()
    return _read(path / ADAPTER)["base_model_name_or_path"]


def _check_published(name: str) -> None:
    from transformers import AutoConfig
    from transformers.utils import find_adapter_config_file

    try:
        kind = AutoConfig.from_pretrained(name).model_type
    except OSError as error:
        if find_adapter_config_file(name) is not None:
            if find_spec("peft") is None:
                raise ModelError(f"{name} is an adapter, which needs peft: pip install peft") from None
            return
        reason = " ".join(str(error).split()).partition(". ")[0].rstrip(".")
        raise ModelError(
            f"{name} is no folder here, and can't be had from the Hub ({reason}): check its name and the connection, "
            f"or fetch it with `hf download {name}`."
        ) from error
    if kind != "qwen":
        raise ModelError(f"{name} is a model of the type {kind!r}, not QWen (Qwen-1): open it with transformers alone.")


def leading(words: Sequence[str]) -> tuple[str | None, list[str]]:
    """Of words where a model may come first, (the model, the rest)."""
    return (words[0], list(words[1:])) if words and names_model(words[0]) else (None, list(words))
