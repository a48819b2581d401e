"""The attention implementations behind transformers' registry, their masks and their kernels.

A new one is a function with the arguments of `eager_attention_forward` and a line at the end of this file.
Shapes: B batch, H query heads, K key/value heads, T queries, S keys, D head size.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
from transformers import AttentionInterface, PreTrainedConfig
from transformers.cache_utils import Cache
from transformers.masking_utils import AttentionMaskInterface, create_causal_mask
from transformers.utils import is_flash_attn_2_available, logging
from transformers.utils.generic import is_flash_attention_requested

from .arguments_qwen import CACHE_NAME
from .plain_qwen import asks_for_sdpa
from .positions_qwen import packed_starts, text_starts
from .prompt_qwen import kernel_reads, prompt_attention

logger = logging.get_logger(__name__)

FLASH_IMPLEMENTATION = "qwen_varlen"
"""Name of `FlashSelfAttention` in transformers' registry, which claims every name with "flash" for its own kernels."""

LONE_QUERY_IMPLEMENTATION = "qwen_lone_query"
"""Name of the attention that takes the place of `sdpa` for a step of decoding on a CPU in half precision."""

PROMPT_IMPLEMENTATION = "qwen_prompt"
"""Name of the attention that takes the place of `sdpa` for many tokens on a CPU, see `prompt_qwen`."""

HALF_PRECISION = (torch.float16, torch.bfloat16)

_CHUNK_ELEMENTS = 2**20


