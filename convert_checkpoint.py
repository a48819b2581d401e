"""Checkpoints in and out: look at them, bring them up to date, convert, compare, merge and publish them.

    python convert_checkpoint.py COMMAND ...

Installed, the same program is called `qwen1-checkpoint`. The commands are in `conversion/commands/`.
"""

from qwen1_commands import checkpoint as main

if __name__ == "__main__":
    main()
