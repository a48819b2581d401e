"""`qwen1-checkpoint doctor`: whether the models run right in the environment at hand. `examination.py` is its outline."""
