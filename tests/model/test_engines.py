"""Engines that keep the keys themselves: each request reads with the NTK alpha of its own prompt.

The truth is `generate`, each prompt alone. Prompts are longer than `seq_length` (32), so that a wrong alpha shows.
"""

import importlib.util

import pytest
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import qwen1.engines_qwen as engines
from qwen1 import prompt_qwen
from qwen1.arguments_qwen import CACHE_NAME
from qwen1.attention_qwen import eager_attention_forward
from qwen1.engines_qwen import engine_alpha, paged_alpha
from qwen1.native_qwen import wait
from qwen1.ntk_qwen import ntk_alpha
from qwen1.positions_qwen import prompt_lengths

GREEDY = dict(do_sample=False, max_new_tokens=8, pad_token_id=256, eos_token_id=463)


def tokens(length, seed=0):
    return torch.randint(0, 256, (1, length), generator=torch.Generator().manual_seed(seed))


def stretch(lengths):
    return ntk_alpha(lengths, 32)


@pytest.fixture(autouse=True)
def warnings_anew():
    engines.logger.warning_once.cache_clear()


@pytest.fixture(autouse=True)
def without_telemetry(monkeypatch):
    """Where opentelemetry is installed, continuous batching of transformers 5.4 fails on a request's status."""
    if importlib.util.find_spec("transformers.utils.metrics"):
        monkeypatch.setattr("transformers.utils.metrics._has_opentelemetry", False)


def written_in_batches(model, prompts, **config):
    """What continuous batching writes, in the order of the prompts."""
    attention = model.config._attn_implementation
    room = ContinuousBatchingConfig(max_memory_percent=0.02, **config)
    results = model.generate_batch(
        [prompt[0].tolist() for prompt in prompts],
        generation_config=GenerationConfig(**GREEDY),
        continuous_batching_config=room,
    )
    model.set_attn_implementation(attention)  # early releases leave their own
    by_prompt = {tuple(result.prompt_ids): result.generated_tokens for result in results.values()}
    return [by_prompt[tuple(prompt[0].tolist())] for prompt in prompts]


def written_alone(model, prompts):
    return [model.generate(prompt, **GREEDY)[0, prompt.shape[1] :].tolist() for prompt in prompts]


@pytest.mark.slow
@pytest.mark.parametrize("use_dynamic_ntk", [True, False])
def test_continuous_batching_has_one_alpha_for_each_request(tiny_model, use_dynamic_ntk, caplog):
    """Below and above the edges, replies that pass one, prompts with a common beginning longer than a block."""
    model = tiny_model("sdpa", use_dynamic_ntk=use_dynamic_ntk)
    begun = tokens(300, 7)
    prompts = [tokens(length, length) for length in (5, 28, 31, 33, 60, 65, 127, 200)]
    prompts += [begun[:, :20], begun[:, :150], begun]
    assert written_in_batches(model, prompts, max_batch_tokens=2048) == written_alone(model, prompts)
    assert "engine" not in caplog.text and "chunks" not in caplog.text


@pytest.mark.slow
@pytest.mark.skipif(wait() is None, reason="needs g++ or clang++ on Linux")
@pytest.mark.skipif(CACHE_NAME != "cache", reason="this release of transformers adds to the cache in its attention")
def test_continuous_batching_reads_by_the_kernels(tiny_model, monkeypatch):
    model, counted = tiny_model("sdpa", num_key_value_heads=2), []
    attend = prompt_qwen._attend
    monkeypatch.setattr(prompt_qwen, "_attend", lambda *args: counted.append(args[1].shape[2]) or attend(*args))
    prompts = [tokens(length, length) for length in range(12, 30)]
    alone = written_alone(model, prompts)
    counted.clear()
    assert written_in_batches(model, prompts, max_batch_tokens=2048) == alone
    assert counted and max(counted) == sum(range(12, 30)) and min(counted) == len(prompts)


