"""The NTK alpha belongs to the sequence: every way to run a prompt agrees with one full pass over it.

The truth is a pass without a cache, told the alpha that the definition gives for the length of the prompt. Sequences
are longer than `seq_length` (32), so that a wrong alpha shows.
"""

import copy
import math
import threading

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.generation import CompileConfig, GenerationConfig

from qwen1.ntk_qwen import NTKState, ntk_alpha
from qwen1.positions_qwen import prompt_lengths

SEQ_LENGTH = 32
TOLERANCE = 1e-4


def defined_alpha(length, seq_length=SEQ_LENGTH):
    return max(2 ** (math.ceil(math.log2(length / seq_length)) + 1) - 1, 1)


def tokens(length, seed=0):
    return torch.randint(0, 256, (1, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def truth(model, ids, prompt_length):
    """Logits of a full pass with the alpha of the prompt."""
    alpha = torch.full((len(ids), 1), float(defined_alpha(prompt_length)))
    return model(ids, use_cache=False, ntk_alpha=alpha).logits


@torch.no_grad()
def greedy_truth(model, prompt, steps):
    ids = prompt
    for _ in range(steps):
        following = truth(model, ids, prompt.shape[1])[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, following], dim=1)
    return ids


@pytest.fixture(params=["eager", "sdpa"])
def model(request, tiny_model):
    return tiny_model(request.param)


def left_pad(rows):
    width = max(row.shape[1] for row in rows)
    ids = torch.cat([torch.nn.functional.pad(row, (width - row.shape[1], 0), value=256) for row in rows])
    mask = torch.cat([torch.nn.functional.pad(torch.ones_like(row), (width - row.shape[1], 0)) for row in rows])
    return ids, mask


GREEDY = dict(
    do_sample=False, max_new_tokens=6, pad_token_id=256, eos_token_id=463
)  # an id that these texts never reach


@pytest.mark.parametrize("length", [1, 16, 31, 32, 33, 63, 64, 65, 128, 129, 1000, 2**20, 2**20 + 1])
def test_alpha_is_the_defined_one(length):
    assert ntk_alpha(torch.tensor([length]), SEQ_LENGTH).item() == defined_alpha(length)


def test_published_examples_of_alpha():
    lengths = torch.tensor([1, 2048, 2049, 4096, 4097])
    assert ntk_alpha(lengths, 2048).tolist() == [1, 1, 3, 3, 7]


def test_prompt_lengths_from_positions():
    positions = torch.tensor([[0, 1, 2, 3, 4, 5], [1, 1, 1, 0, 1, 2], [0, 1, 0, 1, 2, 3], [7, 8, 9, 10, 11, 12]])
    assert prompt_lengths(positions).tolist() == [
        [6, 6, 6, 6, 6, 6],  # one text
        [1, 1, 1, 3, 3, 3],  # left padding, as generate counts it
        [2, 2, 4, 4, 4, 4],  # two packed texts
        [7, 7, 7, 7, 7, 7],  # continues a prompt of seven tokens
    ]
    assert prompt_lengths(torch.tensor([[40]])).tolist() == [[40]]


@pytest.mark.parametrize("length", [20, 33, 70])
@torch.no_grad()
def test_one_prompt_and_what_follows(model, length):
    ids = tokens(length + 40)
    output = model(ids[:, :length], use_cache=True)
    logits = [output.logits]
    for index in range(length, ids.shape[1]):
        logits.append(model(ids[:, index : index + 1], past_key_values=output.past_key_values).logits)
    torch.testing.assert_close(torch.cat(logits, dim=1), truth(model, ids, length), atol=TOLERANCE, rtol=0)


@torch.no_grad()
def test_no_cache_chooses_from_the_tokens_of_the_call(model):
    ids = tokens(70)
    torch.testing.assert_close(model(ids, use_cache=False).logits, truth(model, ids, 70), atol=TOLERANCE, rtol=0)


@torch.no_grad()
def test_left_padded_batch(model):
    rows = [tokens(20, 1), tokens(40, 2), tokens(70, 3)]
    ids, mask = left_pad(rows)
    output = model(ids, attention_mask=mask, use_cache=True)
    assert output.past_key_values.qwen_ntk.alpha.flatten().tolist() == [1, 3, 7]
    following = torch.tensor([[5], [6], [7]])
    mask = torch.cat([mask, torch.ones(3, 1, dtype=mask.dtype)], dim=1)
    step = model(following, attention_mask=mask, past_key_values=output.past_key_values)
    for index, row in enumerate(rows):
        whole = torch.cat([row, following[index : index + 1]], dim=1)
        expected = truth(model, whole, row.shape[1])[0]
        torch.testing.assert_close(output.logits[index, -row.shape[1] :], expected[:-1], atol=TOLERANCE, rtol=0)
        torch.testing.assert_close(step.logits[index, 0], expected[-1], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("chunks", [(40, 1, 1), (40, 7), (33, 20, 3)])
@torch.no_grad()
def test_several_tokens_on_a_cache(model, chunks):
    ids, start, cache, logits = tokens(sum(chunks)), 0, None, []
    for size in chunks:
        output = model(ids[:, start : start + size], past_key_values=cache, use_cache=True)
        cache, start = output.past_key_values, start + size
        logits.append(output.logits)
    expected = truth(model, ids, chunks[0])
    torch.testing.assert_close(torch.cat(logits, dim=1), expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("split", range(1, 12))
@torch.no_grad()
def test_cached_equals_uncached_for_every_split(model, split):
    ids = tokens(12)
    first = model(ids[:, :split], use_cache=True)
    second = model(ids[:, split:], past_key_values=first.past_key_values)
    logits = torch.cat([first.logits, second.logits], dim=1)
    torch.testing.assert_close(logits, model(ids, use_cache=False).logits, atol=TOLERANCE, rtol=0)


@torch.no_grad()
def test_a_cache_is_reused_after_reset_and_after_cropping_to_nothing(model):
    long, short = tokens(70), tokens(20, 1)
    cache = model(long, use_cache=True).past_key_values
    cache.crop(-70)
    torch.testing.assert_close(
        model(short, past_key_values=cache).logits, truth(model, short, 20), atol=TOLERANCE, rtol=0
    )
    static = StaticCache(config=model.config, max_cache_len=80)
    for ids in (long, short, long):
        static.reset()
        output = model(ids, past_key_values=static)
        torch.testing.assert_close(output.logits, truth(model, ids, ids.shape[1]), atol=TOLERANCE, rtol=0)


@torch.no_grad()
def test_a_copied_cache_branches(model):
    prompt = tokens(70)
    cache = model(prompt, use_cache=True).past_key_values
    branches = {seed: copy.deepcopy(cache) for seed in (1, 2)}
    for seed, branch in branches.items():
        following = tokens(5, seed)
        logits = model(following, past_key_values=branch).logits
        whole = torch.cat([prompt, following], dim=1)
        torch.testing.assert_close(logits, truth(model, whole, 70)[:, 70:], atol=TOLERANCE, rtol=0)


@torch.no_grad()
def test_a_cache_rebuilt_from_tensors_counts_as_one_prompt(model):
    ids = tokens(75)
    cache = model(ids[:, :70], use_cache=True).past_key_values
    rebuilt = DynamicCache([(layer.keys, layer.values) for layer in cache.layers])
    logits = model(ids[:, 70:], past_key_values=rebuilt).logits
    torch.testing.assert_close(logits, truth(model, ids, 70)[:, 70:], atol=TOLERANCE, rtol=0)


PROMPTS = [tokens(20, 1), tokens(40, 2), tokens(70, 3)]  # alpha 1, 3 and 7


@pytest.mark.parametrize(
    ("rearrange", "rows"),
    [
        (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 1])), [2, 0, 1]),
        (lambda cache: cache.reorder_cache(torch.tensor([1, 1, 1])), [1, 1, 1]),
        (lambda cache: cache.reorder_cache(torch.tensor([0, 1, 2, 0, 1, 2])), [0, 1, 2, 0, 1, 2]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
        (lambda cache: cache.batch_select_indices(torch.tensor([2, 1])), [2, 1]),
    ],
)
@pytest.mark.parametrize("copied", [True, False])
@torch.no_grad()
def test_alpha_follows_the_rows_of_a_cache(model, rearrange, rows, copied):
    ids, mask = left_pad(PROMPTS)
    cache = model(ids, attention_mask=mask, use_cache=True).past_key_values
    cache = copy.deepcopy(cache) if copied else cache
    rearrange(cache)
    mask = torch.cat([mask[rows], torch.ones(len(rows), 1, dtype=mask.dtype)], dim=1)
    following = torch.arange(1, len(rows) + 1)[:, None]
    logits = model(following, attention_mask=mask, past_key_values=cache).logits
    for index, row in enumerate(rows):
        alone = torch.cat([PROMPTS[row], following[index : index + 1]], dim=1)
        expected = truth(model, alone, PROMPTS[row].shape[1])[0, -1]
        torch.testing.assert_close(logits[index, 0], expected, atol=TOLERANCE, rtol=0)


@torch.no_grad()
def test_rows_of_a_foreign_cache(model):
    """It tells nobody that its rows were picked; where that shows, it is an error."""
    ids, mask = left_pad(PROMPTS)
    cache = DynamicCache(config=model.config)
    model(ids, attention_mask=mask, past_key_values=cache)
    cache.batch_select_indices(torch.tensor([0, 2]))
    mask = torch.cat([mask[[0, 2]], torch.ones(2, 1, dtype=mask.dtype)], dim=1)
    with pytest.raises(ValueError, match=r"3 sequences, the batch has 2.*QWenCache"):
        model(torch.ones(2, 1, dtype=torch.long), attention_mask=mask, past_key_values=cache)
    same = DynamicCache(config=model.config)
    model(torch.cat([PROMPTS[2]] * 2), past_key_values=same)
    same.batch_repeat_interleave(2)
    logits = model(torch.full((4, 1), 5), past_key_values=same).logits
    whole = torch.cat([PROMPTS[2], torch.tensor([[5]])], dim=1)
    torch.testing.assert_close(logits[3], truth(model, whole, 70)[0, -1:], atol=TOLERANCE, rtol=0)


@torch.no_grad()
def test_a_static_cache_of_a_batch_without_mask_or_positions(model):
    """The first call has one row of positions for all; later ones have their own."""
    ids, cache = torch.cat([tokens(40, 1), tokens(40, 2)]), StaticCache(config=model.config, max_cache_len=96)
    model(ids, past_key_values=cache)
    following = torch.tensor([[5], [6]])
    mask = torch.ones(2, 41, dtype=torch.long)
    logits = model(following, attention_mask=mask, past_key_values=cache).logits
    expected = truth(model, torch.cat([ids, following], dim=1), 40)[:, -1:]
    torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=0)
    cache.reset()
    padded, mask = left_pad(PROMPTS[1:])
    logits = model(padded, attention_mask=mask, past_key_values=cache).logits
    for row, prompt in enumerate(PROMPTS[1:]):
        expected = truth(model, prompt, prompt.shape[1])[0]
        torch.testing.assert_close(logits[row, -prompt.shape[1] :], expected, atol=TOLERANCE, rtol=0)
    cache.reset()
    expected = model.generate(ids, **GREEDY)
    assert model.generate(ids, past_key_values=cache, **GREEDY).tolist() == expected.tolist()


