"""The configuration of a checkpoint: read as far as possible, and what it switches on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path

from ..files.access import is_pointer, is_present, read_json
from ..files.links import stray_links
from ..files.weights import ADAPTER_CONFIG
from ..formats.architecture import Architecture
from ..formats.expected import NOT_GATHERED, is_left_empty
from ..formats.kinds import Kind, detect_kind
from ..formats.lenient import read_architecture, read_leniently
from ..formats.llama_original import own_shapes, read_llama
from ..formats.quantised import settings_beside
from ..opening.sources import LLAMA_PARAMS
from .subject import Subject
from .words import NAMED, are, first_of, plural, quoted

_MOST_FILES = 100  # numbered with two digits
_PARAMS = ("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "norm_eps", "rope_theta", "max_seq_len")


def read_configuration(subject: Subject) -> None:
    """Find out the format, and the architecture where it has one."""
    config = subject.path if subject.is_config else subject.folder / "config.json"
    if subject.is_config or subject.path.is_dir() and subject.params is None and is_present(config):
        _read_config(subject, config)
    elif subject.stored.is_llama_original or subject.params is not None:
        _read_params(subject)
    elif subject.path.is_file():
        if not subject.findings.problems:  # of a file that can't be read more is known
            subject.findings.problems.append(f"{subject.path} is one file of a checkpoint: inspect its folder.")
    elif not (subject.folder / ADAPTER_CONFIG).is_file():
        subject.findings.problems.append("config.json is missing, which says what the weights are. Download it.")


def _read_config(subject: Subject, path: Path) -> None:
    subject.config = {} if is_pointer(path) else subject.findings.attempt(read_json, path) or {}
    if subject.config:
        subject.kind = subject.findings.attempt(detect_kind, subject.config, subject.stored.infos)
    if subject.kind is None:
        return
    _take(subject, subject.findings.attempt(read_architecture, subject.kind, subject.config))


def _take(subject: Subject, found: tuple[Architecture, str | None] | None) -> None:
    if found is not None:
        subject.architecture, reason = found
        if reason is not None:
            subject.findings.remarks.append(f"Can't be converted to QWen: {reason}")


def _read_params(subject: Subject) -> None:
    subject.kind = Kind.LLAMA_ORIGINAL
    weights = subject.stored.first
    training = weights.extras.get("model_args") if weights and subject.params is None else None
    if isinstance(training, dict):
        subject.config = training
    else:
        subject.config = subject.findings.attempt(read_json, subject.params or subject.folder / LLAMA_PARAMS) or {}
    if subject.config and weights is not None:
        shapes = own_shapes(weights.infos)
        _expect_files(subject, shapes)
        read = partial(read_llama, shapes=shapes, files=len(subject.stored.parts))
        plain = {name: subject.config[name] for name in _PARAMS if name in subject.config}
        _take(subject, subject.findings.attempt(read_leniently, read, subject.config, plain))


def _expect_files(subject: Subject, shapes: Mapping[str, Sequence[int]]) -> None:
    """The last model-parallel files leave no gap when they are missing, but the others' shapes tell of them."""
    there = len(subject.stored.parts)
    heads, head_dim = subject.config.get("n_heads"), subject.config.get("head_dim")
    queries = heads * head_dim if isinstance(heads, int) and isinstance(head_dim, int) else subject.config.get("dim")
    rows = (shapes.get("layers.0.attention.wq.weight") or (0,))[0]
    if subject.path.is_file() or not isinstance(queries, int) or not rows or queries % rows:
        return
    if not there < queries // rows <= _MOST_FILES:
        return
    subject.stored.expect(queries // rows)
    missing = [part.path.name for part in subject.stored.parts[there:]]
    subject.findings.problems.append(
        f"The shapes are those of {queries // rows} model-parallel files: {first_of(missing)} {are(missing)} "
        f"missing. Download {'it' if len(missing) == 1 else 'them'}, or mend {LLAMA_PARAMS}."
    )


def check_configuration(subject: Subject) -> None:
    """Remark on what the configuration switches on, on adapters and on links."""
    if subject.path.is_dir():
        subject.findings.attempt(_remark_on_links, subject)
    _take_quantization(subject)
    if (subject.folder / ADAPTER_CONFIG).is_file():
        _remark_on_adapter(subject)
    if subject.quantization is not None:
        known = "convert keeps their bits, and convert --dequantize gives full ones"
        unknown = "their names and shapes are not checked, and they can't be converted"
        subject.findings.remarks.append(
            f"The weights are quantised ({subject.quantization}): {known if subject.packing else unknown}."
        )
    stretch = [word for word, on in subject.stretch.items() if on]
    if subject.architecture is not None and stretch:
        subject.findings.remarks.append(
            f"{' and '.join(stretch)} {'is' if len(stretch) == 1 else 'are'} on: texts longer than "
            f"{subject.architecture.length:,} tokens need QWen's own code, as other programs leave this out."
        )


def _take_quantization(subject: Subject) -> None:
    """Settings of the quantisation may be in a file of their own, which transformers doesn't read."""
    if subject.kind is None or subject.kind is Kind.LLAMA_ORIGINAL:
        return
    found = subject.findings.attempt(settings_beside, subject.folder, subject.config, subject.stored.infos)
    if found is not None:
        subject.config = {**subject.config, "quantization_config": found[1]}
        remedy = "upgrade copies it" if subject.is_qwen else "copy it"
        subject.findings.problems.append(
            f"config.json has no quantization_config, which is in {found[0]}: without it transformers takes the "
            f"weights for full ones and fills them at random. Here {remedy} into config.json."
        )


def _remark_on_links(subject: Subject) -> None:
    refused = "upgrade, convert, merge-lora and push refuse the folder for that"
    subject.findings.remarks += [f"{text} ({refused})" for text in islice(stray_links(subject.folder), NAMED)]


def _remark_on_adapter(subject: Subject) -> None:
    adapter = subject.findings.attempt(read_json, subject.folder / ADAPTER_CONFIG) or {}
    empty = [name for name, info in subject.stored.infos.items() if is_left_empty(info.shape)]
    if subject.kind is None and empty:
        subject.findings.problems.append(
            f"{plural(len(empty), 'tensor')} {are(empty)} empty: {quoted(empty)}. {NOT_GATHERED}"
        )
    base, method = adapter.get("base_model_name_or_path"), adapter.get("peft_type")
    if subject.kind is None:
        subject.findings.remarks.append(
            f"This is an adapter ({method}) of {base!r}, not a model of its own: merge-lora joins the two."
        )
    else:
        subject.findings.remarks.append(
            f"{ADAPTER_CONFIG} lies beside a model, so transformers loads {base!r} and the adapter in its place. "
            "Move the adapter into another folder."
        )
