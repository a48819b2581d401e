"""Packing: rows are full and repeatable, and a model can't tell that its examples share one."""

import math
import random

import pytest
import torch

from qwen1.training.examples import IGNORED
from qwen1.training.packing import Collator, ExampleDataset, PackedDataset, pack

PAD = 256


def example(length, seed=0, prompt=2):
    """Random ids; the first `prompt` of them have no label."""
    ids = torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return {"input_ids": ids, "labels": [IGNORED] * prompt + ids[prompt:]}


def examples_of(*lengths):
    return [example(length, seed) for seed, length in enumerate(lengths)]


def total(examples, row):
    return sum(len(examples[index]["input_ids"]) for index in row)


# --- rows ---


@pytest.mark.parametrize("seed", range(5))
def test_each_example_is_in_one_row_that_it_fits(seed):
    lengths = random.Random(seed)
    examples = examples_of(*(lengths.randint(1, 32) for _ in range(200)))
    rows = pack(examples, 32, seed)
    assert sorted(index for row in rows for index in row) == list(range(200))
    assert all(0 < total(examples, row) <= 32 for row in rows)
    least = max(math.ceil(total(examples, range(200)) / 32), sum(total(examples, [i]) > 16 for i in range(200)))
    assert least <= len(rows) <= 1.1 * least  # seeds of 200 lengths need up to 5 % more than the bound


def test_rows_that_can_be_full_are_full():
    examples = examples_of(5, 3, 8, 6, 2, 1, 7)
    assert [total(examples, row) for row in pack(examples, 8, 0)] == [8, 8, 8, 8]


def test_seed():
    examples = examples_of(*(length % 16 + 1 for length in range(100)))
    assert pack(examples, 16, 1) == pack(examples, 16, 1)
    assert pack(examples, 16, 1) != pack(examples, 16, 2)
    state = random.getstate()
    pack(examples, 16, 1)
    assert random.getstate() == state


def test_limits():
    assert pack([], 8, 0) == []
    assert pack(examples_of(8), 8, 0) == [[0]]
    with pytest.raises(ValueError, match="Example 1 has 9 tokens, a row only 8: raise max_length"):
        pack(examples_of(3, 9, 8), 8, 0)


# --- batches ---


def test_packed_rows():
    examples = [
        {"input_ids": [1, 2, 3], "labels": [1, 2, 3]},
        {"input_ids": [4, 5], "labels": [IGNORED, 5]},
        {"input_ids": [6], "labels": [6]},
    ]
    dataset = PackedDataset(examples, [[1, 0], [2]])
    assert len(dataset) == 2
    batch = Collator(PAD, packed=True)([dataset[0], dataset[1]])
    assert {key: value.tolist() for key, value in batch.items()} == {
        "input_ids": [[4, 5, 1, 2, 3], [6, PAD, PAD, PAD, PAD]],
        "labels": [[-100, 5, -100, 2, 3], [-100] * 5],
        "position_ids": [[0, 1, 0, 1, 2], [0, 0, 1, 2, 3]],
    }
    assert examples[0]["labels"] == [1, 2, 3]  # the data stay as they are


def test_unpacked_rows():
    examples = examples_of(3, 5)
    dataset = ExampleDataset(examples)
    assert len(dataset) == 2
    batch = Collator(PAD, packed=False, multiple_of=4)([dataset[0], dataset[1]])
    assert batch["attention_mask"].tolist() == [[1] * 3 + [0] * 5, [1] * 5 + [0] * 3]
    assert batch["input_ids"].tolist() == [[*e["input_ids"], *[PAD] * (8 - len(e["input_ids"]))] for e in examples]
    assert batch["labels"].tolist() == [[*e["labels"], *[IGNORED] * (8 - len(e["labels"]))] for e in examples]
    assert all(value.dtype == torch.int64 and value.shape == (2, 8) for value in batch.values())
    plain = Collator(PAD, packed=False, multiple_of=4)(examples)  # lists instead of tensors
    assert all(torch.equal(batch[key], plain[key]) for key in batch)


# --- the model ---


def summed_loss(model, batch):
    labels = batch["labels"]
    count = int((labels[:, 1:] != IGNORED).sum())
    return model(**batch, num_items_in_batch=1, use_cache=False).loss, count


def gradients(model, batches):
    model.zero_grad()
    losses = [summed_loss(model, batch) for batch in batches]
    loss = sum(loss for loss, _ in losses)
    loss.backward()
    grads = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    return loss.item(), sum(count for _, count in losses), grads


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("settings", [{}, {"use_dynamic_ntk": False, "use_logn_attn": False}], ids=["ntk", "plain"])
def test_loss_and_gradients_equal_those_of_single_examples(tiny_model, attention, settings):
    model = tiny_model(attention, **settings).train()
    examples = examples_of(40, 7, 12, 45, 20, 3, 33, 9)  # seq_length is 32, so the stretch is one of its own for each
    collate = Collator(PAD, packed=True)
    packed_rows = PackedDataset(examples, pack(examples, 64, 0))
    assert any(len(row) > 1 for row in packed_rows.rows)
    rows = [packed_rows[index] for index in range(len(packed_rows))]
    single = ExampleDataset(examples)
    loss, count, expected = gradients(model, [Collator(PAD, packed=False)([single[i]]) for i in range(len(examples))])
    batches = {
        "packed": [collate(rows)],
        "packed, a row at a time": [collate([row]) for row in rows],
        "padded": [Collator(PAD, packed=False)([single[i] for i in range(len(examples))])],
    }
    for name, batch in batches.items():
        found, found_count, grads = gradients(model, batch)
        assert found_count == count == sum(len(e["input_ids"]) - 2 for e in examples), name
        assert found == pytest.approx(loss, rel=2e-6), name
        for parameter, grad in expected.items():
            difference = (grads[parameter] - grad).abs().max()
            assert difference <= 2e-5 * grad.abs().max() + 1e-7, (name, parameter)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_examples_in_a_row_are_blind_to_each_other(tiny_model, attention):
    model = tiny_model(attention).train()
    second, collate = example(20, 1), Collator(PAD, packed=True)

    def logits(first, last):
        row = PackedDataset([first, second, last], [[0, 1, 2]])[0]
        return model(**collate([row]), use_cache=False).logits[:, 40:60]

    kept = logits(example(40, 2), example(4, 3))
    assert torch.equal(kept, logits(example(40, 4), example(4, 3)))
    assert torch.equal(kept, logits(example(40, 2), example(4, 5)))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("packed", [True, False])
@torch.no_grad()
def test_padding_changes_nothing(tiny_model, attention, packed):
    model = tiny_model(attention).train()
    row = ExampleDataset([example(20, 1)])[0]
    alone, padded = Collator(PAD, packed)([row]), Collator(PAD, packed, multiple_of=64)([row])
    other = Collator(7, packed, multiple_of=64)([row])
    expected = model(**alone, use_cache=False)
    found = model(**padded, use_cache=False)
    assert found.loss.item() == pytest.approx(expected.loss.item(), rel=1e-6)
    torch.testing.assert_close(found.logits[:, :20], expected.logits, rtol=1e-5, atol=2e-5)
    assert torch.equal(found.logits[:, :20], model(**other, use_cache=False).logits[:, :20])
