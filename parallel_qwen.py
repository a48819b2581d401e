"""How several processes share the model, as plans that transformers and engines read: name of a module -> style."""

from __future__ import annotations

TENSOR_PLAN = {
    "wte": "embedding_rowwise",
    "h.*.attn.c_attn": "colwise_gather_output",
    "h.*.attn.c_proj": "rowwise_split_input",
    "h.*.mlp.w1": "colwise",
    "h.*.mlp.w2": "colwise",
    "h.*.mlp.c_proj": "rowwise",
}
"""Tensor parallel, of the model below the head."""

HEAD_TENSOR_PLAN = {"lm_head": "colwise_gather_output"}
"""Tensor parallel, of the language model head; each process gets all logits."""
