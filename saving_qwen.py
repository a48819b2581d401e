"""Saving an object as one of the class that was published, whatever has been made of its class since.

`save_pretrained` copies the file that an object's class is defined in and names that class in `auto_map` and
`architectures`. FSDP2 replaces the class by one of torch's making, and programs derive classes of their own: files that
know nothing of this model, or are on no other machine, would travel with the weights. What can't be saved right is
refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def published_class(cls: type, home: str) -> type:
    """The class that objects of `cls` are saved as.

    Args:
        cls: a class of this model's, or one that derives from it.
        home: name of the module in which this model's classes of that kind are defined.

    Returns:
        `cls` itself or the nearest base that is from `home` or was registered with `register_for_auto_class`: whoever
        registers a class of their own wants its file to be copied.
    """
    for base in cls.__mro__:
        if base.__module__ == home or vars(base).get("_auto_class") is not None:
            return base
    raise TypeError(f"{cls.__name__} derives from no class of {home}.")


_IN_KERNELS = ("gptq", "awq")
"""Quantisations whose weights the kernels of gptqmodel lay out anew when a model is loaded."""


def refuse_kernel_weights(model: Any) -> None:
    """Refuse to save weights as a kernel has laid them out, beside settings that speak of another layout.

    What transformers would write loads without a word and gives other logits. With adapters of transformers' own, only
    these are saved.

    Raises:
        ValueError: names the quantisation and the remedies.
    """
    method = getattr(model, "quantization_method", None)
    method = str(getattr(method, "value", method))
    if method not in _IN_KERNELS or getattr(model, "_hf_peft_config_loaded", False):
        return
    raise ValueError(
        f"Weights of {method} lie in memory as the kernels want them, so what would be saved of them gives other "
        f"logits when it is loaded: copy the folder that they came from ({model.name_or_path or 'unknown'}). For full "
        "weights use `qwen1-checkpoint convert --dequantize`, and after a change of these `qwen1-checkpoint quantize`; "
        "an adapter is saved by the save_pretrained of its PeftModel."
    )


@contextmanager
def saved_as_published(obj: Any, home: str) -> Iterator[None]:
    """Let an object go by the name and the module of its published class, and otherwise be what it is.

    Args:
        obj: a model or configuration.
        home: see `published_class`.
    """
    own = type(obj)
    published = published_class(own, home)
    if published is own:
        yield
        return
    names = {"__module__": published.__module__, "__qualname__": published.__qualname__}
    # With __init__, because transformers would make one for a configuration that has none of its own.
    object.__setattr__(obj, "__class__", type(published.__name__, (own,), {**names, "__init__": own.__init__}))
    try:
        yield
    finally:
        object.__setattr__(obj, "__class__", own)
