"""A few tokens through all blocks on a CPU, in one call of a kernel in place of some forty of torch a block.

Such a step is reading weights, keys and values; torch's products read them at half of the memory's speed, and each
small operation between them costs as much as reading 300 KB. What is computed is the same: numbers are rounded where
the modules round them, and added up in float32. Whatever isn't plain (hooks, adapters but LoRA, other classes, another
attention, autocast, training, compiling) goes through the modules.

Shapes: B batch, T tokens, E width, K key/value heads, D head size, S keys, V rows of the vocabulary.
"""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple, cast

import torch
from torch import nn

from .arguments_qwen import UNREAD, one_cache
from .bits_qwen import QWenBitsLinear
from .cache_qwen import QWenCache, QWenGrowingLayer
from .lora_qwen import adapted_product, adapter_of, is_lora, used_of, with_adapter
from .passes_qwen import runs_on
from .plain_qwen import Plain, is_bare, length_held, sdpa_is_torchs
from .preparing_qwen import prepare, steps_may_come, steps_ready
from .products_qwen import (
    DTYPES,
    Matrix,
    is_widened,
    kernels_for_any,
    kernels_for_steps,
    numbers_matrix,
    place,
    product,
    wide_product,
)
from .recording_qwen import can_record

BLOCK_ARGUMENTS = frozenset(
    ("attention_mask", "position_embeddings", "position_ids", "use_cache", "past_key_values", "cache")
)
"""Of a block; what comes beside these asks for something that the kernels don't do."""


class Layer(ctypes.Structure):
    """A block and its part of the cache, as `Layer` in `native_steps_qwen`."""

    _fields_ = [
        *((name, Matrix) for name in ("c_attn", "c_proj", "w1", "w2", "down")),
        *((name, ctypes.c_void_p) for name in ("ln_1", "ln_2", "keys", "values")),
        *((name, ctypes.c_int64) for name in ("key_row", "key_head", "key_token")),
        *((name, ctypes.c_int64) for name in ("value_row", "value_head", "value_token")),
        *((name, ctypes.c_double) for name in ("eps_1", "eps_2", "scale")),
    ]


class Call(ctypes.Structure):
    """What the blocks have in common, as `Call` in `native_steps_qwen`."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("layers", "states", "cosine", "sine", "logn", "seen")),
        *((name, ctypes.c_int64) for name in ("count", "rows", "tokens", "width", "inner")),
        *((name, ctypes.c_int64) for name in ("heads", "kv_heads", "size", "rotated", "length")),
        *((f"{name}_{part}", ctypes.c_int64) for name in ("angle", "logn", "seen") for part in ("row", "token")),
        ("threads", ctypes.c_int64),
    ]


def steps_of_blocks(
    blocks: nn.ModuleList, plain: Plain, states: torch.Tensor, arguments: dict[str, Any]
) -> torch.Tensor | None:
    """What `QWenBlock`s, one after another, make of a few tokens of each row, (B, T, E) -> (B, T, E), behind others.

    On a CPU up to 16 of a row, as when a guess is looked over, and 64 in all (16 in all below AVX2); on a GPU one of
    each row.

    Args:
        plain: of the classes of block, attention, MLP and norm.
        arguments: keyword arguments of each block; the cache gets the tokens' keys and values.

    Returns:
        None, and nothing done, where the kernel can't tell.
    """
    first: Any = blocks[0]
    on_gpu = runs_on(states) and plain(first) and plain(first.attn)
    if on_gpu:
        prepare(blocks, plain, states, arguments["position_embeddings"])
    native = None if on_gpu else kernels_for_steps(states)
    few = states.shape[1] == 1 if on_gpu else native is not None
    if not few or not given(arguments) <= BLOCK_ARGUMENTS:
        return None
    cache, seen = one_cache(arguments.get("past_key_values"), arguments.get("cache")), arguments.get("attention_mask")
    if not sdpa_is_torchs():
        return None
    if native is None:
        if not steps_ready(blocks, states, arguments["position_embeddings"]):
            return None
        from .gpu_steps_qwen import steps_on_gpu

        return steps_on_gpu(blocks, plain, states, cache, seen, arguments["position_embeddings"])
    length = length_held(cache, len(blocks), states, seen)
    if length is None:
        return None
    layers = (Layer * len(blocks))()
    shape = _shape(blocks[0], plain)
    if shape is None:
        return None
    for block, layer in zip(blocks, layers, strict=True):
        if not plain(block) or not _put_weights(layer, block, shape, plain, states):
            return None
    return _steps(native, layers, shape, states, cache, length, seen, arguments["position_embeddings"])


def given(arguments: dict[str, Any]) -> set[str]:
    """Names of arguments that ask for something."""
    wanted = {name for name, value in arguments.items() if value is not None}
    unasked = {name for name in wanted if name.startswith("output_") and arguments[name] is False}
    return wanted - unasked - UNREAD


def collected_by(model: Any) -> dict[str, bool]:
    """Arguments, such as `output_hidden_states`, that the configuration asks for where a call doesn't say."""
    names = (f"output_{key}" for key in model._can_record_outputs)
    return {name: True for name in names if getattr(model.config, name, False)}


