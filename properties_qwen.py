"""A property that is computed once and kept, also where its object is pickled or its process forks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

Value = TypeVar("Value")


class kept(Generic[Value]):
    """`functools.cached_property` without its lock (up to Python 3.11), which outlives neither dill nor a fork."""

    def __init__(self, function: Callable[[Any], Value]):
        self.function = function
        self.__doc__ = function.__doc__

    def __get__(self, instance: Any, owner: type | None = None) -> Value:
        value = self.function(instance)
        vars(instance)[self.function.__name__] = value
        return value
