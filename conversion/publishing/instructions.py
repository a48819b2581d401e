"""Instructions of 2023 in a card, which lead to errors today: ours take their place, the author's text stays."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

_OLD = re.compile(
    r"transformers\s*(==|~=|<=?)\s*4\b|transformers_stream_generator|auto-gptq|csrc/(layer_norm|rotary)",
    re.IGNORECASE,
)
"""What only code for the transformers of 2023 asks for."""

_LOADED = re.compile(r"""from_pretrained\(\s*["']([\w.-]+/[\w.-]+)["']""")
_REQUIREMENTS = re.compile(r"\b(requirements?|dependenc(y|ies)|installation)\b|要求|依赖|安装", re.IGNORECASE)
_HEADING, _FENCE = re.compile(r" {0,3}#{1,6}\s+(.+?)\s*#*\s*$"), re.compile(r" {0,3}(`{3,}|~{3,})")

TITLE = "Use with transformers 5"
_NOTE = "*The example that stood here was for the transformers of 2023: see [{title}](#{anchor}).*"


@dataclass
class _Part:
    """Lines of a card: a heading, a fenced block, or what stands between."""

    lines: list[str] = field(default_factory=list)
    heading: str | None = None
    is_block: bool = False

    @property
    def text(self) -> str:
        return "".join(self.lines)


def renew(card: str, use: str, repo_id: str) -> tuple[str, list[str]]:
    """Put our instructions in the place of those of 2023.

    Sections on requirements go; elsewhere a line takes the place of each block of code that installs or loads what no
    longer runs. All else stays as it is, to the byte. A card without such a block is left alone.

    Args:
        card: text of README.md, behind its front matter or with it.
        use: our instructions, Markdown without a heading.
        repo_id: repository that the card is for; code that loads this one is kept.

    Returns:
        The card, and the headings of the sections that have changed.
    """
    sections = list(_sections(_parts(card)))
    blocks = [part.text for section in sections for part in section if part.is_block]
    if not any(_OLD.search(text) for text in blocks):
        return card, []
    end = "\r\n" if "\r\n" in card else "\n"
    note = _NOTE.format(title=TITLE, anchor=TITLE.lower().replace(" ", "-"))
    written: list[str] = []
    changed: list[str] = []
    for section in sections:
        heading = section[0].heading
        requires = heading is not None and bool(_REQUIREMENTS.search(heading))
        stale = [part.is_block and _is_old(part.text, repo_id) for part in section]
        if requires or any(stale):
            if not changed:
                written.append(f"## {TITLE}\n\n{use.strip()}\n\n".replace("\n", end))
            changed.append(heading or "the text above the first heading")
        if not requires:
            written += [note + end if old else part.text for part, old in zip(section, stale, strict=True)]
    return "".join(written), changed


def _is_old(block: str, repo_id: str) -> bool:
    return bool(_OLD.search(block)) or any(name != repo_id for name in _LOADED.findall(block))


def _parts(card: str) -> Iterator[_Part]:
    part, fence = _Part(), ""
    for line in card.splitlines(keepends=True):
        opening = _FENCE.match(line)
        if fence:
            part.lines.append(line)
            if opening and opening[1].startswith(fence) and not line.strip().strip(fence[0]):
                yield part
                part, fence = _Part(), ""
        elif opening:
            yield part
            part, fence = _Part([line], is_block=True), opening[1]
        elif heading := _HEADING.match(line):
            yield part
            yield _Part([line], heading=heading[1])
            part = _Part()
        else:
            part.lines.append(line)
    yield part


def _sections(parts: Iterator[_Part]) -> Iterator[list[_Part]]:
    """A heading with all up to the next one; first what stands above all headings."""
    section: list[_Part] = []
    for part in parts:
        if part.heading is not None and section:
            yield section
            section = []
        if part.lines:
            section.append(part)
    if section:
        yield section
