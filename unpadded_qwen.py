"""Through all blocks: a few tokens by the kernels of `steps_qwen`, a padded prompt on a CPU without its padding.

Shapes: B batch, T tokens, N tokens that aren't padding, E width, K key/value heads, D head size.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.cache_utils import Cache

from .arguments_qwen import cache_argument, one_cache
from .cache_qwen import QWenCache, QWenGrowingLayer
from .plain_qwen import Plain, asks_for_sdpa
from .products_qwen import FEW, kernels_for_any
from .steps_qwen import BLOCK_ARGUMENTS, given, steps_of_blocks

_LEAST_SHARE = 1 / 16
"""Of padding in a prompt, from which on leaving it out saves more than the moving of numbers costs."""

_COMPUTING = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.w1", "mlp.w2", "mlp.act_fn", "mlp.c_proj")
"""What a block with our attention and MLP is made of; dropouts do nothing here."""

_MOST_TOKENS = 8192
"""Laid end to end, their mask takes 64 MB."""


def through_blocks(
    blocks: nn.ModuleList, plain: Plain, states: torch.Tensor, arguments: dict[str, Any]
) -> torch.Tensor:
    """What blocks, one after another, make of hidden states, (B, T, E) -> (B, T, E); zeros where padding was left out.

    Args:
        plain: of the classes of block, attention, MLP and norm.
        arguments: keyword arguments of each block; with `padding_is_read` no padding is left out.
    """
    whole = arguments.get("padding_is_read")
    arguments = {name: value for name, value in arguments.items() if name != "padding_is_read"}
    stepped = steps_of_blocks(blocks, plain, states, arguments)
    if stepped is not None:
        return stepped
    texts = None if whole else _texts(blocks, plain, states, arguments)
    if texts is None:
        for block in blocks:
            states = block(states, **arguments)
        return states
    some, few = texts.gathered(states), texts.arguments(arguments)
    for block in blocks:
        some = block(some, **few)
    return texts.scattered(some[0])


class _Texts(NamedTuple):
    """Rows without their padding, laid end to end.

    Attributes:
        places: (N,), in B rows of T tokens.
        rows, tokens: B and T.
    """

    places: torch.Tensor
    rows: int
    tokens: int

    def gathered(self, numbers: torch.Tensor) -> torch.Tensor:
        """(B or 1, T, ...) -> (1, N, ...)."""
        return numbers.expand(self.rows, *numbers.shape[1:]).flatten(0, 1)[self.places][None]

    def scattered(self, numbers: torch.Tensor) -> torch.Tensor:
        """(N, ...) -> (B, T, ...)."""
        room = numbers.new_zeros((self.rows * self.tokens, *numbers.shape[1:]))
        room[self.places] = numbers
        return room.unflatten(0, (self.rows, self.tokens))

    def arguments(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Of a block, for a row in which a text sees nothing of the others."""
        text = self.places // self.tokens
        cache = one_cache(arguments.get("past_key_values"), arguments.get("cache"))
        embeddings = [None if part is None else self.gathered(part) for part in arguments["position_embeddings"]]
        return arguments | dict(
            attention_mask=(text[:, None] == text).tril()[None, None],
            position_ids=self.gathered(arguments["position_ids"]),
            position_embeddings=embeddings,
            **cache_argument(None if cache is None else _Apart(cache, self)),
        )


class _Apart(Cache):
    """Brings keys and values of texts that are laid end to end into the rows of an empty cache."""

    def __init__(self, cache: Cache, texts: _Texts):
        self._cache, self._texts = cache, texts

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(1, K, N, D) -> the same, which is all that there is to see."""
        keys, values = (self._texts.scattered(part[0].transpose(0, 1)) for part in (key_states, value_states))
        self._cache.update(keys.transpose(1, 2), values.transpose(1, 2), layer_idx)
        return key_states, value_states


def _texts(blocks: nn.ModuleList, plain: Plain, states: torch.Tensor, arguments: dict[str, Any]) -> _Texts | None:
    """The texts of a padded prompt, where the kernels read one that is laid end to end; None for any other call."""
    mask = arguments.get("attention_mask")
    rows, tokens = states.shape[:2]
    if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool or mask.shape != (rows, 1, tokens, tokens):
        return None
    if rows < 2 or kernels_for_any(states) is None or not given(arguments) <= BLOCK_ARGUMENTS:
        return None
    if not _is_empty(one_cache(arguments.get("past_key_values"), arguments.get("cache"))):
        return None
    real = mask[:, 0, -1]  # tokens that the last one sees
    count = int(real.sum())
    # Padding behind a text sees the text, and somebody may go on from there.
    if not real[:, -1].all() or not FEW < count <= min(_MOST_TOKENS, (1 - _LEAST_SHARE) * rows * tokens):
        return None
    if not all(_is_plain(block, plain) for block in blocks):
        return None
    # Of texts that are packed into a row the last token sees one; and a mask of the caller's own may be any other.
    expected = (real[:, :, None] & real[:, None, :]).tril()
    if not torch.equal(mask[:, 0], expected):
        return None
    return _Texts(real.flatten().nonzero().flatten(), rows, tokens)


def _is_plain(block: Any, plain: Plain) -> bool:
    """Whether a block computes nothing else, and no hook or class of somebody's own counts on rows."""
    if not plain(block) or not plain(block.attn, block.mlp):  # first: another class may have nothing of what follows
        return False
    return asks_for_sdpa(block.attn.config) and all(plain(block.get_submodule(name)) for name in _COMPUTING)


def _is_empty(cache: Any) -> bool:
    """Whether a cache is none, or a growing one of ours in which there is nothing yet."""
    if cache is None:
        return True
    if type(cache) is not QWenCache or cache.offloading:
        return False
    return all(type(layer) is QWenGrowingLayer for layer in cache.layers) and cache.get_seq_length() == 0
