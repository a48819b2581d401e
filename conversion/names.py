"""Names and shapes of the weights in every format, in one table, and the pure functions that lead from one to another.

The names of transformers' Qwen2 and LLaMA classes stand in the middle: each other format is described by how it
becomes that one and, for QWen, how that one becomes it. A way is a list of `Recipe`s, each a pure function from the
tensors that it names to one new tensor, so that a checkpoint can be converted a tensor at a time.

Source: `qwen-7b.md` (QWen: c_attn holds query, key and value; `w2` is the gate, `w1` the up projection), `llama-2.md`
(LLaMA's original format: `w1` is the gate, `w3` the up projection, channels are rotated in adjacent pairs,
model-parallel files hold slices), `golden/native` and `golden/llama_meta`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from math import isfinite
from types import MappingProxyType
from typing import Any

import torch

from .errors import CheckpointError

MOST_LAYERS = 10_000
_LARGEST = 2**31 - 1


def short(value: Any) -> str:
    """A value for a message, which may have any number of digits."""
    text = hex(value) if isinstance(value, int) and abs(value) > 2**128 else repr(value)
    return text if len(text) <= 40 else f"{text[:20]}… ({len(text):,} characters)"


@dataclass(frozen=True)
class Architecture:
    """What the configurations of all formats have in common.

    Attributes:
        rows: rows of the embedding, padding included.
        mlp: width of the gate, which in QWen's configuration is half of `ffn_hidden_size`.
        length: tokens that the model was trained on at once.
        rope: rotary scaling in transformers' keys (`rope_type`, `factor` …), None where there is none.
        positions: `max_position_embeddings`, which is part of the scaling; None without one.
        qkv_bias, output_bias, mlp_bias: which projections have a bias.
        settings: what converters carry over as it is: token ids, `initializer_range`.

    Raises:
        CheckpointError: a value that no model can have, or heads that don't divide into groups.
    """

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    rows: int
    norm_eps: float
    rope_theta: float
    length: int
    tied: bool = False
    qkv_bias: bool = True
    output_bias: bool = False
    mlp_bias: bool = False
    rope: Mapping[str, Any] | None = None
    positions: int | None = None
    settings: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            whole, real = field.type == "int", field.type == "float"
            if (whole or real) and not (type(value) is int or real and type(value) is float and isfinite(value)):
                raise CheckpointError(f"The configuration can't be used: {field.name}={value!r} is not a number.")
            if (whole or real) and value <= 0:
                raise CheckpointError(f"The configuration can't be used: {field.name}={short(value)} is not positive.")
            most = MOST_LAYERS if field.name == "layers" else _LARGEST if whole else 2**63
            if (whole or real) and value > most:
                raise CheckpointError(
                    f"The configuration can't be used: {field.name}={short(value)} is more than {most:,}, the most."
                )
        if self.heads % self.kv_heads:
            raise CheckpointError(
                f"The configuration can't be used: heads={self.heads} don't divide into kv_heads={self.kv_heads}."
            )

    @property
    def queries(self) -> int:
        """Rows of the query projection."""
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        """Rows of the key projection, and of the value projection."""
        return self.kv_heads * self.head_dim

    def shape(self, dimensions: Sequence[str]) -> tuple[int, ...]:
        """Sizes of named dimensions."""
        return tuple(getattr(self, dimension) for dimension in dimensions)


@dataclass(frozen=True)
class Row:
    """One weight in every format; `{}` stands for the number of the layer.

    Attributes:
        hf, qwen, llama: its name in transformers' classes, in QWen (shared by query, key and value, in this order) and
            in LLaMA's original format, where there is one.
        dimensions: names of its dimensions, attributes of `Architecture`.
        split: the dimension along which LLaMA's model-parallel files hold slices; `None` means that each has it whole.
        rotary: its rows are rotated by position.
        when: the attribute of `Architecture` without which it does not exist.
    """

    hf: str
    qwen: str
    llama: str | None
    dimensions: tuple[str, ...]
    split: int | None = None
    rotary: bool = False
    when: str | None = None


_HF, _QWEN, _LLAMA = "model.layers.{}.", "transformer.h.{}.", "layers.{}."

TABLE = (
    # LLaMA splits its embedding along the width, and later files of that format along the rows: see `_split`.
    Row("model.embed_tokens.weight", "transformer.wte.weight", "tok_embeddings.weight", ("rows", "width"), 1),
    Row(_HF + "input_layernorm.weight", _QWEN + "ln_1.weight", _LLAMA + "attention_norm.weight", ("width",)),
    *(
        Row(
            f"{_HF}self_attn.{name}_proj.weight",
            _QWEN + "attn.c_attn.weight",
            f"{_LLAMA}attention.w{name}.weight",
            (size, "width"),
            0,
            rotary=name != "v",
        )
        for name, size in (("q", "queries"), ("k", "keys"), ("v", "keys"))
    ),
    *(
        Row(
            f"{_HF}self_attn.{name}_proj.bias",
            _QWEN + "attn.c_attn.bias",
            None,
            (size,),
            rotary=name != "v",
            when="qkv_bias",
        )
        for name, size in (("q", "queries"), ("k", "keys"), ("v", "keys"))
    ),
    Row(
        _HF + "self_attn.o_proj.weight",
        _QWEN + "attn.c_proj.weight",
        _LLAMA + "attention.wo.weight",
        ("width", "queries"),
        1,
    ),
    Row(_HF + "self_attn.o_proj.bias", _QWEN + "attn.c_proj.bias", None, ("width",), when="output_bias"),
    Row(_HF + "post_attention_layernorm.weight", _QWEN + "ln_2.weight", _LLAMA + "ffn_norm.weight", ("width",)),
    Row(_HF + "mlp.gate_proj.weight", _QWEN + "mlp.w2.weight", _LLAMA + "feed_forward.w1.weight", ("mlp", "width"), 0),
    Row(_HF + "mlp.gate_proj.bias", _QWEN + "mlp.w2.bias", None, ("mlp",), when="mlp_bias"),
    Row(_HF + "mlp.up_proj.weight", _QWEN + "mlp.w1.weight", _LLAMA + "feed_forward.w3.weight", ("mlp", "width"), 0),
    Row(_HF + "mlp.up_proj.bias", _QWEN + "mlp.w1.bias", None, ("mlp",), when="mlp_bias"),
    Row(
        _HF + "mlp.down_proj.weight",
        _QWEN + "mlp.c_proj.weight",
        _LLAMA + "feed_forward.w2.weight",
        ("width", "mlp"),
        1,
    ),
    Row(_HF + "mlp.down_proj.bias", _QWEN + "mlp.c_proj.bias", None, ("width",), when="mlp_bias"),
    Row("model.norm.weight", "transformer.ln_f.weight", "norm.weight", ("width",)),
    Row("lm_head.weight", "lm_head.weight", "output.weight", ("rows", "width"), 0),
)

IGNORED = re.compile(
    r"(.*\.)?rotary_emb\.inv_freq|transformer\.h\.\d+\.attn\.(masked_)?bias|(\d\d/)?(rope\.freqs|freqs_cos|freqs_sin"
    r"|freqs_cis|pos_cis)"
)
"""Tables that some releases stored beside the weights and every implementation computes anew."""

_HEAD, _EMBEDDING = TABLE[-1], TABLE[0]


@dataclass(frozen=True)
class Recipe:
    """How one tensor comes about: `build` of the tensors called `sources`."""

    name: str
    sources: tuple[str, ...]
    build: Callable[..., torch.Tensor]


def convert_tensors(recipes: Sequence[Recipe], tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Follow all recipes at once."""
    return {recipe.name: recipe.build(*(tensors[source] for source in recipe.sources)) for recipe in recipes}


