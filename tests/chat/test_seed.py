"""`seed=`: sampling that repeats, whatever the state of the global generator, which it doesn't seed."""

import numpy as np
import pytest
import torch
from transformers import TopPLogitsWarper

from qwen1.qwen_generation_utils import SeededSampling

PROMPT = torch.tensor([list(b"a prompt of more than thirty-two tokens")])


@pytest.fixture
def sample(chat_model):
    """Sample 16 tokens after a prompt: (global seed, **arguments) -> list of rows."""

    def draw(global_seed=0, **arguments):
        torch.manual_seed(global_seed)
        output = chat_model.generate(PROMPT, do_sample=True, min_new_tokens=16, max_new_tokens=16, **arguments)
        return output[:, PROMPT.shape[1] :].tolist()

    return draw


def test_same_seed_same_text_whatever_the_global_generator_does(sample):
    assert sample(0, seed=7) == sample(1, seed=7)


def test_different_seeds_differ(sample):
    assert len({str(sample(seed=seed)) for seed in (0, 1, 2, -1, 2**70)}) == 5


def test_a_whole_number_of_numpy_is_a_seed(sample):
    assert sample(seed=np.int64(7)) == sample(seed=np.uint8(7)) == sample(seed=7)


def test_without_a_seed_the_global_generator_decides(sample):
    assert sample(0) == sample(0, seed=None) != sample(1)


def test_seed_of_the_configuration(chat_model, sample):
    expected = sample(seed=3)
    chat_model.generation_config.seed = 3
    assert sample(1) == expected != sample(1, seed=4)


def test_seed_has_no_say_in_greedy_decoding(chat_model):
    expected = chat_model.generate(PROMPT)
    assert torch.equal(chat_model.generate(PROMPT, seed=1), expected)


def test_chat_and_stream_repeat(chat_model, byte_tokenizer):
    arguments = {"do_sample": True, "seed": 3, "temperature": 1.5}
    reply, _ = chat_model.chat(byte_tokenizer, "q", **arguments)
    assert chat_model.chat(byte_tokenizer, "q", **arguments)[0] == reply
    assert list(chat_model.chat_stream(byte_tokenizer, "q", **arguments))[-1] == reply
    assert chat_model.chat(byte_tokenizer, "q", **{**arguments, "seed": 4})[0] != reply


def test_rows_differ_and_the_first_is_drawn_as_alone(sample):
    rows = sample(seed=7, num_return_sequences=3)
    assert len({str(row) for row in rows}) == 3
    assert rows[:1] == sample(seed=7)
    assert rows[1] != sample(seed=8)[0]


def test_rejected_drafts_leave_no_trace(tiny_model, sample):
    """Drafts come from an unseeded source here, and the text is still that of plain sampling."""
    expected = sample(seed=7)
    assistant = tiny_model(seed=1)
    assistant.generation_config.do_sample = True
    for global_seed in (0, 1):
        assert sample(global_seed, seed=7, assistant_model=assistant) == expected
    assert sample(seed=7, prompt_lookup_num_tokens=4) == expected


def test_temperature_and_top_p_are_respected(chat_model, sample):
    greedy = chat_model.generate(PROMPT, min_new_tokens=16, max_new_tokens=16)[:, PROMPT.shape[1] :].tolist()
    assert sample(seed=1, temperature=0.001, top_k=0) == greedy != sample(seed=1, top_k=0)
    nucleus = TopPLogitsWarper(0.5)
    for seed in range(5):
        output = chat_model.generate(
            PROMPT,
            do_sample=True,
            seed=seed,
            top_p=0.5,
            top_k=0,
            temperature=3.0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        written = output.sequences[0, PROMPT.shape[1] :]
        for token, logits in zip(written, output.logits, strict=True):
            assert torch.isfinite(nucleus(None, logits / 3.0)[0, token])


@pytest.mark.parametrize("varied", ["rows", "steps", "seeds"])
def test_draws_follow_the_distribution(varied):
    """20,000 draws over rows, steps or seeds, by Pearson's chi-square (7 degrees of freedom, p = 0.001)."""
    count = 20_000
    logits = torch.tensor([2.0, 1.0, 0.5, 0.0, 0.0, -0.5, -1.0, -3.0, -torch.inf])
    if varied == "rows":
        drawn = SeededSampling(5, 0)(torch.zeros(count, 1), logits.expand(count, -1)).argmax(-1)
    else:
        calls = [(5, step) if varied == "steps" else (step, 0) for step in range(count)]
        rows = [SeededSampling(seed, 0)(torch.zeros(1, step), logits[None]) for seed, step in calls]
        drawn = torch.cat(rows).argmax(-1)
    observed = torch.bincount(drawn, minlength=len(logits))
    assert observed[-1] == 0
    expected = logits.softmax(-1)[:-1] * count
    assert ((observed[:-1] - expected) ** 2 / expected).sum() < 24.3


def test_successive_draws_are_independent():
    """Neighbouring steps and rows agree as often as chance says: half of the time, within four deviations."""
    logits = torch.zeros(2, 2)
    draws = torch.stack([SeededSampling(1, 0)(torch.zeros(2, step), logits).argmax(-1) for step in range(4000)])
    for pairs in (draws[1:, 0] == draws[:-1, 0], draws[:, 0] == draws[:, 1]):
        assert abs(pairs.float().mean() - 0.5) < 4 * 0.5 / 4000**0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_leaves_one_choice_in_the_dtype_of_the_scores(dtype):
    scores = torch.randn(3, 11, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = scores.clone()
    left = SeededSampling(1, 2)(torch.zeros(3, 5), scores)
    assert left.dtype == dtype and torch.equal(scores, before)
    assert (left == 0).sum(-1).tolist() == [1, 1, 1] and (left == -torch.inf).sum() == 30


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": "x"}, "seed='x' must be a whole number, or None"),
        ({"seed": 1.5}, "seed=1.5 must be a whole number"),
        ({"seed": 1, "num_beams": 2}, "seed=1 can't be used with num_beams=2: drop one"),
    ],
)
def test_bad_seed(sample, arguments, message):
    with pytest.raises(ValueError, match=message):
        sample(**arguments)
