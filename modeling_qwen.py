"""The QWen (Qwen-1) model: norm, rotary embedding with NTK and LogN, attention, MLP, block, model and heads.

Shapes: B batch, T query length, S key length, H heads, K key/value heads, D head size, R rotated channels of a head,
E width of the residual stream, V rows of the vocabulary.

Source: `qwen-7b.md` for names, signatures and arithmetic; `golden/model` for the numbers.
"""

from __future__ import annotations

from .versions_qwen import check_versions as check_versions  # first: older versions lack what follows

# isort: split

import copy
import inspect
import math
import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.masking_utils import AttentionMaskInterface, create_causal_mask
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import QuestionAnsweringModelOutput, TokenClassifierOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import can_return_tuple, is_flash_attn_2_available, logging
from transformers.utils.generic import is_flash_attention_requested, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .arguments_qwen import (
    CACHE_NAME,
    CACHE_NAMES,
    KNOWN_ARGUMENTS,
    QWenCausalLMOutput,
    QWenModelOutput,
    QWenSequenceClassifierOutput,
    cache_argument,
    check_arguments,
    engine_of,
    one_cache,
    without_resume_download,
)
from .cache_qwen import QWenCache, QWenInt8Cache, give_ntk_alpha, is_exporting, resolve_ntk_alpha, set_ntk_alpha
from .configuration_qwen import QWenConfig, RotaryScaling
from .engines_qwen import engine_alpha

# Published here too; and transformers 5.4 takes along only those files of a local folder that this one names.
from .fingerprint_qwen import fingerprint as fingerprint
from .generation_qwen import QWenGenerationMixin
from .kept_qwen import KeptCache as KeptCache
from .loading_qwen import check_packages
from .logits_qwen import QWenTrainingOutput, UnreadLogits
from .loss_qwen import head_loss, holds_its_weight
from .peft_qwen import ChatAdapterMixin
from .qwen_generation_utils import decode_tokens as decode_tokens
from .qwen_generation_utils import get_stop_words_ids as get_stop_words_ids
from .qwen_generation_utils import make_context as make_context
from .saving_qwen import saved_as_published
from .shards_qwen import gather_weights, needs_gathering
from .tools_qwen import ToolResult as ToolResult

logger = logging.get_logger(__name__)

FLASH_IMPLEMENTATION = "qwen_varlen"
"""Name of `FlashSelfAttention` in transformers' registry, which claims every name with "flash" for its own kernels."""

LONE_QUERY_IMPLEMENTATION = "qwen_lone_query"
"""Name of the attention that takes the place of `sdpa` for a step of decoding on a CPU in half precision."""

_HALF_PRECISION = (torch.float16, torch.bfloat16)
_CHUNK_ELEMENTS = 2**20
_NTK_BANDS = 32


