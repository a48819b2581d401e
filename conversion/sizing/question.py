"""What is asked of `inspect` beside a checkpoint: devices of which memory, texts of which length, how many at once."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import CheckpointError
from .serving import CACHES
from .units import read_size

_LARGEST_RANK = 2**16


@dataclass(frozen=True)
class Question:
    """What a model is to do, and on what.

    Attributes:
        device_memory: bytes of a device; None: only what one device would have to hold is asked for.
        reserve: bytes of each device that are left to others.
        context: tokens of a text; None for the trained length.
        batch: texts at once, on all devices together.
        cache: one of `CACHES`.
        chunk: tokens of a prompt that are read at once; None for all.
        rank: of LoRA.

    Raises:
        CheckpointError: impossible values.
    """

    device_memory: int | None = None
    reserve: int = 0
    context: int | None = None
    batch: int = 1
    cache: str = "growing"
    chunk: int | None = None
    rank: int = 64

    def __post_init__(self) -> None:
        if self.cache not in CACHES:
            raise CheckpointError(f"--cache {self.cache!r} is none of {', '.join(CACHES)}.")
        if not 0 < self.rank <= _LARGEST_RANK:
            raise CheckpointError(f"--lora-rank {self.rank:,} can't be: choose a number from 1 to {_LARGEST_RANK:,}.")
        if self.chunk is not None and self.chunk < 1:
            raise CheckpointError(f"--prefill-chunk {self.chunk:,} can't be: choose at least 1, or leave it out.")
        if self.device_memory is not None and self.reserve >= self.device_memory:
            raise CheckpointError(
                f"--reserve {self.reserve:,} bytes leaves nothing of --device-memory {self.device_memory:,}: lower it."
            )

    @property
    def room(self) -> int | None:
        """Bytes of a device that the model may take."""
        return None if self.device_memory is None else self.device_memory - self.reserve


def ask(
    device_memory: str | None,
    context: int | None,
    batch: int | None,
    cache: str | None,
    prefill_chunk: int | None,
    lora_rank: int | None,
    reserve: str | None,
) -> Question | None:
    """The question of a command line; None where nothing is asked.

    Raises:
        CheckpointError: impossible values, or such as only a question makes use of.
    """
    if device_memory is None and context is None and batch is None:
        details = {"cache": cache, "prefill-chunk": prefill_chunk, "lora-rank": lora_rank, "reserve": reserve}
        for name in (name for name, value in details.items() if value is not None):
            raise CheckpointError(
                f"--{name} has no effect without a question: add --device-memory, --context or --batch, or leave it "
                "out."
            )
        return None
    return Question(
        None if device_memory is None else read_size(device_memory, "--device-memory"),
        0 if reserve is None else read_size(reserve, "--reserve"),
        context,
        1 if batch is None else batch,
        Question.cache if cache is None else cache,
        prefill_chunk,
        Question.rank if lora_rank is None else lora_rank,
    )