def eager_attention_forward(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The documented attention behind the interface of transformers' registry.

    Args:
        module: owner of `_attn`; scale and dropout are its own.
        query: (B, H, T, D); key and value: (B, K, S, D).
        attention_mask: (B, 1, T or 1, S), additive or bool, or None.
        is_causal: False where a query may see keys behind it.

    Returns:
        output (B, T, H, D) and probabilities (B, H, T, S).
    """
    # Causality is no argument of the documented methods, which subclasses may have replaced.
    direction: dict[str, Any] = {"is_causal": False} if is_causal is False else {}
    key, value = repeat_kv(key, module.num_key_value_groups), repeat_kv(value, module.num_key_value_groups)
    if module.config.softmax_in_fp32:
        attn_output, attn_weights = module._upcast_and_reordered_attn(query, key, value, attention_mask, **direction)
        return attn_output.transpose(1, 2), attn_weights
    return module._attn(query, key, value, attention_mask, **direction)


def repeat_kv(states: torch.Tensor, groups: int) -> torch.Tensor:
    """Give each query head its key/value head, (B, K, S, D) -> (B, K * groups, S, D)."""
    return states if groups == 1 else states.repeat_interleave(groups, dim=1)


def mask_scores(scores: torch.Tensor, attention_mask: torch.Tensor | None, is_causal: bool = True) -> torch.Tensor:
    """Set the scores of invisible keys, (B, H, T, S), to the least finite number, so a row without any stays finite."""
    least = torch.finfo(scores.dtype).min
    allowed = allowed_pairs(attention_mask, scores.shape[-2], scores.shape[-1], scores.device, is_causal)
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        allowed = allowed & attention_mask
    elif attention_mask is not None:
        scores = (scores + attention_mask).clamp(min=least)
    return torch.where(allowed, scores, least)


def allowed_pairs(
    attention_mask: torch.Tensor | None,
    query_length: int,
    key_length: int,
    device: torch.device,
    is_causal: bool = True,
) -> torch.Tensor:
    """The documented causal mask, (1, 1, T, S) bool: queries are the last T of the S tokens; all of it if not causal.

    A mask with a row per query says by itself which keys are visible, even some behind the diagonal (a prefix that
    reads itself in both directions); a single query sees every key. So the diagonal is only drawn where it is missing.
    """
    complete = attention_mask is not None and attention_mask.shape[-2] == query_length
    allowed = torch.ones((query_length, key_length), dtype=torch.bool, device=device)
    if is_causal and query_length > 1 and not complete:
        allowed = allowed.tril(key_length - query_length)
    return allowed[None, None]


def lone_query_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of a single token, (B, H, 1, D) -> (B, 1, H, D), with scores and probabilities in float32.

    On a CPU nearly all the work of such a step is reading keys and values, for which torch's fused kernel takes three
    times as long in half precision. Here they become float32 a chunk at a time, small enough to stay in the processor's
    cache. Arguments as `eager_attention_forward`, without dropout.
    """
    _warn_of_attentions("sdpa", kwargs)
    rows, heads, _, size = query.shape
    kv_rows, length = rows * key.shape[1], key.shape[2]
    chunk = min(length, max(1, _CHUNK_ELEMENTS // (kv_rows * size)))
    room = query.new_empty((kv_rows, chunk, size), dtype=torch.float32)
    queries = (query.float() * module.scaling).reshape(kv_rows, -1, size)  # those that share a key head are one matrix
    scores = torch.cat([queries @ part.transpose(1, 2) for part in _in_float32(key, room)], dim=-1)
    if attention_mask is not None:
        scores = mask_scores(scores.view(rows, heads, 1, length), attention_mask).view_as(scores)
    parts = scores.softmax(dim=-1).split(chunk, dim=-1)
    output = sum(part @ values for part, values in zip(parts, _in_float32(value, room), strict=True))
    return cast(torch.Tensor, output).view(rows, 1, heads, size).type_as(query), None


def _in_float32(states: torch.Tensor, room: torch.Tensor) -> Iterator[torch.Tensor]:
    """Keys or values, (B, K, S, D), a chunk of S at a time, (B * K, chunk, D); each is written over the one before."""
    for part in states.flatten(0, 1).split(room.shape[1], dim=1):
        yield room[:, : part.shape[1]].copy_(part)


def flash_self_attention_forward(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cu_seq_lens_q: torch.Tensor | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """`FlashSelfAttention` behind the interface of transformers' registry; arguments as `eager_attention_forward`.

    Args:
        attention_mask: (B, tokens seen so far), 1 for real tokens, or None; shorter than S with a static cache.
        cu_seq_lens_q: starts of documents packed into the rows, laid end to end, (N + 1,) int32, or None.

    Raises:
        ValueError: `is_causal=False`.
    """
    if is_causal is False:
        raise ValueError(f"is_causal=False needs another attention than {FLASH_IMPLEMENTATION}: choose 'sdpa'.")
    _warn_of_attentions(FLASH_IMPLEMENTATION, kwargs)
    q, k, v = (states.transpose(1, 2) for states in (query, key, value))
    if attention_mask is not None:
        k, v = k[:, : attention_mask.shape[-1]], v[:, : attention_mask.shape[-1]]
        return module.core_attention_flash(q, k, v, attention_mask), None
    return module.core_attention_flash(q, k, v, cu_seqlens=cu_seq_lens_q), None


def padding_mask(
    batch_size: int, *, kv_length: int, attention_mask: torch.Tensor | None = None, **kwargs: Any
) -> torch.Tensor | None:
    """The mask that variable-length kernels take: (B, tokens seen so far), or None where each slot holds a token.

    Transformers' own flash mask is not used: before 5.23 it also drops the one that marks a static cache's slots.
    """
    if attention_mask is None or (attention_mask.shape[-1] == kv_length and bool(attention_mask.all())):
        return None
    return attention_mask[:, -kv_length:]


def varlen_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
) -> torch.Tensor:
    """Attention over texts laid end to end: flash-attn's kernel where it is installed, torch's own otherwise.

    Args:
        q: (sum of query lengths, H, D); k, v: (sum of key lengths, K, D), float16 or bfloat16 on CUDA.
        cu_seqlens_q, cu_seqlens_k: (B + 1,) int32, where each text starts.
        max_seqlen_q, max_seqlen_k: longest text.
        causal: the queries are the last tokens of their text and see nothing behind them.

    Raises:
        ValueError: tensors that no kernel takes, or dropout without flash-attn.
        ImportError: neither kernel is installed.
    """
    if not _is_flash_input(q):
        raise ValueError(
            f"Flash attention needs float16 or bfloat16 on a CUDA device, got {q.dtype} on {q.device}. Move or load "
            "the model so, or choose attn_implementation='sdpa'."
        )
    if is_flash_attn_2_available():
        from flash_attn import flash_attn_varlen_func

        lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        return flash_attn_varlen_func(q, k, v, *lengths, dropout_p, softmax_scale=softmax_scale, causal=causal)
    if dropout_p:
        raise ValueError(f"attn_pdrop={dropout_p} needs flash-attn: install it, or train with attn_pdrop=0 or 'sdpa'.")
    kernel, shares_heads = _torch_kernel()
    options: dict[str, Any] = {"scale": softmax_scale, "window_size": (-1, 0) if causal else (-1, -1)}
    if shares_heads:
        options["enable_gqa"] = q.shape[1] != k.shape[1]
    else:
        k, v = (states.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for states in (k, v))
    output = kernel(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **options)
    return cast(torch.Tensor, output)  # a pair only where more is asked for


def whole_row_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
    """Attention of rows that each are one text without padding, q (B, T, H, D), k and v (B, S, K, D) -> (B, T, H, D).

    Without flash-attn by torch's attention for such rows, where it can: on a Hopper GPU it takes less than half of the
    time of the kernel for texts of any length.

    Args:
        options: the last three arguments of `varlen_attention`.
    """
    if _is_fused(q, k, v, options):
        attend, shared = torch.nn.functional.scaled_dot_product_attention, q.shape[2] != k.shape[2]
        scale, causal = options["softmax_scale"], options["causal"]
        q, k, v = (states.transpose(1, 2) for states in (q, k, v))
        return attend(q, k, v, is_causal=causal, scale=scale, enable_gqa=shared).transpose(1, 2).contiguous()
    starts_q, starts_k = (text_starts(x.new_full(x.shape[:1], x.shape[1], dtype=torch.int32)) for x in (q, k))
    flat_q, flat_k, flat_v = (x.flatten(0, 1) for x in (q, k, v))
    output = varlen_attention(flat_q, flat_k, flat_v, starts_q, starts_k, q.shape[1], k.shape[1], **options)
    return output.view_as(q)


def _is_fused(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: Mapping[str, Any]) -> bool:
    """Whether torch's attention would take whole rows by one of its flash kernels, and mean the same by `causal`."""
    if not _is_flash_input(q) or options["dropout_p"] or is_flash_attn_2_available():
        return False
    if options["causal"] and q.shape[1] != k.shape[1]:  # torch counts from the first key
        return False
    shared = q.shape[2] != k.shape[2]
    q, k, v = (states.transpose(1, 2) for states in (q, k, v))
    given = torch.backends.cuda.SDPAParams(q, k, v, None, 0.0, options["causal"], shared)
    return torch.backends.cuda.can_use_flash_attention(given) or torch.backends.cuda.can_use_cudnn_attention(given)


def padded_varlen_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kept_k: torch.Tensor, **options: Any
) -> torch.Tensor:
    """`varlen_attention` of padded rows, q (B, T, H, D), k and v (B, S, K, D) -> (B, T, H, D), zero at padding.

    Args:
        kept_k: (B, S) bool, which keys are no padding; the queries are the last T of them.
        options: the last three arguments of `varlen_attention`.
    """
    kept_q = kept_k[:, k.shape[1] - q.shape[1] :]
    starts = text_starts(kept_q.sum(-1)), text_starts(kept_k.sum(-1))
    output = torch.zeros_like(q)
    output[kept_q] = varlen_attention(q[kept_q], k[kept_k], v[kept_k], *starts, q.shape[1], k.shape[1], **options)
    return output


def _is_flash_input(q: torch.Tensor) -> bool:
    return q.is_cuda and q.dtype in HALF_PRECISION


def _torch_kernel() -> tuple[Callable, bool]:
    """torch's kernel for texts laid end to end, and whether query heads may share key heads in it (torch 2.13).

    Raises:
        ImportError: there is none, or one that can't be causal.
    """
    try:
        from torch.nn.attention.varlen import varlen_attn

        takes = inspect.signature(varlen_attn).parameters
        if "window_size" not in takes:
            raise ImportError("its varlen_attn has no window_size")
    except ImportError as error:
        raise ImportError("FlashSelfAttention needs flash-attn >= 2.1 or torch >= 2.11: install either.") from error
    return varlen_attn, "enable_gqa" in takes


def _warn_of_attentions(implementation: str, kwargs: dict[str, Any]) -> None:
    """Say, as transformers' own functions do, that this one has no probabilities to give."""
    if kwargs.get("output_attentions"):
        logger.warning_once(
            f"`{implementation}` attention does not support `output_attentions=True`. Please set your attention to "
            "`eager` if you want any of these features."
        )


def choose_implementation(module: Any, query: torch.Tensor, cache: Any) -> str:
    """The attention that the configuration of a module asks for, or on a CPU a quicker one for what `sdpa` would do.

    Args:
        query: (B, H, T, D).
        cache: of this call, or an engine's, or None.
    """
    implementation: str = module.config._attn_implementation
    # Before transformers 5.24 the attention itself adds to an engine's cache. Compiled, pieces are computed one by one,
    # over all of a static cache.
    unread = CACHE_NAME != "cache" and cache is not None and not isinstance(cache, Cache)
    if not asks_for_sdpa(module.config) or torch.compiler.is_compiling() or unread:
        return implementation
    trained = module.training or query.requires_grad and torch.is_grad_enabled()
    if not trained and query.shape[2] == 1 and query.device.type == "cpu" and query.dtype in HALF_PRECISION:
        return LONE_QUERY_IMPLEMENTATION
    return PROMPT_IMPLEMENTATION if kernel_reads(query) else implementation


def mask_of_call(
    config: PreTrainedConfig,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor,
    cache: Any,
    inputs_embeds: torch.Tensor,
    arguments: dict[str, Any],
) -> Any:
    """The mask of a call in the form that the configured attention takes, by transformers' registry of masks.

    Args:
        attention_mask, position_ids, inputs_embeds: of the call.
        cache: given to the call, transformers' own or an engine's, or None. Not one that the model makes for it: with
            a cache, nobody looks for documents packed into a row any more.
        arguments: of the call beside these; gets `cu_seq_lens_q`, where the variable-length kernel reads packed rows.
    """
    own_cache = cache if isinstance(cache, Cache) else None
    mask = create_causal_mask(
        config,
        inputs_embeds,
        _mark_filled(config, attention_mask, own_cache, inputs_embeds, arguments.get("is_causal")),
        position_ids=position_ids,
        **{CACHE_NAME: cache if CACHE_NAME == "cache" else own_cache},
    )
    if config._attn_implementation == FLASH_IMPLEMENTATION and cache is mask is None:
        arguments.setdefault("cu_seq_lens_q", packed_starts(position_ids.expand(len(inputs_embeds), -1)))
    paged = "write_index" in arguments and isinstance(mask, torch.Tensor) and mask.is_floating_point()
    if paged and inputs_embeds.device.type == "cpu" and asks_for_sdpa(config):
        return mask == 0  # which torch takes as well, and the kernels alone
    return mask


def _mark_filled(
    config: PreTrainedConfig,
    attention_mask: torch.Tensor | None,
    cache: Cache | None,
    inputs_embeds: torch.Tensor,
    is_causal: bool | None,
) -> torch.Tensor | None:
    """A mask over the filled slots of a static cache, where flash kernels or no causality show the empty ones."""
    if attention_mask is not None or cache is None or not cache.is_compileable:
        return attention_mask
    flash = config._attn_implementation == FLASH_IMPLEMENTATION or is_flash_attention_requested(config)
    if not flash and is_causal is not False:
        return None
    rows, length = inputs_embeds.shape[:2]
    return inputs_embeds.new_ones((rows, int(cache.get_seq_length()) + length), dtype=torch.bool)


AttentionInterface.register(PROMPT_IMPLEMENTATION, prompt_attention)
AttentionInterface.register(LONE_QUERY_IMPLEMENTATION, lone_query_attention)
AttentionInterface.register(FLASH_IMPLEMENTATION, flash_self_attention_forward)
AttentionMaskInterface.register(FLASH_IMPLEMENTATION, padding_mask)
