"""What ships with the repository."""

from pathlib import Path

TINY_CHAT = Path(__file__).parents[1] / "qwen-tiny-chat"
"""The folder of the model that the programs take where no other is named."""
