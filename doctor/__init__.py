"""`qwen1-checkpoint doctor`: whether models run right in the environment at hand; `examination.py` is the outline."""
