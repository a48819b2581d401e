"""The model card: its front matter, and a text where the folder has none."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from huggingface_hub.errors import (
    HFValidationError,
    StrictDataclassError,
)
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.utils import validate_repo_id
from transformers import AutoConfig

from ...few_bits_qwen import PACKED
from ..errors import CheckpointError
from ..files.access import read_json
from ..formats.configurations import quantization_method
from ..formats.endings import end_ids
from ..formats.kinds import Kind
from .folder import README, Checkpoint, examine
from .instructions import renew

_READERS = {**PACKED, **{name: (name,) for name in ("bitsandbytes", "compressed-tensors", "torchao")}}
"""What transformers reads weights in few bits with, by method."""

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

    The folder's own text is kept, but for instructions of 2023, whose place ours take. Front matter that it lacks is
    put on top; where there is no text, one is written from what config.json and the headers of the weights say.

    Raises:
        CheckpointError: the folder can't be published as it is, or `repo_id` can't be the name of a repository.
    """
    return card_of(examine(folder), repo_id)


def card_of(checkpoint: Checkpoint, repo_id: str) -> str:
    _check_repo_id(repo_id)
    text = _renewed(checkpoint, repo_id)[0]
    if text is not None and REGEX_YAML_BLOCK.search(text):
        return text
    if text is None:
        text = _card_text(checkpoint, repo_id)
    return f"---\n{_front_matter(checkpoint).to_yaml()}\n---\n\n{text}"


def notes_on_card(folder: Path, repo_id: str) -> list[str]:
    """What `model_card` has changed in the folder's own text, for the user."""
    changed = _renewed(examine(folder), repo_id)[1]
    if not changed:
        return []
    names = ", ".join(repr(heading) for heading in changed)
    return [f"{README}: instructions of 2023 give way to ours: {names}. The folder's own file stays."]


def _renewed(checkpoint: Checkpoint, repo_id: str) -> tuple[str | None, list[str]]:
    if checkpoint.readme is None or not checkpoint.kind.is_qwen:
        return checkpoint.readme, []
    return renew(checkpoint.readme, _instructions(checkpoint, repo_id), repo_id)


def _check_repo_id(repo_id: str) -> None:
    try:
        validate_repo_id(repo_id)
        if not repo_id.isascii():  # which older releases let pass
            raise HFValidationError("Letters are those of ASCII.")
    except HFValidationError as error:
        raise CheckpointError(f"{repo_id!r} can't be a repository: write NAME or ORGANISATION/NAME. {error}") from error


def _front_matter(checkpoint: Checkpoint) -> ModelCardData:
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


def _is_foreign(checkpoint: Checkpoint) -> bool:
    """Whether the model comes from LLaMA, of whose languages nothing is known and whose tokenizer can't chat."""
    if checkpoint.kind.is_qwen:
        return end_ids(checkpoint.config, checkpoint.folder) is None
    return checkpoint.kind is Kind.LLAMA


def _licence(checkpoint: Checkpoint) -> str | None:
    """Name of the file with the licence, the plainest if there are several."""
    names = [path for path in checkpoint.paths if fnmatchcase(path.lower(), "licen[cs]e*") and "/" not in path]
    return min(names, key=len, default=None)


def _card_text(checkpoint: Checkpoint, repo_id: str) -> str:
    rows = "\n".join(f"| {name} | {value} |" for name, value in _facts(checkpoint).items())
    licence = _licence(checkpoint)
    terms = f"See [{licence}]({licence})." if licence else "The weights keep the licence of their origin."
    return (
        f"# {repo_id.rpartition('/')[2]}\n\nA language model for transformers, with weights in safetensors.\n\n"
        f"| | |\n|---|---|\n{rows}\n\n"
        f"## Use\n\n{_instructions(checkpoint, repo_id)}\n\n"
        f"## Licence\n\n{terms}\n"
    )


def _instructions(checkpoint: Checkpoint, repo_id: str) -> str:
    packages = '"transformers>=5.4" accelerate tiktoken' if checkpoint.kind.is_qwen else "transformers accelerate"
    method = quantization_method(checkpoint.config)
    for package in _READERS.get(method or "", ()):
        if package not in packages:
            packages += f" {package}"
    return f"```bash\npip install {packages}\n```\n\n```python\n{_usage(checkpoint, repo_id)}```"


def _usage(checkpoint: Checkpoint, repo_id: str) -> str:
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


def _facts(checkpoint: Checkpoint) -> dict[str, str]:
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
