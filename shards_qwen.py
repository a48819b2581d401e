"""Weights that several processes have in shards: who puts them together; what the processes have to agree on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn


def gathers_its_weight(head: nn.Module) -> bool:
    """Whether a head is a plain matrix, without a bias or a hook, that FSDP2 alone has in shards or has put together.

    It does so around a call of the head; outside of one the weight is that of a shard.
    """
    derived = torch.distributed.is_available() and nn.Linear in type(head).__bases__  # as FSDP2 derives a class
    if not derived or head.bias is not None or hasattr(head, "_hf_hook"):
        return False
    from torch.distributed.fsdp import FSDPModule  # takes long, and not every build of torch has it
    from torch.distributed.tensor import DTensor

    weight = head.weight
    cuts = [place for place in weight.placements if not place.is_replicate()] if isinstance(weight, DTensor) else []
    return isinstance(head, FSDPModule) and len(cuts) <= 1 and weight.shape == (head.out_features, head.in_features)


def is_partitioned(module: nn.Module) -> bool:
    """Whether DeepSpeed's ZeRO-3 has parameters of a module in parts; asked without its putting them together."""
    return any(hasattr(parameter, "ds_id") for parameter in module.parameters(recurse=False))


def refuse_pipeline(distributed_config: Any) -> None:
    """Refuse transformers' own pipeline, which knows the names of other models' parts only.

    Args:
        distributed_config: of `from_pretrained`: a dictionary or an object; None for none.

    Raises:
        ValueError: names the number of parts and the ways that there are.
    """
    values = distributed_config if isinstance(distributed_config, Mapping) else vars(distributed_config or object)
    if (parts := values.get("pp_size") or 1) > 1:
        raise ValueError(
            f"pp_size={parts} spreads blocks by the names of other models. Convert the checkpoint, after which it does "
            "so for this one (qwen1-checkpoint convert --to qwen2), or use torch.distributed.pipelining, as "
            "examples/pipeline.py does."
        )


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """What this process has of a tensor."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


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