class RMSNorm(nn.Module):
    """Root mean square norm, computed in float32 and rounded to the input's dtype before the weight.

    Args:
        dim: size of the last dimension.
        eps: added to the mean square.
    """

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def _norm(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.rms_norm(x, x.shape[-1:], eps=self.eps)

    def _scaled(self, x: torch.Tensor) -> torch.Tensor:
        return self._norm(x.float()).type_as(x) * self.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., dim) -> (..., dim), same dtype."""
        if x.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # Quickly done again in the backward pass, for which it would keep a float32 copy and a half of its input.
            return checkpoint(self._scaled, x, use_reentrant=False, preserve_rng_state=False)
        return self._scaled(x)

    def extra_repr(self) -> str:
        """Size and epsilon, for `print(model)`."""
        return f"{self.weight.shape[0]}, eps={self.eps}"


def ntk_alpha(lengths: torch.Tensor, seq_length: int) -> torch.Tensor:
    """Stretch of the rotary base for prompts of the given lengths, float32 of the same shape.

    alpha = max(2 ** (ceil(log2(length / seq_length)) + 1) - 1, 1), counted in whole numbers so that a length exactly
    at a power of two can't fall on the wrong side. With seq_length 2048: 2048 -> 1, 2049 -> 3, 4096 -> 3, 4097 -> 7.

    Source: `what-users-hit.md`, "Long context, exactly".
    """
    bands = seq_length * 2 ** torch.arange(_NTK_BANDS, device=lengths.device)
    exceeded = (lengths[..., None] > bands).sum(-1)
    return 2.0 ** (exceeded + 1).float() - 1.0


def prompt_lengths(position_ids: torch.Tensor) -> torch.Tensor:
    """Length of the text that each token was prefilled with, (B, T) -> (B, T), from its position alone.

    Positions that count up by one form one text; left padding and documents packed into one row start new ones. A
    text that starts behind position 0 continues tokens that were read earlier: its prompt is what came before.
    """
    if position_ids.shape[-1] == 1:  # each step of decoding
        return position_ids.clamp(min=1)
    first, last = _text_bounds(position_ids)
    return torch.where(first == 0, last + 1, first)


def text_lengths(position_ids: torch.Tensor) -> torch.Tensor:
    """Length of the text of each token up to the end of this call, (B, T) -> (B, T); texts as in `prompt_lengths`."""
    return position_ids + 1 if position_ids.shape[-1] == 1 else _text_bounds(position_ids)[1] + 1


def _text_bounds(position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """First and last position of the text of each token, both (B, T)."""
    # Without a piece that is a token shorter, which would keep an exported program from reading two tokens.
    restarts = position_ids != position_ids.roll(1, -1) + 1
    text = restarts.cumsum(-1) - restarts[:, :1].long()  # (B, T) index of the text within its row
    first = torch.zeros_like(position_ids).scatter_reduce(-1, text, position_ids, "amin", include_self=False)
    last = torch.zeros_like(position_ids).scatter_reduce(-1, text, position_ids, "amax", include_self=False)
    return first.gather(-1, text), last.gather(-1, text)


def dynamic_alpha(lengths: torch.Tensor, scaling: RotaryScaling) -> torch.Tensor:
    """Stretch of the rotary base by transformers' "dynamic" scaling for texts of the given lengths, float32.

    alpha = factor * length / L - (factor - 1) beyond L = `scaling.length`, else 1. It agrees with `ntk_alpha` where
    factor is 2 and length / L a power of two, and has no steps between.
    """
    alpha = scaling.factor * lengths.float() / scaling.length - (scaling.factor - 1.0)
    return torch.where(lengths > scaling.length, alpha, 1.0)


def yarn_frequencies(periods: torch.Tensor, base: float, scaling: RotaryScaling) -> torch.Tensor:
    """Frequencies under YaRN, (R / 2,) -> (R / 2,) float32; `periods` are base^(2 i / R).

    Channels that turn often within the trained length keep their frequency, slow ones have it divided by the factor,
    and a ramp lies between.
    """
    dim = 2 * periods.shape[-1]

    def channel(turns: float) -> float:
        return dim * math.log(scaling.length / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = channel(scaling.beta_fast), channel(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # as transformers does
    channels = torch.arange(dim // 2, device=periods.device, dtype=torch.float32)
    kept = 1.0 - ((channels - low) / (high - low)).clamp(0, 1)
    return 1.0 / (scaling.factor * periods) * (1.0 - kept) + 1.0 / periods * kept


def logn_scale(position_ids: torch.Tensor, seq_length: int) -> torch.Tensor:
    """LogN factor of queries, (B, T) -> (B, T, 1, 1) float32: max(1, log(position + 1) / log(seq_length))."""
    counted = (position_ids + 1).clamp(min=seq_length).float()
    return (counted.log() / math.log(seq_length))[..., None, None]


def positions_from_mask(attention_mask: torch.Tensor, length: int) -> torch.Tensor:
    """True positions of the last `length` tokens under a padding mask, (B, S) -> (B, length); padding gets 0."""
    positions = attention_mask.long().cumsum(-1) - 1  # (B, S)
    return positions.clamp(min=0)[:, -length:]


class RotaryEmbedding(nn.Module):
    """Rotary angles; stateless, so that requests in flight at once never see each other.

    Args:
        dim: number of rotated channels R, even.
        base: base of the frequencies.
        scaling: how they are changed for long texts, None for not at all.
    """

    def __init__(self, dim: int, base: float = 10000, scaling: RotaryScaling | None = None):
        super().__init__()
        self.dim = dim
        self.base = base
        self.scaling = scaling or RotaryScaling("default", 1.0, 0)

    def forward(
        self, max_seq_len: int, offset: int = 0, ntk_alpha: float = 1.0, device: torch.device | None = None
    ) -> torch.Tensor:
        """Angles of the positions `offset` … `offset + max_seq_len - 1`, (1, max_seq_len, 1, R) float32."""
        positions = torch.arange(offset, offset + max_seq_len, device=device)[None]
        return self.angles(positions, torch.full((1, 1), float(ntk_alpha), device=device))

    def angles(self, position_ids: torch.Tensor, alpha: torch.Tensor | None = None) -> torch.Tensor:
        """Angles at any positions, (B, T) with alpha (B, T), (B, 1) or None for 1 -> (B, T, 1, R) float32.

        "dynamic" scaling chooses alpha itself, for the length that each text has at the end of this call; keys that
        are in a cache keep theirs, as in transformers.
        """
        if self.scaling.kind == "dynamic":
            alpha = dynamic_alpha(text_lengths(position_ids), self.scaling)
        exponents = torch.arange(0, self.dim, 2, device=position_ids.device).float() / self.dim
        periods = self.base**exponents if alpha is None else self._stretched_base(alpha)[..., None] ** exponents
        if self.scaling.kind == "yarn":
            inv_freq = yarn_frequencies(periods, self.base, self.scaling)
        else:
            inv_freq = 1.0 / periods
        if self.scaling.kind == "linear":
            inv_freq = inv_freq / self.scaling.factor
        freqs = position_ids[..., None].float() * inv_freq  # (B, T, R / 2)
        return torch.cat((freqs, freqs), dim=-1)[:, :, None, :]

    def cos_sin(
        self, position_ids: torch.Tensor, alpha: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine of `angles`, which YaRN makes larger."""
        angles, factor = self.angles(position_ids, alpha), self.scaling.attention_factor
        return (angles.cos(), angles.sin()) if factor == 1.0 else (angles.cos() * factor, angles.sin() * factor)

    def _stretched_base(self, alpha: torch.Tensor) -> torch.Tensor:
        # The documents compute this in Python floats; only Apple's devices have no float64.
        exact = torch.float32 if alpha.device.type == "mps" else torch.float64
        return (self.base * alpha.to(exact) ** (self.dim / (self.dim - 2))).float()


