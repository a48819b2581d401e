"""Every form of `device_map`: the logits and conversations of a model that is whole in memory."""

import pytest
import torch
from accelerate.hooks import AlignDevicesHook

from qwen1 import QWenLMHeadModel

QUERY = "long " * 20  # beyond seq_length, so that NTK has its part
IDS = torch.randint(0, 256, (2, 48), generator=torch.Generator().manual_seed(0))
PARTS = ["transformer.wte", "transformer.rotary_emb", "transformer.drop", "transformer.ln_f", "lm_head"]
BLOCKS = ["transformer.h.0", "transformer.h.1"]
ROOM = 450_000
"""Bytes for weights, less than the model has and more than a block."""

WHOLE = {
    "name": "cpu",
    "device": torch.device("cpu"),
    "everything": {"": "cpu"},
    "parts": dict.fromkeys([*PARTS, *BLOCKS], "cpu"),
    **{name: name for name in ("auto", "balanced", "balanced_low_0", "sequential")},
}
"""Forms that leave the model in the memory of the CPU where there is no GPU."""

OFFLOADED = {
    **{name: {"device_map": name, "max_memory": {"cpu": ROOM}} for name in ("auto", "sequential")},
    "balanced": {"device_map": "balanced", "max_memory": {"cpu": "450KB"}},
    "balanced_low_0": {"device_map": "balanced_low_0", "max_memory": {"cpu": ROOM}},
    "block on disk": {"device_map": {**dict.fromkeys([*PARTS, BLOCKS[0]], "cpu"), BLOCKS[1]: "disk"}},
    "all but the head on disk": {"device_map": {"transformer": "disk", "lm_head": "cpu"}},
    "everything on disk": {"device_map": {"": "disk"}},
    "older spelling": {"device_map": "auto", "max_memory": {"cpu": ROOM}, "offload_state_dict": True},
    "with buffers": {"device_map": "auto", "max_memory": {"cpu": ROOM}, "offload_buffers": True},
}


@pytest.fixture
def load(checkpoint_folder, tmp_path):
    """Load the chat model with these arguments, in evaluation mode."""
    return lambda **given: QWenLMHeadModel.from_pretrained(
        checkpoint_folder, offload_folder=tmp_path / "offloaded", **given
    ).eval()


@pytest.fixture
def check(load, byte_tokenizer):
    """Check that a model computes and says what the one in memory does."""

    def compare(model):
        plain = load()
        with torch.no_grad():
            torch.testing.assert_close(model(IDS).logits.to("cpu"), plain(IDS).logits)
        histories = [None, None]
        for query in ("q", QUERY):  # the second on what is kept of the first, where that can be
            said = [
                one.chat(byte_tokenizer, query, history, do_sample=False)
                for one, history in zip((model, plain), histories, strict=True)
            ]
            assert said[0] == said[1]
            streamed = model.chat_stream(byte_tokenizer, query, histories[0], do_sample=False)
            assert list(streamed)[-1] == said[0][0]
            histories = [history for _, history in said]
        batches = [one.batch_chat(byte_tokenizer, ["q", QUERY], do_sample=False) for one in (model, plain)]
        assert batches[0] == batches[1]
        return histories[0]

    return compare


@pytest.mark.skipif(torch.cuda.is_available(), reason="would be on the GPU")
@pytest.mark.parametrize("form", WHOLE)
def test_in_memory(load, check, form):
    model = load(device_map=WHOLE[form])
    assert {weight.device.type for weight in model.parameters()} == {"cpu"}
    assert check(model).kept is not None


@pytest.mark.skipif(torch.cuda.is_available(), reason="would be on the GPU")
@pytest.mark.parametrize("form", OFFLOADED)
def test_partly_on_disk(load, check, byte_tokenizer, form):
    model = load(**OFFLOADED[form])
    on_disk = [module for module in model.modules() if getattr(getattr(module, "_hf_hook", None), "offload", False)]
    if form == "everything on disk" and not on_disk:  # early releases of transformers put nothing in its way
        with pytest.raises(ValueError, match="another device_map"):
            model.chat(byte_tokenizer, "q")
        return
    assert on_disk and all(isinstance(module._hf_hook, AlignDevicesHook) for module in on_disk)
    assert any(weight.is_meta for weight in model.parameters())
    check(model)


def test_a_block_is_never_split(load):
    """What its halves share would have to be moved between devices within a block."""
    model = load(device_map="auto", max_memory={"cpu": ROOM})
    places = {name: place for name, place in model.hf_device_map.items() if name.startswith("transformer.h.")}
    assert len(set(places.values())) == 2 and all(name in BLOCKS for name in places)


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["auto", "balanced", "balanced_low_0", "sequential"])
@pytest.mark.parametrize("memory", [{}, {0: ROOM, "cpu": "1GB"}, {0: ROOM, 1: "1GB"}], ids=["all", "cpu", "two"])
def test_over_gpus(load, check, form, memory):
    if 1 in memory and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    check(load(device_map=form, **({"max_memory": memory} if memory else {})))


@pytest.mark.gpu
def test_blocks_on_two_gpus(load, check):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    check(load(device_map={**dict.fromkeys([*PARTS, BLOCKS[0]], 0), BLOCKS[1]: 1}))
