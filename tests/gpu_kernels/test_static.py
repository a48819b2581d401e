"""A static cache through the kernels of a token on a GPU: where there is one, else as Triton interprets them."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from transformers import CompileConfig, StaticCache, StoppingCriteria, StoppingCriteriaList

from qwen1 import ending_qwen
from qwen1.arguments_qwen import CACHE_NAME
from qwen1.cache_qwen import QWenCache
from qwen1.recording_qwen import Recording

from .conftest import BOUNDS, DEVICE, ON_GPU, PROMPT, error, ids_of, model_of, torch_alone

pytestmark = [pytest.mark.usefixtures("kernels")] + [pytest.mark.gpu] * ON_GPU
SHAPES = {
    "plain": {},
    "ntk": {"use_dynamic_ntk": True, "use_logn_attn": True, "seq_length": 8},
    "grouped": {"num_attention_heads": 4, "kv_channels": 12, "num_key_value_heads": 2},
}
ROOM = 24


@pytest.fixture
def late(monkeypatch):
    monkeypatch.setattr(ending_qwen, "DEVICE", DEVICE)


def steps_of(cache):
    return getattr(cache.layers[0].cumulative_length, "steps", None)


def taken(cache):
    return 0 if steps_of(cache) is None else steps_of(cache).taken


def step(model, cache, token, mask=None):
    ids = torch.full((1 if mask is None else len(mask), 1), token, device=DEVICE)
    return model(ids, attention_mask=mask, **{CACHE_NAME: cache}).logits


def talk(model, rows=1, steps=4, padding=0, cache=None, mode=torch.no_grad):
    """Logits behind a prompt and of tokens after it, (B, 1 + steps, V), and the cache."""
    cache = StaticCache(config=model.config, max_cache_len=ROOM) if cache is None else cache
    mask = torch.ones((rows, PROMPT + steps), dtype=torch.long, device=DEVICE)
    mask[0, :padding] = 0
    with mode():
        model(ids_of(rows, 4), attention_mask=mask[:, :4], **{CACHE_NAME: cache})  # has the kernels compiled
        cache.reset()
        logits = [model(ids_of(rows), attention_mask=mask[:, :PROMPT], **{CACHE_NAME: cache}).logits[:, -1:]]
        for at in range(PROMPT, PROMPT + steps):
            logits.append(step(model, cache, at, mask[:, : at + 1]))
    return torch.cat(logits, dim=1), cache


def lengths(cache):
    return [int(layer.cumulative_length) for layer in cache.layers]


@pytest.mark.parametrize(
    "shape, rows, padding", [*((shape, 1, 0) for shape in SHAPES), ("plain", 1, 5), ("plain", 3, 2), ("ntk", 2, 3)]
)
@pytest.mark.no_cover
def test_logits_keys_and_counts_are_torchs(monkeypatch, shape, rows, padding):
    model = model_of(**SHAPES[shape])
    expected, other = torch_alone(monkeypatch, lambda: talk(model, rows, padding=padding))
    got, cache = talk(model, rows, padding=padding)
    assert taken(cache) == 4 and steps_of(other) is None
    assert error(got, expected) < BOUNDS[torch.float32]
    assert lengths(cache) == lengths(other) == [PROMPT + 4] * 2
    for layer, plain in zip(cache.layers, other.layers, strict=True):
        for ours, theirs in ((layer.keys, plain.keys), (layer.values, plain.values)):
            assert error(ours[:, :, padding:], theirs[:, :, padding:]) < BOUNDS[torch.float32]
            assert not ours[:, :, PROMPT + 4 :].any()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.no_cover
def test_after_the_first_token_nothing_is_asked(monkeypatch, mode):
    model = model_of()
    with mode():
        _, cache = talk(model, mode=mode)
        monkeypatch.setattr(steps_of(cache).keys, "make_room", lambda *given: pytest.fail("asked again"))
        step(model, cache, 1)
    assert taken(cache) == 5


@pytest.mark.no_cover
def test_hidden_states_come_from_the_modules_and_later_tokens_from_the_kernels(monkeypatch):
    """Transformers' hooks, by which it collects them, stay on the model."""
    model = model_of()
    states = {"output_hidden_states": True}
    with torch.no_grad():
        assert len(model(ids_of(), **states).hidden_states) == 3
    got, cache = talk(model)
    assert taken(cache) == 4
    with torch.no_grad():
        ids = torch.full((1, 1), 1, device=DEVICE)
        assert len(model(ids, **states, **{CACHE_NAME: cache}).hidden_states) == 3
    assert taken(cache) == 4 and lengths(cache) == [PROMPT + 5] * 2
    expected, _ = torch_alone(monkeypatch, lambda: talk(model))
    assert error(got, expected) < BOUNDS[torch.float32]
    model.transformer.h[0].register_forward_hook(lambda *given: None)
    with torch.no_grad():
        step(model, cache, 2)
    assert taken(cache) == 4


