"""The terminal of the command `qwen1-chat`; the guide is `docs/terminal.md`."""
