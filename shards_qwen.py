"""Weights that several processes have in shards: put together for saving; what the processes have to agree on."""

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


def weights_once(model: Any) -> dict[str, Any]:
    """The weights of a model, shards as they are, each under one name: put together one by one, two that are tied would
    no longer be known as the same."""
    return {name: weight for name, weight in model.state_dict().items() if name not in model.all_tied_weights_keys}


def sharing_group(model: Any) -> Any:
    """The group of processes that compute each token together, by tensor parallel; None for this process alone."""
    mesh = getattr(model, "_device_mesh", None)
    if mesh is None or (model.tp_size or 1) == 1:
        return None
    return mesh.get_group("tp" if "tp" in (mesh.mesh_dim_names or ()) else 0)


def agreed(model: Any, digest: bytes | None) -> bytes | None:
    """A digest of what each process says of its shard, the same in all; None if one can't tell.

    Processes that read different numbers of tokens would wait for each other for ever.

    Args:
        model: a `QWenLMHeadModel`.
        digest: of this process, of one length in all, or None.
    """
    group = sharing_group(model)
    if group is None:
        return digest
    digests: list[bytes | None] = [None] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(digests, digest, group=group)
    return None if None in digests else b"".join(part for part in digests if part)


def draw_alike(model: Any) -> None:
    """Let all processes that compute a token together draw the same one: their generators get the seed of the first."""
    group = sharing_group(model)
    if group is None:
        return
    seed = torch.randint(2**62, (1,)).to(model.device)
    torch.distributed.broadcast(seed, torch.distributed.get_global_rank(group, 0), group=group)
    torch.manual_seed(int(seed))
