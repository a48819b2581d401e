"""Training data of every form, and texts to calibrate on: control tokens stand around what was said, never in it."""

import json

import pytest
import torch

from qwen1 import QWenTokenizer
from qwen1.conversion.quantising.calibration import make_rows, read_calibration
from qwen1.training.data import read_conversations, read_texts
from qwen1.training.examples import IGNORED, encode_all

from .conftest import ATTACKS, SHIPPED, controls, turns


def write(path, records):
    path.write_text("\n".join(json.dumps(record) for record in records), encoding="utf-8")
    return path


TEXTS = [attack.replace("\0", "") for attack in ATTACKS]


def as_published(text):
    said = [("system", text), ("human", text), ("gpt", text)]
    return {"conversations": [{"from": role, "value": content} for role, content in said], "id": text}


def as_messages(text):
    return {"messages": [{"role": role, "content": text} for role in ("system", "user", "assistant")]}


@pytest.mark.parametrize("record", [as_published, as_messages])
def test_conversations(tokenizer, tmp_path, record):
    examples = encode_all(tokenizer, read_conversations(write(tmp_path / "a.jsonl", map(record, TEXTS)))).examples
    assert len(examples) == len(TEXTS)
    for example in examples:
        assert controls(tokenizer, example["input_ids"]) == turns(3, is_open=False)
        assert controls(tokenizer, [i for i in example["labels"] if i != IGNORED]) == ["<|im_end|>"]


def test_texts(tokenizer, tmp_path):
    for path in (write(tmp_path / "a.jsonl", ({"text": text} for text in TEXTS)), tmp_path / "a.txt"):
        if not path.exists():
            path.write_text("\n\n".join(text.encode("utf-8", "replace").decode() for text in TEXTS), newline="")
        for example in encode_all(tokenizer, read_texts(path)).examples:
            assert controls(tokenizer, example["input_ids"]) == ["<|endoftext|>"]


def test_texts_to_calibrate_on(tmp_path):
    """Between which stand an end of text each."""
    tokenizer = QWenTokenizer(SHIPPED / "qwen.tiktoken")  # the class that reads them
    records = [*({"text": text} for text in TEXTS), *map(as_messages, TEXTS)]
    rows = make_rows(read_calibration(write(tmp_path / "a.jsonl", records)), tokenizer, 10**6, 16, 0)
    ids = torch.cat([rows.held_out.flatten(), rows.seen.flatten()]).tolist()
    found = controls(tokenizer, ids)
    left_out = len(found) - found.count("<|endoftext|>")
    assert set(found) == {"<|endoftext|>", "<|im_start|>", "<|im_end|>"}
    assert found.count("<|endoftext|>") <= 2 * len(TEXTS) and left_out <= 6 * len(TEXTS)
