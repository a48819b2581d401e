"""Whether two checkpoints give the same logits: the command `verify`.

Each is loaded by its own class, one after the other, so that only one of them is in memory.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen2ForCausalLM

from ..modeling_qwen import QWenLMHeadModel
from .errors import CheckpointError
from .files.access import read_value
from .files.weights import ADAPTER_CONFIG
from .formats.architecture import Architecture
from .formats.configurations import refuse_sizes
from .formats.kinds import Kind
from .formats.lenient import read_architecture, rope_scaling
from .formats.names import IGNORED
from .opening.sources import Source, open_source

TOLERANCE = 1e-3
"""Largest difference of logits in float32 that a faithful conversion may have, absolute.

A conversion only renames, cuts, joins and reorders weights, so all that differs is the order in which products are
summed up. That made 1e-5 for the tiny models of the tests and 1.4e-5 for 8 layers of the width of QWen-7B (random
weights, standard deviation of the logits 1.3), which leaves room for 80 layers and for trained weights with their
outliers. In the same 8 layers a single matrix rounded to bfloat16 made 7e-3. A wrong weight or wrong order of channels
is off by about the standard deviation. In half precision no tolerance tells these apart: compare in float32, with
`rounded` if need be.
"""

_DEFAULT_TOKENS, _DEFAULT_ROWS = 64, 2


@dataclass(frozen=True)
class Comparison:
    """How far the logits of two checkpoints are apart.

    Attributes:
        largest, mean: of the absolute differences; NaN where either model gave a NaN or infinite logit.
        std: standard deviation of the first one's logits.
        agreement: share of the positions at which both put the same token first.
        tokens: number of positions compared.
        vocabulary: number of logits compared at each position.
        tolerance: what `largest` may be at most.
        remarks: what to know about this comparison.
    """

    largest: float
    mean: float
    std: float
    agreement: float
    tokens: int
    vocabulary: int
    tolerance: float
    remarks: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether no difference is beyond the tolerance, and all logits are finite."""
        return self.largest <= self.tolerance

    def to_json(self) -> dict[str, Any]:
        """The same and `passed`, as plain values; NaN and infinity become None, as JSON has no words for them."""
        values = {**asdict(self), "passed": self.passed, "remarks": list(self.remarks)}
        return {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in values.items()
        }

    def __str__(self) -> str:
        lines = [
            f"Largest difference  {self.largest:.3g} (tolerance {self.tolerance:.3g})",
            f"Mean difference     {self.mean:.3g} (standard deviation of the logits {self.std:.3g})",
            f"Same greedy token   {self.agreement:.2%} of {self.tokens:,} positions",
            *self.remarks,
            "Passed." if self.passed else "Failed.",
        ]
        return "\n".join(lines)


# --- token ids ---


