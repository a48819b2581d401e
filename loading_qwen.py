"""What has to be there before weights are loaded."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

_PACKAGES = {
    "gptq": ("gptqmodel", "optimum"),
    "awq": ("gptqmodel", "accelerate"),
    "bitsandbytes": ("bitsandbytes", "accelerate"),
}
"""What transformers loads weights of a quantisation with, from 5.4 to 5.24."""


def check_packages(quantization: Any) -> None:
    """Refuse weights in few bits that nothing here can read, before transformers looks for a GPU instead.

    Args:
        quantization: `quantization_config` of a configuration or of a call: a dictionary or an object; None for none.

    Raises:
        ImportError: names the quantisation, the packages that are missing and the command that installs them.
    """
    values = quantization if isinstance(quantization, Mapping) else vars(quantization) if quantization else {}
    method = str(getattr(values.get("quant_method"), "value", values.get("quant_method")))
    wanted = _PACKAGES.get(method, ())
    missing = [name for name in wanted if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f"These weights are to be loaded by {method}, which needs {' and '.join(wanted)}; not installed: "
            f"{', '.join(missing)}. Install them (pip install {' '.join(missing)}), or take weights that are not "
            "quantised."
        )
