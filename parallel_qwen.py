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
