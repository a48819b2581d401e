"""The QWen (Qwen-1) model: norm, attention, MLP, block, model and heads.

Shapes: B batch, T query length, S key length, H heads, K key/value heads, D head size, E width of the residual stream,
V rows of the vocabulary.

Source: `qwen-7b.md` for names, signatures and arithmetic; `golden/model` for the numbers.
"""

from __future__ import annotations

from .versions_qwen import check_versions as check_versions  # first: older versions lack what follows

# isort: split

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .arguments_qwen import CACHE_NAMES, QWenCausalLMOutput, QWenModelOutput, cache_argument, check_arguments, one_cache
from .attention_qwen import (
    FLASH_IMPLEMENTATION,
    choose_implementation,
    eager_attention_forward,
    mask_of_call,
    mask_scores,
    padded_varlen_attention,
    varlen_attention,
    whole_row_attention,
)
from .bits_qwen import QWenBitsLinear as QWenBitsLinear
from .cache_qwen import cache_of_call, extend_cache
from .chat_qwen import QWenChatMixin
from .configuration_qwen import QWenConfig

# Published here too; and transformers 5.4 takes along only those files of a local folder that this one names.
from .ending_qwen import asked_late as asked_late
from .engines_qwen import engine_alpha as engine_alpha
from .few_bits_qwen import QWenBitsConfig as QWenBitsConfig
from .fingerprint_qwen import fingerprint as fingerprint
from .foreign_qwen import relative as relative
from .generation_qwen import QWenGenerationMixin
from .gradients_qwen import passed_back as passed_back
from .heads_qwen import QuestionAnswering, SequenceClassification, TokenClassification
from .kept_qwen import KeptCache as KeptCache
from .loading_qwen import LEFTOVERS, LoadingMixin, choose_softmax
from .logits_qwen import arguments_of_loss, beside_logits, keep_states, skips_logits, training_output
from .lora_qwen import is_lora as is_lora
from .loss_qwen import head_loss as head_loss
from .native_gradients_qwen import GRADIENTS as GRADIENTS
from .native_many_qwen import MANY as MANY
from .native_products_qwen import PRODUCTS as PRODUCTS
from .native_prompt_qwen import PROMPT as PROMPT
from .native_qwen import wait as wait
from .native_steps_qwen import STEPS as STEPS
from .native_vectors_qwen import VECTORS as VECTORS
from .ntk_qwen import alpha_of_call, choose_alpha
from .parallel_qwen import HEAD_SHARDING_PLAN, HEAD_TENSOR_PLAN
from .passes_qwen import gated, normed, pays
from .peft_qwen import ChatAdapterMixin
from .plain_qwen import Plain, is_bare
from .positions_qwen import positions_of_call
from .preparing_qwen import prepare as prepare
from .products_qwen import is_transformed
from .prompt_qwen import prompt_attention as prompt_attention
from .qwen_generation_utils import decode_tokens as decode_tokens
from .qwen_generation_utils import get_stop_words_ids as get_stop_words_ids
from .qwen_generation_utils import make_context as make_context
from .recording_qwen import record as record
from .rotary_qwen import RotaryEmbedding as RotaryEmbedding
from .rotary_qwen import apply_rotary_pos_emb as apply_rotary_pos_emb
from .rotary_qwen import both_turned, logn_scale
from .saving_qwen import saved_as_published as saved_as_published
from .scaling_qwen import RotaryScaling as RotaryScaling
from .schemas_qwen import Tool as Tool
from .shards_qwen import gather_weights as gather_weights
from .steps_qwen import collected_by, logits_of_head, product_of_linear, projected, takes_static_cache
from .streaming_qwen import stream_tokens as stream_tokens
from .tensor_parallel_qwen import shares_of_process
from .tools_qwen import ToolResult as ToolResult
from .translating_qwen import library_of as library_of
from .turning_qwen import turned as turned
from .unpadded_qwen import through_blocks
from .warming_qwen import is_ready as is_ready

if TYPE_CHECKING:  # read when they are wanted, for Triton takes its time
    from .gpu_steps_qwen import steps_on_gpu as steps_on_gpu
    from .triton_qwen import norm_rows as norm_rows