def random_ids(vocabulary: int, tokens: int, rows: int, seed: int) -> torch.Tensor:
    """Token ids below `vocabulary`, (rows, tokens) int64, the same for the same seed.

    Raises:
        CheckpointError: no tokens.
    """
    if tokens < 1 or rows < 1:
        raise CheckpointError(f"{rows} rows of {tokens} tokens can't be compared: use 1 or more.")
    return torch.randint(vocabulary, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def parse_ids(text: str) -> torch.Tensor:
    """Token ids that a user gave, (rows, tokens) int64.

    Args:
        text: "1,2,3", or the path of a JSON file with a list of ids or a list of such lists, all of one length.

    Raises:
        CheckpointError: anything else; the message names the value.
    """
    path = Path(text)
    if path.suffix != ".json" and not path.is_file():
        words = [word.strip() for word in text.split(",")]
        return _as_rows([int(word) if word.isdecimal() else word for word in words], text)
    try:
        value = read_value(path)
    except CheckpointError as error:
        raise CheckpointError(f"{text} is not a JSON file of token ids: {error}") from error
    return _as_rows(value, text)


def _as_rows(value: Any, origin: str) -> torch.Tensor:
    rows = value if isinstance(value, list) and value and isinstance(value[0], list) else [value]
    for row in rows:
        if not isinstance(row, list) or not row:
            raise CheckpointError(f"{origin!r} has {row!r} where a list of token ids is wanted.")
        for item in row:
            if type(item) is not int or not 0 <= item < 2**63:
                raise CheckpointError(f"{item!r} in {origin!r} is not a token id: use whole numbers, 1,2,3.")
    lengths = sorted({len(row) for row in rows})
    if len(lengths) > 1:
        raise CheckpointError(f"{origin!r} has rows of {lengths[0]} and of {lengths[-1]} ids: make them equally long.")
    return torch.tensor(rows)


# --- models ---


def load_model(
    path: Path,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    params: Path | None = None,
    rounded: torch.dtype | None = None,
) -> PreTrainedModel:
    """A checkpoint in its own class, in eval mode and with eager attention; no code beside the weights is run.

    Args:
        path: QWen of any release, Qwen2 or LLaMA in Hugging Face format, LLaMA in the original format.
        params: `params.json` of a LLaMA checkpoint, where it isn't in the same folder.
        rounded: round each weight to this dtype first, as `convert --dtype` does.

    Raises:
        CheckpointError: a checkpoint that is damaged or incomplete, quantised, or an adapter.
    """
    return _load(_open(path, params), dtype, device, rounded)


def _open(path: Path, params: Path | None) -> Source:
    source = open_source(path, None if (path / "config.json").is_file() else params, any_links=True)
    if (source.folder / ADAPTER_CONFIG).is_file():
        raise CheckpointError(
            f"{path} holds an adapter ({ADAPTER_CONFIG}): join it to its model with merge-lora first."
        )
    if source.config.get("quantization_config"):
        raise CheckpointError(f"{path} is quantised, so its logits differ from all others: verify the full weights.")
    refuse_sizes(source.config)
    if source.hidden_from_transformers:
        raise CheckpointError(f"{path}: {source.hidden_from_transformers}")
    return source


def _load(
    source: Source, dtype: torch.dtype, device: str | torch.device, rounded: torch.dtype | None
) -> PreTrainedModel:
    build = _build_llama if source.kind is Kind.LLAMA_ORIGINAL else _load_folder
    model = build(source, dtype, device)
    if rounded is not None:
        for parameter in model.parameters():
            parameter.data.copy_(parameter.data.to(rounded))
    return model.eval()


def _load_folder(source: Source, dtype: torch.dtype, device: str | torch.device) -> PreTrainedModel:
    if source.kind.is_qwen:
        source.check()  # which refuses much that transformers' own classes can have
    classes: dict[Kind, Any] = {Kind.QWEN2: Qwen2ForCausalLM, Kind.LLAMA: LlamaForCausalLM}
    model, found = classes.get(source.kind, QWenLMHeadModel).from_pretrained(
        source.path,
        dtype=dtype,
        attn_implementation="eager",
        local_files_only=True,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    # What is missing would be random, and what differs in size as well.
    for word in ("missing", "unexpected", "mismatched"):
        names = sorted(str(name) for name in found[f"{word}_keys"] if not IGNORED.fullmatch(str(name)))
        if names:
            raise CheckpointError(
                f"{source.path} has {len(names)} {word} tensors, first {names[0]}: use inspect to see what is wrong."
            )
    return model.to(device)


def _build_llama(source: Source, dtype: torch.dtype, device: str | torch.device) -> PreTrainedModel:
    """LLaMA's original format in transformers' class, a tensor at a time, so that nothing is in memory twice."""
    source.check()
    config = _llama_config(source.architecture)
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its table is no weight, so it needs values now
    for recipe in source.to_hf():
        tensor = recipe.build(*(source.weights.read(name) for name in recipe.sources))
        copied = tensor.to(device, dtype, copy=True)  # a mapped tensor would hold on to its file
        model.load_state_dict({recipe.name: copied}, strict=False, assign=True)
    source.weights.close()
    model.tie_weights()
    return model.to(device)


def _llama_config(architecture: Architecture) -> LlamaConfig:
    config = LlamaConfig(
        vocab_size=architecture.rows,
        hidden_size=architecture.width,
        intermediate_size=architecture.mlp,
        num_hidden_layers=architecture.layers,
        num_attention_heads=architecture.heads,
        num_key_value_heads=architecture.kv_heads,
        head_dim=architecture.head_dim,
        rms_norm_eps=architecture.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": float(architecture.rope_theta)},
        max_position_embeddings=architecture.length,
        tie_word_embeddings=architecture.tied,
    )
    config._attn_implementation = "eager"
    return config


# --- comparing ---


def compare(
    first: Path,
    second: Path,
    *,
    ids: torch.Tensor | None = None,
    tokens: int | None = None,
    seed: int = 0,
    tolerance: float = TOLERANCE,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    rounded: torch.dtype | None = None,
    params: Path | None = None,
    progress: Callable[[str], None] = lambda step: None,
) -> Comparison:
    """Compare the logits of two checkpoints on the same token ids.

    Args:
        ids: (rows, tokens) int64; random ones where there are none.
        tokens: length of the random rows; 64, or the shorter trained length: beyond it, what stretches texts counts.
        seed: of the random ids.
        tolerance: see `TOLERANCE`.
        dtype: precision of both models.
        rounded: round the weights of the first one to this dtype, as `convert --dtype` did for the second.
        params: `params.json` of a LLaMA checkpoint, where it isn't in the same folder.
        progress: told what is done next.

    Raises:
        CheckpointError: see `load_model`; an id that a model doesn't have.
    """
    sources = [_open(path, params) for path in (first, second)]
    shapes = [_shape(source) for source in sources]
    vocabulary, length = min(shape.rows for shape in shapes), min(shape.length for shape in shapes)
    if ids is None:
        ids = random_ids(vocabulary, min(_DEFAULT_TOKENS, length) if tokens is None else tokens, _DEFAULT_ROWS, seed)
    _check_ids(ids, vocabulary)
    logits = [
        _logits(source, ids, dtype, device, precision, progress)[:, :vocabulary]
        for source, precision in zip(sources, (rounded, None), strict=True)
    ]
    return compare_logits(logits[0], logits[1], tolerance, tuple(_remarks(sources, shapes, ids)))


def _logits(
    source: Source,
    ids: torch.Tensor,
    dtype: torch.dtype,
    device: str | torch.device,
    rounded: torch.dtype | None,
    progress: Callable[[str], None],
) -> torch.Tensor:
    gc.collect()  # modules and hooks refer to one another, and this model needs the memory of the one before
    progress(f"Loading {source.path}")
    model = _load(source, dtype, device, rounded)
    progress(f"Running {source.path}")
    return run(model, ids)


def _shape(source: Source) -> Architecture:
    if source.kind is Kind.LLAMA_ORIGINAL:
        return source.architecture
    return read_architecture(source.kind, source.config)[0]


def _check_ids(ids: torch.Tensor, vocabulary: int) -> None:
    if ids.ndim != 2 or not ids.numel():
        raise CheckpointError(
            f"Token ids of shape {tuple(ids.shape)} can't be read: give rows of one length, at least 1."
        )
    wrong = ids[(ids < 0) | (ids >= vocabulary)]
    if wrong.numel():
        raise CheckpointError(
            f"Token id {int(wrong[0])} is out of the vocabulary: both checkpoints have rows for 0 to {vocabulary - 1}."
        )


def _remarks(sources: Sequence[Source], shapes: Sequence[Architecture], ids: torch.Tensor) -> Iterator[str]:
    scalings = [(rope_scaling(source.config), shape.rope) for source, shape in zip(sources, shapes, strict=True)]
    for source, (scaling, _) in zip(sources, scalings, strict=True):
        if scaling and scalings[0] != scalings[1]:
            yield f"{source.path} has rope scaling {scaling!r}, which can change the logits of short texts as well."
    rows, length = [shape.rows for shape in shapes], min(shape.length for shape in shapes)
    if rows[0] != rows[1]:
        yield f"The vocabularies have {rows[0]:,} and {rows[1]:,} rows: the first {min(rows):,} are compared."
    if ids.shape[1] > length:
        yield f"{ids.shape[1]:,} tokens are more than the trained {length:,}: what stretches texts counts as well."


@torch.inference_mode()
def run(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Logits of each position, (rows, tokens) -> (rows * tokens, V) float32 on the CPU."""
    # A row at a time, as the logits of a large vocabulary take more memory than anything else here.
    rows = [model(row[None].to(model.device), use_cache=False).logits[0].float().cpu() for row in ids]
    return torch.cat(rows)


def compare_logits(
    first: torch.Tensor, second: torch.Tensor, tolerance: float = TOLERANCE, remarks: tuple[str, ...] = ()
) -> Comparison:
    """Compare logits, both (positions, V)."""
    difference = (first - second).abs()
    finite = bool(first.isfinite().all()) and bool(second.isfinite().all())
    if not finite:
        remarks = (*remarks, "There are NaN or infinite logits.")
    return Comparison(
        largest=difference.max().item() if finite else math.nan,
        mean=difference.mean().item() if finite else math.nan,
        std=first.std().item(),
        agreement=(first.argmax(-1) == second.argmax(-1)).double().mean().item(),
        tokens=first.shape[0],
        vocabulary=first.shape[1],
        tolerance=tolerance,
        remarks=remarks,
    )
