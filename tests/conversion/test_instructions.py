"""Instructions of 2023 in a card give way to ours; the author's text stays as it is."""

import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from qwen1.conversion.publishing.card import model_card, notes_on_card
from qwen1.conversion.publishing.instructions import TITLE, renew

# In the form of the cards of 2023, with words of our own.
CARD = """---
language:
- zh
- en
tags:
- qwen
pipeline_tag: text-generation
inference: false
---

# Qwen-7B-Chat

<p align="center"><img src="assets/logo.jpg"></p>

## 介绍（Introduction）

The author's words, with `transformers==4.32.0` in them.

## 要求（Requirements）

* python 3.8 or later
* pytorch 1.12 or later

## 依赖项（Dependency）

Run this:

```bash
pip install transformers==4.32.0 accelerate tiktoken einops scipy transformers_stream_generator==0.0.4
```

And, if you like:

```bash
git clone https://github.com/Dao-AILab/flash-attention
cd flash-attention && pip install .
# pip install csrc/rotary
```

## 快速使用（Quickstart）

A conversation of several turns:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

# Note: this is no heading
tokenizer = AutoTokenizer.from_pretrained("Qwen/Qwen-7B-Chat", trust_remote_code=True)
```

More of the author's words.

## Tokenizer

```python
print("nothing old in this")
```

| a | table |
|---|---|

## 量化 (Quantization)

~~~bash
pip install auto-gptq optimum
~~~

The end.
"""
OURS = "```bash\npip install ours\n```"


def headings(card):
    tokens = MarkdownIt().parse(card.partition("---\n")[2].partition("---\n")[2])
    return [tokens[number + 1].content for number, token in enumerate(tokens) if token.type == "heading_open"]


def test_instructions_give_way_and_the_text_stays():
    card, changed = renew(CARD, OURS, "me/mine")
    assert changed == ["要求（Requirements）", "依赖项（Dependency）", "快速使用（Quickstart）", "量化 (Quantization)"]
    assert headings(card) == [
        *("Qwen-7B-Chat", "介绍（Introduction）", TITLE, "快速使用（Quickstart）", "Tokenizer", "量化 (Quantization)")
    ]
    assert card.count(OURS) == 1 and card.count("see [Use with transformers 5](#use-with-transformers-5)") == 2
    for gone in ("stream_generator", "csrc", "from_pretrained", "auto-gptq", "python 3.8"):
        assert gone not in card
    start = CARD.index("## 要求")
    assert card.startswith(CARD[:start]) and card.endswith("~\n\nThe end.\n".lstrip("~"))
    kept = ("A conversation of several turns:", "More of the author's words.", 'print("nothing old in this")')
    assert all(text in card for text in kept)


def test_a_card_without_old_instructions_stays_to_the_byte():
    text = CARD.partition("## 要求")[0] + '## Use\n\n```python\nmodel.from_pretrained("Qwen/Qwen-7B")\n```\n'
    assert renew(text, OURS, "me/mine") == (text, [])


def test_code_that_loads_this_repository_is_kept():
    card, _ = renew(CARD, OURS, "Qwen/Qwen-7B-Chat")
    assert 'from_pretrained("Qwen/Qwen-7B-Chat"' in card and "stream_generator" not in card


def test_renewing_twice_changes_nothing_more():
    card, _ = renew(CARD, OURS, "me/mine")
    assert renew(card, OURS, "me/mine") == (card, [])


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_line_ends_are_those_of_the_card(end):
    card, _ = renew(CARD.replace("\n", end), OURS, "me/mine")
    assert card.count("\n") == card.count(end)


def test_a_block_that_never_ends():
    card, changed = renew("text\n```bash\npip install transformers==4.32.0\n", OURS, "me/mine")
    assert changed == ["the text above the first heading"] and card.startswith(f"## {TITLE}\n\n{OURS}\n\ntext\n*The")


def test_push_has_the_card_and_says_so(checkpoint_folder):
    (checkpoint_folder / "README.md").write_text(CARD, encoding="utf-8")
    card = model_card(checkpoint_folder, "me/mine")
    assert ModelCard(card).data.to_dict()["inference"] is False
    assert 'pip install "transformers>=5.4" accelerate tiktoken' in card
    assert 'from_pretrained("me/mine", trust_remote_code=True)' in card and "Qwen/Qwen-7B-Chat" not in card
    (note,) = notes_on_card(checkpoint_folder, "me/mine")
    assert "'依赖项（Dependency）'" in note
    assert (checkpoint_folder / "README.md").read_text(encoding="utf-8") == CARD
    (checkpoint_folder / "README.md").unlink()
    assert notes_on_card(checkpoint_folder, "me/mine") == []