class _Shape(NamedTuple):
    heads: int
    kv_heads: int
    size: int
    inner: int

    def matrices(self, width: int) -> list[tuple[int, int]]:
        """Rows and columns of the products of a block."""
        queries, both = self.heads * self.size, (self.heads + 2 * self.kv_heads) * self.size
        return [(both, width), (width, queries), (self.inner, width), (self.inner, width), (width, self.inner)]


def _shape(block: Any, plain: Plain) -> _Shape | None:
    if not plain(block) or not plain(block.attn, block.mlp):
        return None
    attention, linear = block.attn, block.mlp.w1
    if not is_lora(linear) and not plain(linear):
        return None
    return _Shape(attention.num_heads, attention.num_key_value_heads, attention.head_dim, linear.out_features)


def _put_weights(layer: Layer, block: Any, shape: _Shape, plain: Plain, states: torch.Tensor) -> bool:
    """Tell a layer of the kernel where a block's weights lie; False for a block that it can't stand for.

    Modules are taken from the dictionaries that hold them: attributes of modules cost more than the kernel's own work
    on a small model.
    """
    held = block._modules
    attention, mlp, ln_1, ln_2 = held["attn"], held["mlp"], held["ln_1"], held["ln_2"]
    parts, products = mlp._modules, attention._modules
    if not plain(ln_1, ln_2, attention, mlp, parts["act_fn"]) or attention.config._attn_implementation != "sdpa":
        return False
    heads = attention.num_heads, attention.num_key_value_heads, attention.head_dim
    if block.apply_residual_connection_post_layernorm or heads != shape[:3]:
        return False
    matrices = (products["c_attn"], products["c_proj"], parts["w1"], parts["w2"], parts["c_proj"])
    found = [_adapted_matrix_of(module, plain, states) for module in matrices]
    weights = [cast(torch.Tensor, module._parameters["weight"]) for module in (ln_1, ln_2)]
    norms = [place(weight, states.dtype) for weight in weights if weight.numel() == states.shape[-1]]
    shapes = [matrix and (matrix.rows, matrix.columns) for matrix in found]
    if len(norms) != 2 or None in norms or shapes != shape.matrices(states.shape[-1]):
        return False
    layer.c_attn, layer.c_proj, layer.w1, layer.w2, layer.down = found
    layer.ln_1, layer.ln_2 = norms
    layer.eps_1, layer.eps_2, layer.scale = ln_1.eps, ln_2.eps, attention.scaling
    return True


def _adapted_matrix_of(module: Any, plain: Plain, states: torch.Tensor) -> Matrix | None:
    """As `matrix_of`, also of a layer with a LoRA."""
    if not is_lora(module):
        return matrix_of(module, plain, states)
    adapter = adapter_of(module, states.dtype)
    matrix = None if adapter is None else matrix_of(module.base_layer, plain, states)
    return None if matrix is None or adapter is None else with_adapter(matrix, adapter)


def matrix_of(module: nn.Module, plain: Plain, states: torch.Tensor) -> Matrix | None:
    """The weights of a linear layer for the kernel, or None where it isn't plain or its weights lie otherwise."""
    if not plain(module):
        return None
    if isinstance(module, QWenBitsLinear):
        return module.matrix(states.dtype)
    return numbers_matrix(cast(torch.Tensor, module._parameters["weight"]), module._parameters["bias"], states.dtype)


def takes_static_cache(model: Any) -> bool:
    """Whether a GPU takes a token of each row through the blocks by kernels, which are recorded, with a static cache
    too: there is nothing that compiling a `QWenModel` would save then.
    """
    weight = getattr(model.get_input_embeddings(), "weight", None)
    if not isinstance(weight, torch.Tensor) or not sdpa_is_torchs():
        return False
    states, blocks, config = weight.new_empty((1, 1, weight.shape[-1])), model.h, model.config
    if not runs_on(states) or not model.plain(blocks[0], blocks[0].attn):
        return False
    if not can_record(states.device) or not steps_may_come(blocks, states, config.rotary_dim, config.use_logn_attn):
        return False
    from .gpu_steps_qwen import are_plain

    return are_plain(blocks, model.plain, states, config.rotary_dim)


