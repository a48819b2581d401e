"""Text of others, made safe for a terminal."""

import unicodedata

_OVERRIDES = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")


def printable(text: str) -> str:
    """The text without what could drive the terminal: control characters and changes of the writing direction."""
    return "".join("\N{REPLACEMENT CHARACTER}" if _drives_terminal(c) else c for c in text)


def _drives_terminal(character: str) -> bool:
    if character in "\n\t":
        return False
    return unicodedata.category(character) in ("Cc", "Cs") or unicodedata.bidirectional(character) in _OVERRIDES
