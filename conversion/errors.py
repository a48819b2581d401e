"""The error of every command that handles checkpoints."""


class CheckpointError(ValueError):
    """A checkpoint, or a request about one, that can't be used; the message names the value and the remedy."""
