"""Publish a checkpoint folder on the Hugging Face Hub: what belongs to it, its model card, and the upload."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from json import JSONDecodeError
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    StrictDataclassError,
)
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.utils import validate_repo_id
from transformers import AutoConfig
from transformers.dynamic_module_utils import get_relative_imports

from .errors import CheckpointError
from .files.access import check_readable, is_present, read_json
from .files.links import check_links, resolved
from .files.weights import SAFETENSORS, Weights, open_weights
from .formats.configurations import quantization_method, refuse_sizes
from .formats.endings import end_ids
from .formats.kinds import Kind, detect_kind

README = "README.md"

_PUBLISHED = (
    *("*.safetensors", "*.json", "*.tiktoken", "*.model", "*.txt", "*.jinja"),
    *("*.py", "*.cpp", "*.cu"),
    *("*.md", "licen[cs]e*", "notice*", "*.pdf"),
    *("*.png", "*.jpg", "*.jpeg", "*.gif", "*.svg", "*.webp"),
    ".gitattributes",
)
_PRIVATE = (".*", "*.bak*", "*.partial", "*.tmp", "*.orig", "*~", "__pycache__")
_PICKLES = ("*.bin", "*.pth", "*.pt", "*.ckpt", "*.pkl", "*.pickle", "*.bin.index.json")


# --- files ---


@dataclass(frozen=True)
class PushFile:
    """A file to upload: where it will be in the repository, and its size in bytes."""

    path: str
    size: int


@dataclass(frozen=True)
class _Checkpoint:
    """A folder that has passed all checks; `paths` are what is published of it, `readme` the text of its own card."""

    folder: Path
    kind: Kind
    config: dict[str, Any]
    weights: Weights
    paths: list[str]
    readme: str | None


def files_to_push(folder: Path, repo_id: str | None = None) -> list[PushFile]:
    """List what `push` would upload, sorted by path, without asking the Hub.

    Backups, hidden and temporary files are left out, and so is whatever no model repository needs.

    Args:
        folder: a checkpoint with `config.json` and safetensors.
        repo_id: with it, README.md is listed as it would be uploaded, even where the folder has none.

    Raises:
        CheckpointError: the folder can't be published as it is.
    """
    checkpoint = _examine(folder)
    sizes = {path: (folder / path).stat().st_size for path in checkpoint.paths}
    if repo_id is not None:
        sizes[README] = len(_card(checkpoint, repo_id).encode())
    return [PushFile(path, size) for path, size in sorted(sizes.items())]


def _examine(folder: Path) -> _Checkpoint:
    resolved(folder)
    if not folder.is_dir():
        state = "is a file" if folder.exists() else "doesn't exist"
        raise CheckpointError(f"{folder} {state}: name the folder of a checkpoint.")
    check_links(folder)
    if not is_present(folder / "config.json"):
        raise CheckpointError(f"{folder} has no config.json, so nothing could load it: convert the checkpoint first.")
    config = read_json(folder / "config.json")
    kind = detect_kind(config)
    refuse_sizes(config)
    paths = sorted(_published(folder))
    weights = open_weights(folder)
    detect_kind(config, weights.infos)
    _refuse_strays(folder, weights)
    if kind.is_qwen:
        _check_code(folder, config)
        _check_vocabulary(folder)
    return _Checkpoint(folder, kind, config, weights, paths, _read_card(folder / README))


def _published(folder: Path) -> Iterator[str]:
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not _matches(name, _PRIVATE)]
        for name in names:
            path = Path(parent, name)
            if name != ".gitattributes" and _matches(name, _PRIVATE):
                continue
            if _matches(name, _PICKLES):
                raise CheckpointError(
                    f"{path} is a pickle, or an index of some. Pickles can run code, so they aren't published: turn "
                    "weights into safetensors with `upgrade`, and move anything else out of the folder."
                )
            if _matches(name, _PUBLISHED):
                if not path.is_file():
                    raise CheckpointError(f"{path} leads to no file: mend the link, or remove it.")
                check_readable(path)
                yield path.relative_to(folder).as_posix()


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name.lower(), pattern) for pattern in patterns)


def _refuse_strays(folder: Path, weights: Weights) -> None:
    for path in sorted(folder.glob("model*.safetensors")):
        if path not in weights.files:
            named = " and ".join(file.name for file in weights.files[:2])
            raise CheckpointError(f"{path} isn't part of the weights ({named} …): remove what is stale.")


def _check_code(folder: Path, config: Mapping[str, Any]) -> None:
    tokenizer = folder / "tokenizer_config.json"
    maps = [config.get("auto_map") or {}, (read_json(tokenizer) if tokenizer.is_file() else {}).get("auto_map") or {}]
    if "AutoModelForCausalLM" not in maps[0]:
        raise CheckpointError(
            f"{folder / 'config.json'} has no auto_map with AutoModelForCausalLM, so nobody could load the checkpoint "
            "from the Hub: run `upgrade` on the folder."
        )
    wanted = [(module, "auto_map") for values in maps for value in values.values() for module in _modules(value)]
    seen = set()
    while wanted:
        module, origin = wanted.pop()
        path = folder / f"{module.replace('.', '/')}.py"
        if not path.is_file():
            raise CheckpointError(f"{path} doesn't exist, but {origin} names it: run `upgrade` on the folder.")
        seen.add(module)
        wanted += [(name, path.name) for name in sorted(get_relative_imports(path)) if name not in seen]


def _modules(value: Any) -> Iterator[str]:
    """Modules of an entry of `auto_map`: "module.Class", or a list of such for the slow and the fast tokenizer."""
    for reference in value if isinstance(value, list) else [value]:
        if isinstance(reference, str):
            yield reference.rpartition(".")[0]


def _check_vocabulary(folder: Path) -> None:
    if not any((folder / name).is_file() for name in ("qwen.tiktoken", "tokenizer.json")):
        raise CheckpointError(f"{folder} has neither qwen.tiktoken nor tokenizer.json: put one of them into it.")


# --- model card ---

_LOAD = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{repo_id}"{remote})
model = AutoModelForCausalLM.from_pretrained("{repo_id}", device_map="auto"{remote}).eval()
"""
_CHAT_METHOD = """
response, history = model.chat(tokenizer, "你好", history=None)
print(response)
"""
_CHAT_TEMPLATE = """
messages = [{"role": "user", "content": "你好"}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
output = model.generate(**inputs.to(model.device), max_new_tokens=256)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
"""
_CONTINUATION = """
inputs = tokenizer("Once upon a time", return_tensors="pt").to(model.device)
output = model.generate(**inputs, max_new_tokens=64)
print(tokenizer.decode(output[0], skip_special_tokens=True))
"""