def kept_for_backward() -> bool:
    """Whether what an operation needs for its gradient is kept now; a compiler chooses for itself what that is."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling() and not is_transformed()


def done_again(function: Callable[..., torch.Tensor], *tensors: torch.Tensor) -> torch.Tensor:
    """Keep the arguments of a function only, and call it again in the backward pass; it may draw no random numbers."""
    return checkpoint(function, *tensors, use_reentrant=False, preserve_rng_state=False)


class RMSNorm(nn.Module):
    """Root mean square norm of the last dimension, in float32 and rounded to the input's dtype before the weight."""

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def _norm(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.rms_norm(x, x.shape[-1:], eps=self.eps)

    def _scaled(self, x: torch.Tensor) -> torch.Tensor:
        result = normed(x, self.weight, self.eps) if type(self) is RMSNorm else None
        return self._norm(x.float()).type_as(x) * self.weight if result is None else result

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., dim) -> (..., dim), same dtype."""
        if x.requires_grad and kept_for_backward():
            # Quickly done again in the backward pass, for which it would keep a float32 copy and a half of its input.
            return done_again(self._scaled, x)
        return self._scaled(x)

    def extra_repr(self) -> str:
        """Size and epsilon, for `print(model)`."""
        return f"{self.weight.shape[0]}, eps={self.eps}"


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
        self.causal, self.softmax_scale = causal, softmax_scale
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
        dropout = self.dropout_p if self.training else 0.0
        options: dict[str, Any] = {"dropout_p": dropout, "softmax_scale": self.softmax_scale, "causal": self.causal}
        if attention_mask is not None:
            return padded_varlen_attention(q, k, v, attention_mask.bool(), **options)
        if cu_seqlens is None:
            return whole_row_attention(q, k, v, **options)
        longest = int(cu_seqlens.diff().max())
        flat_q, flat_k, flat_v = (x.flatten(0, 1) for x in (q, k, v))
        output = varlen_attention(flat_q, flat_k, flat_v, cu_seqlens, cu_seqlens, longest, longest, **options)
        return output.view_as(q)


class QWenAttention(nn.Module):
    """Causal self-attention with rotary positions.

    Args:
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
        self.c_attn.heads = self.num_heads, self.num_key_value_heads, self.num_key_value_heads  # type: ignore[assignment]
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
        """Attention in the dtype of its inputs: output (B, T, H, D) and probabilities (B, H, T, S).

        Args:
            query: (B, H, T, D); key and value: (B, H, S, D), the queries being the last T of the S tokens.
            attention_mask: (B, 1, T or 1, S), additive or bool.
            head_mask: broadcast onto the probabilities.
            is_causal: whether a query sees no key behind it.
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
        width, kv_width = shares_of_process(self.c_attn, self.projection_size, self.kv_projection_size)
        if (parts := product_of_linear(self.c_attn, hidden_states)) is not None:
            query, key, value = parts.tensor_split((width, width + kv_width), dim=-1)
        else:
            query, key, value = self.c_attn(hidden_states).split((width, kv_width, kv_width), dim=-1)
        if value.requires_grad:
            value = value.contiguous()  # what is kept for the backward pass would hold all three parts of the product
        query, key, value = (
            self._split_heads(part, part.shape[-1] // self.head_dim, self.head_dim) for part in (query, key, value)
        )

        cos, sin, logn = position_embeddings
        query, key = both_turned(query, key, (cos, sin), apply_rotary_pos_emb)
        if logn is not None:
            query = query * logn.type_as(query)

        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)  # (B, H | K, T, D)
        held = one_cache(past_key_values, cache)
        key, value = extend_cache(held, key, value, self.layer_idx, kwargs)
        implementation = choose_implementation(self, query, held)
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        dropout = self.attn_dropout.p if self.training else 0.0
        attn_output, attn_weights = attend(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )
        # Engines such as vLLM return (B * T, H * D).
        attn_output = attn_output.reshape(*hidden_states.shape[:-1], query.shape[1] * self.head_dim)
        return projected(self.c_proj, attn_output), attn_weights


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

    def _gated(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return self.act_fn(gate) * up

    def _inner(self, hidden_states: torch.Tensor) -> torch.Tensor:
        gate, up = self.w2(hidden_states), self.w1(hidden_states)
        result = gated(gate, up)
        return self._gated(gate, up) if result is None else result

    def _down(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return self.c_proj(self._gated(gate, up))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, T, E) -> (B, T, E)."""
        bare = is_bare(self.act_fn, nn.SiLU)
        if bare and pays(hidden_states):
            return self.c_proj(self._inner(hidden_states))
        if not kept_for_backward() or not bare:
            # Without names for what is between: each is given up as soon as it has been read.
            return projected(
                self.c_proj, self.act_fn(projected(self.w2, hidden_states)) * projected(self.w1, hidden_states)
            )
        gate, up = self.w2(hidden_states), self.w1(hidden_states)
        if not (gate.requires_grad or up.requires_grad):
            return self._down(gate, up)
        # Gate and up projection are all that is kept: what comes of them is quickly done again, but for the last
        # product, before which `checkpoint` ends. An adapter there may draw random numbers, which must be drawn once.
        if is_bare(self.c_proj, nn.Linear):
            return done_again(self._down, gate, up)
        return self.c_proj(done_again(self._gated, gate, up))


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


_PLAIN = Plain(RMSNorm, QWenAttention, QWenMLP, QWenBlock)


class QWenPreTrainedModel(LoadingMixin, PreTrainedModel):
    """What every QWen class has in common: configuration, initialisation, what transformers may do with it."""

    config: QWenConfig
    config_class = QWenConfig
    home = __name__
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
        choose_softmax(config)
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
        elif isinstance(module, nn.Linear) and module.weight.is_floating_point():  # else in few bits
            # Each layer adds twice to the residual stream, so its variance would grow with depth (GPT-2's scheme).
            depth = 2 * self.config.n_layer if getattr(module, "is_residual_projection", False) else 1
            init.normal_(module.weight, mean=0.0, std=std / math.sqrt(depth))
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, QWenModel):
            init.ones_(module.program_alpha)


