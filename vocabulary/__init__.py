"""New words for a vocabulary: `commands` is the command `qwen1-extend-vocabulary`, `learning` learns their tokens."""
