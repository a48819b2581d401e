"""Logits, loss, gradients and states of the published implementations (`tests/golden/README.md`)."""

import shutil

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from qwen1 import QWenModel
from qwen1.arguments_qwen import CACHE_NAME
from qwen1.plain_qwen import is_plain_mask

LOGITS_TOLERANCE = 5e-5
SINGLE_PROMPT_CASES = [
    "aug_ntk_logn",
    "aug_plain",
    "aug_partial_rotary",
    "aug_residual_post_ln",
    "aug_rotary_base",
    "dec_ntk_logn",
    "dec_ntk_padded",
]
IMPLEMENTATIONS = ["eager", "sdpa"]

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="flex_attention compiles C++ on a CPU")


def prompts(tensors):
    return {int(name.removeprefix("ids_")): ids for name, ids in tensors.items() if name.startswith("ids_")}


@torch.no_grad()
def decode(model, ids, start, cache, **kwargs):
    """Logits of the tokens from `start` on, fed one at a time."""
    steps = [model(ids[:, i : i + 1], past_key_values=cache, **kwargs).logits for i in range(start, ids.shape[1])]
    return torch.cat(steps, dim=1)


@pytest.mark.parametrize("case", SINGLE_PROMPT_CASES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@torch.no_grad()
def test_prefill_and_decoding(golden_model, golden_tensors, case, implementation):
    model, expected = golden_model(case, attn_implementation=implementation), golden_tensors(case)
    assert len(prompts(expected)) >= 2
    for length, ids in prompts(expected).items():
        prefill = model(ids[:, :length], use_cache=True)
        torch.testing.assert_close(prefill.logits, expected[f"prefill_{length}"], atol=LOGITS_TOLERANCE, rtol=0)
        decoded = decode(model, ids, length, prefill.past_key_values)
        torch.testing.assert_close(decoded, expected[f"decode_{length}"], atol=LOGITS_TOLERANCE, rtol=0)


@pytest.mark.slow
@needs_compiler
@torch.no_grad()
@pytest.mark.no_cover
def test_flex_attention_reads_prompts(golden_model, golden_tensors):
    """Prefill only: torch 2.13 can't compile flex_attention with padding and a single query on a CPU, nor backward."""
    model = golden_model("dec_ntk_padded", attn_implementation="flex_attention")
    expected = golden_tensors("dec_ntk_padded")
    length, ids = max(prompts(expected).items())
    logits = model(ids[:, :length]).logits
    torch.testing.assert_close(logits, expected[f"prefill_{length}"], atol=LOGITS_TOLERANCE, rtol=0)
    padded = golden_tensors("dec_ntk_padded", "left_padded")
    real = padded["attention_mask"].bool()
    logits = model(padded["ids"], attention_mask=padded["attention_mask"]).logits
    torch.testing.assert_close(logits[real], padded["prefill"][real], atol=LOGITS_TOLERANCE, rtol=0)


def test_masks_of_flex_attention_are_none_of_the_kernels():
    assert not is_plain_mask(create_block_mask(lambda batch, head, query, key: query >= key, 1, 1, 1, 5, device="cpu"))
    assert is_plain_mask(torch.ones((1, 1, 1, 5), dtype=torch.bool)) and not is_plain_mask(torch.ones((1, 1, 1, 5)))


@needs_compiler
@pytest.mark.slow
def test_flex_attention_writes_what_eager_writes(golden_model):
    """Its masks are no tensors, which the kernels of a token had taken for some; without padding torch compiles it."""
    if CACHE_NAME != "cache":
        pytest.skip("the mask that transformers before 5.24 makes for a single query, torch 2.13 can't compile")
    ids = torch.arange(8, 20)[None]
    written = {}
    for implementation in ("eager", "flex_attention"):
        model = golden_model("dec_ntk_padded", attn_implementation=implementation)
        written[implementation] = model.generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=None).tolist()
    assert written["flex_attention"] == written["eager"]


@pytest.mark.parametrize("softmax_in_fp32", [False, True])
@torch.no_grad()
def test_upcast_attention_agrees(golden_model, golden_tensors, softmax_in_fp32):
    model, expected = golden_model("aug_ntk_logn", softmax_in_fp32=softmax_in_fp32), golden_tensors("aug_ntk_logn")
    assert model.config.softmax_in_fp32 is softmax_in_fp32
    length, ids = max(prompts(expected).items())
    logits = model(ids[:, :length]).logits
    torch.testing.assert_close(logits, expected[f"prefill_{length}"], atol=LOGITS_TOLERANCE, rtol=0)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@torch.no_grad()
def test_left_padded_batch_has_an_alpha_per_row(golden_model, golden_tensors, implementation):
    model = golden_model("dec_ntk_padded", attn_implementation=implementation)
    expected = golden_tensors("dec_ntk_padded", "left_padded")
    ids, mask, following = expected["ids"], expected["attention_mask"], expected["next_ids"]
    prefill = model(ids, attention_mask=mask, use_cache=True)
    real = mask.bool()
    torch.testing.assert_close(prefill.logits[real], expected["prefill"][real], atol=LOGITS_TOLERANCE, rtol=0)
    cache = prefill.past_key_values
    for step in range(following.shape[1]):
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        logits = model(following[:, step : step + 1], attention_mask=mask, past_key_values=cache).logits[:, 0]
        torch.testing.assert_close(logits, expected["decode"][:, step], atol=LOGITS_TOLERANCE, rtol=0)


@torch.no_grad()
def test_left_padded_logn_counts_true_positions(golden_model, golden_tensors):
    """The published padded rows count LogN from the padded start; the prompt alone is the truth (golden README)."""
    model = golden_model("dec_ntk_logn")
    expected = golden_tensors("dec_ntk_logn", "left_padded")
    ids, mask = expected["ids"], expected["attention_mask"]
    logits = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(logits[0], expected["prefill"][0], atol=LOGITS_TOLERANCE, rtol=0)
    for row in (1, 2):
        length = int(mask[row].sum())
        alone = model(ids[row : row + 1, -length:]).logits
        torch.testing.assert_close(logits[row, -length:], alone[0], atol=LOGITS_TOLERANCE, rtol=0)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_loss_and_gradients(golden_model, golden_tensors, implementation):
    model, expected = golden_model("aug_train", attn_implementation=implementation), golden_tensors("aug_train")
    loss = model.train()(expected["ids"], labels=expected["labels"]).loss
    loss.backward()
    torch.testing.assert_close(loss, expected["loss"].view(()), rtol=1e-5, atol=0)
    for name, parameter in model.named_parameters():
        golden = expected[f"grad.{name}"]
        assert (parameter.grad - golden).norm() <= 1e-4 * golden.norm(), name


@torch.no_grad()
def test_hidden_states_and_probabilities(golden_model, golden_tensors):
    model, expected = golden_model("aug_plain"), golden_tensors("aug_plain", "states")
    output = model(expected["ids"], output_hidden_states=True, output_attentions=True)
    torch.testing.assert_close(output.logits, expected["logits"], atol=LOGITS_TOLERANCE, rtol=0)
    for layer in range(2):
        torch.testing.assert_close(output.attentions[layer], expected[f"attn_{layer}"], atol=1e-6, rtol=0)
        torch.testing.assert_close(output.hidden_states[layer], expected[f"hidden_{layer}"], atol=1e-5, rtol=1e-5)
    assert len(output.hidden_states) == 3
    base = golden_model("aug_plain", cls=QWenModel)(expected["ids"]).last_hidden_state
    torch.testing.assert_close(output.hidden_states[-1], base)
