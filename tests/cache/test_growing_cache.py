"""The growing cache: transformers' DynamicCache in content, without copying it for each token."""

import copy
import random

import pytest
import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

from qwen1 import generation_qwen
from qwen1.cache_qwen import QWenCache, QWenGrowingLayer
from qwen1.translating_qwen import SWITCH

ROWS, HEADS, SIZE = 2, 3, 4


def chunk(length: int, rows: int = ROWS, **kwargs) -> torch.Tensor:
    return torch.randn(rows, HEADS, length, SIZE, **kwargs)


def filled(length: int = 5) -> QWenGrowingLayer:
    layer = QWenGrowingLayer()
    layer.update(chunk(length), chunk(length))
    return layer


def append(layer: DynamicLayer, rows: int, length: int) -> None:
    keys = chunk(length, rows)
    layer.update(keys, -keys)


@pytest.mark.parametrize("seed", range(20))
def test_any_course_of_operations_leaves_what_transformers_keeps(seed, operations, change_both):
    drawn, ours, theirs, rows = random.Random(seed), QWenGrowingLayer(), DynamicLayer(), ROWS
    for _ in range(60):
        operation = drawn.choice(operations)
        torch.manual_seed(drawn.randrange(10**6))
        state, length = torch.get_rng_state(), drawn.choice([1, 1, 1, 2, 7, 90])
        if operation == "append":
            append(ours, rows, length)
            torch.set_rng_state(state)
            append(theirs, rows, length)
        elif operation == "reset":
            ours.reset()
            theirs = DynamicLayer()  # reset, it forgets nothing in transformers 5.4
            rows = ROWS
        elif not theirs.get_seq_length():
            continue
        else:
            ours, rows = change_both(operation, drawn, ours, theirs, rows)
        assert ours.get_seq_length() == theirs.get_seq_length()
        if theirs.get_seq_length():
            assert torch.equal(ours.keys, theirs.keys) and torch.equal(ours.values, theirs.values), operation


def test_tokens_are_written_without_copying_the_rest():
    layer, moved = filled(1000), 0
    for _ in range(2000):
        place = layer.keys.data_ptr()
        append(layer, ROWS, 1)
        moved += layer.keys.data_ptr() != place
    assert layer.get_seq_length() == 3000
    assert 0 < moved <= 25


@pytest.mark.parametrize(("length", "room"), [(1, 64), (1000, 64), (8192, 512)])
def test_the_room_is_bounded(length, room):
    layer = filled(length)
    assert layer.keys.untyped_storage().nbytes() == (length + room) * ROWS * HEADS * SIZE * 4


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy], ids=["copy", "deepcopy"])
def test_branches_never_see_each_other(copied):
    one = filled()
    start = one.keys.clone()
    other = copied(one)
    append(one, ROWS, 2)
    mine = one.keys.clone()
    append(other, ROWS, 3)
    append(one, ROWS, 1)
    assert torch.equal(one.keys[..., :7, :], mine)
    assert torch.equal(one.keys[..., :5, :], start) and torch.equal(other.keys[..., :5, :], start)
    assert not torch.equal(other.keys[..., 5:7, :], mine[..., 5:, :])


def test_a_view_that_somebody_holds_stays_as_it_is():
    layer = filled()
    held, before = layer.keys, layer.keys.clone()
    layer.crop(-2)
    append(layer, ROWS, 2)
    assert torch.equal(held, before)


def test_gradients_flow_through_the_cache():
    layer, states = filled(), chunk(2, requires_grad=True)
    keys, values = layer.update(states, states * 2)
    append(layer, ROWS, 1)
    (keys.sum() + values.sum()).backward()
    assert torch.equal(states.grad, torch.full_like(states, 3.0))


def test_a_cache_from_inference_mode_can_be_continued():
    with torch.inference_mode():
        layer = filled()
    before = layer.keys.clone()
    append(layer, ROWS, 1)
    assert torch.equal(layer.keys[..., :5, :], before)


def test_other_rows_are_refused():
    layer = filled()
    with pytest.raises(ValueError, match=r"holds \(2, 3, 5, 4\).*can't go on with \(1, 3, 1, 4\)"):
        append(layer, 1, 1)
    assert layer.get_seq_length() == 5


def test_a_wider_dtype_is_not_narrowed():
    ours, theirs = QWenGrowingLayer(), DynamicLayer()
    for states in (chunk(3).bfloat16(), chunk(2), chunk(1).bfloat16()):
        ours.update(states, states)
        theirs.update(states, states)
    assert ours.keys.dtype == torch.float32 and torch.equal(ours.keys, theirs.keys)


def test_a_reset_frees_the_memory():
    layer = filled()
    layer.reset()
    assert layer._key_buffer is layer._value_buffer is layer.keys is None


def test_a_cache_made_of_states_grows_too():
    states = [(chunk(3), chunk(3)) for _ in range(2)]
    cache = QWenCache(states)
    assert [type(layer) for layer in cache.layers] == [QWenGrowingLayer] * 2
    keys, _ = cache.update(chunk(1), chunk(1), layer_idx=0)
    assert torch.equal(keys[..., :3, :], states[0][0])


def test_generate_makes_one(tiny_model, monkeypatch):
    """Of which each asks the configuration about every layer, which takes as long as starting all that a block does."""
    made, make = [], generation_qwen.new_cache
    monkeypatch.setattr(generation_qwen, "new_cache", lambda model: made.append(make(model)) or made[-1])
    tiny_model().generate(torch.tensor([[1, 2, 3]]), max_new_tokens=1, pad_token_id=0)
    assert len(made) == 1


@pytest.mark.parametrize("settings", [{"use_cache": True}, {"cache_implementation": "dynamic"}, {"num_beams": 3}])
def test_generate_uses_it_and_writes_what_the_dynamic_cache_gives(tiny_model, monkeypatch, settings):
    model, ids = tiny_model("sdpa"), torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(1))
    settings = dict(settings, max_new_tokens=80, min_new_tokens=80, do_sample=False, pad_token_id=256)
    settings |= {"return_dict_in_generate": True, "output_logits": True}
    monkeypatch.setenv(SWITCH, "0")  # whose rounding is another one, and which another cache doesn't go through
    ours = model.generate(ids, **settings)
    assert {type(layer) for layer in ours.past_key_values.layers} == {QWenGrowingLayer}
    settings.pop("cache_implementation", None)
    theirs = model.generate(ids, past_key_values=DynamicCache(config=model.config), **settings)
    assert torch.equal(ours.sequences, theirs.sequences)
    torch.testing.assert_close(torch.stack(ours.logits), torch.stack(theirs.logits), rtol=1e-5, atol=1e-5)