def test_a_plan_is_spent_with_its_prompt(model):
    """A cache that generate has filled and that is emptied again takes the alpha of the next prompt."""
    cache = model.generate(tokens(70), **{**GREEDY, "max_new_tokens": 1}, return_dict_in_generate=True).past_key_values
    cache.crop(-70)
    with torch.no_grad():
        logits = model(tokens(20, 1), past_key_values=cache).logits
    torch.testing.assert_close(logits, truth(model, tokens(20, 1), 20), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("given", [3.0, torch.tensor(3.0), torch.ones(20), torch.ones(2, 1), torch.ones(1, 20)])
def test_an_alpha_of_the_wrong_form_is_an_error(model, given):
    with pytest.raises(ValueError, match=r"ntk_alpha must be a tensor of shape \(1, 1\), not"):
        model(tokens(20), ntk_alpha=given)


@torch.no_grad()
def test_an_alpha_given_stays_the_callers(model):
    given, cache = torch.tensor([[3.0]]), StaticCache(config=model.config, max_cache_len=80)
    model(torch.cat([tokens(20, 1), tokens(20, 2)]), past_key_values=cache, ntk_alpha=given)
    cache.reset()
    model(torch.cat([tokens(70, 1), tokens(70, 2)]), past_key_values=cache)
    assert given.tolist() == [[3.0]]
    assert cache.qwen_ntk.alpha.tolist() == [[7.0], [7.0]]


@torch.no_grad()
def test_an_alpha_given_is_kept_by_the_cache(model):
    ids = tokens(50)
    output = model(ids[:, :20], use_cache=True, ntk_alpha=torch.tensor([[3.0]]))
    logits = torch.cat([output.logits, model(ids[:, 20:], past_key_values=output.past_key_values).logits], dim=1)
    torch.testing.assert_close(logits, truth(model, ids, 50), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("length", [20, 31, 70])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"cache_implementation": "dynamic"},
        {"prefill_chunk_size": 16},
        {"prompt_lookup_num_tokens": 3},
        {"num_beams": 3},
        {"num_beams": 2, "use_cache": False},
        {"assistant_early_exit": 1},
    ],
    ids=lambda settings: "-".join(f"{key}={value}" for key, value in settings.items()) or "default",
)
def test_generate(model, length, settings):
    prompt = tokens(length)
    if "num_beams" in settings:
        # Beams have no greedy truth: the same search without anything cached is their full recomputation.
        expected = model.generate(prompt, **GREEDY, num_beams=settings["num_beams"], use_cache=False)
    else:
        expected = greedy_truth(model, prompt, GREEDY["max_new_tokens"])
    assert model.generate(prompt, **{**GREEDY, **settings}).tolist() == expected.tolist()


