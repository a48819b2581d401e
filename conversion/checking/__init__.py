"""Whether two checkpoints are the same model."""