def crops(cache):
    for layer in cache.layers:
        layer.cumulative_length.sub_(3)


def resets_and_reads(cache):
    cache.reset()


def writes_to_data(cache):
    for layer in cache.layers:
        layer.cumulative_length.data.sub_(3)


def swaps_storage(cache):
    for layer in cache.layers:
        layer.keys.data = layer.keys.clone() * 2


def rearranges(cache):
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys.clone() * 2, layer.values.clone()


def counts_anew(cache):
    for layer in cache.layers:
        layer.cumulative_length = layer.cumulative_length - 2


@pytest.mark.parametrize("change", [crops, resets_and_reads, writes_to_data, swaps_storage, rearranges, counts_anew])
@pytest.mark.no_cover
def test_what_is_done_to_the_cache_counts(monkeypatch, change):
    model = model_of()

    def changed():
        _, cache = talk(model, steps=2)
        change(cache)
        with torch.no_grad():
            return torch.cat([step(model, cache, token) for token in (1, 2)], dim=1), cache

    expected, other = torch_alone(monkeypatch, changed)
    got, cache = changed()
    assert error(got, expected) < BOUNDS[torch.float32]
    assert taken(cache) == (2 if change is counts_anew else 4) and lengths(cache) == lengths(other)


@pytest.mark.no_cover
def test_chunks_and_copies(monkeypatch):
    model = model_of()

    @torch.no_grad()
    def turns():
        _, cache = talk(model, steps=2)
        other = copy.deepcopy(cache)
        chunk = model(ids_of(length=3, seed=9), **{CACHE_NAME: cache}).logits
        parts = [chunk, step(model, cache, 1), step(model, other, 2), step(model, cache, 3)]
        return torch.cat(parts, dim=1), cache, other

    expected, *_ = torch_alone(monkeypatch, turns)
    got, cache, other = turns()
    assert error(got, expected) < BOUNDS[torch.float32]
    assert steps_of(other) is not steps_of(cache) and taken(other) == 1 and taken(cache) == 4
    assert steps_of(pickle.loads(pickle.dumps(cache))) is None


@pytest.mark.parametrize("kind", [StaticCache, QWenCache])
@pytest.mark.no_cover
def test_what_nobody_holds_is_given_up_at_once(kind):
    """The memory of steps, their graph, and the model itself, without waiting for Python to look for cycles."""
    model = model_of()
    cache = kind() if kind is QWenCache else None
    step(model, cache or QWenCache(), 1)  # has the kernels compiled
    gc.collect()
    gc.disable()
    try:
        _, cache = talk(model, cache=cache)
        steps = steps_of(cache) if kind is StaticCache else cache.steps
        held = weakref.ref(steps), weakref.ref(model.transformer.h[0])
        del model, cache, steps
        assert [one() for one in held] == [None, None]
    finally:
        gc.enable()


@pytest.mark.skipif(ON_GPU, reason="there it ends all that the process does on the GPU, as torch does")
@pytest.mark.parametrize("beyond", [0, 5, -40])
@pytest.mark.no_cover
def test_a_cache_without_room_is_not_written_to(beyond):
    model = model_of()
    _, cache = talk(model, steps=2, cache=StaticCache(config=model.config, max_cache_len=PROMPT + 2))
    assert taken(cache) == 2 and lengths(cache) == [PROMPT + 2] * 2
    before = [layer.keys.clone() for layer in cache.layers]
    for layer in cache.layers:
        layer.cumulative_length.add_(beyond)
    with pytest.raises(RuntimeError, match=f"max_cache_len={PROMPT + 2}. Make a larger one"), torch.no_grad():
        step(model, cache, 1)
    assert taken(cache) == 2
    assert all(torch.equal(layer.keys, keys) for layer, keys in zip(cache.layers, before, strict=True))


@pytest.mark.no_cover
def test_after_an_interruption_the_token_takes_the_same_place(monkeypatch):
    model = model_of()
    expected, _ = talk(model, steps=3)

    def interrupt(*given):
        raise KeyboardInterrupt

    _, cache = talk(model, steps=2)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt), torch.no_grad():
        patch.setattr(type(steps_of(cache)), "run", interrupt)
        step(model, cache, PROMPT + 2)
    with torch.no_grad():
        got = step(model, cache, PROMPT + 2)
    assert error(got, expected[:, -1:]) < BOUNDS[torch.float32] and lengths(cache) == [PROMPT + 3] * 2