def _steps(
    native: ctypes.CDLL,
    layers: Any,
    shape: _Shape,
    states: torch.Tensor,
    cache: QWenCache,
    length: int,
    seen: torch.Tensor | None,
    position_embeddings: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None],
) -> torch.Tensor:
    rows, tokens = states.shape[:2]
    length += tokens
    chunk = (rows, shape.kv_heads, tokens, shape.size)
    for number, layer in enumerate(layers):
        keys, values = cast(QWenGrowingLayer, cache.layers[number]).make_room(states, chunk)
        layer.keys, layer.values = keys.data_ptr(), values.data_ptr()
        layer.key_row, layer.key_head, layer.key_token, _ = keys.stride()
        layer.value_row, layer.value_head, layer.value_token, _ = values.stride()
    states = states.clone(memory_format=torch.contiguous_format)
    cosine, sine, logn = position_embeddings
    cosine, sine = cosine.contiguous(), sine.contiguous()
    call = Call(
        ctypes.addressof(layers),
        *(None if tensor is None else tensor.data_ptr() for tensor in (states, cosine, sine, logn, seen)),
        *(len(layers), rows, tokens, states.shape[-1], shape.inner, shape.heads, shape.kv_heads, shape.size),
        *(cosine.shape[-1], length, *_strides(cosine, 1), *_strides(logn, 1), *_strides(seen, 2)),
        torch.get_num_threads(),
    )
    if getattr(native, f"qwen_steps_{DTYPES[states.dtype]}")(ctypes.byref(call)):
        raise MemoryError(f"No room for the scores of {length} keys: take a shorter text or a smaller batch.")
    return states


def _strides(tensor: torch.Tensor | None, tokens: int) -> tuple[int, int]:
    """From row to row, 0 where all share one, and from token to token, in a dimension of this number."""
    if tensor is None:
        return 0, 0
    return 0 if tensor.shape[0] == 1 else tensor.stride(0), tensor.stride(tokens)


def product_of_head(head: nn.Module, plain: Plain, states: torch.Tensor) -> torch.Tensor | None:
    """Logits, (B, T, E) -> (B, T, V), or None where the kernels can't tell."""
    native = kernels_for_any(states)
    matrix = None if native is None else matrix_of(head, plain, states)
    if native is None or matrix is None or matrix.columns != states.shape[-1]:
        return None
    return product(native, matrix, states)


def logits_of_head(head: nn.Module, plain: Plain, states: torch.Tensor) -> torch.Tensor:
    """Logits, (B, T, E) -> (B, T, V): by the kernels where they can tell, else by the head itself."""
    logits = product_of_head(used_of(head), plain, states)
    return projected(head, states) if logits is None else logits


def projected(linear: nn.Module, states: torch.Tensor) -> torch.Tensor:
    """A linear layer, (..., I) -> (..., O), by a quicker product than torch's where there is one."""
    result = product_of_linear(linear, states)
    return linear(states) if result is None else result


def product_of_linear(linear: nn.Module, states: torch.Tensor) -> torch.Tensor | None:
    """As `projected`, or None where the layer itself is to be called: by the kernels, or many by `wide_product`.

    So read prompts, and those whom `steps_of_blocks` leaves to the modules: other caches, an engine's texts laid end to
    end, a block that somebody hooks or an adapter is in. Not in training, where a checkpoint computes without gradients
    what it computes again with them.
    """
    native = None if linear.training else kernels_for_any(states)
    if native is not None and is_lora(linear):
        return _product_of_lora(native, linear, states)
    if not (native or is_widened(states)) or not is_bare(linear, nn.Linear):
        return None
    weight, bias = linear._parameters["weight"], linear._parameters["bias"]
    if native is None:
        return wide_product(states, cast(torch.Tensor, weight), bias)
    matrix = numbers_matrix(cast(torch.Tensor, weight), bias, states.dtype)
    return None if matrix is None or matrix.columns != states.shape[-1] else product(native, matrix, states)


def _product_of_lora(native: ctypes.CDLL, lora: Any, states: torch.Tensor) -> torch.Tensor | None:
    base, adapter = lora.base_layer, adapter_of(lora, states.dtype)
    if adapter is None or not is_bare(base, nn.Linear):
        return None
    matrix = numbers_matrix(base.weight, base.bias, states.dtype)
    if matrix is None or with_adapter(matrix, adapter) is None or matrix.columns != states.shape[-1]:
        return None
    return adapted_product(native, matrix, states) if matrix.adapter else product(native, matrix, states)
