"""peft's layers around those of the base."""

from __future__ import annotations

import importlib
import re
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..errors import CheckpointError
from ..opening.adapters import Adapter
from ..writing.progress import Progress
from .base import Base

_SPARE = re.compile(
    r"base_model\.model\.(transformer\.wte|lm_head)\.(original_module|modules_to_save(\.default)?)\.weight"
)
"""What peft saves of embeddings that were trained as a whole, beside the result."""


def put_on(adapter: Adapter, base: Base, progress: Progress) -> nn.Module:
    """The base's model with the adapter around its layers, the latter in float32 and with the trained values.

    Raises:
        CheckpointError: peft is missing or too old, or the adapter belongs to another base.
    """
    peft = _import_peft()
    if adapter.kind not in peft.PeftType.__members__:
        raise CheckpointError(f"peft {peft.__version__} doesn't know {adapter.kind} adapters: pip install -U peft")
    with peft_errors(f"{adapter.folder} doesn't fit the base"), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        config = peft.PeftConfig.from_pretrained(str(adapter.folder))
    for warning in caught:  # of options that this version of peft doesn't know
        progress.note(f"peft: {' '.join(str(warning.message).split())}")
    config.inference_mode = True
    with peft_errors(f"{adapter.folder} doesn't fit the base"):
        wrapped = peft.PeftModel(base.model, config)
        expected = peft.get_peft_model_state_dict(wrapped, save_embedding_layers=False)
        _check_tensors(adapter, expected, base.taken)
        for name, module in list(base.model.named_modules()):
            if isinstance(module, peft.utils.ModulesToSaveWrapper):  # the trained copies stay in their file
                base.model.set_submodule(name, module.original_module)
        for tensor in (*wrapped.parameters(), *wrapped.buffers()):  # made in the dtype of the base
            if tensor.is_floating_point() and not base.holds(tensor):
                tensor.data = tensor.data.float()
        added = {name: adapter.weights.read(name) for name in expected if name not in base.taken}
        peft.set_peft_model_state_dict(wrapped, added)
    adapter.weights.close()
    return wrapped.get_base_model()


def _import_peft() -> Any:
    try:
        return importlib.import_module("peft")
    except ImportError as error:
        raise CheckpointError(f"merge-lora needs peft ({error}): pip install peft") from error


@contextmanager
def peft_errors(what: str) -> Iterator[None]:
    """Turn what peft raises, which is anything, into an error that names the adapter; its warnings are for training."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"{what}: {' '.join(str(error).split()) or type(error).__name__}") from error


def _check_tensors(adapter: Adapter, expected: Mapping[str, torch.Tensor], taken: Collection[str]) -> None:
    """Compare the names and shapes in the file with those that the adapter would have on this base.

    Raises:
        CheckpointError: the first difference.
    """
    found = adapter.weights.infos
    unknown = [name for name in found if name not in expected and name not in taken and not _SPARE.fullmatch(name)]
    missing = [name for name in expected if name not in found]
    if unknown:
        raise CheckpointError(
            f"{found[unknown[0]]} has no place in the base ({len(unknown)} such tensors): the adapter belongs to "
            "another base."
        )
    if missing:
        raise CheckpointError(
            f"{missing[0]!r} is missing in {adapter.file} ({len(missing)} of {len(expected)} tensors are): the adapter "
            "is incomplete, or belongs to another base."
        )
    for name, tensor in expected.items():
        if found[name].shape != tuple(tensor.shape):
            raise CheckpointError(
                f"{found[name]} has shape {found[name].shape}, but on this base it would be {tuple(tensor.shape)}: the "
                "adapter belongs to another base."
            )
