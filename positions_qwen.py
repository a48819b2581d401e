"""Where tokens stand: their positions, the text that each belongs to, which of them are padding.

Shapes: B batch, T tokens of this call, S tokens up to the end of it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache


def positions_of_call(
    position_ids: torch.Tensor | None,
    attention_mask: Any,
    cache: Any,
    inputs_embeds: torch.Tensor,
    arguments: dict[str, Any],
) -> torch.Tensor:
    """Positions of the tokens of a call, (B or 1, T): those given, else what mask, packing and cache say.

    Args:
        position_ids: given, or None.
        attention_mask: (B, S), a prepared one of any form, or None.
        cache: transformers' own or an engine's, or None.
        inputs_embeds: (B, T, E).
        arguments: of the call beside these; `cu_seq_lens_q` tells where packed texts start.

    Raises:
        ValueError: a mask or positions of other tokens than those of this call and those in the cache.
    """
    own_cache = cache if isinstance(cache, Cache) else None
    _check_lengths(attention_mask, position_ids, own_cache, inputs_embeds.shape[1])
    if position_ids is not None:
        return position_ids
    return _infer_positions(attention_mask, own_cache, inputs_embeds, arguments.get("cu_seq_lens_q"))


def positions_from_mask(attention_mask: torch.Tensor, length: int) -> torch.Tensor:
    """True positions of the last `length` tokens under a padding mask, (B, S) -> (B, length); padding gets 0."""
    positions = attention_mask.long().cumsum(-1) - 1  # (B, S)
    return positions.clamp(min=0)[:, -length:]


def _infer_positions(
    attention_mask: torch.Tensor | None, cache: Cache | None, inputs_embeds: torch.Tensor, starts: Any
) -> torch.Tensor:
    """Positions of the tokens of this call, (B or 1, T): from the padding mask, else from where packed texts start,
    else from the length of the cache.
    """
    rows, length = inputs_embeds.shape[:2]
    if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2:
        return positions_from_mask(attention_mask, length)
    if isinstance(starts, torch.Tensor) and cache is None:
        tokens = torch.arange(rows * length, device=starts.device)
        return (tokens - starts[torch.searchsorted(starts, tokens, right=True) - 1]).view(rows, length)
    past = cache.get_seq_length() if cache is not None else 0
    return (torch.arange(length, device=inputs_embeds.device) + past)[None]


def _check_lengths(attention_mask: Any, position_ids: torch.Tensor | None, cache: Cache | None, length: int) -> None:
    """Refuse a padding mask or positions that belong to other tokens than those of this call and those in the cache."""
    if position_ids is not None and (position_ids.ndim != 2 or position_ids.shape[-1] != length):
        raise ValueError(f"position_ids has the shape {tuple(position_ids.shape)}, which must be (B or 1, {length}).")
    past = cache.get_seq_length() if cache is not None else 0
    if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2 and isinstance(past, int):
        if attention_mask.shape[1] != past + length:
            raise ValueError(
                f"attention_mask covers {attention_mask.shape[1]} tokens, which must be the {past} of the cache and "
                f"the {length} of this call: give it {past + length} columns."
            )


def real_tokens(attention_mask: Any, length: int) -> torch.Tensor | None:
    """Which of the last `length` tokens are no padding, (B, T) bool; None where no mask tells of any."""
    if length == 1 or not isinstance(attention_mask, torch.Tensor) or attention_mask.ndim not in (2, 4):
        return None  # a token alone is a chunk of its own
    if attention_mask.ndim == 2:
        return attention_mask[:, -length:].bool()
    seen = attention_mask
    if seen.dtype != torch.bool:
        seen = seen > torch.finfo(seen.dtype).min / 2
    return seen[..., -length:].any(dim=(1, 2))  # a token that nobody attends to


def packed_starts(position_ids: torch.Tensor) -> torch.Tensor | None:
    """Where texts start with the rows laid end to end, (B, T) -> (N + 1,) int32; None where each row is one text."""
    restarts = torch.ones_like(position_ids, dtype=torch.bool)
    restarts[:, 1:] = position_ids.diff() != 1
    starts = restarts.flatten().nonzero().flatten()
    if len(starts) == len(position_ids):
        return None
    return nn.functional.pad(starts, (0, 1), value=position_ids.numel()).to(torch.int32)


def prompt_lengths(position_ids: torch.Tensor) -> torch.Tensor:
    """Length of the text that each token was prefilled with, (B, T) -> (B, T), from its position alone.

    Positions that count up by one form one text; left padding and documents packed into one row start new ones. A
    text that starts behind position 0 continues tokens that were read earlier: its prompt is what came before.
    """
    if position_ids.shape[-1] == 1:  # each step of decoding
        return position_ids.clamp(min=1)
    first, last = _text_bounds(position_ids)
    return torch.where(first == 0, last + 1, first)


def text_lengths(position_ids: torch.Tensor) -> torch.Tensor:
    """Length of the text of each token up to the end of this call, (B, T) -> (B, T); texts as in `prompt_lengths`."""
    return position_ids + 1 if position_ids.shape[-1] == 1 else _text_bounds(position_ids)[1] + 1


def _text_bounds(position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """First and last position of the text of each token, both (B, T)."""
    # Without a piece that is a token shorter, which would keep an exported program from reading two tokens.
    restarts = position_ids != position_ids.roll(1, -1) + 1
    text = restarts.cumsum(-1) - restarts[:, :1].long()  # (B, T) index of the text within its row
    first = torch.zeros_like(position_ids).scatter_reduce(-1, text, position_ids, "amin", include_self=False)
    last = torch.zeros_like(position_ids).scatter_reduce(-1, text, position_ids, "amax", include_self=False)
    return first.gather(-1, text), last.gather(-1, text)


def text_starts(lengths: torch.Tensor) -> torch.Tensor:
    """Where each of the texts laid end to end starts, (B,) -> (B + 1,) int32."""
    return nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
