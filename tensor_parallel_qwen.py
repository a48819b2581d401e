"""Tensor parallel: attention heads, and with them keys and values, shared among processes.

`c_attn` is queries, keys and values one below the other, and each process needs its share of all three. Transformers'
own styles cut a matrix into equal contiguous parts, or into two such parts, so there is one of ours, `HEADS_STYLE`:

- As many key/value heads as heads, as in all published models: each process has three parts of weight and bias, and
  nothing is exchanged.
- Fewer key/value heads; or FSDP2 beside it, whose shards of three parts torch (2.13) puts together in a wrong order; or
  a transformers that can't cut so (5.4, whose shards are plain tensors): each process has an equal contiguous part, and
  what the processes compute is exchanged, numbers as many as one product of `c_attn`.

Shapes: B batch, T tokens, W rows of `c_attn`, H heads, K key/value heads, P processes.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn

from .parallel_qwen import HEADS_STYLE

try:
    from transformers.distributed import tensor_parallel as styles
except ImportError:  # where they were in 5.4
    from transformers.integrations import tensor_parallel as styles  # type: ignore[no-redef]

ON_DTENSORS = hasattr(styles.TensorParallelLayer, "install_forward")
"""Whether shards are DTensors in the transformers installed."""


def check_heads(heads: tuple[int, int, int], processes: int) -> None:
    """Refuse numbers of heads that processes can't share equally.

    Args:
        heads: H, K, K.

    Raises:
        ValueError: names the numbers, and those of processes that would do.
    """
    if not any(count % processes for count in heads):
        return
    fitting = [str(count) for count in range(1, min(heads) + 1) if not any(of_part % count for of_part in heads)]
    raise ValueError(
        f"num_attention_heads={heads[0]} and num_key_value_heads={heads[1]} can't be shared equally by "
        f"tp_size={processes} processes: start {' or '.join(fitting)}."
    )


def shares_of_process(projection: Any, *sizes: int) -> tuple[int, ...]:
    """What this process has of numbers that are divided as the heads of a `c_attn` are: heads, or widths of parts."""
    processes = getattr(projection, "processes", 1)
    return tuple(size // processes for size in sizes)


def heads_of_process(packed: torch.Tensor, heads: tuple[int, int, int], process: int, processes: int) -> torch.Tensor:
    """Queries, keys and values of one process out of those of all, (B, T, W) -> (B, T, W / P)."""
    size = packed.shape[-1] // sum(heads)
    parts = packed.split([count * size for count in heads], dim=-1)
    return torch.cat([part.chunk(processes, dim=-1)[process] for part in parts], dim=-1)


def _share_heads(projection: Any, processes: int) -> None:
    check_heads(projection.heads, processes)
    projection.processes = processes


if ON_DTENSORS and torch.distributed.is_available():
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    class HeadsParallel(styles.TensorParallelLayer):
        """`HEADS_STYLE` of a `c_attn`, with DTensors in the place of weight and bias."""

        def should_use_local_tensors(self, module: Any) -> bool:
            """Always: products of DTensors know no three parts."""
            return True

        def shard_param(self, module: Any, param: str, mesh: Any) -> None:
            """Put a DTensor in the place of a parameter that has no values yet.

            Raises:
                ValueError: heads that can't be shared, or weights in few bits.
            """
            _share_heads(module, mesh.size())
            whole = getattr(module, param, None)
            if whole is None:
                return
            if param not in ("weight", "bias"):
                raise ValueError(
                    f"{param!r} of c_attn, in few bits, can't be shared among processes by its heads: load weights "
                    "that are not quantised, or convert the checkpoint to Qwen2 and serve that."
                )
            placements = [Shard(0)]
            module.in_three_parts = len(set(module.heads)) == 1 and mesh.size() == torch.distributed.get_world_size()
            if module.in_three_parts:
                if param == "weight":
                    return styles.PackedColwiseParallel(split_factor=3).shard_param(module, param, mesh)
                placements = module.weight.placements
            shard = distribute_tensor(whole, mesh, placements, src_data_rank=None)
            setattr(module, param, nn.Parameter(shard, requires_grad=whole.requires_grad))

        def transform_inputs_pre_forward(self, module: Any, args: Any, kwargs: Any, mesh: Any) -> Any:
            """The same states for all, whose gradients are added up."""
            states, *others = args
            if torch.is_grad_enabled():
                states = DTensor.from_local(states, mesh, [Replicate()], run_check=False)
                states = states.to_local(grad_placements=[Partial()])
            return (states, *others), kwargs

        def transform_output_post_forward(self, module: Any, output: torch.Tensor, mesh: Any) -> torch.Tensor:
            """What the rows here give, (B, T, W / P) -> the heads of this process, (B, T, W / P)."""
            if module.in_three_parts:
                return output
            shard = DTensor.from_local(output, mesh, [Shard(-1)], run_check=False)
            # Each process has the gradients of its own heads.
            packed = shard.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])
            return heads_of_process(packed, module.heads, mesh.get_local_rank(), mesh.size())

    styles.ALL_PARALLEL_STYLES.register(HEADS_STYLE, HeadsParallel())  # type: ignore[arg-type]

elif not ON_DTENSORS:

    class HeadsParallel(styles.ColwiseParallel):  # type: ignore[no-redef]
        """`HEADS_STYLE` of a `c_attn`, with a contiguous part of weight and bias."""

        def prepare_module_tp(self, module: Any, device_mesh: Any, config: Any, **kwargs: Any) -> Any:
            """Exchange what the projection gives.

            Raises:
                ValueError: heads, a vocabulary or an MLP that can't be shared.
            """
            _share_heads(module, device_mesh.size())
            _check_sizes(config, device_mesh.size())
            return styles.distribute_module(module, device_mesh, _same_states, _exchanged)

    def _check_sizes(config: Any, processes: int) -> None:
        for name, size in (("vocabulary", config.embedding_rows), ("ffn_hidden_size / 2", config.ffn_hidden_size // 2)):
            if size % processes:
                raise ValueError(
                    f"{name}={size} can't be shared equally by tp_size={processes} processes, as transformers "
                    f"{transformers.__version__} has to: start another number, or install 5.24."
                )

    def _same_states(module: Any, inputs: Any, mesh: Any) -> torch.Tensor:
        return styles.all_reduce_backward(inputs[0], mesh)

    def _exchanged(module: Any, output: torch.Tensor, mesh: Any) -> torch.Tensor:
        packed = styles.all_reduce_backward(styles.all_gather(output, mesh), mesh)
        return heads_of_process(packed, module.heads, mesh.get_local_rank(), mesh.size())

    styles.ALL_PARALLEL_STYLES.register(HEADS_STYLE, HeadsParallel())  # type: ignore[arg-type]
    for _plan_of in (
        styles.ParallelInterface.register_plan_to_weight_dim,  # type: ignore[attr-defined]
        styles.ParallelInterface.register_plan_to_bias_dim,  # type: ignore[attr-defined]
    ):
        _plan_of(HEADS_STYLE, 0)


def complete_plan(model: Any) -> None:
    """Give a model its whole plan where shards are plain tensors: there transformers forgets that of the class itself,
    and when it saves looks for names with a star in the place of each digit (`w1`).
    """
    if ON_DTENSORS:
        return
    plan = model.tp_plan
    plan.update(vars(type(model)).get("_tp_plan") or {})
    plan.update({f"{name[:-1]}*": style for name, style in plan.items() if name[-1:].isdigit()})
