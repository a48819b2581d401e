"""Kernels for a GPU in place of torch's operations: on a GPU where there is one, else as Triton interprets them.

Interpreted, each program of a kernel takes milliseconds, so that shapes are small and programs few. Triton
interprets the rounding to bfloat16 wrongly (towards zero), so float16 stands for half precision there.
"""

import copy
import inspect
import pickle
import threading

import pytest
import torch
from torch import nn

from qwen1 import (
    gpu_steps_qwen,
    modeling_qwen,
    passes_qwen,
    preparing_qwen,
    rotary_qwen,
    triton_qwen,
    warming_qwen,
)
from qwen1.cache_qwen import QWenCache
from qwen1.rotary_qwen import apply_rotary_pos_emb

from .conftest import BOUNDS, DEVICE, ON_GPU, PROMPT, error, ids_of, model_of, torch_alone

pytest.importorskip("triton", reason="Triton is not installed")
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * ON_GPU
pytestmark = [pytest.mark.usefixtures("kernels")] + [pytest.mark.gpu] * ON_GPU


@torch.no_grad()
def talk(model, rows=1, steps=4, padding=0, **arguments):
    """Logits of a prompt's last token and of each token after it, (B, 1 + steps, V), and the cache."""
    ids, following = ids_of(rows), ids_of(rows, steps, seed=4)
    mask = torch.ones((rows, PROMPT + steps), dtype=torch.long, device=DEVICE)
    mask[0, :padding] = 0
    found = model(ids, attention_mask=mask[:, :PROMPT], use_cache=True, **arguments)
    logits = [found.logits[:, -1:]]
    for step in range(steps):
        found = model(
            following[:, step : step + 1],
            attention_mask=mask[:, : PROMPT + step + 1],
            past_key_values=found.past_key_values,
            **arguments,
        )
        logits.append(found.logits)
    return torch.cat(logits, dim=1), found.past_key_values


def steps_of(cache):
    return getattr(cache, "steps", None)


def turns_by_kernels(monkeypatch):
    monkeypatch.setattr(rotary_qwen, "turned_on_gpu", passes_qwen.turned)
    monkeypatch.setattr(rotary_qwen, "both_turned_on_gpu", passes_qwen.both_turned)


