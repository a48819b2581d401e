"""How `qwen-tiny-chat` is made: its world, its vocabulary, its training, its examination."""
