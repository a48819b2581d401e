r"""Mathematics in Markdown: `$…$`, `\(…\)`, `\[…\]` and `$$…$$` become text that KaTeX finds, and money stays money."""

from __future__ import annotations

import re

from markdown_it import MarkdownIt
from markdown_it.common.utils import escapeHtml
from markdown_it.rules_block import StateBlock
from markdown_it.rules_inline import StateInline

# What KaTeX is told to look for. They are invisible, so that a formula reads as TeX until KaTeX is there, and none of
# them comes from a message: `without_marks` takes them away.
INLINE = ("\u2061", "\u2062")
DISPLAY = ("\u2063", "\u2064")
DELIMITERS: list[dict[str, str | bool]] = [
    {"left": INLINE[0], "right": INLINE[1], "display": False},
    {"left": DISPLAY[0], "right": DISPLAY[1], "display": True},
]
_MARKS = dict.fromkeys(map(ord, INLINE + DISPLAY))
_CLOSING = {r"\(": r"\)", r"\[": r"\]", "$$": "$$"}
_OPERATORS = tuple(":;,./-+=&|<>")


def without_marks(text: str) -> str:
    """Text in which KaTeX finds nothing by itself."""
    return text.translate(_MARKS)


def find_mathematics(text: str, start: int) -> tuple[str, int, bool] | None:
    r"""The formula that begins at a place of a text: its TeX, where it ends, whether it stands on a line of its own.

    None where none begins: an amount of money, a variable of a shell, a formula whose end is still to come.
    """
    opening = text[start : start + 2]
    if opening in _CLOSING:
        end = text.find(_CLOSING[opening], start + 2)
        tex = text[start + 2 : max(end, 0)]
        return (tex.strip(), end + 2, opening != r"\(") if tex.strip() else None
    if text[start : start + 1] != "$" or re.match(r"[A-Za-z0-9$\\]", text[start - 1 : start]):
        return None
    end = _dollar(text, start + 1)
    tex = text[start + 1 : max(end, 0)]
    return (tex, end + 1, False) if _is_formula(tex, text[end + 1 : end + 2]) else None


def _dollar(text: str, start: int) -> int:
    found = re.compile(r"(?:\\.|[^\\$`\n])*?\$").match(text, start)
    return found.end() - 1 if found else -1


def _is_formula(tex: str, after: str) -> bool:
    if not tex or tex != tex.strip() or after.isdigit() or after == "$":
        return False
    if after.isascii() and after.isalpha() and (after.isupper() or tex.endswith(_OPERATORS)):
        return False  # of $HOME:$PATH
    amount = re.match(r"\d[\d.,]*", tex)
    return amount is None or " " not in tex or re.search(r"[\\^_=<>{}+*]", tex) is not None


def _inline(state: StateInline, silent: bool) -> bool:
    found = find_mathematics(state.src, state.pos)
    if found is None:
        return False
    tex, end, display = found
    if not silent:
        token = state.push("mathematics", "", 0)
        token.content, token.meta = tex, {"display": display}
    state.pos = end
    return True


def _block(state: StateBlock, line: int, last: int, silent: bool) -> bool:
    """A formula of several lines, in which nothing is a list, a heading or a paragraph."""
    start = state.bMarks[line] + state.tShift[line]
    closing = {r"\[": r"\]", "$$": "$$"}.get(state.src[start : start + 2])
    if closing is None or state.is_code_block(line):
        return False
    for end in range(line, last):
        first = start + 2 if end == line else state.bMarks[end] + state.tShift[end]
        if end > line and state.tShift[end] < state.blkIndent and not state.isEmpty(end):
            return False
        place = state.src.find(closing, first, state.eMarks[end])
        if place >= 0:
            break
    else:
        return False
    lines = state.getLines(line, end + 1, state.blkIndent, False).strip()
    tex = lines[2:-2].strip()
    if not lines.endswith(closing) or closing in tex or not tex:
        return False
    if not silent:
        token = state.push("mathematics", "", 0)
        token.content, token.meta, token.map, token.block = tex, {"display": True}, [line, end + 1], True
        state.line = end + 1
    return True


def _render(renderer: object, tokens: list, index: int, options: object, env: object) -> str:
    token = tokens[index]
    left, right = DISPLAY if token.meta["display"] else INLINE
    html = f'<span class="mathematics">{left}{escapeHtml(token.content)}{right}</span>'
    return f'<div class="formula" tabindex="0">{html}</div>\n' if token.block else html


def mathematics(parser: MarkdownIt) -> None:
    """Teach a parser mathematics."""
    parser.inline.ruler.before("escape", "mathematics", _inline)
    ends = ["paragraph", "reference", "blockquote", "list"]
    parser.block.ruler.before("fence", "mathematics", _block, {"alt": ends})
    parser.add_render_rule("mathematics", _render)