@pytest.mark.slow
def test_a_prompt_in_chunks_is_said(tiny_model, caplog):
    model = tiny_model("sdpa")
    prompts = [tokens(100, seed) for seed in range(3)]
    written_in_batches(model, prompts, max_batch_tokens=48)
    assert "was read in chunks by continuous batching" in caplog.text and "max_batch_tokens" in caplog.text


def paged(**arguments):
    """Arguments of one step: lengths of the texts' new tokens and of their keys, slots as lists."""
    starts = {f"cu_seq_lens_{name}": torch.tensor(arguments.pop(name), dtype=torch.int32).cumsum(0) for name in "qk"}
    starts = {name: torch.nn.functional.pad(values, (1, 0)) for name, values in starts.items()}
    starts["cu_seq_lens_k"] = {"full_attention": starts["cu_seq_lens_k"]}
    return {**starts, **{name: [torch.tensor(slots)] for name, slots in arguments.items()}}


class Pages:
    """Stands for the engine's cache, of which only an attribute is used."""

    block_size = 4


def test_an_alpha_stays_with_the_first_slot():
    cache = Pages()
    first = paged(q=[40, 5], k=[40, 5], write_index=[*range(100, 140), *range(200, 205)], read_index=[])
    positions = torch.tensor([[*range(40), *range(5)]])
    assert paged_alpha(positions, cache, first, stretch).tolist() == [[3.0] * 40 + [1.0] * 5]
    # The second text has grown to 66 keys and the first to 41; a third begins, in slots beyond those known so far.
    keys = [*range(200, 266), *range(100, 141), *range(9000, 9070)]
    step = paged(q=[1, 1, 70], k=[66, 41, 70], write_index=[265, 140, *range(9000, 9070)], read_index=keys)
    positions = torch.tensor([[65, 40, *range(70)]])
    assert paged_alpha(positions, cache, step, stretch).tolist() == [[1.0, 3.0] + [7.0] * 70]
    # Another text takes the first slot of the first.
    again = paged(q=[3], k=[3], write_index=[100, 101, 102], read_index=[])
    assert paged_alpha(torch.arange(3)[None], cache, again, stretch).tolist() == [[1.0] * 3]
    assert cache.qwen_alpha[100] == 1 and cache.qwen_alpha[9000] == 3, "log2(alpha + 1)"


def test_pages_name_the_first_slot_too():
    cache = Pages()
    first = paged(q=[40, 5], k=[40, 5], write_index=[*range(100, 140), *range(200, 205)], read_index=[])
    paged_alpha(torch.tensor([[*range(40), *range(5)]]), cache, first, stretch)
    step = paged(q=[1, 1], k=[41, 6], write_index=[], read_index=[])
    step["block_table"] = torch.tensor([[[25, 26], [50, 51]]])  # (groups, texts, pages) of four slots each
    assert paged_alpha(torch.tensor([[40, 5]]), cache, step, stretch).tolist() == [[3.0, 1.0]]


@pytest.mark.parametrize(("argument", "engine"), [("attention_instances", "vLLM"), ("forward_batch", "SGLang")])
def test_engines_that_tell_positions_only(argument, engine, caplog):
    positions = torch.tensor([[*range(40), 70]])
    alpha = engine_alpha(positions, prompt_lengths(positions), None, {argument: object()}, stretch)
    assert alpha.tolist() == [[3.0] * 40 + [7.0]]
    assert f"{engine} keeps the keys" in caplog.text


@torch.no_grad()
def test_an_engine_is_named_only_where_one_is(tiny_model, monkeypatch, caplog):
    """An attention of the user's own is none, whatever it is called."""
    model, ids = tiny_model("eager"), tokens(40)
    expected = model(ids, use_cache=False).logits
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "of_my_own", eager_attention_forward)
    model.config._attn_implementation = "of_my_own"
    torch.testing.assert_close(model(ids, use_cache=False).logits, expected)
    assert not caplog.text
    model(ids, use_cache=False, attention_instances={})
    assert "vLLM keeps the keys" in caplog.text
