"""Every value, read: NaN and infinity, biases that would be lost, heads that differ."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from ..files.tensors import is_finite
from ..files.weights import Weights
from ..formats.packed_values import check_groups, contradictions
from .subject import Subject
from .words import are, first_of, plural, quoted


def scan_values(subject: Subject, progress: Callable[[str, int], None]) -> None:
    """Read every value, a tensor at a time."""
    bad: list[str] = []
    for number, part in enumerate(subject.stored.parts):
        if part.weights is not None:
            bad += _scan_file(subject, part.weights, subject.stored.prefix(number), progress)
    lost = [name for name in subject.expected.optional if _is_lost(subject, name)]
    if lost:
        subject.findings.problems.append(
            f"{plural(len(lost), 'bias')} {are(lost)} stored that no_bias leaves out, and not zero: {quoted(lost)}."
        )
    if bad:
        subject.findings.problems.append(
            f"{plural(len(bad), 'tensor')} {'has' if len(bad) == 1 else 'have'} NaN or infinite values: "
            f"{first_of(bad)}."
        )
    if subject.packing is not None:
        _check_groups(subject)
    _compare_tied_head(subject)
    if subject.packing is not None and not subject.findings.problems:
        subject.findings.remarks += contradictions(subject.shapes, subject.packing, partial(_read, subject))


def _check_groups(subject: Subject) -> None:
    """Look for inputs of packed layers in groups that are not there."""
    shapes = subject.expected.required
    for name in shapes:
        g_idx = _read(subject, name) if name.endswith(".g_idx") else None
        if g_idx is not None and tuple(g_idx.shape) == shapes[name]:
            groups = shapes[f"{name.removesuffix('g_idx')}scales"][0]
            subject.findings.attempt(check_groups, subject.stored.infos[name], g_idx, groups)


def _is_lost(subject: Subject, name: str) -> bool:
    """Whether a stored bias that the model has no place for changes what is computed."""
    tensor = _read(subject, name)
    return tensor is not None and bool(tensor.any())


def _read(subject: Subject, name: str) -> torch.Tensor | None:
    """A tensor; None where it isn't there or can't be read."""
    info = subject.stored.infos.get(name)
    part = next((part for part in subject.stored.parts if info is not None and part.path == info.file), None)
    return subject.findings.attempt(part.weights.read, name) if part is not None and part.weights else None


def _scan_file(subject: Subject, weights: Weights, prefix: str, progress: Callable[[str, int], None]) -> list[str]:
    bad = []
    damaged = False
    for info in weights.infos.values():
        if info.same_as is not None:
            continue
        if not damaged:
            tensor = subject.findings.attempt(weights.read, info.name)
            damaged = tensor is None
            if tensor is not None and not is_finite(tensor):
                bad.append(str(info))
        progress(prefix + info.name, info.nbytes)
    weights.close()
    return bad


def _compare_tied_head(subject: Subject) -> None:
    if subject.tied_head is not None and subject.stored.equal(*subject.tied_head) is False:
        subject.findings.problems.append(
            f"{subject.tied_head[1]!r} differs from {subject.tied_head[0]!r}, although tie_word_embeddings makes them "
            "one: set it to false, or delete the tensor."
        )