def model_card(folder: Path, repo_id: str) -> str:
    """README.md as `push` would upload it.

    The folder's own text is kept. Front matter that it lacks is put on top; where there is no text, one is written from
    what config.json and the headers of the weights say.

    Raises:
        CheckpointError: the folder can't be published as it is, or `repo_id` can't be the name of a repository.
    """
    return _card(_examine(folder), repo_id)


def _card(checkpoint: _Checkpoint, repo_id: str) -> str:
    _check_repo_id(repo_id)
    text = checkpoint.readme
    if text is not None and REGEX_YAML_BLOCK.search(text):
        return text
    if text is None:
        text = _card_text(checkpoint, repo_id)
    return f"---\n{_front_matter(checkpoint).to_yaml()}\n---\n\n{text}"


def _check_repo_id(repo_id: str) -> None:
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise CheckpointError(f"{repo_id!r} can't be a repository: write NAME or ORGANISATION/NAME. {error}") from error


def _read_card(path: Path) -> str | None:
    if not path.is_file():
        return None
    try:
        text = path.read_bytes().decode("utf-8-sig")  # as bytes, so that line ends stay as they are
        if REGEX_YAML_BLOCK.search(text):
            ModelCard(text, ignore_metadata_errors=True)
    except (ValueError, TypeError, yaml.YAMLError) as error:
        raise CheckpointError(f"{path} begins with no valid YAML, or isn't UTF-8: mend it. {error}") from error
    return text


