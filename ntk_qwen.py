"""The NTK alpha of each sequence: chosen when a prompt is read, and kept by the cache for as long as its keys are.

Shapes: B batch, T tokens of this call.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers.cache_utils import Cache
from transformers.utils import logging

from .arguments_qwen import engine_of
from .engines_qwen import engine_alpha
from .positions_qwen import prompt_lengths

logger = logging.get_logger(__name__)

_NTK_BANDS = 32


def ntk_alpha(lengths: torch.Tensor, seq_length: int) -> torch.Tensor:
    """Stretch of the rotary base for prompts of the given lengths, float32 of the same shape.

    alpha = max(2 ** (ceil(log2(length / seq_length)) + 1) - 1, 1), counted in whole numbers so that a length exactly
    at a power of two can't fall on the wrong side. With seq_length 2048: 2048 -> 1, 2049 -> 3, 4096 -> 3, 4097 -> 7.

    Source: `what-users-hit.md`, "Long context, exactly".
    """
    bands = seq_length * 2 ** torch.arange(_NTK_BANDS, device=lengths.device)
    exceeded = (lengths[..., None] > bands).sum(-1)
    return 2.0 ** (exceeded + 1).float() - 1.0


def stretched_base(base: float, alpha: torch.Tensor, dim: int) -> torch.Tensor:
    """base * alpha^(R / (R - 2)), float32 of the shape of alpha; R rotated channels."""
    # The documents compute this in Python floats; only Apple's devices have no float64.
    exact = torch.float32 if alpha.device.type == "mps" else torch.float64
    return (base * alpha.to(exact) ** (dim / (dim - 2))).float()


def choose_alpha(position_ids: torch.Tensor, seq_length: int) -> torch.Tensor:
    """NTK alpha that prompts with these positions ask for, (B, T) -> (B, T)."""
    return ntk_alpha(prompt_lengths(position_ids), seq_length)


def alpha_of_call(
    model: Any,
    given: torch.Tensor | None,
    position_ids: torch.Tensor,
    cache: Any,
    inputs_embeds: torch.Tensor,
    arguments: dict[str, Any],
) -> torch.Tensor | None:
    """Alpha of each sequence or token of a call, (B or 1, 1 or T) float32; None where nothing is stretched.

    Args:
        model: a `QWenModel`.
        given: what the caller chose, (B, 1) or (1, 1), or None.
        position_ids, inputs_embeds: of the call.
        cache: of the call, transformers' own or an engine's, or None.
        arguments: what an engine hands down to `forward`.

    Raises:
        ValueError: an alpha where nothing is stretched, or of another shape; other rows than the cache holds.
    """
    rows, seq_length = inputs_embeds.shape[0], model.config.seq_length
    if model.training or not model.config.use_dynamic_ntk:
        if given is not None:
            raise ValueError(
                "ntk_alpha is given, but nothing is stretched in training or with use_dynamic_ntk=False: leave it "
                "out, or call model.eval() and set use_dynamic_ntk=True."
            )
        return None
    if given is not None:
        alpha = _given_alpha(rows, cache, given)
    elif isinstance(cache, Cache):
        alpha = resolve_ntk_alpha(
            cache, rows, lambda: choose_alpha(position_ids, seq_length).amax(-1, keepdim=True), model.program_alpha
        )
    elif cache is not None or engine_of(arguments) is not None:
        lengths = prompt_lengths(position_ids)
        alpha = engine_alpha(position_ids, lengths, cache, arguments, partial(ntk_alpha, seq_length=seq_length))
    else:
        alpha = choose_alpha(position_ids, seq_length)
    return alpha.to(position_ids.device)


def _given_alpha(rows: int, cache: Any, given: torch.Tensor) -> torch.Tensor:
    shape = tuple(getattr(given, "shape", ()))
    if shape not in ((rows, 1), (1, 1)):
        raise ValueError(f"ntk_alpha must be a tensor of shape ({rows}, 1), not {shape or given}.")
    # A compiled graph is given it at each step, and leaves the cache alone; what a program returns carries it.
    if isinstance(cache, Cache) and (not torch.compiler.is_compiling() or is_exporting()):
        give_ntk_alpha(cache, given, rows)
    return given.expand(rows, -1)


class NTKState:
    """The alpha that each sequence of one cache was prefilled with.

    Keys are stored rotated, so alpha is fixed with the first of them and stays until the cache is empty again.

    Args:
        alpha: (B, 1) float32.
        planned: set ahead by `generate`, for first tokens among which there are drafts behind the prompt.

    Attributes:
        given: the tensor that the caller gave, where it did.
    """

    # Beside `vars(state)`, of whose tensors exporters make inputs of a program.
    __slots__ = ("__dict__", "given", "planned")

    def __init__(self, alpha: torch.Tensor, planned: bool = False):
        self.alpha = alpha
        self.given: torch.Tensor | None = None
        self.planned = planned


class NTKRows(Cache):
    """Mixin of caches whose sequences keep their alpha when rows are rearranged, repeated or picked by hand."""

    def _rearrange(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        state: NTKState | None = getattr(self, "qwen_ntk", None)
        if state is not None and state.alpha.shape[0] > 1:
            state.alpha = change(state.alpha)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Rearrange the rows for beam search, (B,) indices."""
        super().reorder_cache(beam_idx)
        self._rearrange(lambda alpha: alpha[beam_idx.to(alpha.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row `repeats` times."""
        super().batch_repeat_interleave(repeats)
        self._rearrange(lambda alpha: alpha.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows that `indices` names."""
        super().batch_select_indices(indices)
        self._rearrange(lambda alpha: alpha[indices.to(alpha.device)])


def set_ntk_alpha(cache: Cache, alpha: torch.Tensor, planned: bool = False) -> NTKState:
    """Fix the alpha of the sequences in a cache, (B, 1); a copy of it is kept. Arguments as those of `NTKState`."""
    state = NTKState(alpha.clone(), planned)
    cache.qwen_ntk = state  # type: ignore[attr-defined]
    if cache.is_compileable and not torch.compiler.is_compiling():
        torch._dynamo.mark_static_address(state.alpha)  # as the keys and values of a static cache are
    return state


def give_ntk_alpha(cache: Cache, given: torch.Tensor, rows: int) -> None:
    """Fix the alpha that the caller chose, (B, 1) or (1, 1), for `rows` sequences.

    The same tensor at each step, as `generate` gives it, is copied once.
    """
    state: NTKState | None = getattr(cache, "qwen_ntk", None)
    if state is None or getattr(state, "given", None) is not given:
        set_ntk_alpha(cache, given.expand(rows, -1)).given = given


def held_ntk_alpha(cache: Cache | None) -> torch.Tensor | None:
    """The alpha that the keys in a cache were rotated with, (B, 1) float32; None where there is none, or none known."""
    state: NTKState | None = getattr(cache, "qwen_ntk", None)
    return None if cache is None or state is None or int(cache.get_seq_length()) == 0 else state.alpha


def resolve_ntk_alpha(
    cache: Cache, rows: int, choose: Callable[[], torch.Tensor], program_alpha: torch.Tensor
) -> torch.Tensor:
    """Alpha of this call for the sequences in `cache`: the one they hold, else a new one, which they hold from now on.

    Args:
        cache: any transformers cache, before the keys of this call are added to it.
        rows: batch size B of this call.
        choose: gives what the tokens of this call alone ask for, (B, 1) or (1, 1); called only where it is needed.
        program_alpha: buffer in which a program keeps it that is exported together with its cache, (1, 1).

    Returns:
        (B, 1) float32.

    Raises:
        ValueError: the batch has other rows than the cache was prefilled with.
    """
    state: NTKState | None = getattr(cache, "qwen_ntk", None)
    length = cache.get_seq_length()
    if is_exporting() and isinstance(length, torch.Tensor) and not _is_program_input(state):
        return _keep_in_program(choose(), length, program_alpha).expand(rows, -1)
    if state is None:
        if is_exporting() and not (isinstance(length, int) and length == 0):
            _warn_of_unknown_alpha()
        return set_ntk_alpha(cache, choose().expand(rows, -1)).alpha
    if getattr(state, "planned", False):
        state.planned = False
    elif isinstance(length, torch.Tensor):
        # A static cache counts on the device. Written in place, so that a captured CUDA graph finds it again.
        chosen = choose()
        state.alpha.copy_(torch.where(length.to(chosen.device) > 0, state.alpha, chosen))
    elif length == 0:
        state.alpha = choose().expand(rows, -1)
    return _match_rows(state.alpha, rows)


def is_exporting() -> bool:
    """Whether a program is being exported, which before torch 2.12 a graph is told that is only compiled.

    There a program of `torch.export.export(strict=True)` counts as compiled, for nothing tells the two apart.
    """
    told_wrong = torch.__version__ < "2.12" and torch.compiler.is_dynamo_compiling()
    return torch.compiler.is_exporting() and not told_wrong


def _is_program_input(state: NTKState | None) -> bool:
    """Whether the program that is being exported gets this alpha, with its cache. One that was left in a cache inside
    the program, by a call before, is a plain tensor, and would be a constant of it."""
    return state is not None and type(state.alpha) is not torch.Tensor


def _keep_in_program(chosen: torch.Tensor, length: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Alpha in a program that holds its static cache, (1, 1): the first tokens choose it, a buffer keeps it."""
    if len(chosen) > 1:  # a buffer doesn't know how many there will be
        _warn_of_unknown_alpha()
        return chosen
    alpha = torch.where(length.to(chosen.device) > 0, kept.to(chosen), chosen)
    kept.copy_(alpha)
    return alpha


@torch.compiler.assume_constant_result  # so that it is run while a program is traced, and is no part of it
def _warn_of_unknown_alpha() -> bool:
    logger.warning(
        "This program continues a cache that doesn't tell the NTK alpha its keys were rotated by, so alpha follows the "
        "positions: wrong for a prompt beyond seq_length, and for a reply that passes it. Export with `ntk_alpha`, "
        "(B, 1), among the inputs, and give each step of a text what `model.transformer.choose_alpha` says of its "
        "prompt."
    )
    return True


def _match_rows(alpha: torch.Tensor, rows: int) -> torch.Tensor:
    held = alpha.shape[0]
    if held == rows:
        return alpha
    if held == 1 or bool((alpha == alpha[0]).all()):  # whichever rows these are, they have the same
        return alpha[:1].expand(rows, -1)
    raise ValueError(
        f"The cache holds the NTK alpha of {held} sequences, the batch has {rows}. Rows of this cache can't be picked "
        "or repeated while use_dynamic_ntk is on: use the model's own (QWenCache), or prefill these sequences again."
    )
