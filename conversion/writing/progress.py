"""What is told of the work going on."""

from __future__ import annotations


class Progress:
    """What is told of the work going on; this one keeps silent."""

    def begin(self, tensors: int, nbytes: int) -> None:
        """Work starts, over so many tensors and bytes of them."""

    def advance(self, name: str, nbytes: int, tensors: int = 1) -> None:
        """One more tensor is done, or a whole file of them."""

    def note(self, text: str) -> None:
        """Something that the user should know."""