def _front_matter(checkpoint: _Checkpoint) -> ModelCardData:
    data = ModelCardData(library_name="transformers", pipeline_tag="text-generation")
    data.tags = ["llama"] if checkpoint.kind is Kind.LLAMA else ["qwen"]
    if checkpoint.kind.is_qwen:
        data.tags.append("custom_code")
    if not _is_foreign(checkpoint):
        data.language = ["zh", "en"]
    if licence := _licence(checkpoint):
        text = (checkpoint.folder / licence).read_text(encoding="utf-8", errors="replace")
        slug = re.sub(r"[^a-z0-9]+", "-", text.strip().partition("\n")[0].lower()).strip("-")[:60]
        data.license, data.license_name, data.license_link = "other", slug or "see-file", licence
    return data


def _is_foreign(checkpoint: _Checkpoint) -> bool:
    """Whether the model comes from LLaMA, of whose languages nothing is known and whose tokenizer can't chat."""
    if checkpoint.kind.is_qwen:
        return end_ids(checkpoint.config, checkpoint.folder) is None
    return checkpoint.kind is Kind.LLAMA


def _licence(checkpoint: _Checkpoint) -> str | None:
    """Name of the file with the licence, the plainest if there are several."""
    names = [path for path in checkpoint.paths if fnmatchcase(path.lower(), "licen[cs]e*") and "/" not in path]
    return min(names, key=len, default=None)


def _card_text(checkpoint: _Checkpoint, repo_id: str) -> str:
    rows = "\n".join(f"| {name} | {value} |" for name, value in _facts(checkpoint).items())
    packages = '"transformers>=5.4" accelerate tiktoken' if checkpoint.kind.is_qwen else "transformers accelerate"
    licence = _licence(checkpoint)
    terms = f"See [{licence}]({licence})." if licence else "The weights keep the licence of their origin."
    return (
        f"# {repo_id.rpartition('/')[2]}\n\nA language model for transformers, with weights in safetensors.\n\n"
        f"| | |\n|---|---|\n{rows}\n\n"
        f"## Use\n\n```bash\npip install {packages}\n```\n\n```python\n{_usage(checkpoint, repo_id)}```\n\n"
        f"## Licence\n\n{terms}\n"
    )


def _usage(checkpoint: _Checkpoint, repo_id: str) -> str:
    folder, is_qwen = checkpoint.folder, checkpoint.kind.is_qwen
    load = _LOAD.format(repo_id=repo_id, remote=", trust_remote_code=True" if is_qwen else "")
    if is_qwen:
        path = folder / "generation_config.json"
        chat_format = read_json(path).get("chat_format", "chatml") if path.is_file() else "chatml"
        chats = chat_format == "chatml" and not _is_foreign(checkpoint)
        return load + (_CHAT_METHOD if chats else _CONTINUATION)
    path = folder / "tokenizer_config.json"
    has_template = (folder / "chat_template.jinja").is_file() or (path.is_file() and "chat_template" in read_json(path))
    return load + (_CHAT_TEMPLATE if has_template else _CONTINUATION)


def _facts(checkpoint: _Checkpoint) -> dict[str, str]:
    try:
        config: Any = AutoConfig.for_model(**checkpoint.config)
    except (ValueError, TypeError, ZeroDivisionError, StrictDataclassError) as error:
        raise CheckpointError(f"{checkpoint.folder / 'config.json'} can't be used: {error}") from error
    facts = {"Architecture": ", ".join(checkpoint.config.get("architectures") or [config.model_type])}
    if method := quantization_method(checkpoint.config):  # several parameters share one stored number
        facts["Quantised with"] = method
    else:
        dtypes = checkpoint.weights.dtypes
        facts["Parameters"] = f"{sum(dtypes.values()):,}"
        facts["Dtype"] = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    return {
        **facts,
        "Trained context length": f"{_trained_length(config):,} tokens",
        "Layers": f"{config.num_hidden_layers:,}",
        "Width": f"{config.hidden_size:,}",
        "Attention heads": f"{config.num_attention_heads:,}",
    }


def _trained_length(config: Any) -> int:
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "yarn" and rope.get("original_max_position_embeddings"):
        return rope["original_max_position_embeddings"]
    return getattr(config, "seq_length", None) or config.max_position_embeddings


# --- upload ---

