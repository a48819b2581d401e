"""The library of kernels for a CPU, made of the texts beside; where there is none, everything runs through torch."""

from __future__ import annotations

import ctypes

from .native_gradients_qwen import GRADIENTS
from .native_many_qwen import MANY
from .native_products_qwen import PRODUCTS
from .native_prompt_qwen import PROMPT
from .native_steps_qwen import STEPS
from .native_vectors_qwen import VECTORS
from .translating_qwen import Source, library_of, wait_for

KERNELS = Source(
    "native",
    "QWen's kernels",
    VECTORS + PRODUCTS + MANY + STEPS + PROMPT + GRADIENTS,
    ("-fno-math-errno", "-fopenmp"),
)


def library() -> ctypes.CDLL | None:
    """The library, or None where there is none or none yet. The first call begins to make it."""
    return library_of(KERNELS)


def wait() -> ctypes.CDLL | None:
    """As `library`, once it is known whether there is one."""
    return wait_for(KERNELS)
