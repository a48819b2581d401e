"""The commands of `qwen1-checkpoint`, one a file, and what they share (`terminal.py`)."""