def _rotate_half(x: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def apply_rotary_pos_emb(t: torch.Tensor, freqs: torch.Tensor | tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Rotate the first R channels of each head in float32 and round back.

    Args:
        t: queries or keys, (B, T, H, D).
        freqs: angles, (B or 1, T, 1, R), or their cosine and sine.
    """
    cos, sin = (freqs.cos(), freqs.sin()) if isinstance(freqs, torch.Tensor) else freqs
    channels = cos.shape[-1]
    rotated = t[..., :channels].float()
    rotated = (rotated * cos + _rotate_half(rotated) * sin).type_as(t)
    return rotated if channels == t.shape[-1] else torch.cat((rotated, t[..., channels:]), dim=-1)


def repeat_kv(states: torch.Tensor, groups: int) -> torch.Tensor:
    """Give each query head its key/value head, (B, K, S, D) -> (B, K * groups, S, D)."""
    return states if groups == 1 else states.repeat_interleave(groups, dim=1)


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


def mask_scores(scores: torch.Tensor, attention_mask: torch.Tensor | None, is_causal: bool = True) -> torch.Tensor:
    """Set the scores of invisible keys, (B, H, T, S), to the least finite number, so a row without any stays finite."""
    least = torch.finfo(scores.dtype).min
    allowed = allowed_pairs(attention_mask, scores.shape[-2], scores.shape[-1], scores.device, is_causal)
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        allowed = allowed & attention_mask
    elif attention_mask is not None:
        scores = (scores + attention_mask).clamp(min=least)
    return torch.where(allowed, scores, least)


def eager_attention_forward(
    module: QWenAttention,
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


def lone_query_attention(
    module: QWenAttention,
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


def _warn_of_attentions(implementation: str, kwargs: dict[str, Any]) -> None:
    """Say, as transformers' own functions do, that this one has no probabilities to give."""
    if kwargs.get("output_attentions"):
        logger.warning_once(
            f"`{implementation}` attention does not support `output_attentions=True`. Please set your attention to "
            "`eager` if you want any of these features."
        )


AttentionInterface.register(LONE_QUERY_IMPLEMENTATION, lone_query_attention)


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
    if not q.is_cuda or q.dtype not in _HALF_PRECISION:
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


class FlashSelfAttention(nn.Module):
    """Scaled dot product attention through a variable-length flash kernel.

    The documented code drops causality whenever query and key lengths differ, which lets several tokens on a cache see
    their future; here `causal` always holds, with the queries as the last tokens of the keys.

    Args:
        causal: a query sees no key behind it.
        softmax_scale: factor of the scores; None means 1 / sqrt(D).
        attention_dropout: dropout probability of the attention weights, while training only.
    """

    def __init__(self, causal: bool = False, softmax_scale: float | None = None, attention_dropout: float = 0.0):
        super().__init__()
        self.causal = causal
        self.softmax_scale = softmax_scale
        self.dropout_p = attention_dropout

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend q (B, T, H, D) to k, v (B, S, K, D) -> (B, T, H, D).

        Args:
            attention_mask: (B, S), true or 1 for real keys; outputs of padded queries are zero.
            cu_seqlens: (N + 1,) int32, starts of documents packed into the rows, laid end to end; excludes a mask.

        Raises:
            ValueError: as `varlen_attention`.
        """
        if attention_mask is not None:
            return self._attend_padded(q, k, v, attention_mask.bool())
        if cu_seqlens is None:
            starts_q, starts_k = (_starts(x.new_full(x.shape[:1], x.shape[1], dtype=torch.int32)) for x in (q, k))
            longest_q, longest_k = q.shape[1], k.shape[1]
        else:
            starts_q = starts_k = cu_seqlens
            longest_q = longest_k = int(cu_seqlens.diff().max())
        flat_q, flat_k, flat_v = (x.flatten(0, 1) for x in (q, k, v))
        return self._run_kernel(flat_q, flat_k, flat_v, starts_q, starts_k, longest_q, longest_k).view_as(q)

    def _attend_padded(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kept_k: torch.Tensor) -> torch.Tensor:
        kept_q = kept_k[:, k.shape[1] - q.shape[1] :]
        starts_q, starts_k = _starts(kept_q.sum(-1)), _starts(kept_k.sum(-1))
        output = torch.zeros_like(q)
        output[kept_q] = self._run_kernel(q[kept_q], k[kept_k], v[kept_k], starts_q, starts_k, q.shape[1], k.shape[1])
        return output

    def _run_kernel(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        starts_q: torch.Tensor,
        starts_k: torch.Tensor,
        longest_q: int,
        longest_k: int,
    ) -> torch.Tensor:
        return varlen_attention(
            q,
            k,
            v,
            starts_q,
            starts_k,
            longest_q,
            longest_k,
            dropout_p=self.dropout_p if self.training else 0.0,
            softmax_scale=self.softmax_scale,
            causal=self.causal,
        )


def _starts(lengths: torch.Tensor) -> torch.Tensor:
    """Where each of the texts laid end to end starts, (B,) -> (B + 1,) int32."""
    return nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)


def packed_starts(position_ids: torch.Tensor) -> torch.Tensor | None:
    """Where texts start with the rows laid end to end, (B, T) -> (N + 1,) int32; None where each row is one text."""
    restarts = torch.ones_like(position_ids, dtype=torch.bool)
    restarts[:, 1:] = position_ids.diff() != 1
    starts = restarts.flatten().nonzero().flatten()
    if len(starts) == len(position_ids):
        return None
    return nn.functional.pad(starts, (0, 1), value=position_ids.numel()).to(torch.int32)


def flash_self_attention_forward(
    module: QWenAttention,
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


AttentionInterface.register(FLASH_IMPLEMENTATION, flash_self_attention_forward)
AttentionMaskInterface.register(FLASH_IMPLEMENTATION, padding_mask)


class QWenAttention(nn.Module):
    """Causal self-attention with rotary positions.

    Args:
        config: shape and switches.
        layer_number: index of the layer in a cache, from 0; None means 0.
    """

    def __init__(self, config: QWenConfig, layer_number: int | None = None):
        super().__init__()
        self.config = config
        self.layer_idx = 0 if layer_number is None else layer_number
        self.hidden_size = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.num_key_value_heads = config.num_key_value_heads
        self.num_key_value_groups = self.num_heads // self.num_key_value_heads
        self.head_dim = config.kv_channels
        self.projection_size = self.num_heads * self.head_dim
        self.kv_projection_size = self.num_key_value_heads * self.head_dim
        self.is_causal = True
        self.scale_attn_weights = config.scale_attn_weights
        self.scaling = self.head_dim**-0.5 if self.scale_attn_weights else 1.0

        self.c_attn = nn.Linear(self.hidden_size, self.projection_size + 2 * self.kv_projection_size)
        self.c_proj = nn.Linear(self.projection_size, self.hidden_size, bias=not config.no_bias)
        self.c_proj.is_residual_projection = True  # type: ignore[assignment]
        self.attn_dropout = nn.Dropout(config.attn_pdrop)
        self.core_attention_flash = FlashSelfAttention(
            causal=True, softmax_scale=self.scaling, attention_dropout=config.attn_pdrop
        )

    def _attn(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        head_mask: torch.Tensor | None = None,
        is_causal: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention in the dtype of its inputs.

        Args:
            query: (B, H, T, D); key and value: (B, H, S, D), the queries being the last T of the S tokens.
            attention_mask: (B, 1, T or 1, S), additive or bool.
            head_mask: broadcast onto the probabilities.
            is_causal: whether a query sees no key behind it.

        Returns:
            output (B, T, H, D) and probabilities (B, H, T, S).
        """
        attn_weights = torch.matmul(query, key.transpose(-1, -2))
        if self.scale_attn_weights:
            attn_weights = attn_weights / value.size(-1) ** 0.5
        attn_weights = mask_scores(attn_weights, attention_mask, is_causal).softmax(dim=-1)
        attn_weights = self._drop_heads(attn_weights.type(value.dtype), head_mask)
        return torch.matmul(attn_weights, value).transpose(1, 2), attn_weights

    def _upcast_and_reordered_attn(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        head_mask: torch.Tensor | None = None,
        is_causal: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `_attn`, with scores and softmax in float32; the output stays (B, H, T, D), as documented."""
        batch, heads, query_length, size = query.shape
        key_length = key.shape[-2]
        scale = 1.0 / size**0.5 if self.scale_attn_weights else 1.0
        with torch.autocast(query.device.type, enabled=False):
            attn_weights = torch.baddbmm(
                query.new_empty((batch * heads, query_length, key_length), dtype=torch.float32),
                query.reshape(-1, query_length, size).float(),
                key.transpose(-1, -2).reshape(-1, size, key_length).float(),
                beta=0,
                alpha=scale,
            ).view(batch, heads, query_length, key_length)
        attn_weights = mask_scores(attn_weights, attention_mask, is_causal).softmax(dim=-1)
        attn_weights = self._drop_heads(attn_weights.type(value.dtype), head_mask)
        return torch.matmul(attn_weights, value), attn_weights

    def _drop_heads(self, attn_weights: torch.Tensor, head_mask: torch.Tensor | None) -> torch.Tensor:
        attn_weights = self.attn_dropout(attn_weights)
        return attn_weights if head_mask is None else attn_weights * head_mask

    def _split_heads(self, tensor: torch.Tensor, num_heads: int, attn_head_size: int) -> torch.Tensor:
        """(..., num_heads * attn_head_size) -> (..., num_heads, attn_head_size)."""
        return tensor.view(*tensor.shape[:-1], num_heads, attn_head_size)

    def _merge_heads(self, tensor: torch.Tensor, num_heads: int, attn_head_size: int) -> torch.Tensor:
        """(..., num_heads, attn_head_size) -> (..., num_heads * attn_head_size)."""
        return tensor.contiguous().view(*tensor.shape[:-2], num_heads * attn_head_size)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(B, T, E) -> (B, T, E) and, under eager, the probabilities (B, H, T, S).

        Args:
            position_embeddings: cosine and sine (B or 1, T, 1, R), LogN factor (B or 1, T, 1, 1) or None.
            attention_mask: in the form that the attention implementation takes.
            past_key_values, cache: cache that this call's keys and values are added to, under either name.
        """
        query, key, value = self.c_attn(hidden_states).split(
            (self.projection_size, self.kv_projection_size, self.kv_projection_size), dim=-1
        )
        query = self._split_heads(query, self.num_heads, self.head_dim)
        key = self._split_heads(key, self.num_key_value_heads, self.head_dim)
        if value.requires_grad:
            value = value.contiguous()  # what is kept for the backward pass would hold all three parts of the product
        value = self._split_heads(value, self.num_key_value_heads, self.head_dim)

        cos, sin, logn = position_embeddings
        query, key = apply_rotary_pos_emb(query, (cos, sin)), apply_rotary_pos_emb(key, (cos, sin))
        if logn is not None:
            query = query * logn.type_as(query)

        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)  # (B, H | K, T, D)
        held = one_cache(past_key_values, cache)
        paged = held is not None and not isinstance(held, Cache)
        if paged and CACHE_NAME != "cache":
            kwargs["cache"] = held  # the attention implementation adds to it
        elif paged:
            key, value = held.update(key, value, self.layer_idx, kwargs=kwargs)
        elif held is not None:
            key, value = held.update(key, value, self.layer_idx)

        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self._choose_implementation(query, paged), eager_attention_forward
        )
        attn_output, attn_weights = attention_interface(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attn_dropout.p if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        # Engines such as vLLM return (B * T, H * D).
        attn_output = attn_output.reshape(*hidden_states.shape[:-1], self.num_heads, self.head_dim)
        return self.c_proj(self._merge_heads(attn_output, self.num_heads, self.head_dim)), attn_weights

    def _choose_implementation(self, query: torch.Tensor, paged: bool) -> str:
        """The configured attention, except for a single token on a CPU in half precision, (B, H, T, D)."""
        implementation = self.config._attn_implementation
        quick = implementation == "sdpa" and query.device.type == "cpu" and query.dtype in _HALF_PRECISION
        alone = query.shape[2] == 1 and not paged  # such a cache holds several texts in a row
        trained = self.training or query.requires_grad and torch.is_grad_enabled()
        # Compiled, the chunks are copied one by one, over all the room of a static cache.
        by_chunks = quick and alone and not trained and not torch.compiler.is_compiling()
        return LONE_QUERY_IMPLEMENTATION if by_chunks else implementation


class QWenMLP(nn.Module):
    """SwiGLU: `w2` is the gate, `w1` the up projection, each half of `ffn_hidden_size` wide."""

    def __init__(self, config: QWenConfig):
        super().__init__()
        width, bias = config.ffn_hidden_size // 2, not config.no_bias
        self.w1 = nn.Linear(config.hidden_size, width, bias=bias)
        self.w2 = nn.Linear(config.hidden_size, width, bias=bias)
        self.c_proj = nn.Linear(width, config.hidden_size, bias=bias)
        self.c_proj.is_residual_projection = True  # type: ignore[assignment]
        self.act_fn = nn.SiLU()

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, T, E) -> (B, T, E)."""
        return self.c_proj(self.act_fn(self.w2(hidden_states)) * self.w1(hidden_states))


class QWenBlock(GradientCheckpointingLayer):
    """One layer: attention and MLP, each behind a norm, each added to the residual stream."""

    def __init__(self, config: QWenConfig, layer_idx: int | None = None):
        super().__init__()
        self.ln_1 = RMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.attn = QWenAttention(config, layer_number=layer_idx)
        self.ln_2 = RMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.mlp = QWenMLP(config)
        self.apply_residual_connection_post_layernorm = config.apply_residual_connection_post_layernorm

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """(B, T, E) -> (B, T, E); keyword arguments as `QWenAttention.forward`."""
        normed = self.ln_1(hidden_states)
        residual = normed if self.apply_residual_connection_post_layernorm else hidden_states
        hidden_states = residual + self.attn(normed, **kwargs)[0]

        normed = self.ln_2(hidden_states)
        residual = normed if self.apply_residual_connection_post_layernorm else hidden_states
        return residual + self.mlp(normed)


class QWenPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation of every QWen class."""

    config: QWenConfig
    config_class = QWenConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["QWenBlock"]
    _skip_keys_device_placement = list(CACHE_NAMES)
    _input_embed_layer = "wte"
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": QWenBlock, "attentions": QWenAttention}

    def __init__(self, config: QWenConfig, *args: Any, **kwargs: Any):
        config.check_values()  # it may have been changed since it was made
        if config.softmax_in_fp32:
            if config._attn_implementation is None:
                config._attn_implementation = "eager"
            elif config._attn_implementation != "eager":
                logger.warning_once(
                    f"softmax_in_fp32=True has no effect with attn_implementation='{config._attn_implementation}': "
                    "it is a switch of 'eager'."
                )
        super().__init__(config, *args, **kwargs)

    @property
    def _can_compile_fullgraph(self) -> bool:  # type: ignore[override]
        # Variable-length kernels need lengths that only the values of a mask tell.
        return self.config._attn_implementation != FLASH_IMPLEMENTATION

    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, RMSNorm):
            init.ones_(module.weight)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, mean=0.0, std=std)
        elif isinstance(module, nn.Linear):
            # Each layer adds twice to the residual stream, so its variance would grow with depth (GPT-2's scheme).
            depth = 2 * self.config.n_layer if getattr(module, "is_residual_projection", False) else 1
            init.normal_(module.weight, mean=0.0, std=std / math.sqrt(depth))
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, QWenModel):
            init.ones_(module.program_alpha)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, config=None, **kwargs):
        """As in transformers, with the published flags, in the configuration or as arguments.

        `bf16`, `fp16` or `fp32` choose the dtype, `use_flash_attn` the attention implementation. An argument wins over
        the configuration, and an explicit `dtype` or `attn_implementation` over both.

        - `use_flash_attn=False`, float32 or no CUDA device: transformers' default, `sdpa`.
        - `"auto"`: `flash_attention_2` where flash-attn is installed, else `sdpa`.
        - `True`: `flash_attention_2` where flash-attn is installed, else `qwen_varlen`; a warning where neither runs.
        - `softmax_in_fp32=True`: `eager`, the only implementation with that switch.

        Raises:
            ValueError: two of the precision flags contradict each other.
            ImportError: weights in few bits, and the packages that read them are not installed.
        """
        kwargs = without_resume_download(kwargs)
        flags = {name: kwargs.pop(name) for name in _LOAD_FLAGS if name in kwargs}
        if isinstance(config, PreTrainedConfig):
            config = effective = copy.deepcopy(config)
            config.override(flags)
            flags = {}
        else:
            hub = {name: kwargs[name] for name in _HUB_ARGUMENTS if name in kwargs}
            effective = cls.config_class.from_pretrained(config or pretrained_model_name_or_path, **hub, **flags)
        check_packages(kwargs.get("quantization_config") or getattr(effective, "quantization_config", None))
        precision = effective.precision_flag()
        if kwargs.get("dtype") is None and kwargs.get("torch_dtype") is None and precision is not None:
            kwargs["dtype"] = _DTYPES[precision]
        free = kwargs.get("attn_implementation") is None and effective._attn_implementation is None
        loaded = super().from_pretrained(pretrained_model_name_or_path, *model_args, config=config, **flags, **kwargs)
        if free:
            loaded_model = loaded[0] if isinstance(loaded, tuple) else loaded  # with output_loading_info
            loaded_model._apply_flash_flag()
        return loaded

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, torch.Tensor] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """As in transformers, with the code of the published class, even if FSDP2 or a program derived another.

        A precision flag, where one is set, becomes that of the weights saved. Weights that FSDP2 has in shards are put
        together, unless they come in `state_dict`: then every process has to call this method, and the first one
        writes.

        Raises:
            NotADirectoryError: there is a file of that name.
        """
        if os.path.isfile(save_directory):
            raise NotADirectoryError(f"{os.fspath(save_directory)} is a file: name a folder to save into.")
        if state_dict is None and not kwargs.get("distributed_checkpoint") and needs_gathering(self):
            state_dict = gather_weights(self)
            if torch.distributed.get_rank() != 0:
                return
        if self.config.precision_flag() is not None:
            for flag, dtype in _DTYPES.items():
                setattr(self.config, flag, self.dtype == dtype)
        with saved_as_published(self, __name__):
            super().save_pretrained(save_directory, is_main_process, state_dict, *args, **kwargs)

    def _apply_flash_flag(self) -> None:
        """Choose the attention that `use_flash_attn` asks for, now that the dtype of the weights is known."""
        wanted = self.config.use_flash_attn and not self.config.softmax_in_fp32
        if not wanted:
            return
        if self.dtype in _HALF_PRECISION and torch.cuda.is_available():
            if is_flash_attn_2_available():
                self.set_attn_implementation("flash_attention_2")
            elif self.config.use_flash_attn is True:
                self.set_attn_implementation(FLASH_IMPLEMENTATION)
        elif self.config.use_flash_attn is True:
            logger.warning_once(
                "use_flash_attn=True needs a CUDA device and half precision (bf16=True or fp16=True); the dtype is "
                f"{self.dtype} here, so attention runs as 'sdpa'."
            )

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """As in transformers; the padded vocabulary, where the configuration counts one, follows."""
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        if self.config.padded_vocab_size is not None:
            self.config.padded_vocab_size = embeddings.num_embeddings
        return embeddings


