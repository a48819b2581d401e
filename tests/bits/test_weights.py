"""Weights in few bits by the libraries that transformers knows: loaded, used, saved, trained."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import BitsAndBytesConfig

from qwen1 import QWenLMHeadModel
from qwen1.fingerprint_qwen import fingerprint
from qwen1.loss_qwen import holds_its_weight

IDS = torch.randint(0, 256, (2, 60), generator=torch.Generator().manual_seed(0))
LAYERS = ("attn.c_attn", "attn.c_proj", "mlp.w1", "mlp.w2", "mlp.c_proj")


def plain(weight):
    return type(weight) is nn.Parameter and weight.dtype == torch.bfloat16


def relative_error(got, expected):
    return ((got.float() - expected.float()).norm() / expected.float().norm()).item()


@torch.no_grad()
def logits_of(model):
    return model(IDS, use_cache=False).logits


@pytest.mark.parametrize("tied", [False, True], ids=["head apart", "head tied"])
def test_logits_are_near_and_embedding_and_head_stay_whole(in_few_bits, way, whole, tied):
    folder = whole(tie_word_embeddings=tied)
    expected = logits_of(QWenLMHeadModel.from_pretrained(folder, dtype=torch.float32).eval())
    model = in_few_bits(tie_word_embeddings=tied)
    error = relative_error(logits_of(model), expected)
    assert 1e-4 < error < (0.9 if way.bits == 4 else 0.4)  # random weights, of which each layer makes it larger
    assert plain(model.lm_head.weight) and plain(model.transformer.wte.weight)
    assert (model.lm_head.weight.data_ptr() == model.transformer.wte.weight.data_ptr()) is tied
    if way.scheme is None:  # compressed-tensors gives the values back where it has no kernel
        for block in model.transformer.h:
            assert not any(plain(block.get_submodule(name).weight) for name in LAYERS)


@torch.no_grad()
def test_each_cache_gives_the_logits_of_the_whole_text(in_few_bits, way):
    model = in_few_bits()
    whole_text = logits_of(model)
    output = model(IDS[:, :40], use_cache=True)
    steps = [output.logits]
    for index in range(40, 60):
        steps.append(model(IDS[:, index : index + 1], past_key_values=output.past_key_values).logits)
    # Activations in 8 bits, and outliers, are chosen anew for each call.
    assert relative_error(torch.cat(steps, 1)[:, -20:], whole_text[:, -20:]) < 0.1


def test_chats_go_on_with_what_they_keep(in_few_bits, byte_tokenizer, count_read):
    model = in_few_bits(seq_length=2048)
    model.generation_config.update(chat_format="chatml", pad_token_id=256, do_sample=False, allow_custom_entries=True)
    _, history = model.chat(byte_tokenizer, "What?", None, max_new_tokens=4)
    _, history = model.chat(byte_tokenizer, "And?", history, max_new_tokens=4)  # some lay weights out anew at first
    read = count_read(model)
    _, kept = model.chat(byte_tokenizer, "Why?", history, max_new_tokens=4)
    new = read()
    model.chat(byte_tokenizer, "Why?", list(history), max_new_tokens=4, reuse_cache=False)
    assert 0 < new < read() and kept.kept is not None
    assert len(model.batch_chat(byte_tokenizer, ["a", "b"], [None, kept], max_new_tokens=4)[0]) == 2
    assert list(model.chat_stream(byte_tokenizer, "c", kept, max_new_tokens=4)) is not None


def innermost(tensor):
    """What a tensor is made of; codes that are packed look like whole ones through a view of the packed tensor."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    return [inner for name in tensor.__tensor_flatten__()[0] for inner in innermost(getattr(tensor, name))]


def few_bit_tensors(model):
    """Codes and scales of the first layer: what is no plain weight there."""
    layer = model.transformer.h[0].attn.c_attn
    weight = getattr(layer, "weight", None)
    if weight is None or hasattr(layer, "quantization_scheme"):
        return [tensor for tensor in layer.parameters() if tensor.numel() and tensor.ndim]
    if hasattr(weight, "__tensor_flatten__"):
        return innermost(weight)
    state = getattr(layer, "state", None)
    scales = [
        getattr(state, "SCB", None),
        getattr(weight, "SCB", None),
        getattr(getattr(weight, "quant_state", None), "absmax", None),
    ]
    return [weight.data, *(scale for scale in scales if scale is not None)]


@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
def test_any_change_of_codes_or_scales_is_another_model(in_few_bits, used):
    model = in_few_bits()
    if used:
        logits_of(model)
    count = len(few_bit_tensors(model))
    assert count >= 1
    for index in range(count):
        before = fingerprint(model)
        tensor = few_bit_tensors(model)[index]
        if tensor.numel() == 0:
            continue
        tensor.detach().view(torch.uint8).flatten()[0] ^= 1
        assert None is not before != fingerprint(model)


def test_it_is_saved_and_loaded(in_few_bits, way, tmp_path):
    model = in_few_bits()
    expected = logits_of(model)
    if not way.saves:
        with pytest.raises(ValueError, match="not serializable"):
            model.save_pretrained(tmp_path / "saved")
        return
    model.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "modeling_qwen.py").is_file() or model.config.auto_map
    again = QWenLMHeadModel.from_pretrained(tmp_path / "saved", device_map="cpu").eval()
    assert relative_error(logits_of(again), expected) < 0.1  # bitsandbytes lays nf4 out anew, rounding its scales


def test_adapters_are_trained_on_it(in_few_bits, way):
    """LoRA: the loss falls, what is quantised stays, and the head's loss is that of the logits."""
    if not way.trains:
        pytest.skip("activations in few bits let no gradient through")
    model = in_few_bits()
    if way.scheme is not None:
        logits_of(model)  # which gives the weights back with the first call
    before = [copy.deepcopy(tensor.detach()) for tensor in few_bit_tensors(model)]
    settings = LoraConfig(r=4, target_modules=["c_attn", "w1"], task_type="CAUSAL_LM", lora_dropout=0.0)
    peft = get_peft_model(model, settings).train()
    trained = [weight for weight in peft.parameters() if weight.requires_grad]
    optimizer, losses = torch.optim.AdamW(trained, lr=1e-2), []
    for _ in range(6):
        output = peft(IDS, labels=IDS)
        losses.append(output.loss.item())
        output.loss.backward()
        optimizer.step(), optimizer.zero_grad()
    logits = output.logits
    assert losses[-1] < losses[0] - 0.1
    assert torch.isfinite(logits).all()
    for old, new in zip(before, few_bit_tensors(peft.base_model.model), strict=False):
        assert old.shape != new.shape or torch.equal(old.view(torch.uint8), new.detach().view(torch.uint8))


def test_a_head_in_few_bits_has_its_own_loss(whole):
    """Asked for by name, the head is quantised too: the loss then comes from its logits."""
    pytest.importorskip("bitsandbytes")
    settings = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["nothing"])
    model = QWenLMHeadModel.from_pretrained(
        whole(), quantization_config=settings, dtype=torch.bfloat16, device_map="cpu"
    )
    assert not plain(model.lm_head.weight) and not holds_its_weight(model.lm_head)
    model.train()
    output = model(IDS, labels=IDS)
    logits = output.logits[:, :-1].float()
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), IDS[:, 1:].flatten())
    torch.testing.assert_close(output.loss.float(), expected, atol=1e-2, rtol=1e-2)
