"""The loss of the language model head, without the logits of all tokens at once.

Shapes: B batch, T tokens of a row, N tokens that count in the loss, E width of the residual stream, V vocabulary.

torch's own `linear_cross_entropy` does the same in float32; in bfloat16 it adds up the loss itself in bfloat16
(12.19 for 12.14), and takes twice as long as the plain loss on a CPU (torch 2.13).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn

from .plain_qwen import is_bare
from .shards_qwen import gathers_its_weight, is_partitioned

_PIECE = 256  # tokens whose logits are held at once, in the dtype of the head
_BLOCK = 16  # tokens whose logits are held in float32
_SLICE = 2**13  # rows of the head whose gradient is added up together


def holds_its_weight(head: nn.Module) -> bool:
    """Whether a head is a plain matrix at hand: without an adapter or a hook, not in few bits, not in shards."""
    if not is_bare(head, nn.Linear) or head.bias is not None or hasattr(head, "_hf_hook"):
        return False
    return type(head.weight) is nn.Parameter and head.weight.shape == (head.out_features, head.in_features)


def gives_its_weight(head: nn.Module) -> bool:
    """Whether the loss can be computed with the weight of a head: it holds it, or FSDP2 puts it together for a call.

    ZeRO-3 would, as soon as one looks at the weight, but loses count of its parameters when a step doesn't call the
    modules of the step before, as an evaluation does; and it goes through the output by its keys, which reads logits.
    """
    return not is_partitioned(head) and (holds_its_weight(head) or gathers_its_weight(head))


def loss_of_head(head: nn.Linear, states: torch.Tensor, labels: torch.Tensor, **arguments: Any) -> torch.Tensor:
    """`head_loss` with the weight of a head that `gives_its_weight`."""
    if holds_its_weight(head):
        return head_loss(states, head.weight, labels, **arguments)
    return head(_LossInput(states, partial(head_loss, labels=labels, **arguments)))


def logits_behind_loss(head: nn.Linear, states: torch.Tensor) -> torch.Tensor:
    """The logits of a head that `gives_its_weight`, (B, T, E) -> (B, T, V), when the loss has been computed.

    A second call would be the end of what FSDP2 has in one group with the head, in the middle of the backward pass; so
    a weight that it keeps together is used without a call.
    """
    if type(head) is nn.Linear or type(head.weight) is not nn.Parameter:
        return head(states)
    return nn.functional.linear(states.to(head.weight.dtype), head.weight)


@dataclass(eq=False)
class _LossInput:
    """Given to a head in the place of states, it makes the call return the loss in the place of logits.

    FSDP2 puts the weight together before a call and sends its gradient away after it, for which it has to see the
    states: this is a node of torch's trees.
    """

    states: torch.Tensor
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

    @classmethod
    def __torch_function__(cls, function: Callable, types: Any, args: tuple = (), kwargs: Any = None) -> torch.Tensor:
        given, weight, _ = args  # of the linear layer's only product
        return given.loss(given.states, weight)


pytree.register_pytree_node(
    _LossInput,
    lambda given: ([given.states], given.loss),
    lambda children, loss: _LossInput(next(iter(children)), loss),
    serialized_type_name="qwen.LossInput",
)


def head_loss(
    states: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """Cross entropy of each next token, the mean over those that count, float32; as transformers' `ForCausalLMLoss`.

    The gradients are computed in the forward pass, together with the loss; a second backward pass through the same
    loss is an error of torch's, a second derivative one of ours. Tokens that don't count cost nothing.

    Args:
        states: (B, T, E), of the last layer.
        weight: of the head, (V, E).
        labels: (B, T), shifted here.
        num_items_in_batch: divide the sum by this instead, under gradient accumulation.
        ignore_index: label of tokens that are left out.
        shift_labels: (B, T), labels that have been shifted already, in place of `labels`.
    """
    if shift_labels is None:
        shift_labels = nn.functional.pad(labels[:, 1:], (0, 1), value=ignore_index)
    shift_labels = shift_labels.to(states.device)
    counted = shift_labels != ignore_index
    device = states.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        states, weight = states.to(dtype), weight.to(dtype)
    count = counted.sum() if num_items_in_batch is None else num_items_in_batch
    with torch.autocast(device, enabled=False):
        return _HeadLoss.apply(states[counted], weight, shift_labels[counted], count)


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, states: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, count: torch.Tensor | int
    ) -> torch.Tensor:
        """Sum of the cross entropies divided by `count`; states (N, E), weight (V, E), labels (N,)."""
        of_states, of_weight = ctx.needs_input_grad[:2]
        total = torch.zeros((), device=states.device)
        states_grad = torch.empty_like(states) if of_states else None
        # Added up over the pieces in float32: in half precision each piece would be rounded once more.
        weight_sums = (
            [torch.zeros_like(some, dtype=torch.float32) for some in weight.split(_SLICE)] if of_weight else []
        )
        for start in range(0, len(states), _PIECE):
            piece = slice(start, start + _PIECE)
            logits = states[piece] @ weight.t()
            total += _cross_entropy(logits, labels[piece], of_states or of_weight)
            if states_grad is not None:
                torch.mm(logits, weight, out=states_grad[piece])
            _add_products(weight_sums, logits, states[piece])
            del logits  # before the next are made
        ctx.save_for_backward(states_grad, _joined(weight_sums, weight) if of_weight else None)
        ctx.count = count
        return total / count

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of states and weight, scaled by that of the loss.

        Raises:
            RuntimeError: they are to be differentiated again, and would pass for constants.
        """
        if torch.is_grad_enabled():  # create_graph=True
            raise RuntimeError(
                "The loss of a training step without logits is differentiated once, not with create_graph=True: call "
                "the model with skip_logits=False."
            )
        # Not before: in float16 what is divided by the count would vanish before a gradient scaler has enlarged it.
        scale = grad_outputs[0] / ctx.count
        gradients = (None if grad is None else grad.mul_(scale) for grad in ctx.saved_tensors)
        return *gradients, None, None


def _cross_entropy(logits: torch.Tensor, labels: torch.Tensor, differentiated: bool) -> torch.Tensor:
    """Sum of the cross entropies, float32; the logits, (n, V), are replaced by their gradient."""
    total = torch.zeros((), device=logits.device)
    for block, wanted in zip(logits.split(_BLOCK), labels.split(_BLOCK), strict=True):
        logs = block.log_softmax(-1, dtype=torch.float32)
        total -= logs.gather(-1, wanted[:, None]).sum()
        if differentiated:
            gradient = logs.exp_()
            gradient.scatter_add_(-1, wanted[:, None], gradient.new_full((len(wanted), 1), -1.0))
            block.copy_(gradient)
    return total


def _add_products(totals: list[torch.Tensor], left: torch.Tensor, right: torch.Tensor) -> None:
    """Add left.T @ right, (n, V) and (n, E), to its float32 sum in slices, a list that may be empty."""
    for total, columns in zip(totals, left.split(_SLICE, dim=-1), strict=False):
        if right.dtype == torch.float32:
            total.addmm_(columns.t(), right)
        else:
            total += columns.t() @ right


def _joined(parts: list[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
    """The parts one below the other in the dtype of `like`; each is given up as soon as it is copied."""
    whole = torch.empty_like(like)
    start = 0
    while parts:
        part = parts.pop(0)
        whole[start : start + len(part)] = part
        start += len(part)
    return whole
