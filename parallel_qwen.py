"""How several processes share the model, as plans that transformers and engines read: name of a module -> style."""

from __future__ import annotations

HEADS_STYLE = "qwen_heads"
"""The one style that isn't transformers' own, see `heads_of_process` in `tensor_parallel_qwen.py`."""

TENSOR_PLAN = {
    "wte": "embedding_rowwise",
    "h.*.attn.c_attn": HEADS_STYLE,
    "h.*.attn.c_proj": "rowwise",
    "h.*.mlp.w1": "colwise",
    "h.*.mlp.w2": "colwise",
    "h.*.mlp.c_proj": "rowwise",
}
"""Tensor parallel, of the model below the head: each process has a share of the heads, and of their keys and values."""

HEAD_TENSOR_PLAN = {"lm_head": "colwise_gather_output"}
"""Tensor parallel, of the language model head; each process gets all logits."""

SHARDING_PLAN = {"wte": "free_full_weight", "h.*": "free_full_weight", "ln_f": "keep_full_weight"}
"""FSDP2, of the model below the head: what is put together and given up as one, so that no step has the whole model."""

HEAD_SHARDING_PLAN = {"lm_head": "keep_full_weight"}
"""FSDP2, of the head, which the backward pass needs first and which is kept until then."""