_MESSAGE = "Upload model, tokenizer, code and card"


def push(
    folder: Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    token: str | None = None,
    message: str | None = None,
) -> str:
    """Upload a checkpoint as one commit; the folder stays as it is. Run again after an interruption, it resumes.

    Large files are sent one by one before the commit refers to them: the Hub knows a file that has arrived by its hash,
    commit or not, and doesn't ask for it again. Given all files at once, huggingface_hub would hash them all before the
    first byte is sent (LFS) or register them only together (Xet), so an interruption would cost more. The commit comes
    last and is a single one, so that nobody ever downloads half a checkpoint.

    Args:
        repo_id: "organisation/name", or "name" for a repository of the user's own; it is created where it is missing.
        private: create it as a private one.
        revision: branch, created from main where it is missing; main unless given.
        token: in place of that of `hf auth login`.
        message: of the commit.

    Returns:
        URL of the commit; of the latest one if nothing has changed.

    Raises:
        CheckpointError: the folder can't be published as it is, the Hub refuses, or it can't be reached.
    """
    checkpoint = _examine(folder)
    _card(checkpoint, repo_id)  # what it refuses is refused before anything is created
    api = HfApi(token=token or True)  # True: without a token, fail before anything is sent
    with _explained(repo_id):
        repo_id = _make_repository(api, repo_id, private, revision)
        _refuse_shadow(api, checkpoint, repo_id, revision)
        additions = [CommitOperationAdd(path, folder / path) for path in checkpoint.paths if path != README]
        additions.append(CommitOperationAdd(README, _card(checkpoint, repo_id).encode()))
        for addition in additions:
            api.preupload_lfs_files(repo_id, [addition], revision=revision, free_memory=False)
        return api.create_commit(repo_id, additions, commit_message=message or _MESSAGE, revision=revision).commit_url


def _make_repository(api: HfApi, repo_id: str, private: bool, revision: str | None) -> str:
    """Full name of a repository that is there, with its branch, when this returns."""
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if private and not api.model_info(repo_id).private:
        raise CheckpointError(f"{repo_id} exists and is public: make it private there, or choose another name.")
    if revision:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    return repo_id


def _refuse_shadow(api: HfApi, checkpoint: _Checkpoint, repo_id: str, revision: str | None) -> None:
    if SAFETENSORS not in checkpoint.paths and api.file_exists(repo_id, SAFETENSORS, revision=revision):
        where = f" --revision {revision}" if revision else ""
        raise CheckpointError(
            f"{repo_id} holds {SAFETENSORS}, which would be loaded in place of these {len(checkpoint.weights.files)} "
            f"files: remove it with `hf repos delete-files {repo_id} {SAFETENSORS}{where}`."
        )


@contextmanager
def _explained(repo_id: str) -> Iterator[None]:
    """Turn what huggingface_hub raises into errors that say what to do."""
    try:
        yield
    except CheckpointError:
        raise
    except LocalTokenNotFoundError as error:
        raise CheckpointError(f"{repo_id} needs a token: log in with `hf auth login`, or pass one.") from error
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(_explain(error, repo_id)) from error


def _explain(error: Exception, repo_id: str) -> str:
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    reason = " ".join(f"{error} {error.__cause__ if isinstance(error, RuntimeError) else ''}".split())
    if status == 401 or isinstance(error, RepositoryNotFoundError):
        return (
            f"The Hub doesn't know this token, or hides {repo_id} from it: log in with `hf auth login`, or pass "
            f"another token. {reason}"
        )
    if status == 403:
        return (
            f"This token may not write to {repo_id}: log in with `hf auth login` and a token that may, or choose a "
            f"repository of your own. {reason}"
        )
    if _is_final(error, status):
        return f"The Hub refuses the upload to {repo_id}: mend what it names. {reason}"
    return f"The upload to {repo_id} stopped; run it again to resume. {reason}"


def _is_final(error: Exception, status: int | None) -> bool:
    """Whether the same request would fail again."""
    if status is not None:
        return 400 <= status < 500 and status not in (408, 409, 412, 429)
    return isinstance(error, ValueError) and not isinstance(error, JSONDecodeError)  # which proxies cause
