"""What a checkpoint is, what it needs, and what is missing or odd about it: the command `inspect`.

Only headers are read, unless a scan of every value is asked for. Nothing stops at the first fault: what can't be read
becomes a problem in the report, and everything else is looked at all the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..files.access import check_exists
from ..files.weights import ADAPTER_CONFIG
from ..formats.lenient import kind_name
from ..formats.names import TABLE, hf_shapes
from ..opening.sources import check_params
from ..sizing.devices import Sizing, answer
from ..sizing.question import Question
from ..sizing.shape import Shape
from .companions import CompanionChecks, tokenizer_files
from .configuration import check_configuration, read_configuration
from .memory import int8_cache_per_token, memory_needs, numel
from .report import Report
from .scan import scan_values
from .subject import Subject
from .weights import check_weights

ADAPTER = "adapter"
"""What `Report.kind` says of a folder that holds no model but an adapter of one."""


def inspect(
    path: Path,
    params: Path | None = None,
    scan: bool = False,
    progress: Callable[[str, int], None] = lambda name, nbytes: None,
    question: Question | None = None,
) -> Report:
    """Find out what a checkpoint is and what is wrong with it.

    Args:
        path: a folder, the single file of a LLaMA training, or a `config.json`, which may lie alone.
        params: `params.json` of a LLaMA checkpoint, where it isn't in the same folder.
        scan: read every value: compare the checksums that are known, and look for NaN and infinite values.
        progress: while scanning, called after each tensor with its name and size; the sizes add up to `weights_bytes`.
        question: how many devices it needs; then the weights may be missing.

    Raises:
        CheckpointError: nothing is at this path, it needs no `params`, or the question has no answer. A checkpoint that
            is broken is reported on instead.
    """
    check_exists(path)
    check_params(path, params)
    subject = Subject(path, params, without_weights=question is not None)
    read_configuration(subject)
    check_configuration(subject)
    check_weights(subject)
    _check_companions(subject)
    if scan:
        scan_values(subject, progress)
    return _report(subject, scan, None if question is None else _size_up(subject, question))


def _size_up(subject: Subject, question: Question) -> Sizing:
    """Answer a question, and remark on a text that is too long."""
    if subject.architecture is None:
        reason = subject.findings.problems[0] if subject.findings.problems else "There is no configuration of a model."
        raise CheckpointError(f"How much memory it needs can't be said. {reason}")
    sizing = answer(question, Shape(subject.architecture, subject.is_qwen), subject.packing)
    positions = max(subject.positions or 0, subject.architecture.length)
    if sizing.context > positions:
        subject.findings.remarks.append(
            f"--context {sizing.context:,} is more than the {positions:,} tokens that the model is made for: its "
            "answers get worse there, whatever the memory."
        )
    return sizing


def _check_companions(subject: Subject) -> None:
    """Look at the files beside the weights."""
    if subject.path.is_dir() and subject.kind is not None:
        CompanionChecks(subject.folder, subject.kind, subject.config, subject.architecture, subject.findings).check()


def _report(subject: Subject, scanned: bool, sizing: Sizing | None) -> Report:
    """What was found out."""
    return Report(
        path=str(subject.path),
        kind=_kind_name(subject),
        description=_description(subject),
        architecture=_describe_architecture(subject),
        quantization=subject.quantization,
        parameters=_count_parameters(subject),
        dtypes=subject.dtypes,
        files=subject.stored.file_reports(),
        weights_bytes=subject.stored.nbytes,
        memory=memory_needs(subject.architecture, subject.is_qwen) if subject.architecture else {},
        int8_cache_per_token=_int8_cache(subject),
        tokenizer=tokenizer_files(subject.folder),
        problems=subject.findings.problems,
        remarks=subject.findings.remarks,
        scanned=scanned,
        sizing=sizing,
    )


def _kind_name(subject: Subject) -> str | None:
    if subject.kind is not None:
        return kind_name(subject.kind)
    return ADAPTER if not subject.config and (subject.folder / ADAPTER_CONFIG).is_file() else None


def _description(subject: Subject) -> str:
    if subject.kind is not None:
        return subject.kind.value
    return "adapter of a model" if _kind_name(subject) == ADAPTER else "unknown"


def _describe_architecture(subject: Subject) -> dict[str, Any] | None:
    if subject.architecture is None:
        return None
    values = {name: value for name, value in asdict(subject.architecture).items() if name != "settings"}
    return {**values, "ntk": subject.stretch["NTK"], "logn": subject.stretch["LogN"]}


def _int8_cache(subject: Subject) -> int | None:
    return int8_cache_per_token(subject.architecture) if subject.architecture and subject.is_qwen else None


def _count_parameters(subject: Subject) -> dict[str, int | None]:
    if subject.architecture is None:
        return {"total": sum(subject.dtypes.values()), "without_embeddings": None}
    shapes = hf_shapes(subject.architecture)
    outside = {TABLE[0].hf, TABLE[-1].hf}
    sizes = {name: numel(shape) for name, shape in shapes.items()}
    inner = sum(size for name, size in sizes.items() if name not in outside)
    return {"total": sum(sizes.values()), "without_embeddings": inner}