@pytest.mark.no_cover
def test_a_graph_of_the_caller_gets_the_modules(monkeypatch):
    """What it would record of the steps lies in memory that the graph may outlive."""
    model = model_of()
    _, cache = talk(model)
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr("qwen1.gpu_steps_qwen.is_recorded", lambda device: True)
        step(model, cache, 1)
    assert taken(cache) == 4
    with torch.no_grad():
        step(model, cache, 2)
    assert taken(cache) == 5 and lengths(cache) == [PROMPT + 6] * 2


@pytest.mark.slow
@pytest.mark.no_cover
def test_a_used_cache_is_exported():
    exporters = pytest.importorskip("transformers.exporters", reason="transformers has no exporters before 5.21")
    model = model_of()
    _, cache = talk(model)
    mask = torch.ones((1, PROMPT + 5), dtype=torch.long, device=DEVICE)
    inputs = {"input_ids": torch.tensor([[1]], device=DEVICE), "attention_mask": mask, CACHE_NAME: cache}
    exporters.DynamoExporter().export(model, inputs, exporters.DynamoConfig(dynamic=False))
    assert taken(cache) == 4


@pytest.mark.parametrize("made", [True, False], ids=["made in it", "made before"])
@pytest.mark.no_cover
def test_inference_mode(monkeypatch, made):
    model = model_of()
    expected, _ = torch_alone(monkeypatch, lambda: talk(model))
    cache = None if made else StaticCache(config=model.config, max_cache_len=ROOM)
    if cache is not None:
        talk(model, steps=0, cache=cache)
    with torch.inference_mode():
        got, cache = talk(model, cache=cache, mode=torch.inference_mode)
    assert taken(cache) == 4 and error(got, expected) < BOUNDS[torch.float32]


@pytest.mark.no_cover
def test_masks_of_another_kind_are_left_to_the_modules(monkeypatch):
    model = model_of()

    @torch.no_grad()
    def masked():
        _, cache = talk(model)
        mask = torch.zeros((1, 1, 1, ROOM), device=DEVICE)
        mask[..., PROMPT + 5 :] = -torch.inf
        return step(model, cache, 1, mask), cache

    expected, _ = torch_alone(monkeypatch, masked)
    got, cache = masked()
    assert error(got, expected) < BOUNDS[torch.float32] and steps_of(cache) is None


@pytest.mark.parametrize("kind", ["static", "growing"])
@pytest.mark.no_cover
def test_a_mask_of_each_head_is_left_to_the_modules(monkeypatch, kind):
    model = model_of()

    @torch.no_grad()
    def masked():
        if kind == "static":
            _, cache = talk(model, padding=3)
        else:
            cache = QWenCache()
            ids, mask = ids_of(1, PROMPT + 1), torch.ones((1, PROMPT + 1), dtype=torch.long, device=DEVICE)
            mask[:, :3] = 0
            model(ids[:, :PROMPT], attention_mask=mask[:, :PROMPT], **{CACHE_NAME: cache})
            model(ids[:, PROMPT:], attention_mask=mask, **{CACHE_NAME: cache})
        room = ROOM if kind == "static" else PROMPT + 2
        mask = torch.rand((1, 3, 1, room), generator=torch.Generator().manual_seed(2)).to(DEVICE) > 0.5
        mask[..., PROMPT + 5 :] = False
        positions = torch.tensor([[PROMPT]], device=DEVICE)
        return model(ids_of(1, 1), attention_mask=mask, position_ids=positions, **{CACHE_NAME: cache}).logits

    assert error(masked(), torch_alone(monkeypatch, masked)) < BOUNDS[torch.float32]


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.no_cover
def test_recorded_steps_go_on_when_memory_is_given_back(monkeypatch, rows):
    """And where others work on the cache between them: they read where its tokens end each time."""
    replay, replayed = Recording.replay, []
    monkeypatch.setattr(Recording, "replay", lambda recording: (replayed.append(1), replay(recording)))
    model = model_of(torch.bfloat16)

    def both():
        logits, cache = talk(model, rows, steps=8, padding=2)
        if ON_GPU:
            torch.cuda.empty_cache()
        crops(cache)
        mask = torch.ones((rows, PROMPT + 7), dtype=torch.long, device=DEVICE)
        mask[0, :2] = 0
        with torch.no_grad():
            after = [step(model, cache, 1, mask[:, :-1]), step(model, cache, 2, mask)]
        return torch.cat([logits, *after], dim=1), cache

    expected, _ = torch_alone(monkeypatch, both)
    got, cache = both()
    assert error(got, expected) < BOUNDS[torch.bfloat16] and lengths(cache) == [PROMPT + 7] * 2
    assert taken(cache) == 10 and len(replayed) == 6


