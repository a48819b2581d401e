"""Weights rounded while they are loaded, saved as codes and loaded again."""

import json
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from qwen1 import QWenBitsConfig, QWenForSequenceClassification, QWenLMHeadModel, QWenModel
from qwen1.bits_qwen import QWenBitsEmbedding, QWenBitsLinear, quantised
from qwen1.programs.few_bits import in_bits
from qwen1.programs.shipped import TINY_CHAT
from qwen1.terminal.commands import parse_arguments
from qwen1.terminal.conversation import open_conversation

IDS = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(0))
LAYERS = ("attn.c_attn", "attn.c_proj", "mlp.w1", "mlp.w2", "mlp.c_proj")


@torch.no_grad()
def logits_of(model):
    return model(IDS, use_cache=False).logits


def rounded_by_hand(folder, bits, group_size=32):
    """The model in float32 with every weight rounded here, layer by layer."""
    model = QWenLMHeadModel.from_pretrained(folder, dtype=torch.float32).eval()
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in ("c_attn", "c_proj", "w1", "w2", "wte", "lm_head"):
            codes, scales = quantised(module.weight.data, bits, group_size)
            few = QWenBitsLinear(module.weight.shape[1], module.weight.shape[0], bits, group_size, bias=False)
            few.codes.data, few.scales.data = codes, scales
            module.weight.data = few.dequantised()
    return model


@pytest.mark.parametrize("tied", [False, True], ids=["head apart", "head tied"])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_those_of_weights_rounded_by_hand(whole, load, bits, dtype, tied):
    folder = whole(dtype, tie_word_embeddings=tied)
    model = load(folder, bits)
    assert isinstance(model.transformer.wte, QWenBitsEmbedding) and isinstance(model.lm_head, QWenBitsLinear)
    assert all(
        isinstance(block.get_submodule(name), QWenBitsLinear) for block in model.transformer.h for name in LAYERS
    )
    assert (model.lm_head.codes.data_ptr() == model.transformer.wte.codes.data_ptr()) is tied
    assert model.dtype == dtype and model.is_quantized and model.hf_quantizer.quantization_config.bits == bits

    got = logits_of(model).float()
    expected = logits_of(rounded_by_hand(folder, bits))
    error = ((got - expected).norm() / expected.norm()).item()
    assert error < (1e-5 if dtype == torch.float32 else 0.03)


@pytest.mark.parametrize("tied", [False, True], ids=["head apart", "head tied"])
@pytest.mark.parametrize("bits", [8, 4])
def test_saved_codes_are_loaded_bit_for_bit(whole, load, tmp_path, bits, tied, caplog):
    model = load(whole(tie_word_embeddings=tied), bits)
    model.save_pretrained(tmp_path / "saved")
    with caplog.at_level(logging.WARNING):
        again = QWenLMHeadModel.from_pretrained(tmp_path / "saved").eval()
    assert torch.equal(logits_of(model), logits_of(again))
    state, other = model.state_dict(), again.state_dict()
    assert state.keys() == other.keys() and all(torch.equal(state[name], other[name]) for name in state)
    assert (again.lm_head.codes.data_ptr() == again.transformer.wte.codes.data_ptr()) is tied
    settings = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    assert settings["quant_method"] == "qwen_bits" and settings["bits"] == bits and "packed" not in settings
    assert not [record for record in caplog.records if "weights" in record.message.lower()]
    auto = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", device_map="cpu")
    assert torch.equal(logits_of(auto.eval()), logits_of(model))


def test_a_folder_of_codes_is_small(whole, load, tmp_path):
    def size(folder):
        return sum(path.stat().st_size for path in folder.glob("*.safetensors"))

    folder = whole(n_embd=128, kv_channels=32, ffn_hidden_size=512)
    load(folder, 8).save_pretrained(tmp_path / "8")
    load(folder, 4).save_pretrained(tmp_path / "4")
    assert size(tmp_path / "8") < 0.56 * size(folder)
    assert size(tmp_path / "4") < 0.34 * size(folder)