@pytest.mark.parametrize("settings", [{}, {"cache_implementation": "static"}, {"use_cache": False}, {"num_beams": 2}])
def test_generate_a_left_padded_batch(model, settings):
    rows = [tokens(20, 1), tokens(31, 2), tokens(70, 3)]
    ids, mask = left_pad(rows)
    written = model.generate(ids, attention_mask=mask, **GREEDY, **settings)
    for row, output in zip(rows, written, strict=True):
        alone = model.generate(row, **GREEDY, **settings)[0]
        assert output[-GREEDY["max_new_tokens"] :].tolist() == alone[-GREEDY["max_new_tokens"] :].tolist()
        if "num_beams" not in settings:
            assert alone.tolist() == greedy_truth(model, row, GREEDY["max_new_tokens"])[0].tolist()


def test_generate_with_an_assistant(model, tiny_model):
    """The assistant has a shorter training length, so an alpha of its own."""
    assistant = tiny_model(seed=1, n_layer=1, seq_length=16)
    prompt = tokens(40)
    assert (
        model.generate(prompt, assistant_model=assistant, **GREEDY).tolist() == greedy_truth(model, prompt, 6).tolist()
    )


def test_generate_continues_a_cache(model):
    prompt, more = tokens(40), tokens(30, 1)
    first = model.generate(prompt, **GREEDY, return_dict_in_generate=True)
    whole = torch.cat([first.sequences, more], dim=1)
    second = model.generate(whole, past_key_values=first.past_key_values, **GREEDY)
    ids = whole
    for _ in range(GREEDY["max_new_tokens"]):
        ids = torch.cat([ids, truth(model, ids, 40)[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert second.tolist() == ids.tolist()


def test_generate_from_embeddings(model):
    prompt = tokens(40)
    written = model.generate(inputs_embeds=model.get_input_embeddings()(prompt), **GREEDY)
    assert written.tolist() == greedy_truth(model, prompt, 6)[:, 40:].tolist()


@torch.no_grad()
def test_interleaved_generations(model):
    prompts = {20: tokens(20, 1), 40: tokens(40, 2), 70: tokens(70, 3)}
    caches, written = {}, {length: prompt for length, prompt in prompts.items()}
    for step in range(5):
        for length in prompts:
            ids = written[length] if step == 0 else written[length][:, -1:]
            output = model(ids, past_key_values=caches.get(length), use_cache=True)
            caches[length] = output.past_key_values
            written[length] = torch.cat([written[length], output.logits[:, -1:].argmax(-1)], dim=1)
    for length, prompt in prompts.items():
        assert written[length].tolist() == greedy_truth(model, prompt, 5).tolist()


@pytest.mark.parametrize("cache_implementation", ["dynamic", "static"])
def test_interleaved_streams(model, byte_tokenizer, cache_implementation):
    queries = ["long " * 30, "short"]
    settings = dict(max_new_tokens=12, do_sample=False, cache_implementation=cache_implementation)
    alone = [model.chat(byte_tokenizer, query, **settings)[0] for query in queries]
    streams = [model.chat_stream(byte_tokenizer, query, **settings) for query in queries]
    texts = ["", ""]
    for _ in range(20):
        for index, stream in enumerate(streams):
            texts[index] = next(stream, texts[index])
    assert texts == alone


def test_two_threads_at_once(model):
    prompts = [tokens(20, 1), tokens(40, 2), tokens(70, 3), tokens(130, 4)]
    results, start = {}, threading.Barrier(len(prompts))

    def run(index):
        start.wait()
        results[index] = [model.generate(prompts[index], **GREEDY).tolist() for _ in range(3)]

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, prompt in enumerate(prompts):
        assert results[index] == [greedy_truth(model, prompt, 6).tolist()] * 3


def test_nothing_is_kept_on_modules(model):
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    model.generate(tokens(70), **GREEDY)
    after = {name: dict(vars(module)) for name, module in model.named_modules()}
    hidden = {"_output_capturing_hooks_installed", "_forward_hooks"}  # transformers' own, the same for every request
    for name, values in before.items():
        changed = {key for key in {*values, *after[name]} if values.get(key) is not after[name].get(key)}
        assert changed <= hidden, (name, changed)


@pytest.mark.parametrize("training", [True, False])
@torch.no_grad()
def test_training_stretches_nothing(tiny_model, training):
    model, plain = tiny_model(), tiny_model(use_dynamic_ntk=False, use_logn_attn=False)
    ids = tokens(70)
    same = torch.allclose(model.train(training)(ids).logits, plain.train(training)(ids).logits, atol=1e-5)
    assert same is training


@pytest.mark.slow
@pytest.mark.parametrize("length", [20, 70])
@pytest.mark.no_cover
def test_compiled_generation(tiny_model, length):
    model = tiny_model("sdpa")
    compile_config = CompileConfig(fullgraph=True, mode="default")
    compile_config._compile_all_devices = True
    settings = GenerationConfig(**GREEDY, cache_implementation="static", compile_config=compile_config)
    prompt = tokens(length)
    assert model.generate(prompt, settings).tolist() == greedy_truth(model, prompt, 6).tolist()


@pytest.mark.slow
@torch.no_grad()
def test_compiled_forward_is_one_graph_for_all_prompt_lengths(tiny_model):
    model = tiny_model("sdpa")
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend=backend)
    cache = StaticCache(config=model.config, max_cache_len=80)
    for length in (70, 20, 40):
        ids = tokens(length + 3)
        cache.reset()
        model(ids[:, :length], past_key_values=cache)
        for index in range(length, length + 3):
            token = torch.tensor([[ids[0, index]]])  # a slice's strides would tell the lengths apart
            logits = compiled(token, past_key_values=cache).logits
            expected = truth(model, ids[:, : index + 1], length)[:, -1:]
            torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=0)
    assert len(graphs) == 1


def test_drafting_for_itself_leaves_the_model_whole(model):
    model.generate(tokens(40), **GREEDY, assistant_early_exit=1)
    assert model.config.num_hidden_layers == 2


def test_state_is_a_plain_value():
    state = NTKState(alpha=torch.ones(2, 1))
    assert not state.planned and list(vars(state)) == ["alpha"], "exporters make an input of each tensor in vars"
    assert copy.deepcopy(state).alpha is not state.alpha


@pytest.mark.parametrize("settings", [{}, {"prefill_chunk_size": 16}])
def test_a_wrapped_forward_that_names_no_alpha(model, monkeypatch, settings):
    """As tools that watch or time a model leave it: the cache alone keeps the alpha of the whole prompt."""
    forward = type(model).forward
    monkeypatch.setattr(
        type(model), "forward", lambda self, input_ids=None, **kwargs: forward(self, input_ids, **kwargs)
    )
    prompt = tokens(70)
    written = model.generate(prompt, attention_mask=torch.ones_like(prompt), **GREEDY, **settings)
    monkeypatch.undo()
    assert written.tolist() == greedy_truth(model, prompt, 6).tolist()