def compose(first: Sequence[Recipe], second: Sequence[Recipe]) -> list[Recipe]:
    """Recipes that lead from the sources of `first` to the results of `second`."""
    by_name = {recipe.name: recipe for recipe in first}
    return [_composed(recipe, [by_name[source] for source in recipe.sources]) for recipe in second]


def _composed(recipe: Recipe, parts: Sequence[Recipe]) -> Recipe:
    def build(*tensors: torch.Tensor) -> torch.Tensor:
        rest = iter(tensors)
        return recipe.build(*(part.build(*(next(rest) for _ in part.sources)) for part in parts))

    return Recipe(recipe.name, tuple(source for part in parts for source in part.sources), build)


# --- pure functions on tensors ---


def keep(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself."""
    return tensor


def concatenate(*tensors: torch.Tensor, dim: int = 0) -> torch.Tensor:
    """Tensors laid end to end along a dimension."""
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim=dim)


def take_rows(tensor: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """Rows `start` … `stop - 1`."""
    return tensor[start:stop]


def halves_from_pairs(tensor: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Reorder the rows of a query or key projection from adjacent rotated pairs to two halves of each head.

    Row 2 i of a head becomes row i, row 2 i + 1 becomes row i + D / 2; (H * D, ...) -> (H * D, ...).
    """
    return tensor.view(-1, head_dim // 2, 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


# --- which weights there are ---


def layer_rows(architecture: Architecture) -> Iterator[tuple[Row, Any]]:
    """Every weight of a model with its layer (None outside the layers), in the order of computation."""
    present = [row for row in TABLE if row.when is None or getattr(architecture, row.when)]
    if architecture.tied:
        present.remove(_HEAD)
    inside = [row for row in present if "{}" in row.hf]
    yield present[0], None
    for layer in range(architecture.layers):
        yield from ((row, layer) for row in inside)
    yield from ((row, None) for row in present[1:] if row not in inside)


def hf_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every weight under the names of transformers' Qwen2 and LLaMA classes."""
    return {row.hf.format(layer): architecture.shape(row.dimensions) for row, layer in layer_rows(architecture)}


def qwen_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every weight under QWen's names."""
    shapes: dict[str, tuple[int, ...]] = {}
    for row, layer in layer_rows(architecture):
        name, shape = row.qwen.format(layer), architecture.shape(row.dimensions)
        rows = shapes[name][0] if name in shapes else 0
        shapes[name] = (rows + shape[0], *shape[1:])
    return shapes


def llama_shapes(architecture: Architecture, files: int, embedding_split: int) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every weight in LLaMA's original format, `files` model-parallel files together."""
    shapes = {}
    for row, layer in layer_rows(architecture):
        shape = list(architecture.shape(row.dimensions))
        dimension = _split(row, embedding_split)
        if dimension is not None:
            shape[dimension] //= files
        for number in range(files):
            shapes[f"{number:02d}/{str(row.llama).format(layer)}"] = tuple(shape)
    return shapes


def _split(row: Row, embedding_split: int) -> int | None:
    return embedding_split if row is _EMBEDDING else row.split


# --- from format to format ---


def qwen_to_hf(architecture: Architecture) -> list[Recipe]:
    """QWen's names to those of Qwen2: query, key and value are cut apart."""
    recipes = []
    ends: dict[str, int] = {}
    sizes = qwen_shapes(architecture)
    for row, layer in layer_rows(architecture):
        source = row.qwen.format(layer)
        start = ends.get(source, 0)
        stop = ends[source] = start + architecture.shape(row.dimensions)[0]
        whole = stop - start == sizes[source][0]
        build = keep if whole else partial(take_rows, start=start, stop=stop)
        recipes.append(Recipe(row.hf.format(layer), (source,), build))
    return recipes


def as_qwen(architecture: Architecture) -> Architecture:
    """The same model with the biases that QWen has: always in c_attn, elsewhere everywhere or nowhere."""
    elsewhere = architecture.output_bias or architecture.mlp_bias
    return replace(architecture, qkv_bias=True, output_bias=elsewhere, mlp_bias=elsewhere)


def hf_to_qwen(architecture: Architecture, dtype: torch.dtype) -> list[Recipe]:
    """Names of Qwen2 or LLaMA to QWen's; biases that the source lacks are zero, of this dtype."""
    there, target = hf_shapes(architecture), as_qwen(architecture)
    parts: dict[str, list[Recipe]] = {}
    for row, layer in layer_rows(target):
        source = row.hf.format(layer)
        zeros = partial(torch.zeros, architecture.shape(row.dimensions), dtype=dtype)
        part = Recipe(source, (source,), keep) if source in there else Recipe(source, (), zeros)
        parts.setdefault(row.qwen.format(layer), []).append(part)
    fused = [Recipe(name, tuple(part.name for part in group), concatenate) for name, group in parts.items()]
    return compose([part for group in parts.values() for part in group], fused)


def llama_to_hf(architecture: Architecture, files: int, embedding_split: int) -> list[Recipe]:
    """LLaMA's original format to the names of transformers' class: slices joined, rotated pairs made halves."""
    recipes = []
    for row, layer in layer_rows(architecture):
        dimension = _split(row, embedding_split)
        numbers = range(files if dimension is not None else 1)
        sources = tuple(f"{number:02d}/{str(row.llama).format(layer)}" for number in numbers)
        join = partial(concatenate, dim=dimension or 0)
        build = partial(_join_and_reorder, join=join, head_dim=architecture.head_dim) if row.rotary else join
        recipes.append(Recipe(row.hf.format(layer), sources, build))
    return recipes


def _join_and_reorder(*tensors: torch.Tensor, join: Callable[..., torch.Tensor], head_dim: int) -> torch.Tensor:
    return halves_from_pairs(join(*tensors), head_dim)


NOT_GATHERED = (
    "ZeRO-3 of DeepSpeed keeps a slice of each tensor in each process, and saved what one of them had. Set "
    "stage3_gather_16bit_weights_on_model_save to true and save again, or join the slices of the training checkpoint "
    "with its zero_to_fp32.py."
)
"""Cause and remedy of empty tensors."""


def is_left_empty(shape: Sequence[int]) -> bool:
    """Whether a tensor is what ZeRO-3 leaves in the place of one whose values are in other processes."""
    return tuple(shape) == (0,)


def check_names(
    found: Mapping[str, Any],
    expected: Mapping[str, tuple[int, ...]],
    optional: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
) -> None:
    """Compare the tensors of a checkpoint (`TensorInfo` by name) with those that its configuration asks for.

    Args:
        optional: name -> shape of tensors that may be missing.

    Raises:
        CheckpointError: an unknown name, a missing tensor or a wrong shape; all of the kind are counted, one is named.
    """
    missing = [name for name in expected if name not in found]
    known = {**expected, **optional}
    unknown = [name for name in found if name not in known and not IGNORED.fullmatch(name)]
    if unknown:
        raise CheckpointError(
            f"{found[unknown[0]]} is not a weight of this architecture ({len(unknown)} such tensors, "
            f"{len(missing)} missing{f', first {missing[0]!r}' if missing else ''})."
        )
    if missing:
        raise CheckpointError(
            f"{missing[0]!r} is missing ({len(missing)} of {len(expected)} tensors are). Download the checkpoint "
            "again, or mend its config.json (number of layers, tie_word_embeddings, biases)."
        )
    for name, shape in known.items():
        if name in found and is_left_empty(found[name].shape):
            raise CheckpointError(f"{found[name]} is empty: {NOT_GATHERED}")
        if name in found and tuple(found[name].shape) != shape:
            raise CheckpointError(
                f"{found[name]} has shape {tuple(found[name].shape)}, but the configuration asks for {shape}. "
                "Mend the configuration, or download the file again."
            )
