"""What is kept of a conversation between two turns, so that a turn reads only what is new."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache

from .cache_qwen import QWenCache, QWenGroupedInt8Cache, continues
from .fingerprint_qwen import fingerprint
from .ntk_qwen import NTKState, set_ntk_alpha
from .shards_qwen import agreed

KEPT = (QWenCache, QWenGroupedInt8Cache)
"""Caches in which a token is held in the same way whatever was read together with it."""


def cache_of_turn(model: Any, kept: KeptCache | None, prompt: Sequence[int], empty: Any) -> Cache | None:
    """The cache that a turn begins with, a branch of what is kept or an empty one; None where it couldn't be kept.

    It carries the fingerprint that the model has now, so weights that change while the turn is written end it too.

    Args:
        model: a `QWenLMHeadModel`.
        kept: of the turn before, or None.
        prompt: token ids of the whole prompt.
        empty: a new cache of the kind that this turn asks for, one of `KEPT`.
    """
    made_by = agreed(model, fingerprint(model))
    if made_by is None:
        return None
    branch = None if kept is None or not kept.is_held_as(empty) else kept.branch(model, made_by, prompt)
    cache: Cache = empty if branch is None else branch
    cache.made_by = made_by  # type: ignore[attr-defined]
    return cache


class KeptCache:
    """Keys and values of a conversation between two turns. What is kept never changes: a turn goes on with a branch.

    Args:
        model: which made it, a `QWenLMHeadModel`; remembered, but not kept alive.
        ids: token ids of the conversation, at least as many as the cache has tokens.
        cache: of one sequence, from `cache_of_turn`, which nobody uses from now on.
    """

    def __init__(self, model: Any, ids: Sequence[int], cache: Cache):
        self._model = weakref.ref(model)
        self._ids = list(ids[: cache.get_seq_length()])
        self._cache = cache

    def branch(self, model: Any, made_by: bytes, prompt: Sequence[int]) -> Cache | None:
        """A cache with as much of the beginning of a prompt as is kept, or None where nothing of it can be used.

        At least the last token of the prompt is left to be read. Nothing is used if anything of the model has changed,
        or if the prompt is as long as to ask for another stretch of the rotary base than the keys have.

        Args:
            model: that is to go on.
            made_by: its fingerprint.
            prompt: token ids of the whole prompt.
        """
        if self._model() is not model or self._cache.made_by != made_by:  # type: ignore[attr-defined]
            return None
        length = _common_length(self._ids, prompt[:-1])
        if not length or not self._has_alpha_of(model, len(prompt)) or not self._is_rotated_as(model, len(prompt)):
            return None
        branch = copy.copy(self._cache)
        branch.layers = [copy.copy(layer) for layer in branch.layers]
        if length < len(self._ids):
            branch.crop(length - len(self._ids))
        if (state := getattr(branch, "qwen_ntk", None)) is not None:
            set_ntk_alpha(branch, state.alpha)
        return branch

    def is_held_as(self, wanted: Cache) -> bool:
        """Whether keys and values are in the form of another cache: a turn may ask for fewer bits than the last."""
        return continues(self._cache, wanted)

    def _is_rotated_as(self, model: Any, length: int) -> bool:
        """Whether "dynamic" scaling, which goes by the length that a text had when a key was made, hasn't begun."""
        scaling = model.transformer.rotary_emb.scaling
        return scaling.kind != "dynamic" or max(length, len(self._ids)) <= scaling.length

    def _has_alpha_of(self, model: Any, length: int) -> bool:
        state: NTKState | None = getattr(self._cache, "qwen_ntk", None)
        if state is None or not model.config.use_dynamic_ntk:
            return state is None and not model.config.use_dynamic_ntk
        asked = model.transformer.choose_alpha(torch.arange(length)[None]).amax()
        return bool((state.alpha.cpu() == asked).all())


def _common_length(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens at the beginning are the same."""
    pairs = zip(first, second, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))
