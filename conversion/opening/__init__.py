"""Opening a checkpoint: what it is, what it holds, and whether the two fit."""
