"""How `qwen-tiny-chat` is made: its world, its vocabulary, its training, its examination."""

PER_KIND = 100
"""Prompts of each kind in an examination, unless told otherwise."""
