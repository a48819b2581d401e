"""The command `merge-lora`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import CheckpointError
from ..writing.progress import Progress
from .terminal import Dtype, ShardOption, TargetArgument, optional_dtype, out, progress_bars

if TYPE_CHECKING:
    import torch


def merge_lora_command(
    base: Annotated[Path, typer.Argument(metavar="BASE", help="QWen folder of any release.")],
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="Folder written by peft.")],
    target: TargetArgument,
    dtype: Annotated[Dtype | None, typer.Option(help="Of the new weights; that of BASE without it.")] = None,
    max_shard_size: ShardOption = "5GB",
) -> None:
    """Add a LoRA adapter to the weights of its base; tokenizer and code go along."""
    with progress_bars() as progress:
        written = merge_lora(
            base, adapter, target, dtype=optional_dtype(dtype), max_shard_size=max_shard_size, progress=progress
        )
    out.print(f"{target}: merged." if written else f"{target} is up to date.")


def merge_lora(
    base: Path,
    adapter: Path,
    target: Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: str = "5GB",
    progress: Progress,
) -> bool:
    """Write the folder of a base with an adapter merged into its weights.

    Beside the weights there is what `upgrade` would write for the base; where the adapter's folder has a vocabulary,
    tokenizer settings or a chat template of its own, these take its place.

    Args:
        base: QWen folder of any release, with its full weights.
        adapter: folder that peft's `save_pretrained` wrote.
        target: folder to write.
        dtype: of the new weights; None for that of the base's.
        max_shard_size: of the safetensors, "5GB" or "500MB".
        progress: told of each tensor.

    Returns:
        False if the target was there already, equal in every file.

    Raises:
        CheckpointError: a damaged file, an adapter that can't be merged here, or values that would not be finite.
        CheckpointError, OSError: see `write_folder`.
    """
    from ..files.links import resolved
    from ..opening.adapters import open_adapter, open_base
    from ..planning.merge import plan_merge
    from ..writing.plans import write_plan

    given, source = open_adapter(adapter), open_base(base)
    if resolved(target).is_relative_to(resolved(base)):
        raise CheckpointError(f"{target} is in the folder of the base: name a folder elsewhere.")
    return write_plan(plan_merge(source, given, dtype, max_shard_size, progress), target, progress)
