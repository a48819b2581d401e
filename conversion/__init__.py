"""Checkpoints in and out: what the commands of `convert_checkpoint.py` are made of.

The way of a checkpoint is `opening`, `planning`, `writing`, `checking`, in this order and each once.
All of them build on `files` and `formats`. `tests/conversion/test_rooms.py` keeps what may import what.
"""
