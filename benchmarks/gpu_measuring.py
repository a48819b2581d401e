"""The 7B shape on a GPU, as our model and as transformers' Qwen2, and how they are timed; for `gpu_sections.py`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from typing import Any

import torch
from measuring import Comparison, compare, seconds_of
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM, StoppingCriteria

from qwen1 import QWenConfig, QWenLMHeadModel
from qwen1.conversion.formats.qwen import qwen_to_hf, read_qwen
from qwen1.conversion.formats.recipes import convert_tensors
from qwen1.warming_qwen import wait

TRIES = 5
"""How often a reply is timed in which the later tokens seem to take no time."""

WARM_TOKENS = 8
"""Tokens of a reply before its steady rate is timed: among the first, CUDA graphs are recorded."""


@dataclass(frozen=True)
class Sizes:
    """What is measured: shape of the model, lengths, batches.

    Attributes:
        prompt, new: tokens read and written by `generate`.
        batch_new: tokens written in batches.
        copied: bytes of the buffer that is copied and summed for the bandwidth.
        matrix: side of the square matrices whose product gives the matrix rate.
        lengths: tokens of prompts, and of texts under attention alone.
    """

    width: int = 4096
    layers: int = 32
    heads: int = 32
    ffn: int = 22016
    vocabulary: int = 151_936
    prompt: int = 512
    new: int = 128
    batch_new: int = 32
    batches: tuple[int, ...] = (8, 32, 64)
    lengths: tuple[int, ...] = (2048, 8192)
    copied: int = 4 * 2**30
    matrix: int = 8192
    rounds: int = 4

    @property
    def head_dim(self) -> int:
        """Channels of a head."""
        return self.width // self.heads


TINY = Sizes(64, 2, 2, 256, 320, 16, 24, 12, (2,), (32, 64), 2**22, 128, 1)


@dataclass
class Row:
    """A figure, or why there is none.

    Attributes:
        name: what was measured.
        ours, theirs: of our code, or of the machine where `other` is empty; and of the other side.
        other: who the other side is.
        share: of what the machine could do, as measured.
        aim: what the share should at least be.
        note: how it came about, where that isn't plain.
        skipped: why nothing was measured.
    """

    name: str
    ours: float | None = None
    theirs: float | None = None
    unit: str = ""
    other: str = ""
    share: float | None = None
    aim: float | None = None
    note: str = ""
    skipped: str = ""

    def as_json(self) -> dict[str, Any]:
        """All that is set."""
        return {name: value for name, value in asdict(self).items() if value not in (None, "")}


def one_line(error: BaseException) -> str:
    """Kind and first line of an error."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


def attempt(name: str, measure: Callable[[], Row]) -> Row:
    """What `measure` gives; a row with the reason where it fails."""
    try:
        return measure()
    except Exception as error:  # one figure that can't be had leaves the others
        return Row(name, skipped=one_line(error))


# --- the models ---


