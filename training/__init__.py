"""Training on conversations and texts: data files, token ids with a loss mask, packing, and `qwen1-finetune`."""