# --- generate ---


def write(model, monkeypatch=None, rows=1, **options):
    def run():
        settings = dict(cache_implementation="static", max_new_tokens=6, do_sample=False, pad_token_id=0)
        if monkeypatch is not None:  # on a GPU it would be compiled, for each length of a reply
            settings["disable_compile"] = True
        return model.generate(ids_of(rows), **settings | options)

    return run() if monkeypatch is None else torch_alone(monkeypatch, run)


@pytest.mark.parametrize("asked_late", [False, True])
@pytest.mark.parametrize("end", [None, "by itself"])
def test_generate(monkeypatch, asked_late, end):
    monkeypatch.setattr(ending_qwen, "DEVICE", DEVICE if asked_late else "none")
    model = model_of()
    written = write(model, monkeypatch, eos_token_id=None)[0, PROMPT:].tolist()
    options = {"eos_token_id": None if end is None else written[2]}
    overran, finish = [], ending_qwen.Late.finish
    monkeypatch.setattr(
        ending_qwen.Late, "finish", lambda self, *rest: overran.append(self.overran) or finish(self, *rest)
    )
    expected = write(model, monkeypatch, **options)
    assert torch.equal(write(model, **options), expected)
    assert overran[-1:] == [end is not None] * asked_late
    if end is not None:
        assert expected.shape[1] < PROMPT + 6


@pytest.mark.slow
def test_several_rows_and_beams(monkeypatch, late):
    model = model_of()
    for options in ({"rows": 3}, {"num_beams": 2}, {"rows": 2, "do_sample": True, "seed": 3}):
        assert torch.equal(write(model, **options), write(model, monkeypatch, **options))


class Harmless(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


@pytest.fixture
def compiled(monkeypatch):
    """Settings of the calls that transformers would have compiled, were this a GPU."""
    asked = []

    def criteria(self, model_kwargs, generation_config):
        asked.append(generation_config.compile_config)
        return False

    monkeypatch.setattr("transformers.GenerationMixin._valid_auto_compile_criteria", criteria)
    return asked


@pytest.mark.slow
def test_nothing_is_compiled_where_kernels_serve(monkeypatch, compiled, late):
    model = model_of()
    write(model)
    write(model, stopping_criteria=StoppingCriteriaList([Harmless()]))
    assert not compiled
    write(model, compile_config=CompileConfig())
    assert [type(config) for config in compiled] == [CompileConfig]
    write(model, monkeypatch)
    model.set_attn_implementation("eager")
    write(model)
    assert compiled[1:] == [None, None]


AS_BEFORE = [
    pytest.param({"cache_implementation": "offloaded_static"}, id="offloaded", marks=pytest.mark.gpu),
    pytest.param({"prefill_chunk_size": 5}, id="in chunks"),
    pytest.param({"output_hidden_states": True, "return_dict_in_generate": True}, id="with states"),
]


@pytest.mark.parametrize("options", AS_BEFORE)
def test_what_kernels_do_not_tell_is_compiled(compiled, options):
    write(model_of(), max_new_tokens=2, **options)
    assert compiled


def test_what_is_not_plain_is_compiled(compiled, late):
    model = model_of()
    hook = model.transformer.h[1].register_forward_hook(lambda *given: None)
    write(model, max_new_tokens=2)
    assert compiled == [None] and not model.transformer.takes_static_cache()
    hook.remove()
    with torch.no_grad():
        assert model.transformer.takes_static_cache()
    model.set_input_embeddings(torch.nn.Identity())
    assert not model.transformer.takes_static_cache()


@torch.no_grad()
def test_kernels_that_never_come_are_not_waited_for(monkeypatch):
    model = model_of(hidden_size=32, num_attention_heads=2)
    monkeypatch.setattr("qwen1.warming_qwen._begun", set())
    monkeypatch.setattr("qwen1.preparing_qwen.norm_prompt", None)  # what is compiled first fails
    assert model.transformer.takes_static_cache(), "for all that is known"
    talk(model, steps=0)
    assert not model.transformer.takes_static_cache()


@torch.no_grad()
def test_steps_that_can_not_be_recorded_are_slower_than_what_is_compiled(monkeypatch):
    asked = []
    monkeypatch.setattr("qwen1.steps_qwen.can_record", lambda device: asked.append(device.type) and False)
    assert not model_of().transformer.takes_static_cache() and asked == [DEVICE]


@pytest.mark.gpu
def test_no_token_waits_for_the_gpu(waits):
    model = model_of()
    _, few, many = [
        waits(model, lambda new=new: write(model, max_new_tokens=new, eos_token_id=None)) for new in (8, 10, 30)
    ]
    assert len(few) == len(many), many[len(few) :]