class Bench:
    """Models and limits of one process, made when they are first asked for.

    Args:
        tiny: a shape that takes seconds, on a CPU too.
    """

    def __init__(self, tiny: bool):
        self.tiny = tiny
        self.sizes = TINY if tiny else Sizes()
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = torch.bfloat16

    @cached_property
    def models(self) -> tuple[QWenLMHeadModel, Qwen2ForCausalLM]:
        """Ours and Qwen2 on the same random weights: Qwen2's tensors are ours, or rows of ours, in the same memory."""
        mine, other = configurations(self.sizes)
        default = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        try:
            with self.device:
                torch.manual_seed(0)
                ours, theirs = QWenLMHeadModel(mine).eval(), Qwen2ForCausalLM(other).eval()
        finally:
            torch.set_default_dtype(default)
        theirs.load_state_dict(
            convert_tensors(qwen_to_hf(read_qwen(mine.to_dict())), ours.state_dict()), strict=True, assign=True
        )
        for model in (ours, theirs):
            model.generation_config.update(eos_token_id=None, pad_token_id=0, do_sample=False)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        with torch.no_grad():
            ours(self.ids(1, 1))
        wait()  # for what is compiled in the background, once on a machine
        return ours, theirs

    @cached_property
    def bandwidth(self) -> dict[str, float]:
        """Bytes per second: of copying, bytes read and written together, and of reading alone."""
        source = torch.randn(self.sizes.copied // 4, device=self.device)
        target = torch.empty_like(source)
        copying = self.best(partial(target.copy_, source))
        reading = self.best(source.sum)
        return {"copy": 2 * source.nbytes / copying, "read": source.nbytes / reading}

    @cached_property
    def matrix_rate(self) -> float:
        """Multiplications and additions per second of a square bf16 product of random data."""
        side = self.sizes.matrix
        left, right = (torch.randn((side, side), device=self.device).to(self.dtype) for _ in range(2))
        return 2 * side**3 / self.best(partial(torch.matmul, left, right))

    @property
    def fastest_bytes(self) -> float:
        """The higher of both bandwidths, by which shares are counted."""
        return max(self.bandwidth.values())

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def waiting(self, run: Callable[[], Any], times: int = 1) -> Callable[[], None]:
        """`run`, so many times in a row, until the device has done it; results are dropped at once."""

        def repeated() -> None:
            for _ in range(times):
                run()
            self.synchronize()

        return repeated

    def best(self, run: Callable[[], Any], rounds: int = 10, times: int = 5) -> float:
        """Least seconds of a call after two that don't count: what the machine can do."""
        repeated = self.waiting(run, 1 if self.tiny else times)
        for _ in range(2):
            repeated()
        return min(seconds_of(repeated) for _ in range(rounds)) / (1 if self.tiny else times)

    def compare(
        self, name: str, ours: Callable[[], Any], theirs: Callable[[], Any], times: int = 1, warm: int = 2
    ) -> Comparison:
        """Seconds of a call of both sides in turn, `times` calls in each round."""
        sides = [self.waiting(run, 1 if self.tiny else times) for run in (ours, theirs)]
        for side in sides * (warm - 1):  # `compare` itself begins with a round that doesn't count
            side()
        found = compare(name, *sides, rounds=self.sizes.rounds if self.tiny else 2 * self.sizes.rounds)
        found.ours, found.theirs = (
            [seconds / (1 if self.tiny else times) for seconds in side] for side in (found.ours, found.theirs)
        )
        return found

    def ids(self, rows: int, length: int) -> torch.Tensor:
        """Random tokens, (rows, length)."""
        generator = torch.Generator().manual_seed(2)
        return torch.randint(self.sizes.vocabulary, (rows, length), generator=generator).to(self.device)


def configurations(sizes: Sizes) -> tuple[QWenConfig, Qwen2Config]:
    """Of ours and of Qwen2, both with torch's attention; NTK and LogN, which Qwen2 lacks, are off as by default."""
    longest = 2 * max(sizes.lengths)
    shape: dict[str, Any] = dict(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.width,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        eos_token_id=sizes.vocabulary - 1,
        attn_implementation="sdpa",
    )
    mine = QWenConfig(
        **shape,
        kv_channels=sizes.head_dim,
        ffn_hidden_size=sizes.ffn,
        layer_norm_epsilon=1e-6,
        seq_length=longest,
        n_positions=longest,
        use_flash_attn=False,
    )
    other = Qwen2Config(
        **shape,
        num_key_value_heads=sizes.heads,
        intermediate_size=sizes.ffn // 2,
        rms_norm_eps=1e-6,
        max_position_embeddings=longest,
    )
    return mine, other


def token_bytes(model: QWenLMHeadModel, context: int) -> int:
    """Bytes that a token reads: all weights but the embedding, of which it needs a row, and the keys and values."""
    weights = sum(weight.nbytes for weight in model.parameters()) - model.get_input_embeddings().weight.nbytes
    config = model.config
    return (
        weights + 2 * context * config.n_layer * config.num_key_value_heads * config.kv_channels * model.dtype.itemsize
    )


def prompt_work(model: QWenLMHeadModel, length: int) -> int:
    """Multiplications and additions of a prompt: 2 T P for the P weights of the layers, 2 V E for the head on the last
    token, and 2 T^2 E L for causal attention, half of the two products of T x T with E channels.
    """
    layers = sum(weight.numel() for weight in model.transformer.h.parameters() if weight.ndim == 2)
    head: nn.Linear = model.lm_head
    return 2 * length * layers + 2 * head.weight.numel() + 2 * length**2 * model.config.n_embd * model.config.n_layer


# --- generate, a token at a time ---


class Stamps(StoppingCriteria):
    """Marks when the device has each token, without waiting for it, and never stops."""

    def __init__(self, bench: Bench):
        self.bench = bench
        self.marks: list[Any] = []
        self.mark()

    def mark(self) -> None:
        """Now, in the order of the device's work."""
        event = torch.cuda.Event(enable_timing=True) if self.bench.device.type == "cuda" else _Now()
        event.record()
        self.marks.append(event)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.mark()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def between(self, first: int, last: int) -> float:
        """Seconds from one mark to another; 0 is the start, n the n-th token."""
        return self.marks[first].elapsed_time(self.marks[last]) / 1000


class _Now:
    """An event on a CPU."""

    def record(self) -> None:
        self.seconds = seconds_now()

    def elapsed_time(self, later: _Now) -> float:
        return (later.seconds - self.seconds) * 1000


def seconds_now() -> float:
    """A clock for what runs on the CPU."""
    return time.perf_counter()


@dataclass
class Reply:
    """Times of one call of `generate`, in seconds: the whole call, its first token, each of the later ones."""

    whole: float
    first: float
    token: float


def stamped(bench: Bench, model: Any, ids: torch.Tensor, new: int, **options: Any) -> Reply:
    """Write `new` tokens behind each row, greedily, marked by the device's own clock.

    The marks are a criterion of the caller's, whose answer `generate` of either model waits for.
    """
    stamps = Stamps(bench)
    whole = written_in(bench, model, ids, new, stopping_criteria=[stamps], **options)
    if len(stamps.marks) <= new:
        raise RuntimeError(f"generate asked its criteria {len(stamps.marks) - 1} times, not {new}.")
    return Reply(whole, stamps.between(0, 1), stamps.between(WARM_TOKENS, new) / (new - WARM_TOKENS))


def reply(bench: Bench, model: Any, ids: torch.Tensor, new: int, **options: Any) -> Reply:
    """Write `new` tokens behind each row as users call it: whole calls for three lengths of the reply are timed, and
    the time of a token is what those behind the `WARM_TOKENS` first take longer.

    Raises:
        RuntimeError: they took no longer, however often they were timed.
    """
    for _ in range(TRIES):
        first, few, whole = (written_in(bench, model, ids, count, **options) for count in (1, WARM_TOKENS, new))
        if whole > few:
            return Reply(whole, first, (whole - few) / (new - WARM_TOKENS))
    raise RuntimeError(f"{new} tokens took no longer than {WARM_TOKENS}, {TRIES} times: end what else runs here.")


def written_in(bench: Bench, model: Any, ids: torch.Tensor, new: int, **options: Any) -> float:
    """Seconds of a call of `generate` for so many tokens behind each row.

    Raises:
        RuntimeError: it wrote fewer.
    """
    streamer = options.get("streamer")
    if streamer is not None:
        options["streamer"] = streamer()
    bench.synchronize()
    start = seconds_now()
    output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, **options)
    bench.synchronize()
    seconds = seconds_now() - start
    if output.shape[1] != ids.shape[1] + new:
        raise RuntimeError(f"generate wrote {output.shape[1] - ids.shape[1]} tokens, not {new}.")
    return seconds


def replies(
    bench: Bench,
    rows: int,
    new: int,
    warm: int = 1,
    rounds: int | None = None,
    take: Callable[..., Reply] = reply,
    **options: Any,
) -> tuple[Reply, Reply]:
    """Medians of both models in turn, taken by `reply` or `stamped`, after `warm` of each that don't count."""
    ids = bench.ids(rows, bench.sizes.prompt)
    found: list[list[Reply]] = [[], []]
    for number in range(warm + (rounds or bench.sizes.rounds)):
        for side in (0, 1) if number % 2 else (1, 0):
            taken = take(bench, bench.models[side], ids, new, **options)
            found[side] += [taken] if number >= warm else []
    ours, theirs = (
        Reply(*(statistics.median(getattr(taken, name) for taken in side) for name in ("whole", "first", "token")))
        for side in found
    )
    return ours, theirs
