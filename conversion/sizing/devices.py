"""How many devices a model needs, for serving and for each way of training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..formats.quantised import Packing
from .question import Question
from .serving import PRECISIONS, Precision, cache_per_token, serving_need
from .shape import Load, Shape
from .training import WAYS, Adapter, Sharding, TrainingStep, Way

MOST_DEVICES = 4096


@dataclass(frozen=True)
class Answer:
    """What one way of serving or training needs.

    Attributes:
        name: of a precision, or of a way of training.
        devices: the fewest that hold it; None where no number of them does.
        bytes_per_device: what each holds at the peak, by what it is for, with `devices` of them; where no number is
            enough, with as many as make it least.
        total: the sum.
        gradient_checkpointing: None for serving.
        reason: why there is no number.
    """

    name: str
    devices: int | None
    bytes_per_device: dict[str, int]
    total: int
    gradient_checkpointing: bool | None = None
    reason: str | None = None


@dataclass(frozen=True)
class Sizing:
    """All answers to a question.

    Attributes:
        cache_per_token: precision -> bytes of the keys and values of a token, on all devices together.
        lora_parameters: that LoRA trains.
    """

    device_memory: int | None
    reserve: int
    context: int
    batch: int
    cache: str
    prefill_chunk: int
    lora_rank: int
    lora_parameters: int
    parameters: int
    cache_per_token: dict[str, int]
    serving: list[Answer]
    training: list[Answer]

    def to_json(self) -> dict[str, Any]:
        """The same as dictionaries, lists, texts and numbers."""
        return asdict(self)


def answer(question: Question, shape: Shape, packing: Packing | None = None) -> Sizing:
    """Count devices for every way.

    Args:
        packing: of weights that are stored quantised.

    Raises:
        CheckpointError: impossible values.
    """
    architecture = shape.architecture
    load = Load(architecture.length if question.context is None else question.context, question.batch)
    chunk = load.context if question.chunk is None else min(question.chunk, load.context)
    precisions = list(PRECISIONS)
    if packing is not None:
        precisions.insert(0, Precision(f"{packing.method} int{packing.bits}, as stored", 2, packing))
    adapter = Adapter(question.rank)
    return Sizing(
        device_memory=question.device_memory,
        reserve=question.reserve,
        context=load.context,
        batch=load.batch,
        cache=question.cache,
        prefill_chunk=chunk,
        lora_rank=question.rank,
        lora_parameters=architecture.layers * adapter.parameters(shape.linears),
        parameters=shape.parameters,
        cache_per_token={p.name: cache_per_token(shape, p, question.cache) for p in precisions},
        serving=[_serve(question, shape, precision, load, chunk) for precision in precisions],
        training=[_train(question, shape, way, load, on, adapter) for way in WAYS for on in (False, True)],
    )


def _serve(question: Question, shape: Shape, precision: Precision, load: Load, chunk: int) -> Answer:
    """Tensor parallel: on as many devices as heads, MLP and groups of a quantisation can be divided among."""
    counts = [count for count in shape.divisors if shape.can_share(count, precision.group)]

    def parts(count: int) -> dict[str, int]:
        return asdict(serving_need(shape, precision, question.cache, load, chunk, count))

    devices, held = _fewest(counts, parts, question.room)
    reason = None
    if devices is None and len(counts) == 1:
        reason = (
            f"{precision.name} can't be divided among devices, as heads or groups would be cut, and one is too small"
        )
    elif devices is None:
        listed = f"{', '.join(map(str, counts[:-1]))} or {counts[-1]}"
        reason = f"{precision.name} can be divided among {listed} devices only, which are too small"
    return Answer(precision.name, devices, held, sum(held.values()), None, reason)


def _train(question: Question, shape: Shape, way: Way, load: Load, checkpointing: bool, adapter: Adapter) -> Answer:
    """Data parallel: each device has its share of the texts, at least one."""
    most = load.batch if way.sharding is Sharding.NONE else MOST_DEVICES

    def parts(count: int) -> dict[str, int]:
        return asdict(TrainingStep(shape, way, load, checkpointing, count, adapter).need)

    devices, held = _fewest(range(1, most + 1), parts, question.room)
    reason = None
    if devices is None:
        reason = "the model is whole on each device, which is too small for it and a text"
        if way.sharding is not Sharding.NONE:
            reason = f"on up to {MOST_DEVICES:,} devices, what each needs of what isn't divided is too much"
    return Answer(way.name, devices, held, sum(held.values()), checkpointing, reason)


def _fewest(
    counts: Sequence[int], parts: Callable[[int], dict[str, int]], room: int | None
) -> tuple[int | None, dict[str, int]]:
    """The least of the counts whose parts fit, and these; else None, and the parts of the count that comes closest.

    More devices never need more, but for the second of a training, which needs copies of the gradients.
    """
    if room is None:
        return 1, parts(1)
    first, last = parts(counts[0]), parts(counts[-1])
    if sum(first.values()) <= room:
        return counts[0], first
    if sum(last.values()) > room:
        return None, min(first, last, key=lambda held: sum(held.values()))
    low, high = 0, len(counts) - 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if sum(parts(counts[middle]).values()) <= room else (middle, high)
    return counts[high], parts(counts[high])