_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_LOAD_FLAGS = (*_DTYPES, "use_flash_attn", "softmax_in_fp32")
_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


class QWenModel(QWenPreTrainedModel):
    """The stack of blocks without a head: token ids to hidden states."""

    # What early releases stored beside the weights. Not the head: vLLM, which puts one of its own onto this class,
    # would leave it unloaded.
    _keys_to_ignore_on_load_unexpected = [r"\.attn\.(masked_)?bias$", r"rotary_emb\.inv_freq$"]

    def __init__(self, config: QWenConfig):
        super().__init__(config)
        self.wte = nn.Embedding(config.embedding_rows, config.n_embd)
        self.drop = nn.Dropout(config.embd_pdrop)
        self.h = nn.ModuleList(QWenBlock(config, layer_idx) for layer_idx in range(config.n_layer))
        self.ln_f = RMSNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.rotary_emb = RotaryEmbedding(config.rotary_dim, config.rotary_emb_base, config.rotary_scaling)
        self.gradient_checkpointing = False
        self.program_alpha: torch.Tensor
        # Only a program that is exported together with a static cache writes to it, which lives in its buffers too.
        # Whole numbers, because a cast of the model leaves them alone.
        self.register_buffer("program_alpha", torch.ones((1, 1), dtype=torch.long), persistent=False)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        ntk_alpha: torch.Tensor | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> QWenModelOutput:
        """Hidden states of the last layer after the final norm, (B, T, E).

        Args:
            input_ids: (B, T); or `inputs_embeds`, (B, T, E).
            attention_mask: (B, tokens in the cache + T), 0 for padding; or any mask that transformers has prepared.
            position_ids: (B or 1, T); derived from the mask where absent, so that left padding needs nothing else.
            past_key_values, cache: cache to continue, under either name; it remembers the NTK alpha of each sequence.
            use_cache: return a cache, a new one where none is given.
            ntk_alpha: (B, 1), to use instead of the alpha that the length of the prompt asks for; kept by the cache.
                `generate` gives it; a program that is exported for texts beyond `seq_length` takes it as an input.
            kwargs: `arguments_qwen.KNOWN_ARGUMENTS`.

        Raises:
            ValueError: both or none of `input_ids` and `inputs_embeds`; two caches; mask or positions of other tokens.
            TypeError: an argument that nothing here knows.
        """
        check_arguments(type(self).__name__, kwargs, ALL_ATTENTION_FUNCTIONS.get(self.config._attn_implementation))
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        cache = one_cache(past_key_values, cache)
        if inputs_embeds is None:
            inputs_embeds = self.wte(input_ids)
        own_cache = cache if isinstance(cache, Cache) else None  # not an engine's
        _check_lengths(attention_mask, position_ids, own_cache, inputs_embeds.shape[1])
        attention_mask = self._mark_filled(attention_mask, own_cache, inputs_embeds, kwargs.get("is_causal"))
        if position_ids is None:
            position_ids = _infer_positions(attention_mask, own_cache, inputs_embeds, kwargs.get("cu_seq_lens_q"))
        # Before a cache of our own is made: with one, nobody looks for documents packed into a row any more.
        causal_mask = create_causal_mask(
            self.config,
            inputs_embeds,
            attention_mask,
            position_ids=position_ids,
            **{CACHE_NAME: cache if CACHE_NAME == "cache" else own_cache},
        )
        if self.config._attn_implementation == FLASH_IMPLEMENTATION and cache is causal_mask is None:
            kwargs.setdefault("cu_seq_lens_q", packed_starts(position_ids.expand(len(inputs_embeds), -1)))
        alpha = self._resolve_alpha(inputs_embeds.shape[0], position_ids, cache, ntk_alpha, kwargs)
        if use_cache and cache is None:
            cache = self.new_cache()
            if alpha is not None:
                set_ntk_alpha(cache, alpha.amax(-1, keepdim=True))
        if hasattr(cache, "real_tokens"):
            cache.real_tokens = _real_tokens(attention_mask, inputs_embeds.shape[1])
        position_embeddings = self._position_embeddings(position_ids, alpha)
        hidden_states = self.drop(inputs_embeds)
        for block in self.h[: self.config.n_layer]:  # fewer where the model drafts for itself
            hidden_states = block(
                hidden_states,
                attention_mask=causal_mask,
                position_embeddings=position_embeddings,
                position_ids=position_ids,
                use_cache=use_cache,
                **cache_argument(cache),
                **kwargs,
            )
        return QWenModelOutput(
            last_hidden_state=self.ln_f(hidden_states), **cache_argument(cache if use_cache else None)
        )

    def new_cache(self) -> Cache:
        """Empty cache of the kind that the configuration asks for: int8, except in training, or a growing one."""
        if self.config.use_cache_quantization and not self.training:  # codes carry no gradient
            return QWenInt8Cache(self.config)
        return QWenCache(config=self.config)

    def choose_alpha(self, position_ids: torch.Tensor) -> torch.Tensor:
        """NTK alpha that prompts with these positions ask for, (B, T) -> (B, T)."""
        return ntk_alpha(prompt_lengths(position_ids), self.config.seq_length)

    def _resolve_alpha(
        self,
        rows: int,
        position_ids: torch.Tensor,
        cache: Any,
        given: torch.Tensor | None,
        kwargs: dict[str, Any],
    ) -> torch.Tensor | None:
        """Alpha of each sequence or token, (B or 1, 1 or T), or None for 1."""
        if self.training or not self.config.use_dynamic_ntk:
            if given is not None:
                raise ValueError(
                    "ntk_alpha is given, but nothing is stretched in training or with use_dynamic_ntk=False: leave it "
                    "out, or call model.eval() and set use_dynamic_ntk=True."
                )
            return None
        if given is not None:
            shape = tuple(getattr(given, "shape", ()))
            if shape not in ((rows, 1), (1, 1)):
                raise ValueError(f"ntk_alpha must be a tensor of shape ({rows}, 1), not {shape or given}.")
            # A compiled graph is given it at each step, and leaves the cache alone; what a program returns carries it.
            kept = not torch.compiler.is_compiling() or is_exporting()
            alpha = given.expand(rows, -1)
            if kept and isinstance(cache, Cache):
                give_ntk_alpha(cache, given, rows)
        elif isinstance(cache, Cache):
            alpha = resolve_ntk_alpha(
                cache, rows, lambda: self.choose_alpha(position_ids).amax(-1, keepdim=True), self.program_alpha
            )
        elif cache is not None or engine_of(kwargs) is not None:
            lengths = prompt_lengths(position_ids)
            alpha = engine_alpha(
                position_ids, lengths, cache, kwargs, partial(ntk_alpha, seq_length=self.config.seq_length)
            )
        else:
            alpha = self.choose_alpha(position_ids)
        return alpha.to(position_ids.device)

    def _position_embeddings(
        self, position_ids: torch.Tensor, alpha: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        use_logn = self.config.use_logn_attn and not self.training
        logn = logn_scale(position_ids, self.config.seq_length) if use_logn else None
        return *self.rotary_emb.cos_sin(position_ids, alpha), logn

    def _mark_filled(
        self,
        attention_mask: torch.Tensor | None,
        cache: Cache | None,
        inputs_embeds: torch.Tensor,
        is_causal: bool | None,
    ) -> torch.Tensor | None:
        """A mask over the filled slots of a static cache, where flash kernels, or no causality, let the empty ones be
        seen.
        """
        if attention_mask is not None or cache is None or not cache.is_compileable:
            return attention_mask
        implementation = self.config._attn_implementation
        flash = implementation == FLASH_IMPLEMENTATION or is_flash_attention_requested(self.config)
        if not flash and is_causal is not False:
            return None
        rows, length = inputs_embeds.shape[:2]
        return inputs_embeds.new_ones((rows, int(cache.get_seq_length()) + length), dtype=torch.bool)


def _check_lengths(attention_mask: Any, position_ids: torch.Tensor | None, cache: Cache | None, length: int) -> None:
    """Refuse a padding mask or positions that belong to other tokens than those of this call and those in the cache."""
    if position_ids is not None and (position_ids.ndim != 2 or position_ids.shape[-1] != length):
        raise ValueError(f"position_ids has the shape {tuple(position_ids.shape)}, which must be (B or 1, {length}).")
    past = cache.get_seq_length() if cache is not None else 0
    if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2 and isinstance(past, int):
        if attention_mask.shape[1] != past + length:
            raise ValueError(
                f"attention_mask covers {attention_mask.shape[1]} tokens, which must be the {past} of the cache and "
                f"the {length} of this call: give it {past + length} columns."
            )


def _real_tokens(attention_mask: Any, length: int) -> torch.Tensor | None:
    """Which of the last `length` tokens are no padding, (B, T) bool; None where no mask tells of any."""
    if length == 1 or not isinstance(attention_mask, torch.Tensor) or attention_mask.ndim not in (2, 4):
        return None  # a token alone is a chunk of its own
    if attention_mask.ndim == 2:
        return attention_mask[:, -length:].bool()
    seen = attention_mask
    if seen.dtype != torch.bool:
        seen = seen > torch.finfo(seen.dtype).min / 2
    return seen[..., -length:].any(dim=(1, 2))  # a token that nobody attends to


def _infer_positions(
    attention_mask: torch.Tensor | None, cache: Cache | None, inputs_embeds: torch.Tensor, starts: Any
) -> torch.Tensor:
    """Positions of the tokens of this call, (B or 1, T): from the padding mask, else from where packed texts start,
    else from the length of the cache.
    """
    rows, length = inputs_embeds.shape[:2]
    if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2:
        return positions_from_mask(attention_mask, length)
    if isinstance(starts, torch.Tensor) and cache is None:
        tokens = torch.arange(rows * length, device=starts.device)
        return (tokens - starts[torch.searchsorted(starts, tokens, right=True) - 1]).view(rows, length)
    past = cache.get_seq_length() if cache is not None else 0
    return (torch.arange(length, device=inputs_embeds.device) + past)[None]


_KEYS_BESIDE_A_NEW_HEAD = [r"^lm_head\.", *QWenModel._keys_to_ignore_on_load_unexpected]


class QWenLMHeadModel(QWenPreTrainedModel, QWenGenerationMixin, ChatAdapterMixin):
    """QWen with a language model head, `generate` and the published `chat` interface."""

    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}
    _keys_to_ignore_on_load_unexpected = [r"\.attn\.(masked_)?bias$", r"rotary_emb\.inv_freq$"]

    def __init__(self, config: QWenConfig):
        super().__init__(config)
        self.transformer = QWenModel(config)
        self.lm_head = nn.Linear(config.n_embd, config.embedding_rows, bias=False)
        self.loss_type = "ForCausalLM"
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        skip_logits: bool | None = None,
        ntk_alpha: torch.Tensor | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> QWenCausalLMOutput:
        """Logits (B, T, V), and the loss where there are labels; other arguments as `QWenModel.forward`.

        Args:
            labels: (B, T), shifted here; -100 is left out of the loss.
            logits_to_keep: compute logits of the last so many tokens only, 0 for all; or indices, (N,).
            skip_logits: compute the loss a piece at a time and return no logits, which take most of the memory of a
                training step. None: where gradients are computed in training and the head is a plain one, the loss is
                computed so, and the logits when somebody reads them (`QWenTrainingOutput`).
            kwargs: also `num_items_in_batch`, to divide the summed loss by under gradient accumulation, and what a loss
                of the caller's own (`model.loss_function`) names.

        Raises:
            ValueError: as `QWenModel.forward`; `skip_logits=True` without labels, with `logits_to_keep`, or for a head
                with an adapter, in few bits, on another device or in shards.
        """
        skip = self._skips_logits(labels, logits_to_keep, skip_logits)
        of_loss = {} if labels is None else self._arguments_of_loss(kwargs)
        outputs = self.transformer(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            ntk_alpha=ntk_alpha,
            cache=cache,
            return_dict=True,  # whatever the configuration says of what is returned here
            **{name: value for name, value in kwargs.items() if name not in of_loss},
        )
        states: torch.Tensor = outputs.last_hidden_state
        if skip and labels is not None:
            return QWenTrainingOutput(
                loss=head_loss(states, self.lm_head.weight, labels, **kwargs),
                logits=None if skip_logits else UnreadLogits.of(states, self.lm_head),
                **cache_argument(outputs.cache),
                hidden_states=outputs.hidden_states,
                attentions=outputs.attentions,
            )
        if not isinstance(logits_to_keep, int) or logits_to_keep:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            # With the strides of a slice torch would copy the whole head for the product, 0.3 GB of a model of 0.5 B.
            states = states[:, kept, :].clone(memory_format=torch.contiguous_format)
        logits = self.lm_head(states)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **kwargs)
        return QWenCausalLMOutput(
            loss=loss,
            logits=logits,
            **cache_argument(outputs.cache),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _arguments_of_loss(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Keyword arguments that only a loss of the caller's own names, which are not for the model."""
        # Not a difference of sets, which torch before 2.12 can't trace.
        unknown = [name for name in kwargs if name not in KNOWN_ARGUMENTS]
        if not unknown or getattr(self, "_loss_function", None) is None:
            return {}
        named = inspect.signature(self.loss_function).parameters
        return {name: kwargs[name] for name in unknown if name in named}

    def _skips_logits(
        self, labels: torch.Tensor | None, logits_to_keep: int | torch.Tensor, wanted: bool | None
    ) -> bool:
        plain = labels is not None and isinstance(logits_to_keep, int) and logits_to_keep == 0
        plain = plain and holds_its_weight(self.lm_head)
        if wanted and not plain:
            raise ValueError(
                "skip_logits=True needs labels, no logits_to_keep, and a head that is a plain matrix at hand, without "
                f"adapter, quantisation, offloading or sharding ({type(self.lm_head).__name__} here): leave it out."
            )
        if wanted is None:  # a loss of the caller's own, or a compiler, gets the logits
            own_loss = self.loss_type == "ForCausalLM" and getattr(self, "_loss_function", None) is None
            training = self.training and torch.is_grad_enabled() and not torch.compiler.is_compiling()
            return plain and own_loss and training
        return wanted


class QWenForSequenceClassification(GenericForSequenceClassification, QWenPreTrainedModel):
    """QWen that scores a whole text, at its last token; `config.num_labels` classes, or a regression."""

    base_model_prefix = "transformer"
    _keys_to_ignore_on_load_unexpected = _KEYS_BESIDE_A_NEW_HEAD

    def __init__(self, config: QWenConfig):
        # The generic constructor would look the base model up in transformers' registry, where remote code is not.
        QWenPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.transformer = QWenModel(config)
        self.score = nn.Linear(config.n_embd, self.num_labels, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> QWenSequenceClassifierOutput | tuple:
        """Logits (B, num_labels) of the last token that is not `config.pad_token_id`; arguments as `QWenModel.forward`.

        Args:
            labels: (B,) classes, or (B,) or (B, num_labels) values of a regression, by `config.problem_type`.

        Raises:
            ValueError: several rows and no `config.pad_token_id`; as `QWenModel.forward`.
        """
        outputs = super().forward(
            input_ids,
            attention_mask,
            position_ids,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            **cache_argument(one_cache(past_key_values, cache)),
            **kwargs,
        )
        return outputs if isinstance(outputs, tuple) else QWenSequenceClassifierOutput(**outputs)


class QWenForTokenClassification(GenericForTokenClassification, QWenPreTrainedModel):
    """QWen that scores each token; `config.num_labels` classes, behind a dropout of `config.classifier_dropout`."""

    base_model_prefix = "transformer"
    _keys_to_ignore_on_load_unexpected = _KEYS_BESIDE_A_NEW_HEAD

    def __init__(self, config: QWenConfig):
        QWenPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.transformer = QWenModel(config)
        dropout = getattr(config, "classifier_dropout", None)
        self.dropout = nn.Dropout(0.1 if dropout is None else dropout)
        self.score = nn.Linear(config.n_embd, self.num_labels)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> TokenClassifierOutput | tuple:
        """Logits (B, T, num_labels); other arguments as `QWenModel.forward`.

        Args:
            labels: (B, T) classes, not shifted; -100 is left out of the loss.
        """
        return super().forward(
            input_ids,
            attention_mask,
            position_ids,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            **cache_argument(one_cache(past_key_values, cache)),
            **kwargs,
        )


class QWenForQuestionAnswering(GenericForQuestionAnswering, QWenPreTrainedModel):
    """QWen that finds an answer in a text: scores of each token as its start and as its end."""

    base_model_prefix = "transformer"
    _keys_to_ignore_on_load_unexpected = _KEYS_BESIDE_A_NEW_HEAD
    get_input_embeddings = QWenPreTrainedModel.get_input_embeddings  # the generic ones know `embed_tokens` only
    set_input_embeddings = QWenPreTrainedModel.set_input_embeddings

    def __init__(self, config: QWenConfig):
        QWenPreTrainedModel.__init__(self, config)
        self.transformer = QWenModel(config)
        self.qa_outputs = nn.Linear(config.n_embd, 2)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        start_positions: torch.Tensor | None = None,
        end_positions: torch.Tensor | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> QuestionAnsweringModelOutput | tuple:
        """`start_logits` and `end_logits`, (B, T) each; other arguments as `QWenModel.forward`.

        Args:
            start_positions, end_positions: (B,), where the answer begins and ends; beyond the text, none.
        """
        return super().forward(
            input_ids,
            attention_mask,
            position_ids,
            inputs_embeds=inputs_embeds,
            start_positions=start_positions,
            end_positions=end_positions,
            **cache_argument(one_cache(past_key_values, cache)),
            **kwargs,
        )
