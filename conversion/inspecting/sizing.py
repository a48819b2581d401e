"""How the devices that a model needs are shown to people."""

from __future__ import annotations

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from ..sizing.devices import Answer, Sizing
from .tables import new_table
from .words import plural, size_text

_NOT_COUNTED = (
    "Not counted: what CUDA and NCCL take for themselves, about 0.5 to 1 GB of each device, and what an allocator "
    "leaves unused; --reserve 1GB keeps it free."
)


def sizing_blocks(sizing: Sizing) -> list[RenderableType]:
    """Tables of serving and training, and what they leave out."""
    blocks: list[RenderableType] = [_serving_table(sizing), _training_table(sizing)]
    reasons = {answer.reason for answer in (*sizing.serving, *sizing.training) if answer.reason is not None}
    blocks += [
        Text(f"none: {reason}. The sizes are the least that each holds.", style="yellow") for reason in sorted(reasons)
    ]
    return [*blocks, Text(_NOT_COUNTED)]


def _load(sizing: Sizing) -> str:
    return f"{plural(sizing.batch, 'text')} of {plural(sizing.context, 'token')}"


def _count(answer: Answer) -> str:
    return "none" if answer.devices is None else f"{answer.devices:,}"


def _memory(sizing: Sizing) -> str:
    if sizing.device_memory is None:
        return "on one device"
    kept = f", {size_text(sizing.reserve)} of it kept free" if sizing.reserve else ""
    return f"devices of {size_text(sizing.device_memory)}{kept}"


def _serving_table(sizing: Sizing) -> Table:
    chunk = "" if sizing.prefill_chunk == sizing.context else f", prompts read {sizing.prefill_chunk:,} at a time"
    table = new_table(f"Serving {_load(sizing)}, {_memory(sizing)} ({sizing.cache} cache{chunk})")
    table.add_column("weights in", style="cyan")
    for heading in ("devices", "on each: weights", "cache", "working", "in all", "cache per token"):
        table.add_column(heading, justify="right")
    for answer in sizing.serving:
        sizes = (*answer.bytes_per_device.values(), answer.total, sizing.cache_per_token[answer.name])
        table.add_row(answer.name, _count(answer), *map(size_text, sizes), style=_style(answer))
    return table


def _training_table(sizing: Sizing) -> Table:
    table = new_table(f"Training on {_load(sizing)} a step, {_memory(sizing)} (LoRA of rank {sizing.lora_rank})")
    table.add_column("way", style="cyan", no_wrap=True)
    table.add_column("gradient checkpointing")
    for heading in ("devices", "on each: kept", "in a step", "in all"):
        table.add_column(heading, justify="right")
    for answer in sizing.training:
        checkpointing = "yes" if answer.gradient_checkpointing else "no"
        sizes = map(size_text, (*answer.bytes_per_device.values(), answer.total))
        table.add_row(answer.name, checkpointing, _count(answer), *sizes, style=_style(answer))
    return table


def _style(answer: Answer) -> str:
    return "dim" if answer.devices is None else ""
