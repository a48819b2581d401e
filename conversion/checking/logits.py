"""Whether two checkpoints give the same logits: the command `verify`.

Each is loaded by its own class, one after the other, so that only one of them is in memory.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel

from ..errors import CheckpointError
from ..formats.architecture import Architecture
from ..formats.kinds import Kind
from ..formats.lenient import read_architecture, rope_scaling
from ..opening.sources import Source
from .comparison import TOLERANCE, Comparison
from .models import load_opened, open_for_comparison
from .token_ids import random_ids

_DEFAULT_TOKENS, _DEFAULT_ROWS = 64, 2


def compare(
    first: Path,
    second: Path,
    *,
    ids: torch.Tensor | None = None,
    tokens: int | None = None,
    seed: int = 0,
    tolerance: float = TOLERANCE,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    rounded: torch.dtype | None = None,
    params: Path | None = None,
    progress: Callable[[str], None] = lambda step: None,
) -> Comparison:
    """Compare the logits of two checkpoints on the same token ids.

    Args:
        ids: (rows, tokens) int64; random ones where there are none.
        tokens: length of the random rows; 64, or the shorter trained length: beyond it, what stretches texts counts.
        seed: of the random ids.
        tolerance: see `TOLERANCE`.
        dtype: precision of both models.
        rounded: round the weights of the first one to this dtype, as `convert --dtype` did for the second.
        params: `params.json` of a LLaMA checkpoint, where it isn't in the same folder.
        progress: told what is done next.

    Raises:
        CheckpointError: see `load_model`; an id that a model doesn't have; `params` that neither needs.
    """
    sources = [open_for_comparison(path, params) for path in (first, second)]
    if params is not None and all(source.kind is not Kind.LLAMA_ORIGINAL for source in sources):
        raise CheckpointError(
            f"--params is for LLaMA's original format, but {first} and {second} have a config.json: leave it out."
        )
    shapes = [_shape(source) for source in sources]
    vocabulary, length = min(shape.rows for shape in shapes), min(shape.length for shape in shapes)
    if ids is None:
        ids = random_ids(vocabulary, min(_DEFAULT_TOKENS, length) if tokens is None else tokens, _DEFAULT_ROWS, seed)
    _check_ids(ids, vocabulary)
    logits = [
        _logits(source, ids, dtype, device, precision, progress)[:, :vocabulary]
        for source, precision in zip(sources, (rounded, None), strict=True)
    ]
    return compare_logits(logits[0], logits[1], tolerance, tuple(_remarks(sources, shapes, ids)))


def _logits(
    source: Source,
    ids: torch.Tensor,
    dtype: torch.dtype,
    device: str | torch.device,
    rounded: torch.dtype | None,
    progress: Callable[[str], None],
) -> torch.Tensor:
    gc.collect()  # modules and hooks refer to one another, and this model needs the memory of the one before
    progress(f"Loading {source.path}")
    model = load_opened(source, dtype, device, rounded)
    progress(f"Running {source.path}")
    return run(model, ids)


def _shape(source: Source) -> Architecture:
    if source.kind is Kind.LLAMA_ORIGINAL:
        return source.architecture
    return read_architecture(source.kind, source.config)[0]


def _check_ids(ids: torch.Tensor, vocabulary: int) -> None:
    if ids.ndim != 2 or not ids.numel():
        raise CheckpointError(
            f"Token ids of shape {tuple(ids.shape)} can't be read: give rows of one length, at least 1."
        )
    wrong = ids[(ids < 0) | (ids >= vocabulary)]
    if wrong.numel():
        raise CheckpointError(
            f"Token id {int(wrong[0])} is out of the vocabulary: both checkpoints have rows for 0 to {vocabulary - 1}."
        )


def _remarks(sources: Sequence[Source], shapes: Sequence[Architecture], ids: torch.Tensor) -> Iterator[str]:
    scalings = [(rope_scaling(source.config), shape.rope) for source, shape in zip(sources, shapes, strict=True)]
    for source, (scaling, _) in zip(sources, scalings, strict=True):
        if scaling and scalings[0] != scalings[1]:
            yield f"{source.path} has rope scaling {scaling!r}, which can change the logits of short texts as well."
    rows, length = [shape.rows for shape in shapes], min(shape.length for shape in shapes)
    if rows[0] != rows[1]:
        yield f"The vocabularies have {rows[0]:,} and {rows[1]:,} rows: the first {min(rows):,} are compared."
    if ids.shape[1] > length:
        yield f"{ids.shape[1]:,} tokens are more than the trained {length:,}: what stretches texts counts as well."


@torch.inference_mode()
def run(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Logits of each position, (rows, tokens) -> (rows * tokens, V) float32 on the CPU."""
    # A row at a time, as the logits of a large vocabulary take more memory than anything else here.
    rows = [model(row[None].to(model.device), use_cache=False).logits[0].float().cpu() for row in ids]
    return torch.cat(rows)


def compare_logits(
    first: torch.Tensor, second: torch.Tensor, tolerance: float = TOLERANCE, remarks: tuple[str, ...] = ()
) -> Comparison:
    """Compare logits, both (positions, V)."""
    difference = (first - second).abs()
    finite = bool(first.isfinite().all()) and bool(second.isfinite().all())
    if not finite:
        remarks = (*remarks, "There are NaN or infinite logits.")
    return Comparison(
        largest=difference.max().item() if finite else math.nan,
        mean=difference.mean().item() if finite else math.nan,
        std=first.std().item(),
        agreement=(first.argmax(-1) == second.argmax(-1)).double().mean().item(),
        tokens=first.shape[0],
        vocabulary=first.shape[1],
        tolerance=tolerance,
        remarks=remarks,
    )
