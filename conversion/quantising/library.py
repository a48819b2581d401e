"""gptqmodel, which rounds the weights: what it is told, and what is kept from it."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError


@dataclass(frozen=True)
class Settings:
    """How weights are to be rounded; the names are those of `quantization_config`, in the published order."""

    bits: int
    group_size: int = 128
    damp_percent: float = 0.01
    desc_act: bool = False
    sym: bool = True
    true_sequential: bool = True

    @property
    def published(self) -> dict[str, Any]:
        """`quantization_config` as the published checkpoints have it."""
        return {**asdict(self), "quant_method": "gptq"}


@contextlib.contextmanager
def _inside(folder: Path) -> Iterator[None]:
    """Work in a folder of our own, as the library writes its logs into whichever it finds itself in."""
    before = Path.cwd()
    folder.mkdir(exist_ok=True)
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def _show_warnings_only() -> None:
    """Leave the library's bars on the terminal, and not the pages of settings around them."""
    with contextlib.suppress(ImportError, AttributeError):
        importlib.import_module("logbar").LogBar.shared().setLevel(logging.WARNING)


def check_library() -> None:
    """Refuse to begin without gptqmodel.

    Raises:
        CheckpointError: it isn't installed.
    """
    if importlib.util.find_spec("gptqmodel") is None:
        raise CheckpointError("quantize needs gptqmodel, which is not installed: pip install 'qwen1[gptq]'")


def quantise(source: Path, target: Path, rows: torch.Tensor, settings: Settings, device: str, scratch: Path) -> None:
    """Round the weights of a QWen folder with our code, and write what gptqmodel makes of them.

    Args:
        source: with safetensors; this path and the others are absolute.
        target: folder for the result, in gptqmodel's own form.
        rows: (N, T) int64, token ids to round by.
        device: "cpu", or one that torch finds.
        scratch: folder for what the library lays aside, and for its logs.

    Raises:
        CheckpointError: whatever the library raises.
    """
    # Without a bound it starts workers that wait for one another on few cores.
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    # Progress and remarks of the library are for people, and standard output is for results.
    with contextlib.redirect_stdout(sys.stderr), _inside(scratch):
        try:
            library: Any = importlib.import_module("gptqmodel")
            _show_warnings_only()
            # On the CPU it lays aside layers that it then doesn't find again.
            aside = {"offload_to_disk": device != "cpu", "offload_to_disk_path": str(scratch)}
            config = library.QuantizeConfig(**asdict(settings), **aside)
            model = library.GPTQModel.load(str(source), config, trust_remote_code=True, device=device)
            ones = torch.ones_like(rows[0])[None]
            model.quantize([{"input_ids": row[None], "attention_mask": ones} for row in rows], batch_size=1)
            model.save(str(target))
        except Exception as error:  # of any kind, and from several libraries
            raise CheckpointError(
                f"gptqmodel failed: {' '.join(str(error).split()) or 'no reason given'} ({type(error).__name__})."
            ) from error
