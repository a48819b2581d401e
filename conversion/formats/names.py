"""Names and dimensions of the weights in every format, in one table.

The names of transformers' Qwen2 and LLaMA classes stand in the middle: each other format is described by how it
becomes that one and, for QWen, how that one becomes it. A way is a list of `Recipe`s, so that a checkpoint can be
converted a tensor at a time.

Source: `qwen-7b.md` (QWen: c_attn holds query, key and value; `w2` is the gate, `w1` the up projection), `llama-2.md`
(LLaMA's original format: `w1` is the gate, `w3` the up projection, channels are rotated in adjacent pairs,
model-parallel files hold slices), `golden/native` and `golden/llama_meta`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .architecture import Architecture


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
    # LLaMA splits its embedding along the width, and later files of that format along the rows: see `split_of`.
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

HEAD, EMBEDDING = TABLE[-1], TABLE[0]


def layer_rows(architecture: Architecture) -> Iterator[tuple[Row, Any]]:
    """Every weight of a model with its layer (None outside the layers), in the order of computation."""
    present = [row for row in TABLE if row.when is None or getattr(architecture, row.when)]
    if architecture.tied:
        present.remove(HEAD)
    inside = [row for row in present if "{}" in row.hf]
    yield present[0], None
    for layer in range(architecture.layers):
        yield from ((row, layer) for row in inside)
    yield from ((row, None) for row in present[1:] if row not in inside)


def hf_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every weight under the names of transformers' Qwen2 and LLaMA classes."""
    return {row.hf.format(layer): architecture.shape(row.dimensions) for row, layer in layer_rows(architecture)}
