"""Chat templates, ours and of others: no text of the caller's becomes a control token, wherever a template puts it.

`templates` holds twenty in the manner of well known families, in our own words: what checkpoints of other makers bring.
With such a template, the control tokens of QWen that it writes itself are those tokens, and nothing else is: no marks
of its own (`<|eot_id|>` is text to this model), and no text that it is given.
"""

import enum
import json
import unicodedata
from pathlib import Path

import pytest
from jinja2.exceptions import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from .conftest import ATTACKS, TURN, controls, turns

TEMPLATES = {
    path.stem: path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parent.glob("templates/*.jinja"))
}
assert len(TEMPLATES) == 20


def ids_of(tokenizer, messages, **arguments):
    return tokenizer.apply_chat_template(messages, return_dict=False, **arguments)


def conversation(*texts):
    """The texts in every field of messages, one after another."""
    messages = []
    for text in texts:
        messages += [
            {"role": "system", "content": text},
            {"role": "user", "content": text},
            {"role": "assistant", "content": text, "reasoning_content": text},
            {"role": "user", "content": text, "metadata": text},
        ]
    return messages


def tool(text):
    parameters = {"type": "object", "properties": {text: {"type": "string", "description": text, "enum": [text]}}}
    return {"type": "function", "function": {"name": text, "description": text, "parameters": parameters, text: text}}


def everything(*texts):
    """What a template may be given beside messages."""
    return {
        "tools": [tool(text) for text in texts],
        "documents": [{"title": text, "text": text, text: text} for text in texts],
        "custom": {text: {text: text} for text in texts},
        "date_string": texts[0],
        "eos_token": texts[0],
        "bos_token": texts[0],
        "enable_thinking": texts[0],
    }


def calls_of(*texts):
    """The texts in every field of calls and their results."""
    messages = []
    for text in texts:
        call = {"id": text, "type": "function", "function": {"name": text, "arguments": {text: [text]}}}
        messages += [
            {"role": "user", "content": text},
            {"role": "assistant", "content": text, "tool_calls": [call]},
            {"role": "tool", "content": text, "name": text, "tool_call_id": text},
        ]
    return messages


HARMLESS = [f"x{number}" for number in range(len(ATTACKS))]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("make", [conversation, calls_of])
@pytest.mark.parametrize("given", [False, True])
def test_templates_of_other_families(tokenizer, name, make, given):
    """As many control tokens as harmless texts give, and the text of plain Jinja."""
    options = {"chat_template": TEMPLATES[name], "add_generation_prompt": True}
    attacks, harmless = (everything(*texts) if given else {} for texts in (ATTACKS, HARMLESS))
    expected = controls(tokenizer, ids_of(tokenizer, make(*HARMLESS), **options, **harmless))
    assert controls(tokenizer, ids_of(tokenizer, make(*ATTACKS), **options, **attacks)) == expected
    shown = tokenizer.apply_chat_template(make(*ATTACKS), tokenize=False, **options, **attacks)
    (plain,), _ = render_jinja_template([make(*ATTACKS)], **options, **{**tokenizer.special_tokens_map, **attacks})
    assert shown == plain


@pytest.mark.parametrize("name", TEMPLATES)
def test_roles_in_templates_of_other_families(tokenizer, name):
    """Unless the template refuses them."""

    def found(role):
        try:
            ids = ids_of(tokenizer, [{"role": role, "content": "a"}] * 2, chat_template=TEMPLATES[name])
        except TemplateError:
            return None
        return controls(tokenizer, ids)

    for attack in ATTACKS:
        assert found(attack) in (None, found("x")), attack


@pytest.mark.parametrize("attack", ATTACKS)
def test_every_field_of_the_shipped_template(tokenizer, attack):
    function = {"name": attack, "arguments": {attack: [attack, {attack: attack}]}}
    parts = [{"type": "text", "text": attack}, attack]
    messages = [
        {"role": "system", "content": attack, attack: attack},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": attack, "tool_calls": [{"id": attack, "type": attack, "function": function}]},
        {"role": "tool", "content": attack, "name": attack, "tool_call_id": attack},
        {"role": "assistant", "content": attack},
        {"role": "user", "content": attack},
        {"role": "assistant", "content": "", "function_call": {**function, "arguments": attack}},
        {"role": "function", "content": parts, "name": attack},
    ]
    ids = ids_of(tokenizer, messages, add_generation_prompt=True, **everything(attack))
    assert controls(tokenizer, ids) == turns(4)
    assert controls(tokenizer, ids_of(tokenizer, conversation(attack), add_generation_prompt=True)) == turns(4)
    begun = conversation(attack)[:3]
    assert controls(tokenizer, ids_of(tokenizer, begun, continue_final_message=True)) == turns(2)


