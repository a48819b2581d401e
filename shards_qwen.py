"""Weights that several processes have in shards, put together for saving."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def needs_gathering(model: nn.Module) -> bool:
    """Whether weights are in shards that transformers doesn't put together: FSDP2 or DTensors by the user's own hand.

    Those of a model that `from_pretrained` distributed are known to transformers.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    from torch.distributed.tensor import DTensor  # takes long, and not every build of torch has it

    config, shards = getattr(model, "config", None), getattr(model, "tp_size", None)
    known = shards is not None or getattr(config, "distributed_config", None) is not None
    return not known and any(isinstance(parameter, DTensor) for parameter in model.parameters())


def gather_weights(model: nn.Module) -> dict[str, Any]:
    """The whole weights, on the CPU of process 0; nothing in the others. Every process has to call it."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
