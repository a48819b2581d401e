"""The NTK alpha where an engine keeps the keys: continuous batching of transformers, vLLM, SGLang.

Engines lay the new tokens of several texts end to end in one row. Shapes: N such tokens, R texts among them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers.utils import logging

from .arguments_qwen import engine_of

logger = logging.get_logger(__name__)

_SLOTS = {"cuda": 2**26}
_LEAST_SLOTS = 2**12
"""Slots that an alpha is remembered for at first, a byte each; a captured CUDA graph can't wait for more."""


def engine_alpha(
    position_ids: torch.Tensor,
    lengths: torch.Tensor,
    cache: Any,
    arguments: dict[str, Any],
    stretch: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Alpha of each token, (1, N) positions -> (1, N) float32.

    A paged cache of transformers tells which tokens belong to one text, so alpha is chosen when the text begins and
    found again from then on. Other engines tell positions only: alpha follows from them, as for a text whose prompt
    ends where this step begins, and changes where a reply passes an edge.

    Args:
        lengths: of the prompts, as far as positions tell them, (1, N).
        cache: of the engine, where it gives one.
        arguments: what the engine hands down to `forward`.
        stretch: gives the alpha that prompts of the given lengths ask for.
    """
    if "write_index" in arguments and cache is not None:
        return paged_alpha(position_ids, cache, arguments, stretch)
    if (engine := engine_of(arguments)) is not None:
        logger.warning_once(
            f"{engine} keeps the keys of this model and doesn't tell how long a prompt is, so use_dynamic_ntk follows "
            "the positions: a reply that passes seq_length, or twice, four times … of it, and a prompt beyond it that "
            "is read in chunks, lose quality. Use generate or chat for those."
        )
    return stretch(lengths)


def paged_alpha(
    position_ids: torch.Tensor, cache: Any, arguments: dict[str, Any], stretch: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Alpha of each token in a step of continuous batching, (1, N) positions -> (1, N) float32.

    A text gets its alpha with its first tokens; the cache remembers it in the slot of the first one, which stays the
    same as long as the text does.

    Args:
        cache: `PagedAttentionCache`, which gets the attribute `qwen_alpha`, a number for each of its slots.
        arguments: `cu_seq_lens_q` and `cu_seq_lens_k` (R + 1,), where the new tokens and the keys of each text start;
            `write_index`, `read_index` and `block_table`, the slots of the new tokens and of all keys, or the pages.
        stretch: as `engine_alpha`.
    """
    starts = arguments["cu_seq_lens_q"].long()  # (R + 1,)
    tokens = torch.arange(position_ids.shape[-1], device=position_ids.device)
    text = (torch.searchsorted(starts, tokens, right=True) - 1).clamp(max=len(starts) - 2)  # (N,)
    first = position_ids[0, starts[:-1].clamp(max=len(tokens) - 1)]  # (R,)
    chosen = stretch(first + starts.diff())
    held = _held_alpha(cache, arguments, chosen)
    alpha = torch.where(first == 0, chosen, held)[text]
    _warn_of_chunks(chosen, held, first, starts)
    if arguments.get("block_table") is None:  # with one, each text has been begun before
        (written, *_) = arguments["write_index"]
        _slots(cache, written).index_copy_(0, written.long(), _to_band(alpha[: written.numel()]))
    return alpha[None]


def _held_alpha(cache: Any, arguments: dict[str, Any], chosen: torch.Tensor) -> torch.Tensor:
    """What the slot of each text's first token remembers, (R,); anything where no text has been begun before."""
    keys, pages = arguments.get("read_index"), arguments.get("block_table")
    if pages is not None:
        return _remembered(cache, pages[0, :, 0].long() * _page_size(cache))
    if not keys or keys[0].numel() == 0:
        return chosen
    starts = arguments["cu_seq_lens_k"]
    starts = (next(iter(starts.values())) if isinstance(starts, dict) else starts).long()
    return _remembered(cache, keys[0][starts[:-1].clamp(max=keys[0].numel() - 1)].long().clamp(min=0))


def _page_size(cache: Any) -> int:
    """Slots of a page, which later releases tell for each group of layers."""
    groups = getattr(cache, "cache_allocators", None)
    return int(cache.block_size if groups is None else next(iter(groups.values())).tokens_per_page)


def _to_band(alpha: torch.Tensor) -> torch.Tensor:
    """An alpha, 2 ** (k + 1) - 1 or 1, as a byte."""
    return (alpha + 1).log2().round().to(torch.uint8)


def _remembered(cache: Any, index: torch.Tensor) -> torch.Tensor:
    """The alphas at slots of a paged cache, float32."""
    return 2.0 ** _slots(cache, index).index_select(0, index).float() - 1.0


def _slots(cache: Any, index: torch.Tensor) -> torch.Tensor:
    """What a paged cache remembers of alphas, as many bytes as the index needs."""
    slots: torch.Tensor | None = getattr(cache, "qwen_alpha", None)
    device = index.device
    if slots is None:
        size = _SLOTS.get(device.type, _LEAST_SLOTS)
        slots = cache.qwen_alpha = torch.ones(size, dtype=torch.uint8, device=device)
    captured = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    if not captured and index.numel() and (last := int(index.max())) >= len(slots):
        slots = cache.qwen_alpha = torch.cat([slots, slots.new_ones(last)])
    return slots


def _warn_of_chunks(chosen: torch.Tensor, held: torch.Tensor, first: torch.Tensor, starts: torch.Tensor) -> None:
    """Say so where a prompt read in chunks has grown past the stretch that its first chunk asked for."""
    if chosen.device.type == "cuda":  # a look at the values would stop the device, or a captured graph
        return
    if bool(((first > 0) & (starts.diff() > 1) & (chosen > held)).any()):
        logger.warning_once(
            "A prompt longer than seq_length was read in chunks by continuous batching, whose first chunk alone has "
            "chosen the NTK stretch, so it loses quality: raise max_batch_tokens in ContinuousBatchingConfig, or use "
            "generate."
        )