@pytest.mark.parametrize("cls", [QWenModel, QWenForSequenceClassification])
def test_other_heads_load_from_the_same_folders(whole, load, tmp_path, cls):
    folder = whole()
    load(folder, 8).save_pretrained(tmp_path / "saved")
    rounded = load(folder, 8, cls)
    saved = cls.from_pretrained(tmp_path / "saved").eval()
    base = rounded if cls is QWenModel else rounded.transformer
    assert isinstance(base.h[0].mlp.w1, QWenBitsLinear) and isinstance(base.wte, QWenBitsEmbedding)
    other = saved if cls is QWenModel else saved.transformer
    for name, value in base.state_dict().items():
        assert torch.equal(value, other.state_dict()[name])
    if cls is not QWenModel:
        assert type(rounded.score) is nn.Linear


def test_layers_that_are_named_stay_whole(whole, load, tmp_path):
    folder = whole()
    model = load(folder, 8, modules_to_not_convert=["lm_head", "h.0.mlp.w1", r"transformer\.h\.1\.attn"])
    float_model = QWenLMHeadModel.from_pretrained(folder)
    stay = {"lm_head", *(f"transformer.h.{name}" for name in ("0.mlp.w1", "1.attn.c_attn", "1.attn.c_proj"))}
    for name, module in model.named_modules():
        if name in stay:
            assert type(module) is nn.Linear and torch.equal(module.weight, float_model.get_submodule(name).weight)
        elif name.endswith(("c_attn", "c_proj", "w1", "w2", "wte")):
            assert isinstance(module, (QWenBitsLinear, QWenBitsEmbedding)), name
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits_of(QWenLMHeadModel.from_pretrained(tmp_path / "saved").eval()), logits_of(model))


def test_a_tied_head_stays_whole_with_its_embedding(whole, load):
    model = load(whole(tie_word_embeddings=True), 8, modules_to_not_convert=["lm_head"])
    assert model.lm_head.weight is model.transformer.wte.weight


def test_widths_that_do_not_divide_stay_whole_with_a_warning(whole, load, caplog):
    folder = whole(ffn_hidden_size=160)
    with caplog.at_level(logging.WARNING):
        model = load(folder, 8)
    assert type(model.transformer.h[0].mlp.c_proj) is nn.Linear
    assert isinstance(model.transformer.h[0].mlp.w1, QWenBitsLinear)
    assert "transformer.h.0.mlp.c_proj stays whole: its width of 80" in caplog.text


def test_names_that_keep_no_layer_whole_are_told(whole, load, caplog):
    folder = whole()
    with caplog.at_level(logging.WARNING):
        load(folder, 8, modules_to_not_convert=["lm_head", r"transformer\.h\.\d+\.mlp", "lm_haed"])
    assert caplog.text.count("modules_to_not_convert") == 1 and "'lm_haed' is the name of no layer" in caplog.text


def test_head_and_embedding_may_have_more_bits(whole, load, tmp_path):
    model = load(whole(), 4, head_bits=8)
    assert (model.lm_head.bits, model.transformer.wte.bits, model.transformer.h[0].mlp.w1.bits) == (8, 8, 4)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits_of(QWenLMHeadModel.from_pretrained(tmp_path / "saved").eval()), logits_of(model))


@pytest.mark.parametrize("tied", [False, True], ids=["head apart", "head tied"])
def test_dequantised_it_is_an_ordinary_model(whole, load, tmp_path, tied):
    folder = whole(torch.float32, tie_word_embeddings=tied)
    model = load(folder, 4)
    expected = logits_of(model)
    model.dequantize()
    assert type(model.lm_head) is nn.Linear and type(model.transformer.wte) is nn.Embedding
    assert (model.lm_head.weight is model.transformer.wte.weight) is tied
    torch.testing.assert_close(logits_of(model), expected)
    model.save_pretrained(tmp_path / "saved")
    assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())
    torch.testing.assert_close(logits_of(QWenLMHeadModel.from_pretrained(tmp_path / "saved").eval()), expected)