class QWenModel(QWenPreTrainedModel):
    """The stack of blocks without a head: token ids to hidden states."""

    _keys_to_ignore_on_load_unexpected = LEFTOVERS  # not the head: vLLM puts one of its own onto this class
    plain, takes_static_cache = _PLAIN, takes_static_cache  # asked by `generate`, which knows no classes

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
            ntk_alpha: (B, 1), in place of the alpha that the length of the prompt asks for; kept by the cache.
            kwargs: `arguments_qwen.KNOWN_ARGUMENTS`.

        Raises:
            ValueError, TypeError: arguments that contradict each other, or that nothing here knows.
        """
        check_arguments(type(self).__name__, kwargs, ALL_ATTENTION_FUNCTIONS.get(self.config._attn_implementation))
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        cache = one_cache(past_key_values, cache)
        if inputs_embeds is None:
            inputs_embeds = self.wte(input_ids)
        position_ids = positions_of_call(position_ids, attention_mask, cache, inputs_embeds, kwargs)
        causal_mask = mask_of_call(self.config, attention_mask, position_ids, cache, inputs_embeds, kwargs)
        alpha = alpha_of_call(self, ntk_alpha, position_ids, cache, inputs_embeds, kwargs)
        cache = cache_of_call(self, cache, use_cache, alpha, attention_mask, inputs_embeds.shape[1])
        arguments = dict(attention_mask=causal_mask, position_ids=position_ids, use_cache=use_cache, **kwargs)
        arguments |= dict(position_embeddings=self._position_embeddings(position_ids, alpha), **cache_argument(cache))
        hidden_states = self.ln_f(self._through_blocks(self.drop(inputs_embeds), arguments))
        return QWenModelOutput(last_hidden_state=hidden_states, **cache_argument(cache if use_cache else None))

    def _through_blocks(self, hidden_states: torch.Tensor, arguments: dict[str, Any]) -> torch.Tensor:
        layers = self.config.n_layer
        blocks = self.h if layers >= len(self.h) else self.h[:layers]  # fewer where the model drafts for itself
        return through_blocks(blocks, _PLAIN, hidden_states, collected_by(self) | arguments)

    def choose_alpha(self, position_ids: torch.Tensor) -> torch.Tensor:
        """NTK alpha that prompts with these positions ask for, (B, T) -> (B, T)."""
        return choose_alpha(position_ids, self.config.seq_length)

    def _position_embeddings(
        self, position_ids: torch.Tensor, alpha: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        use_logn = self.config.use_logn_attn and not self.training
        logn = logn_scale(position_ids, self.config.seq_length) if use_logn else None
        return *self.rotary_emb.cos_sin(position_ids, alpha), logn


class QWenLMHeadModel(QWenPreTrainedModel, QWenChatMixin, QWenGenerationMixin, ChatAdapterMixin):
    """QWen with a language model head, `generate` and the published `chat` interface."""

    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}
    _fsdp_plan = HEAD_SHARDING_PLAN
    _keys_to_ignore_on_load_unexpected = LEFTOVERS
    _tp_plan = HEAD_TENSOR_PLAN

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
            skip_logits: compute the loss without logits, which take most of the memory of a training step, and return
                none. None: in training with a plain head so too, and the logits when somebody reads them.
            kwargs: also `num_items_in_batch`, a divisor of the summed loss, and what a loss of the caller's own names.

        Raises:
            ValueError: as `QWenModel.forward` and `skips_logits`.
        """
        skip = skips_logits(self, labels, logits_to_keep, skip_logits)
        of_loss = {} if labels is None else arguments_of_loss(self, kwargs)
        outputs = self.transformer(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            ntk_alpha=ntk_alpha,
            cache=cache,
            padding_is_read=labels is not None,  # a row's first token is guessed from the padding before it
            return_dict=True,  # whatever the configuration says of what is returned here
            **{name: value for name, value in kwargs.items() if name not in of_loss},
        )
        if skip and labels is not None:
            return training_output(outputs, self.lm_head, labels, skip_logits, kwargs)
        states = keep_states(outputs.last_hidden_state, logits_to_keep)
        logits = logits_of_head(self.lm_head, _PLAIN, states)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **kwargs)
        return QWenCausalLMOutput(loss=loss, logits=logits, **beside_logits(outputs))


class QWenForSequenceClassification(SequenceClassification, QWenPreTrainedModel):
    """QWen that scores a whole text, at its last token; `config.num_labels` classes, or a regression."""

    transformer_class = QWenModel


class QWenForTokenClassification(TokenClassification, QWenPreTrainedModel):
    """QWen that scores each token; `config.num_labels` classes, behind a dropout of `config.classifier_dropout`."""

    transformer_class = QWenModel


class QWenForQuestionAnswering(QuestionAnswering, QWenPreTrainedModel):
    """QWen that finds an answer in a text: scores of each token as its start and as its end."""

    transformer_class = QWenModel
    get_input_embeddings = QWenPreTrainedModel.get_input_embeddings  # the generic ones know `embed_tokens` only
    set_input_embeddings = QWenPreTrainedModel.set_input_embeddings
