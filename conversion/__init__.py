"""Checkpoints in and out: what the commands of `convert_checkpoint.py` are made of."""