def test_what_was_saved_can_be_dequantised(whole, load, tmp_path):
    model = load(whole(torch.float32), 4)
    expected = logits_of(model)
    model.save_pretrained(tmp_path / "saved")
    model.dequantize()
    assert model.dtype == torch.float32
    torch.testing.assert_close(logits_of(model), expected)


def test_settings_as_a_dictionary_are_those_of_the_class(whole, load):
    folder = whole()
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config={"quant_method": "qwen_bits", "bits": 4})
    assert torch.equal(logits_of(model.eval()), logits_of(load(folder, 4)))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(bits=5), "bits=5: weights have 8 or 4 bits"),
        (dict(group_size=20), "group_size=20: .* multiple of 32"),
        (dict(head_bits=2), "head_bits=2: give 8, 4, or None"),
        (dict(modules_to_not_convert="lm_head"), "modules_to_not_convert='lm_head': give a list"),
        (dict(bits=8, own_zeros=True), "own_zeros=True: groups of 8 bits"),
        (dict(bit=8), "'bit': no setting of QWenBitsConfig"),
    ],
)
def test_wrong_settings_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        QWenBitsConfig(**settings)


def test_another_model_is_refused(tmp_path):
    config = Qwen2Config(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1
    )
    Qwen2ForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match="qwen_bits is for models of QWen, and Qwen2ForCausalLM is of the type 'qwen2'"
    ):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=QWenBitsConfig(bits=4))


def test_other_settings_than_those_of_the_folder_are_refused(whole, load, tmp_path):
    load(whole(), 8).save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match="bits=4, but the weights of this folder have 8"):
        load(tmp_path / "saved", 4)
    with pytest.raises(ValueError, match="group_size=64, but this folder has groups of 32"):
        load(tmp_path / "saved", 8, group_size=64)
    with pytest.raises(ValueError, match="head_bits=4, but this folder was rounded with 8"):
        load(tmp_path / "saved", 8, head_bits=4)
    with pytest.raises(ValueError, match=r"modules_to_not_convert=\['lm_head'\], but .* rounded with \[\]"):
        load(tmp_path / "saved", 8, modules_to_not_convert=["lm_head"])
    assert load(tmp_path / "saved", 8, head_bits=8).lm_head.bits == 8
    assert load(tmp_path / "saved", 8).transformer.wte.bits == 8


def test_a_folder_that_lacks_codes_is_refused(whole, load, tmp_path):
    load(whole(), 8).save_pretrained(tmp_path / "saved")
    file = tmp_path / "saved" / "model.safetensors"
    tensors = load_file(file)
    del tensors["transformer.h.1.mlp.w2.scales"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"no weights of transformer\.h\.1\.mlp\.w2"):
        QWenLMHeadModel.from_pretrained(tmp_path / "saved")


def test_weights_that_are_no_numbers_are_named(whole, load, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    file = whole() / "model.safetensors"
    tensors = load_file(file)
    tensors["transformer.h.1.mlp.w2.weight"][0, 0] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match="conversion"):
        load(file.parent, 8)
    assert "transformer.h.1.mlp.w2: Weights that are infinite" in caplog.text


def test_an_embedding_in_few_bits_is_not_resized(whole, load):
    model = load(whole(), 8)
    with pytest.raises(ValueError, match="8 bits can't be resized to 500 rows"):
        model.resize_token_embeddings(500)


@pytest.mark.parametrize("bits", [8, 4])
def test_the_terminal_opens_a_checkpoint_in_few_bits(bits):
    conversation = open_conversation(str(TINY_CHAT), "You are a helpful assistant.", bits=bits)
    assert conversation.model.lm_head.bits == bits and conversation.model.device.type == "cpu"
    assert in_bits(None) == {"device_map": "auto"} and in_bits(None, cpu_only=True) == {"device_map": "cpu"}


def test_other_bits_are_no_option(capsys):
    assert parse_arguments(["--bits", "4"]).bits == 4 and parse_arguments([]).bits is None
    with pytest.raises(SystemExit):
        parse_arguments(["--bits", "3"])
    assert "invalid choice: 3" in capsys.readouterr().err
