"""Conversations of a model that accelerate keeps on a disk or in the memory of the CPU."""

import copy

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import ModelHook, add_hook_to_module

from qwen1 import QWenLMHeadModel

QUERY = "long " * 20  # beyond seq_length, so that NTK has its part


@pytest.fixture(params=["all on disk", "embedding on disk", "embedding on cpu", "all on cpu", "head on disk"])
def offloaded(request, chat_model, tmp_path):
    """A copy of the chat model whose weights are elsewhere between the steps."""
    model = copy.deepcopy(chat_model).eval()
    parts = ["transformer.wte", "transformer.drop", "transformer.rotary_emb", "transformer.h", "transformer.ln_f"]
    if request.param == "all on cpu":
        return cpu_offload(model, "cpu")
    if request.param == "all on disk":
        return disk_offload(model, str(tmp_path), "cpu")
    device_map = {**dict.fromkeys(parts, "cpu"), "lm_head": "cpu"}
    place = "disk" if request.param.endswith("disk") else "cpu"
    device_map["lm_head" if request.param.startswith("head") else "transformer.wte"] = place
    return dispatch_model(model, device_map, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True)


@pytest.mark.no_cover
def test_every_door_answers_as_the_model_in_memory(chat_model, byte_tokenizer, offloaded):
    expected, history = chat_model.chat(byte_tokenizer, QUERY, [("a", "b")])
    reply, said = offloaded.chat(byte_tokenizer, QUERY, [("a", "b")])
    assert (reply, said) == (expected, history)
    assert list(offloaded.chat_stream(byte_tokenizer, QUERY, [("a", "b")]))[-1] == expected
    queries, histories = ["short", QUERY], [None, [("a", "b")]]
    batch = offloaded.batch_chat(byte_tokenizer, queries, histories)
    assert batch == chat_model.batch_chat(byte_tokenizer, queries, histories) and batch[0][1] == expected


@pytest.mark.no_cover
def test_conversations_go_on(chat_model, byte_tokenizer, offloaded):
    """On the keys of the history, in turns and streams, or without them."""
    expected = chat_model.chat(byte_tokenizer, "d", chat_model.chat(byte_tokenizer, "c")[1])
    _, history = offloaded.chat(byte_tokenizer, "c")
    for reuse in (True, False):
        assert offloaded.chat(byte_tokenizer, "d", history, reuse_cache=reuse) == expected
        stream = offloaded.chat_stream(byte_tokenizer, "d", history, reuse_cache=reuse)
        assert list(stream)[-1] == expected[0]


@pytest.mark.no_cover
def test_sampled_replies_and_the_callers_autocast(chat_model, byte_tokenizer, offloaded):
    arguments = {"do_sample": True, "seed": 3}
    expected, _ = chat_model.chat(byte_tokenizer, "q", **arguments)
    assert offloaded.chat(byte_tokenizer, "q", **arguments)[0] == expected
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert list(offloaded.chat_stream(byte_tokenizer, "q"))[-1] == offloaded.chat(byte_tokenizer, "q")[0]


def test_folder_loaded_onto_a_disk(checkpoint_folder, byte_tokenizer, tmp_path):
    ordinary = QWenLMHeadModel.from_pretrained(checkpoint_folder)
    parts = ("transformer.drop", "transformer.rotary_emb", "transformer.h", "transformer.ln_f", "lm_head")
    device_map = {"transformer.wte": "disk", **dict.fromkeys(parts, "cpu")}
    model = QWenLMHeadModel.from_pretrained(checkpoint_folder, device_map=device_map, offload_folder=tmp_path / "o")
    assert model.device.type == "meta"
    assert model.chat(byte_tokenizer, "q", do_sample=False) == ordinary.chat(byte_tokenizer, "q", do_sample=False)


def test_weights_that_are_nowhere_are_told(chat_model, byte_tokenizer):
    with pytest.raises(ValueError, match="on the meta device, and no hook .* another device_map"):
        chat_model.to("meta").chat(byte_tokenizer, "q")


def test_a_hook_beside_it(chat_model, byte_tokenizer, offloaded):
    expected = chat_model.chat(byte_tokenizer, "q")
    add_hook_to_module(offloaded.get_input_embeddings(), ModelHook(), append=True)
    assert offloaded.chat(byte_tokenizer, "q") == expected
