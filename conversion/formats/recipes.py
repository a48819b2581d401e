"""Recipes, each a pure function from the tensors that it names to one new tensor; a way between formats is a list."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Recipe:
    """How one tensor comes about: `build` of the tensors called `sources`."""

    name: str
    sources: tuple[str, ...]
    build: Callable[..., torch.Tensor]


def convert_tensors(recipes: Sequence[Recipe], tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Follow all recipes at once."""
    return {recipe.name: recipe.build(*(tensors[source] for source in recipe.sources)) for recipe in recipes}


def compose(first: Sequence[Recipe], second: Sequence[Recipe]) -> list[Recipe]:
    """Recipes that lead from the sources of `first` to the results of `second`."""
    by_name = {recipe.name: recipe for recipe in first}
    return [_composed(recipe, [by_name[source] for source in recipe.sources]) for recipe in second]


def _composed(recipe: Recipe, parts: Sequence[Recipe]) -> Recipe:
    def build(*tensors: torch.Tensor) -> torch.Tensor:
        rest = iter(tensors)
        return recipe.build(*(part.build(*(next(rest) for _ in part.sources)) for part in parts))

    return Recipe(recipe.name, tuple(source for part in parts for source in part.sources), build)


def keep(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself."""
    return tensor


def concatenate(*tensors: torch.Tensor, dim: int = 0) -> torch.Tensor:
    """Tensors laid end to end along a dimension."""
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim=dim)


def take_rows(tensor: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """Rows `start` … `stop - 1`."""
    return tensor[start:stop]


def halves_from_pairs(tensor: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Reorder the rows of a query or key projection from adjacent rotated pairs to two halves of each head.

    Row 2 i of a head becomes row i, row 2 i + 1 becomes row i + D / 2; (H * D, ...) -> (H * D, ...).
    """
    return tensor.view(-1, head_dim // 2, 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
