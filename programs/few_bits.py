"""The option `--bits`: weights in few bits, for the programs that open a checkpoint."""

from __future__ import annotations

from typing import Any

LESS_MEMORY = "round the weights (--bits 8 or --bits 4), take a smaller model, or end other programs"
BITS_HELP = "Round the weights to 8 or 4 bits, on the processor; on a GPU bitsandbytes is the tool."


def in_bits(bits: int | None, cpu_only: bool = False) -> dict[str, Any]:
    """Arguments of `from_pretrained` for weights of so many bits; None for those that the checkpoint has."""
    if bits is None:
        return {"device_map": "cpu" if cpu_only else "auto"}
    return {"device_map": "cpu", "quantization_config": {"quant_method": "qwen_bits", "bits": bits}}
