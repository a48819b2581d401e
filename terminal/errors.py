"""The error of the terminal's commands."""


class CommandError(ValueError):
    """A command that can't be carried out, and changed nothing; the message names the value and the remedy."""
