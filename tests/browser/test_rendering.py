"""Messages as HTML: nothing that was HTML before is HTML then, and the text behind it comes back as it was."""

from html.parser import HTMLParser

import pytest

from qwen1.browser.messages import message, text_of
from qwen1.browser.rendering import LONGEST_COLOURED, SOURCE, behind, shown, to_html

OURS = {
    "div", "p", "span", "a", "code", "pre", "button", "svg", "path", "table", "thead", "tbody", "tr", "th", "td", "ul",
    "ol", "li", "h1", "h2", "blockquote", "strong", "em", "s", "br", "hr",
}  # fmt: skip
EVIL = (
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "<b>bold</b>",
    "<style>p { display: none }</style>",
    "<!-- gone -->",
    "<svg/onload=alert(1)>",
    "</div></pre></span>",
    "<think>hm</think>",
    "<![CDATA[x]]>",
    "<?php echo 1 ?>",
)
AROUND = (
    "{}",
    "before {} after",
    "- {}\n- {}",
    "1. a\n   {}",
    "> {}",
    "# {}",
    "|a|{}|\n|-|-|\n|{}|b|",
    "**{}**",
    "```\n{}\n```",
    "```html\n{}\n```",
    "```{}\nx\n```",
    "```mermaid\n{}\n```",
    "    {}",
    "a `{}` b",
    "$a {}$",
    "\\[\n{}\n\\]",
    "[{}](https://example.org)",
    "![{}](https://example.org/x.png)",
)


class Parts(HTMLParser):
    """Tags, names of attributes and text of HTML."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.attributes, self.text = set(), set(), ""
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attributes}

    def handle_data(self, data):
        self.text += data


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("evil", EVIL)
def test_html_is_text_wherever_it_stands(evil, around):
    parts = Parts(to_html(around.replace("{}", evil)))
    assert parts.tags <= OURS
    assert not {name for name in parts.attributes if name.startswith("on")}
    if not around.startswith("```{}"):  # the language of code isn't shown
        assert evil in parts.text


@pytest.mark.parametrize("address", ["javascript:alert(1)", "data:text/html,<script>", "vbscript:x", "JaVaScRiPt:x"])
def test_no_link_runs_anything(address):
    for text in (f"[a]({address})", f"<{address}>", f"![a]({address})", f"[a]: {address}\n\n[a]"):
        assert "href" not in Parts(to_html(text)).attributes


def test_pictures_are_links():
    html = to_html("![a cat](https://example.org/cat.png)")
    assert "<img" not in html and '<a href="https://example.org/cat.png">a cat</a>' in html


@pytest.mark.parametrize(
    "text, address, after",
    [
        ("see https://a.org/b_c_d.", "https://a.org/b_c_d", "."),
        ("(https://a.org/x_(y)).", "https://a.org/x_(y)", ")."),
        ("在https://a.org/x，后", "https://a.org/x", "，后"),
    ],
)
def test_addresses_are_links(text, address, after):
    assert f'<a href="{address}">{address}</a>{after}</p>' in to_html(text)


def test_no_link_in_a_link():
    assert to_html("[https://a.org](https://b.org)").count("<a ") == 1
    assert "<a " not in to_html("`https://a.org`")


@pytest.mark.parametrize("code", ["x = 1 < 2\n\n\n", "\n  indented\n", "no end"])
@pytest.mark.parametrize("language", ["", "python", "no-such-language", "html"])
def test_code_stays_as_it_is(code, language):
    assert Parts(to_html(f"```{language}\n{code}\n```")).text.strip("\n") == code.strip("\n")


def test_long_code_is_not_coloured():
    assert '<span class="mi">' in to_html("```python\n1\n```")
    assert '<span class="mi">' not in to_html(f"```python\n{'1 + ' * LONGEST_COLOURED}1\n```")


def test_tables_and_code_scroll_by_keyboard_too():
    assert '<div class="table" tabindex="0"><table>' in to_html("|a|\n|-|\n|b|")
    assert '<pre tabindex="0">' in to_html("```\na\n```")


def test_lines_stay_lines():
    assert "a<br />\nb" in to_html("a\nb")


@pytest.mark.parametrize(
    "text", ["", "a\r\n b\t", " lead", "</pre>", "<!--", "\ud83d lone", "\x00\u2028", "é'\"\\", "a\n\n\nb", "\u2061"]
)
def test_the_text_behind_comes_back(text):
    held = shown(message("assistant", text))
    assert behind(held) == message("assistant", text)
    assert text_of(held).isascii() or text_of(held).partition("</pre>")[0].isascii()


@pytest.mark.parametrize("text", ["plain", SOURCE, f"{SOURCE}not JSON</pre>", f"a {SOURCE}1</pre>"])
def test_a_text_of_the_page_that_is_not_ours_is_its_own(text):
    assert text_of(behind(message("user", text))) == text


def test_what_was_typed_like_ours_is_typed_text():
    text = f'{SOURCE}"trick"</pre>'
    assert text_of(behind(shown(message("user", text)))) == text
