"""Any messages, tools and templates: the prompt that the structure demands, or an error that says why not."""

import itertools

from hypothesis import example, given
from hypothesis import strategies as st
from jinja2.exceptions import TemplateError

from qwen1.pieces_qwen import normalise, split_pattern
from qwen1.qwen_generation_utils import make_context
from qwen1.templates_qwen import mask_unsafe, unmask

from .conftest import SPECIALS, encodable, objects, texts, values

turns = st.lists(st.tuples(texts, texts), max_size=3)
content = texts | st.lists(texts | st.fixed_dictionaries({"type": st.just("text"), "text": texts}), max_size=3)
roles = st.sampled_from(["system", "user", "assistant", "tool", "function"]) | texts
calls = st.lists(st.fixed_dictionaries({"name": texts, "arguments": values}) | values, max_size=2)
messages = st.fixed_dictionaries(
    {"role": roles, "content": content | values}, optional={"tool_calls": calls | values, "name": texts, "more": values}
)
tools = st.lists(
    st.fixed_dictionaries({"function": st.fixed_dictionaries({"name": texts, "parameters": values})}) | values
)
MARK = "\U00020002"
# Pieces of templates: what they write, what they take from messages, what they do with it.
expressions = st.lists(
    st.sampled_from(
        [
            *("<|im_start|>", "<|im_end|>", "<|", "|>", "<", ">", "\n", " "),
            *("{{ m.role }}", "{{ m.content }}", "{{ m.content | trim }}", "{{ m | tojson }}", "{{ m.role | lower }}"),
            *("{{ m.content ~ m.role }}", "{{ '<|' ~ m.role ~ '|>' }}", "{{ '<|' ~ m.role | upper | lower ~ '|>' }}"),
            *("{{ m.content.split('a') | join }}", "{{ m.content | replace('x', '') }}", "{{ m.content[:4] }}"),
            *("{{ m }}", "{{ m.items() | list }}", "{{ m.content | striptags }}", "{{ m.content | title }}"),
        ]
    ),
    max_size=6,
).map(lambda parts: "{% for m in messages %}" + "".join(parts) + "{% endfor %}")


def control_ids(tokenizer, ids):
    return [i for i in ids if i >= tokenizer.eod_id]


@given(texts, turns, texts)
def test_the_shipped_template_gives_the_ids_of_make_context(tokenizers, system, history, query):
    earlier = itertools.chain.from_iterable([("user", asked), ("assistant", answered)] for asked, answered in history)
    chat = [{"role": role, "content": text} for role, text in [("system", system), *earlier, ("user", query)]]
    expected_text, expected = make_context(tokenizers[0], query, history, system, 10**6)
    for tokenizer in tokenizers:
        assert tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False) == expected
        assert tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) == expected_text


@given(st.lists(messages, max_size=4), st.none() | tools, st.booleans())
def test_any_messages(tokenizers, chat, given_tools, prompt):
    """No control token but those around turns, which begin and end in turn."""
    results = []
    for tokenizer in tokenizers:
        try:
            ids = tokenizer.apply_chat_template(chat, given_tools, add_generation_prompt=prompt, return_dict=False)
        except (ValueError, TypeError, TemplateError) as error:
            assert str(error) and MARK not in str(error)
            results.append(type(error))
        else:
            results.append(ids)
            pair = [tokenizer.im_start_id, tokenizer.im_end_id]
            found = control_ids(tokenizer, ids)
            assert found == (pair * len(found))[: len(found)]
    assert results[0] == results[1]


@given(st.lists(messages | objects, max_size=3) | objects, objects, objects)
@example({"": None}, None, None)  # no list: a KeyError
def test_anything_as_messages(tokenizers, chat, given_tools, documents):
    for tokenizer in tokenizers:
        try:
            tokenizer.apply_chat_template(chat, given_tools, documents)
        except (ValueError, TypeError, TemplateError) as error:
            assert str(error)


@given(
    st.lists(st.fixed_dictionaries({"role": texts, "content": texts, "a": texts}), min_size=1, max_size=3), expressions
)
@example(  # a control token out of a name that the template brought to lower case
    [{"role": "IM_START", "content": "", "a": ""}],
    "{% for m in messages %}{{ '<|' ~ m.role | lower ~ '|>' }}{% endfor %}",
)
def test_templates_of_others(tokenizers, chat, template):
    """The control tokens that the template writes itself, as often as it does, and no others; the text of the ids."""
    harmless = [{key: "y" for key in message} for message in chat]
    for tokenizer in tokenizers:
        ids = tokenizer.apply_chat_template(chat, chat_template=template, return_dict=False)
        expected = tokenizer.apply_chat_template(harmless, chat_template=template, return_dict=False)
        assert control_ids(tokenizer, ids) == control_ids(tokenizer, expected)
        text = tokenizer.apply_chat_template(chat, chat_template=template, tokenize=False)
        nfc = split_pattern(frozenset())
        assert normalise(encodable(tokenizer.decode(ids)), nfc) == normalise(encodable(text), nfc)


@given(texts)
def test_masks(text):
    masked = mask_unsafe(text, MARK)
    assert unmask(masked, MARK) == text
    for around in ("{}", "<{}", "{}>", "<|{}|>", "<|im_{}", "{}|>"):
        for changed in (masked, masked.strip(), masked.lower(), masked.upper().lower()):
            whole = around.format(changed)
            assert not any(token in whole for token in SPECIALS), (around, changed)


@given(
    st.lists(st.sampled_from(["{{ messages }}", "{% for m in messages %}", "{{ m.content", "%}", "{% endfor %}", "a"]))
)
def test_damaged_templates(tokenizers, parts):
    for tokenizer in tokenizers:
        try:
            tokenizer.apply_chat_template([{"role": "user", "content": "a"}], chat_template="".join(parts))
        except (ValueError, TemplateError) as error:
            assert str(error)
