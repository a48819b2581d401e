r"""`$…$`, `\(…\)`, `\[…\]` and `$$…$$` become formulas, with all their backslashes; money and variables don't."""

import html
import re

import pytest

from qwen1.browser.mathematics import DELIMITERS, DISPLAY, INLINE
from qwen1.browser.rendering import to_html


def formulas(text):
    """What KaTeX is given: (TeX, whether it is displayed)."""
    marks = f"[{INLINE[0]}{DISPLAY[0]}](.*?)[{INLINE[1]}{DISPLAY[1]}]"
    found = re.finditer(marks, to_html(text), re.DOTALL)
    return [(html.unescape(formula[1]), formula[0][0] == DISPLAY[0]) for formula in found]


@pytest.mark.parametrize(
    "text, tex, display",
    [
        (r"$\alpha_1 \\ \beta$", r"\alpha_1 \\ \beta", False),
        (r"\(x_1 * y * z\)", "x_1 * y * z", False),
        (r"\[ \frac{1}{2} \]", r"\frac{1}{2}", True),
        ("$$a < b & c$$", "a < b & c", True),
        ("其中$x$是", "x", False),
        ("the $n$th", "n", False),
        ("$n$-th", "n", False),
        ("$3x + 2$", "3x + 2", False),
        ("$100$", "100", False),
        (r"$\$5 + x$", r"\$5 + x", False),
        (r"$2 \times 10^{-5}$", r"2 \times 10^{-5}", False),
        ("**$a_b$**", "a_b", False),
        ("|a|\n|-|\n|$x_1$ and more|", "x_1", False),
        ("- one\n  $$\n  a\n  = b\n  $$", "a\n= b", True),
        ("> \\[\n> a\n> \\]", "a", True),
        ("so\n$$\na\n= b\n- c\n\n# d\n$$\nthen", "a\n= b\n- c\n\n# d", True),
    ],
)
def test_a_formula(text, tex, display):
    assert formulas(text) == [(tex, display)]


@pytest.mark.parametrize(
    "text",
    [
        "$5 and $6",
        "$5, $6, or $7",
        "between $5-$10",
        "$1,000 and 5% of $2,000.",
        "US$5 and HK$6",
        "US$5 to US$ a",
        "his $20 (US$) note",
        r"\$x\$",
        r"\\(x\\)",
        "$HOME:$PATH",
        "$HOME and $PATH",
        "$ x $",
        "$x\n\ny$",
        "$$",
        "$$x",
        r"\(x",
        r"\[x",
        "`$x$`",
        "``\\(x\\)``",
        "```\n$x$ \\[y\\]\n```",
        "    $x$",
        "\u2061x\u2062 \u2063y\u2064",
    ],
)
def test_no_formula(text):
    assert formulas(text) == []


def test_text_around_keeps_its_form():
    assert to_html("a *b* $x_1$ c_d_e").endswith(
        f'<p>a <em>b</em> <span class="mathematics">{INLINE[0]}x_1{INLINE[1]}</span> c_d_e</p>\n</div>'
    )


def test_katex_looks_for_each_kind():
    assert {(d["left"], d["right"], d["display"]) for d in DELIMITERS} == {(*INLINE, False), (*DISPLAY, True)}


@pytest.mark.slow
@pytest.mark.no_cover
def test_many_openings_without_an_end_take_no_time():
    for opening in ("$", "$$\n", "\\(", "\\[\n", "https://"):
        assert formulas(opening * 3000) == [] or opening in ("$", "$$\n")