# --- a prompt's passes ---


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [64, 100])
def test_norm(monkeypatch, dtype, width):
    norm = model_of(dtype, hidden_size=width, num_attention_heads=1, kv_channels=width).transformer.ln_f
    states = torch.randn((2, 5, width), device=DEVICE, dtype=dtype)
    with torch.no_grad():
        got = passes_qwen.norm_prompt(states, norm.weight, norm.eps)
        expected = torch_alone(monkeypatch, lambda: norm(states))
    assert error(got, expected) < BOUNDS[dtype] / 4


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 100, 4099])
def test_gate(dtype, size):
    gate, up = 3 * torch.randn((2, 1, size), device=DEVICE, dtype=dtype)
    assert error(passes_qwen.gate_prompt(gate, up), nn.functional.silu(gate) * up) < BOUNDS[dtype] / 4


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads, size, rotated", [(4, 16, 16), (3, 24, 8), (1, 20, 20), (37, 4, 4)])
@pytest.mark.parametrize("rows, angle_rows", [(1, 1), (2, 1), (2, 2)])
def test_rotation(monkeypatch, dtype, heads, size, rotated, rows, angle_rows):
    product = torch.randn((rows, 5, 3 * heads, size), device=DEVICE, dtype=dtype)
    angles = torch.randn((angle_rows, 5, 1, rotated // 2), device=DEVICE).repeat(1, 1, 1, 2)
    given, cosine, sine = product[:, :, heads : 2 * heads], angles.cos(), angles.sin()
    got = passes_qwen.turn_prompt(given, cosine, sine)
    expected = torch_alone(monkeypatch, lambda: apply_rotary_pos_emb(given, (cosine, sine)))
    assert got.is_contiguous() and error(got, expected) < BOUNDS[dtype] / 4


@pytest.mark.parametrize("long", [True, False])
def test_what_a_prompt_goes_through(monkeypatch, long):
    monkeypatch.setattr(passes_qwen, "LEAST_TOKENS", PROMPT if long else PROMPT + 1)
    monkeypatch.setattr(modeling_qwen, "normed", passes_qwen.normed)
    turns_by_kernels(monkeypatch)
    called = []
    for name in ("norm_prompt", "gate_prompt", "turn_prompt"):
        kernel = getattr(passes_qwen, name)
        monkeypatch.setattr(
            passes_qwen, name, lambda *given, name=name, kernel=kernel: called.append(name) or kernel(*given)
        )
    model = model_of()
    talk(model, steps=0)  # begins to compile, which waits here
    called.clear()
    got, _ = talk(model, steps=0)
    expected, _ = torch_alone(monkeypatch, lambda: talk(model, steps=0))
    assert error(got, expected) < BOUNDS[torch.float32]
    counts = [called.count(name) for name in ("norm_prompt", "gate_prompt", "turn_prompt")]
    assert counts == [2 * 2 + 1, 2 * long, 2]


def test_a_token_whose_blocks_are_not_plain_is_normed_and_turned_by_kernels(monkeypatch):
    monkeypatch.setattr(modeling_qwen, "normed", passes_qwen.normed)
    turns_by_kernels(monkeypatch)
    model, turned = model_of(), []
    talk(model, rows=2, steps=0, padding=3)  # begins to compile, which waits here
    model.transformer.h[0].register_forward_hook(lambda *given: None)
    expected, _ = torch_alone(monkeypatch, lambda: talk(model, rows=2, steps=2, padding=3))
    kernel = passes_qwen.turn_prompt
    monkeypatch.setattr(passes_qwen, "turn_prompt", lambda *given: turned.append(given[0].shape[1]) or kernel(*given))
    got, cache = talk(model, rows=2, steps=2, padding=3)
    assert error(got, expected) < BOUNDS[torch.float32]
    assert steps_of(cache) is None and turned[-4:] == [1] * 4, "two blocks in two tokens, queries and keys at once"


@pytest.mark.parametrize("shape", ["grouped", "plain", "partly rotated"])
@pytest.mark.parametrize("beside", [True, False])
@torch.no_grad()
def test_queries_and_keys_are_turned_at_once_where_they_lie_side_by_side(monkeypatch, shape, beside):
    turns_by_kernels(monkeypatch)
    model, called = model_of(**SHAPES[shape]), []
    model(ids_of(2))  # begins to compile, which waits here
    kernel = passes_qwen.turn_prompt
    monkeypatch.setattr(passes_qwen, "turn_prompt", lambda *given: called.append(given[0].shape[2]) or kernel(*given))
    attention = model.transformer.h[0].attn
    numbers, size = (attention.num_heads, attention.num_key_value_heads), attention.head_dim
    product = torch.randn((2, 5, sum(numbers) + numbers[1], size), device=DEVICE)
    query, key = product[:, :, : numbers[0]], product[:, :, numbers[0] : sum(numbers)]
    angles = torch.randn((1, 5, 1, model.config.rotary_dim // 2), device=DEVICE).repeat(1, 1, 1, 2)
    got = rotary_qwen.both_turned(query, key if beside else key.clone(), (angles.cos(), angles.sin()))
    assert called == ([sum(numbers)] if beside else list(numbers))
    for ours, heads in zip(got, (query, key), strict=True):
        theirs = torch_alone(monkeypatch, lambda heads=heads: apply_rotary_pos_emb(heads, (angles.cos(), angles.sin())))
        assert ours.shape == heads.shape and error(ours, theirs) < BOUNDS[torch.float32]


@torch.no_grad()
def test_a_rotation_of_the_users_own_is_obeyed(monkeypatch):
    turns_by_kernels(monkeypatch)
    model = model_of()
    expected = model(ids_of()).logits
    rotate = modeling_qwen.apply_rotary_pos_emb
    monkeypatch.setattr(modeling_qwen, "apply_rotary_pos_emb", lambda t, freqs: rotate(t, (freqs[0], 0.5 * freqs[1])))
    assert error(model(ids_of()).logits, expected) > 1e-3  # without it, some 1e-7


def test_nothing_at_all_is_left_to_torch():
    states, angles = torch.randn((0, 5, 48), device=DEVICE), torch.randn((1, 5, 1, 16), device=DEVICE)
    with torch.no_grad():
        assert passes_qwen.normed(states, torch.ones(48, device=DEVICE), 1e-6) is None
        assert passes_qwen.turned(states.view(0, 5, 3, 16), angles, angles) is None


# --- tokens ---

SHAPES = {
    "plain": {},
    "logn": {"use_logn_attn": True, "seq_length": 8},
    "ntk": {"use_dynamic_ntk": True, "use_logn_attn": True, "seq_length": 8},
    "biased": {"no_bias": False},
    "partly rotated": {"rotary_pct": 0.5},
    "grouped": {"num_attention_heads": 4, "kv_channels": 12, "num_key_value_heads": 2},
    "odd": {"hidden_size": 60, "num_attention_heads": 3, "kv_channels": 20, "ffn_hidden_size": 74},
}


CASES = [(shape, 1, 0) for shape in SHAPES] + [("plain", 1, 5), ("plain", 3, 2), ("ntk", 2, 2), ("biased", 2, 0)]


@pytest.mark.parametrize("shape, rows, padding", CASES)
@pytest.mark.no_cover
def test_logits_are_torchs(monkeypatch, shape, rows, padding):
    model = model_of(**SHAPES[shape])
    expected, other = torch_alone(monkeypatch, lambda: talk(model, rows, padding=padding))
    got, cache = talk(model, rows, padding=padding)
    assert steps_of(cache).taken == 4 and steps_of(other) is None
    assert error(got, expected) < BOUNDS[torch.float32]
    for layer, plain in zip(cache.layers, other.layers, strict=True):
        for ours, theirs in ((layer.keys, plain.keys), (layer.values, plain.values)):
            assert error(ours[:, :, padding:], theirs[:, :, padding:]) < BOUNDS[torch.float32]


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.no_cover
def test_half_precision(monkeypatch, dtype):
    model = model_of(dtype)
    expected, _ = torch_alone(monkeypatch, lambda: talk(model))
    got, cache = talk(model)
    assert steps_of(cache).taken == 4 and error(got, expected) < BOUNDS[dtype]


@pytest.mark.no_cover
def test_long_replies_get_new_memory(monkeypatch):
    monkeypatch.setattr("qwen1.cache_qwen._LEAST_ROOM", 2)
    model = model_of()
    expected, _ = torch_alone(monkeypatch, lambda: talk(model, steps=7))
    got, cache = talk(model, steps=7)
    assert steps_of(cache).taken == 7 and error(got, expected) < BOUNDS[torch.float32]


@pytest.mark.no_cover
def test_a_mask_outgrows_its_room(monkeypatch):
    model = model_of()
    expected, _ = torch_alone(monkeypatch, lambda: talk(model, 2, padding=3))
    talk(model, steps=1)
    monkeypatch.setattr("qwen1.gpu_steps_qwen._MASK_ROOM", 3)
    got, cache = talk(model, 2, padding=3)
    assert steps_of(cache).taken in (1, 2, 3) and error(got, expected) < BOUNDS[torch.float32]


@pytest.mark.no_cover
def test_inference_mode(monkeypatch):
    model = model_of()
    with torch.inference_mode():
        expected, _ = torch_alone(monkeypatch, lambda: talk(model))
        got, _ = talk(model)
    assert error(got, expected) < BOUNDS[torch.float32]


@pytest.mark.parametrize("first, then", [(torch.inference_mode, torch.no_grad), (torch.no_grad, torch.inference_mode)])
@pytest.mark.no_cover
def test_from_one_mode_to_another(monkeypatch, first, then):
    model = model_of()

    def both():
        with first():
            _, cache = talk(model)
        with then():
            return model(ids_of(length=1), past_key_values=cache).logits.clone()

    assert error(both(), torch_alone(monkeypatch, both)) < BOUNDS[torch.float32]


# --- one cache, several users of it ---


@torch.no_grad()
def follow(model, cache, tokens):
    """Logits of tokens one after another behind what a cache holds, (1, T, V)."""
    ids = torch.tensor([tokens], device=DEVICE)
    return torch.cat([model(ids[:, at : at + 1], past_key_values=cache).logits for at in range(len(tokens))], dim=1)


@pytest.mark.slow
@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
@pytest.mark.no_cover
def test_copies_go_on_apart(monkeypatch, copied):
    model = model_of()

    def fork():
        _, cache = talk(model)
        other = copied(cache)
        if copied is copy.copy:
            other.layers = [copy.copy(layer) for layer in cache.layers]
        parts = [follow(model, cache, [1]), follow(model, other, [2]), follow(model, cache, [3, 4])]
        return torch.cat([*parts, follow(model, other, [5, 6])], dim=1), cache, other

    expected, *_ = torch_alone(monkeypatch, fork)
    got, cache, other = fork()
    assert error(got, expected) < BOUNDS[torch.float32]
    assert steps_of(cache) is not steps_of(other) and steps_of(other) is not None


@pytest.mark.no_cover
def test_a_cache_goes_back(monkeypatch):
    model = model_of()

    def back():
        _, cache = talk(model)
        cache.crop(-4)
        return follow(model, cache, [7, 8, 9])

    assert error(back(), torch_alone(monkeypatch, back)) < BOUNDS[torch.float32]


@pytest.mark.no_cover
def test_steps_and_chunks_take_turns(monkeypatch):
    model = model_of()

    @torch.no_grad()
    def turns():
        _, cache = talk(model)
        chunk = model(ids_of(seed=9), past_key_values=cache).logits
        return torch.cat((chunk, follow(model, cache, [7, 8])), dim=1)

    assert error(turns(), torch_alone(monkeypatch, turns)) < BOUNDS[torch.float32]


def test_beams(monkeypatch):
    model = model_of()
    settings = dict(max_new_tokens=4, num_beams=2, do_sample=False, pad_token_id=0)
    expected = torch_alone(monkeypatch, lambda: model.generate(ids_of(), **settings))
    assert torch.equal(model.generate(ids_of(), **settings), expected)


@pytest.mark.no_cover
def test_a_cache_is_stored_without_its_steps():
    _, cache = talk(model_of())
    again = pickle.loads(pickle.dumps(cache))
    assert steps_of(cache) is not None and steps_of(again) is None
    assert torch.equal(again.layers[1].keys, cache.layers[1].keys)


@pytest.mark.gpu  # Triton interprets one kernel at a time
def test_two_requests_at_once():
    model, found = model_of(), {}
    expected = {seed: sampled(model, seed) for seed in range(2)}
    threads = [
        threading.Thread(target=lambda seed=seed: found.update({seed: sampled(model, seed)})) for seed in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[seed], expected[seed]) for seed in expected)


def sampled(model, seed):
    return model.generate(
        ids_of(seed=seed), do_sample=True, seed=seed, max_new_tokens=8, pad_token_id=0, eos_token_id=None
    )


# --- what isn't plain ---


@pytest.mark.no_cover
def test_tokens_go_by_kernels_again_when_an_adapter_is_merged(monkeypatch):
    peft = pytest.importorskip("peft")
    model = model_of(ffn_hidden_size=112)  # of a size that no other test has had kernels compiled for
    lora = peft.LoraConfig(r=2, target_modules=["c_attn", "w1"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, lora).eval()
    beside, cache = talk(adapted)
    assert steps_of(cache) is None
    merged = adapted.merge_and_unload()
    got, cache = talk(merged)
    assert steps_of(cache).taken == 4
    assert error(got, beside) < 1e-4 and error(got, torch_alone(monkeypatch, lambda: talk(merged))[0]) < 1e-5


def changes_hook(model):
    block = model.transformer.h[1]
    block.mlp.w1.register_forward_hook(lambda module, args, output: 2 * output)


def changes_weight(model):
    part = model.transformer.h[0].attn.c_proj
    part.weight = nn.Parameter(part.weight.detach() * 2)


def changes_data(model):
    part = model.transformer.h[0].ln_2
    part.weight.data = part.weight.data.clone() * 2


def changes_module(model):
    attention = model.transformer.h[1].attn
    attention.c_attn = nn.Sequential(attention.c_attn)


def changes_activation(model):
    model.transformer.h[0].mlp.act_fn = nn.GELU()


def changes_attention(model):
    model.set_attn_implementation("eager")


def changes_in_place(model):
    model.transformer.h[0].mlp.w2.weight.data.mul_(2)


CHANGES = [
    changes_hook,
    changes_weight,
    changes_data,
    changes_module,
    changes_activation,
    changes_attention,
    changes_in_place,
]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.no_cover
def test_changes_between_tokens_count(monkeypatch, change):
    def changed():
        model = model_of()
        _, cache = talk(model)
        before = steps_of(cache)
        change(model)
        if isinstance(model.transformer.h[1].attn.c_attn, nn.Sequential):
            model.transformer.h[1].attn.c_attn.heads = (3, 3, 3)
        return follow(model, cache, [1, 2]), cache, before

    expected, *_ = torch_alone(monkeypatch, changed)
    got, cache, before = changed()
    assert error(got, expected) < BOUNDS[torch.float32]
    kept, steps = change in (changes_weight, changes_data, changes_in_place), steps_of(cache)
    assert (steps is not None and steps.taken == (6 if steps is before else 2)) == kept


def test_an_attention_of_another_class(monkeypatch, somebodys_own):
    model = model_of()
    for block in model.transformer.h:
        block.attn = somebodys_own(block.attn)
    expected, _ = torch_alone(monkeypatch, lambda: talk(model))
    got, cache = talk(model)
    assert steps_of(cache) is None and error(got, expected) < BOUNDS[torch.float32]


def test_gradients_autocast_and_the_switch_go_through_torch(monkeypatch):
    model = model_of()
    _, cache = talk(model)
    taken = steps_of(cache).taken
    token = ids_of(length=1)
    model(token, past_key_values=cache).logits.sum().backward()
    with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16):
        model(token, past_key_values=QWenCache())
    monkeypatch.setenv("QWEN_NATIVE", "0")
    follow(model, cache, [1])
    assert steps_of(cache).taken == taken


def test_training_is_torchs(monkeypatch):
    model = model_of().train()
    for name in ("norm_prompt", "gate_prompt", "turn_prompt"):
        monkeypatch.setattr(passes_qwen, name, None)
    model(ids_of(), labels=ids_of()).loss.backward()
    assert model.transformer.h[0].ln_1.weight.grad is not None


# --- compiling ---


@pytest.mark.no_cover
def test_until_they_are_compiled_torch_computes(monkeypatch):
    monkeypatch.setattr(warming_qwen, "_ready", set())
    monkeypatch.setattr(warming_qwen, "_begun", set())
    may_go_on, begin = threading.Event(), warming_qwen.begin

    def later(key, device, warm):
        begin(key, device, lambda: warm() if may_go_on.wait(60) else ())

    monkeypatch.setattr(preparing_qwen, "begin", later)
    model = model_of()
    expected, cache = talk(model)
    assert steps_of(cache) is None
    may_go_on.set()
    warming_qwen.wait()
    got, cache = talk(model)
    assert steps_of(cache) is not None and error(got, expected) < BOUNDS[torch.float32]


class Started:
    """A kernel that notes what Triton would compile for each start, and does nothing.

    Args:
        kernel: of `triton_qwen`.
        found: gets its name, what is the same in all programs, and what its arguments are specialised for.
    """

    def __init__(self, kernel, found):
        self.found, self.name = found, kernel.fn.__name__
        self.names = list(inspect.signature(kernel.fn).parameters)

    def __getitem__(self, grid):
        return lambda *given, **settings: self.found.add(
            (self.name, *map(self.kind, self.names, given), *sorted(settings.items()))
        )

    @staticmethod
    def kind(name, given):
        if isinstance(given, int):
            return name in triton_qwen._COUNTED or (given == 1, given % 16 == 0)
        return (given.dtype, given.data_ptr() % 16 == 0) if isinstance(given, torch.Tensor) else type(given)


@pytest.mark.parametrize("shape", [{}, {"use_logn_attn": True, "seq_length": 8}], ids=["plain", "logn"])
def test_nothing_is_compiled_for_a_batch_that_has_not_been(monkeypatch, shape):
    found = set()
    for name in ("attend_parts", "gate_states", "merge_parts", "multiply", "multiply_gated", "norm_rows", "turn_heads"):
        started = Started(getattr(triton_qwen, name), found)
        for module in (triton_qwen, gpu_steps_qwen):
            monkeypatch.setattr(module, name, started, raising=False)
    for name in ("_ready", "_begun", "_ended"):
        monkeypatch.setattr(warming_qwen, name, set())
    model = model_of(**shape)
    talk(model, steps=0)  # has the kernels compiled
    compiled = set(found)
    assert {name for name, *_ in compiled} >= {"attend_parts", "multiply_gated", "gate_states", "norm_rows"}
    for rows, padding in ((1, 0), (1, 2), (3, 2)):
        _, cache = talk(model, rows, steps=1, padding=padding)
        assert steps_of(cache).taken == 1 and found == compiled


@torch.no_grad()
def test_nothing_is_compiled_while_the_caller_records(monkeypatch):
    """Compiling waits for the GPU, which would end the recording."""
    begun = []
    monkeypatch.setattr(preparing_qwen, "begin", lambda *given: begun.append(given))
    model = model_of()
    with monkeypatch.context() as patch:
        patch.setattr("qwen1.preparing_qwen.is_recorded", lambda device: True)
        model(ids_of())
    assert not begun
    model(ids_of())
    assert begun


def test_compiled_once_on_a_machine(monkeypatch, tmp_path, caplog):
    mark, made = tmp_path / "mark", []
    monkeypatch.setattr(warming_qwen, "_mark", lambda key, device: mark)
    for _ in range(2):
        monkeypatch.setattr(warming_qwen, "_begun", set())
        warming_qwen.begin(
            ("a", 1), torch.device(DEVICE), lambda: made.append(threading.current_thread().name) or [("a", 1)]
        )
        warming_qwen.wait()
    assert mark.exists() and warming_qwen.is_ready("a", 1) and not warming_qwen.is_ready("a", 2)
    assert made == ["qwen1-kernels", threading.current_thread().name]


def test_a_process_that_ends_ends_the_compiling(monkeypatch):
    """Else it is killed inside of the compiler, which ends the process by SIGABRT."""
    monkeypatch.setattr(warming_qwen, "_begun", set())
    monkeypatch.setattr(threading, "main_thread", lambda: threading.Thread())
    warming_qwen.begin(("c",), torch.device(DEVICE), lambda: iter([("c", 1), ("c", 2)]))
    assert not warming_qwen._threads[-1].daemon
    warming_qwen.wait()
    assert not warming_qwen.is_ready("c", 1) and not warming_qwen.is_ready("c", 2)


def test_a_compiler_that_fails_is_done_without(monkeypatch):
    monkeypatch.setattr(warming_qwen, "_begun", set())

    def fail():
        raise RuntimeError("no ptxas")

    warming_qwen.begin(("b",), torch.device(DEVICE), fail)
    warming_qwen.wait()
    assert not warming_qwen.is_ready("b")


@pytest.mark.gpu
def test_steps_are_recorded(monkeypatch):
    replayed = []
    monkeypatch.setattr("qwen1.recording_qwen.Recording.replay", count_calls(replayed))
    model = model_of(torch.bfloat16)
    expected, _ = torch_alone(monkeypatch, lambda: talk(model, steps=12))
    got, cache = talk(model, steps=12)
    assert len(replayed) == 8 and error(got, expected) < BOUNDS[torch.bfloat16]
    del cache


def count_calls(calls):
    from qwen1.recording_qwen import Recording

    replay = Recording.replay
    return lambda recording: (calls.append(1), replay(recording))
