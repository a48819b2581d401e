"""Messages as the page shows them: Markdown becomes HTML here, in which all that was HTML before is text.

Gradio's own Markdown takes the HTML out of a message, and the backslashes out of its mathematics. So the page is told
not to read Markdown, and each message brings its HTML along, behind the text that it was made of: that is what the
pencil and the copy button take, and what comes back with the next question.
"""

from __future__ import annotations

import json
import re
from typing import Any

import gradio as gr
from markdown_it import MarkdownIt
from markdown_it.common.utils import escapeHtml
from markdown_it.rules_inline import StateInline
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_by_name
from pygments.util import ClassNotFound

from .calls import described
from .mathematics import mathematics, without_marks
from .messages import DONE, Message, is_step, message, state_of, step, text_of

SOURCE = '<pre class="source" hidden>'
LONGEST_COLOURED = 20_000
"""Characters of code beyond which it has no colours, which take long."""
_COPY = (
    '<button title="Copy" class="copy_code_button">'
    '<span class="copy-text"><svg viewBox="0 0 16 16" width="15" height="15" aria-hidden="true" fill="none" '
    'stroke="currentColor"><path d="M5.5 5.5h8v8h-8z M10.5 5.5v-3h-8v8h3"></path></svg></span>'
    '<span class="check"><svg viewBox="0 0 16 16" width="15" height="15" aria-hidden="true" fill="none" '
    'stroke="currentColor"><path d="M2.5 8.5l4 4l7 -8"></path></svg></span></button>'
)


def shown(spoken: Message, request: gr.Request | None = None) -> Message:
    """A message as the page holds it, made of one with plain text; of a step, in the language of a request."""
    source = f"{SOURCE}{_as_json(text_of(spoken))}</pre>"
    if not is_step(spoken):
        return message(spoken["role"], source + to_html(text_of(spoken)))
    title, below = described(spoken, request)
    metadata = {
        "title": escapeHtml(without_marks(title)),
        "status": "done" if state_of(spoken) == DONE else "pending",  # which Gradio shows open, and turning
    }
    return {**message(spoken["role"], source + to_html(below)), "metadata": metadata}


def behind(held: Message) -> Message:
    """The message with plain text that one of the page was made of; one that has none is its own. A step is over."""
    text = text_of(held)
    if text.startswith(SOURCE):
        source = text.removeprefix(SOURCE).partition("</pre>")[0]
        try:
            text = str(json.loads(source))
        except ValueError:  # a text that only begins like ours
            pass
    return step(text, DONE) if is_step(held) else message(held["role"], text)


def _as_json(text: str) -> str:
    """JSON in plain ASCII that is the same whether it is read as HTML or not."""
    return re.sub("[<>&]", lambda found: f"\\u{ord(found[0]):04x}", json.dumps(text))


def to_html(text: str) -> str:
    """HTML of a text in Markdown, with mathematics, with tables that scroll, and with no HTML of its own."""
    html: str = _PARSER.render(without_marks(text))
    return f'<div class="prose">{html}</div>'


def _coloured(code: str, language: str) -> str:
    if not language or len(code) > LONGEST_COLOURED:
        return escapeHtml(code)
    try:
        lexer = get_lexer_by_name(language, stripnl=False, ensurenl=False)
    except ClassNotFound:
        return escapeHtml(code)
    html: str = highlight(code, lexer, HtmlFormatter(nowrap=True))
    return html


def _code(renderer: object, tokens: list[Any], index: int, options: object, env: object) -> str:
    language = (tokens[index].info or "").strip().partition(" ")[0]
    code = _coloured(tokens[index].content, language)
    return f'<div class="code_wrap">{_COPY}<pre tabindex="0"><code>{code}</code></pre></div>\n'


def _image(renderer: object, tokens: list[Any], index: int, options: object, env: object) -> str:
    """A link to the picture: the page loads nothing from other servers."""
    source = escapeHtml(str(tokens[index].attrs["src"]))
    return f'<a href="{source}">{escapeHtml(tokens[index].content) or source}</a>'


def _table_open(renderer: object, tokens: list[Any], index: int, options: object, env: object) -> str:
    return '<div class="table" tabindex="0"><table>\n'


def _table_close(renderer: object, tokens: list[Any], index: int, options: object, env: object) -> str:
    return "</table></div>\n"


def _address(state: StateInline, silent: bool) -> bool:
    """An address on the web that isn't marked as a link is one all the same."""
    if state.linkLevel > 0 or not state.src.startswith("://", state.pos):
        return False
    scheme = re.search(r"(?<![A-Za-z0-9])https?$", state.pending[-6:])
    rest = re.compile(r"""://[^\s<>"'`（）“”，。、；：！？$]+""").match(state.src, state.pos)
    if scheme is None or rest is None:
        return False
    url = scheme[0] + rest[0]
    while url[-1] in ".,:;!?*_~" or (url[-1] == ")" and url.count("(") < url.count(")")):
        url = url[:-1]
    if not silent:
        state.pending = state.pending[: -len(scheme[0])]
        state.push("link_open", "a", 1).attrs = {"href": state.md.normalizeLink(url)}
        state.push("text", "", 0).content = url
        state.push("link_close", "a", -1)
    state.pos += len(url) - len(scheme[0])
    return True


def _parser() -> MarkdownIt:
    parser = MarkdownIt("commonmark", {"html": False, "breaks": True}).enable(["table", "strikethrough"])
    parser.disable("html_block").disable("html_inline")
    mathematics(parser)
    parser.inline.ruler.push("address", _address)
    for name, rule in (("fence", _code), ("code_block", _code), ("image", _image)):
        parser.add_render_rule(name, rule)
    parser.add_render_rule("table_open", _table_open)
    parser.add_render_rule("table_close", _table_close)
    return parser


_PARSER = _parser()