def test_pieces_in_all_fields_do_not_join(tokenizer):
    """Cut anywhere and put into neighbours: roles, contents, parts, keys and values."""
    template = (
        "{% for m in messages %}{{ m.role ~ m.content ~ m.end }}{{ m.parts | join }}{% endfor %}"
        "{% for k, v in custom.items() %}{{ k ~ v }}{% endfor %}<{{ messages[0].role }}{{ messages[0].content }}"
        "<|{{ messages[0].role }}|>{{ messages[0].content | lower }}<|{{ messages[0].role | upper | lower }}|>"
    )
    for token in ("<|im_end|>", "<|im_start|>", "<|endoftext|>", "<|extra_0|>", "<|IM_END|>", "im_start", "IM_START"):
        for cut in range(len(token) + 1):
            first, second = token[:cut], token[cut:]
            message = {"role": first, "content": second, "end": first, "parts": [second, first, second]}
            custom = {first + "|": second, first: second}
            ids = ids_of(tokenizer, [message], chat_template=template, custom=custom)
            assert controls(tokenizer, ids) == [], (first, second)


@pytest.mark.parametrize(
    "role", ["IM_END", "\u0131m_end", "im_\ufb05art", "\u0131m_\u017ftart", "EXTRA_0", "ENDOFTEXT"]
)
def test_names_that_a_template_brings_to_lower_case(tokenizer, role):
    for change in ("lower", "upper | lower", "capitalize | lower", "title | lower"):
        ids = ids_of(
            tokenizer,
            [{"role": role, "content": ""}],
            chat_template=f"{{{{ '<|' ~ messages[0].role | {change} ~ '|>' }}}}",
        )
        assert controls(tokenizer, ids) == [], change


def test_numbers_that_print_as_text(tokenizer):
    class Evil(int):
        def __str__(self):
            return TURN

        __repr__ = __format__ = lambda self, *_: TURN

    class Share(float):
        __str__ = __repr__ = lambda self: TURN

    class Named(enum.IntEnum):
        END = 1

    template = "{{ messages[0].content }}{{ [messages[0].content] }}{{ '%s' % messages[0].content }}"
    for value in (Evil(1), Share(0.5), Named.END):
        ids = ids_of(tokenizer, [{"role": "user", "content": value}], chat_template=template)
        assert controls(tokenizer, ids) == []


def test_names_of_variables_reach_the_template(tokenizer):
    """Whatever they are called: only values are masked."""
    template = "{{ im_start }}{{ extra_0 }}"
    ids = ids_of(tokenizer, [{"role": "user", "content": ""}], chat_template=template, im_start="a", extra_0="b")
    assert tokenizer.decode(ids) == "ab"


def test_errors_of_a_template_say_what_was_given(tokenizer):
    """Without the characters that break control tokens meanwhile."""
    with pytest.raises(TemplateError) as caught:
        ids_of(tokenizer, [{"role": "<|im_start|>", "content": ""}])
    assert "Unknown role <|im_start|>;" in str(caught.value)


@pytest.mark.parametrize("depth", [300, 5000])
def test_nesting_without_end(tokenizer, depth):
    value = "x"
    for _ in range(depth):
        value = [value]
    for messages in ([{"role": "user", "content": value}], [{"role": "user", "content": "a", "more": value}]):
        try:
            ids_of(tokenizer, messages)
        except (ValueError, TemplateError) as error:
            assert str(error)
    loop: list = []
    loop.append(loop)
    with pytest.raises(ValueError, match="nested"):
        ids_of(tokenizer, [{"role": "user", "content": loop}])


def test_no_character_becomes_part_of_a_control_token_under_nfc():
    """So that normalising text after it was cut can't hide what it was cut at, and before could have hidden nothing."""
    letters = set("<|im_startedofx>")
    for code in range(0x80, 0x110000):
        assert not letters & set(unicodedata.normalize("NFC", chr(code))), hex(code)


def test_json_that_escapes_every_character(tokenizer):
    template = "{{ messages | tojson(ensure_ascii=true) }}<|im_end|>"
    for attack in ATTACKS:
        ids = ids_of(tokenizer, [{"role": "user", "content": attack}], chat_template=template)
        assert controls(tokenizer, ids) == ["<|im_end|>"]
        text = tokenizer.decode(ids).removesuffix("<|im_end|>")
        assert json.loads(text)[0]["content"] == attack
