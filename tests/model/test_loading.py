"""from_pretrained and save_pretrained: flags, published formats, code along, nothing lost."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import qwen1.loading_qwen as loading
from qwen1 import QWenConfig, QWenForSequenceClassification, QWenLMHeadModel, QWenModel
from qwen1.configuration_qwen import AUTO_MAP


@pytest.fixture
def folder(golden, tmp_path):
    """A golden checkpoint of 2023-12, whose configuration says nothing of precision."""
    shutil.copytree(golden / "model" / "dec_ntk_logn", tmp_path / "checkpoint")
    change(tmp_path / "checkpoint", fp32=False)
    return tmp_path / "checkpoint"


def change(folder, **values):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.fixture
def machine(monkeypatch):
    """Pretend to have a CUDA device and flash-attn, or not."""

    def pretend(cuda, flash_attn):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        monkeypatch.setattr(loading, "is_flash_attn_2_available", lambda: flash_attn)

    return pretend


def load(folder, **kwargs):
    return QWenLMHeadModel.from_pretrained(folder, **kwargs)


def test_golden_folders_load_completely(golden):
    for case in (golden / "model").iterdir():
        _, report = load(case, output_loading_info=True)
        assert not any(report.values()), (case.name, report)


@pytest.mark.parametrize(
    ("flag", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)]
)
@pytest.mark.no_cover
def test_precision_flags(folder, flag, dtype):
    assert load(folder, **{flag: True}).dtype == dtype
    assert AutoModelForCausalLM.from_pretrained(folder, **{flag: True}).dtype == dtype
    config = QWenConfig.from_pretrained(folder)
    assert load(folder, config=config, **{flag: True}).dtype == dtype
    assert not getattr(config, flag)  # the caller's own is left alone
    change(folder, **{flag: True})
    assert load(folder).dtype == dtype


@pytest.mark.parametrize("cls", [QWenLMHeadModel, AutoModelForCausalLM], ids=lambda cls: cls.__name__)
def test_every_argument_of_2023_is_taken(folder, cls):
    """Both constructors' parameters and the keys of their files, which programs gave to `from_pretrained`."""
    arguments = {
        **{"use_cache_quantization": True, "use_cache_kernel": True, "use_flash_attn": False},
        **{"use_dynamic_ntk": True, "use_logn_attn": False, "softmax_in_fp32": True, "fp32": True, "bf16": False},
        **{"fp16": False, "scale_attn_weights": True, "use_cache": True, "no_bias": True, "rotary_pct": 1.0},
        **{"emb_dropout_prob": 0.1, "attn_pdrop": 0.2, "resid_pdrop": 0.1, "n_inner": None, "initializer_range": 0.5},
        **{"seq_length": 50, "max_position_embeddings": 99, "layer_norm_epsilon": 1e-5, "rotary_emb_base": 10000},
        **{"onnx_safe": None, "pos_emb": "rotary", "activation": "swiglu", "bias_dropout_fusion": True},
        **{"params_dtype": "torch.bfloat16", "tokenizer_type": "QWenTokenizer", "tie_word_embeddings": False},
        **{"apply_residual_connection_post_layernorm": False, "padded_vocab_size": None},
    }
    model = cls.from_pretrained(folder, **arguments)
    assert {name: getattr(model.config, name) for name in arguments} == arguments
    assert model.dtype == torch.float32
    with pytest.raises(TypeError, match="use_cash"):
        cls.from_pretrained(folder, use_cash=True)


def test_an_explicit_dtype_wins(folder):
    change(folder, bf16=True)
    assert load(folder, dtype=torch.float16).dtype == torch.float16
    assert load(folder, dtype="float32", bf16=True).dtype == torch.float32
    assert load(folder, dtype="auto").dtype == torch.float32


def test_contradicting_flags_are_an_error(folder):
    for load_it in (load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(ValueError, match="bf16=True and fp16=True"):
            load_it(folder, bf16=True, fp16=True)
    change(folder, fp32=True, fp16=True)
    with pytest.raises(ValueError, match="fp16=True and fp32=True"):
        load(folder)


@pytest.mark.parametrize("load_it", [load, AutoModelForCausalLM.from_pretrained])
def test_an_argument_wins_over_the_flag_in_the_file(folder, load_it):
    change(folder, fp32=True)
    model = load_it(folder, bf16=True)
    assert model.dtype == torch.bfloat16
    assert (model.config.bf16, model.config.fp32) == (True, False)
    config = QWenConfig.from_pretrained(folder)
    assert load_it(folder, config=config, fp16=True).dtype == torch.float16


def test_saved_flags_are_those_of_the_weights(folder, tmp_path):
    load(folder, bf16=True).float().save_pretrained(tmp_path / "float")
    assert load(tmp_path / "float").dtype == torch.float32
    load(tmp_path / "float", bf16=True).save_pretrained(tmp_path / "half")
    assert load(tmp_path / "half").dtype == torch.bfloat16
    assert load(tmp_path / "half", fp32=True).dtype == torch.float32


@pytest.mark.parametrize("dtype_in_the_file", [True, False])
@pytest.mark.parametrize(
    ("flag", "half", "cuda", "flash_attn", "chosen"),
    [
        (False, True, True, True, None),
        (None, True, True, True, None),
        ("auto", True, True, True, "flash_attention_2"),
        ("auto", True, True, False, None),
        ("auto", False, True, True, None),
        ("auto", True, False, False, None),
        (True, True, True, True, "flash_attention_2"),
        (True, True, True, False, "qwen_varlen"),
        (True, False, True, True, None),
        (True, True, False, False, None),
    ],
)
def test_use_flash_attn(folder, machine, monkeypatch, flag, half, cuda, flash_attn, chosen, dtype_in_the_file):
    """The published files name no dtype: it is that of the weights."""
    model = load(folder, dtype=torch.bfloat16 if half else torch.float32)
    model.save_pretrained(folder)
    change(folder, use_flash_attn=flag)
    if not dtype_in_the_file:
        change(folder, dtype=None)
    machine(cuda, flash_attn)
    switched = []
    monkeypatch.setattr(QWenLMHeadModel, "set_attn_implementation", lambda model, name: switched.append(name))
    assert load(folder).config._attn_implementation == "sdpa"
    assert switched == ([chosen] if chosen else [])
    load(folder, attn_implementation="eager")
    assert len(switched) == (1 if chosen else 0)


def test_use_flash_attn_reaches_the_model(folder, machine):
    machine(cuda=True, flash_attn=False)
    assert load(folder, bf16=True, use_flash_attn=True).config._attn_implementation == "qwen_varlen"
    model, _ = load(folder, bf16=True, use_flash_attn=True, output_loading_info=True)
    assert model.config._attn_implementation == "qwen_varlen"
    assert load(folder, use_flash_attn=True).config._attn_implementation == "sdpa"
    explicit = load(folder, bf16=True, use_flash_attn=True, attn_implementation="eager")
    assert explicit.config._attn_implementation == "eager"
    config = QWenConfig.from_pretrained(folder, attn_implementation="eager", use_flash_attn=True)
    assert load(folder, config=config, bf16=True).config._attn_implementation == "eager"


def test_use_flash_attn_in_vain_is_said_once(folder, machine, caplog):
    machine(cuda=False, flash_attn=False)
    loading.logger.warning_once.cache_clear()
    for _ in range(2):
        load(folder, use_flash_attn=True, bf16=True)
    assert len([r for r in caplog.records if "use_flash_attn=True needs a CUDA device" in r.message]) == 1


def test_softmax_in_fp32_chooses_eager(folder, monkeypatch):
    model = load(folder, softmax_in_fp32=True)
    assert model.config._attn_implementation == "eager"
    attention, called = model.transformer.h[0].attn, []
    documented = attention._upcast_and_reordered_attn
    monkeypatch.setattr(attention, "_upcast_and_reordered_attn", lambda *a: called.append(1) or documented(*a))
    model(torch.arange(4)[None])
    assert called


def test_softmax_in_fp32_holds_however_the_model_is_made(tiny_config, caplog):
    config = tiny_config(softmax_in_fp32=True)
    for model in (QWenLMHeadModel(config), AutoModelForCausalLM.from_config(config), QWenModel(config)):
        assert model.config._attn_implementation == "eager"
    loading.logger.warning_once.cache_clear()
    config = tiny_config(softmax_in_fp32=True, attn_implementation="sdpa")
    assert QWenLMHeadModel(config).config._attn_implementation == "sdpa"
    assert "softmax_in_fp32=True has no effect" in caplog.text


def test_a_configuration_changed_since_is_checked(tiny_config):
    config = tiny_config()
    config.num_key_value_heads = 3
    with pytest.raises(ValueError, match="num_key_value_heads=3"):
        QWenLMHeadModel(config)


def test_arguments_of_the_hub_reach_the_configuration(folder):
    (folder / "inner").mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).rename(folder / "inner" / name)
    assert load(folder, subfolder="inner", bf16=True).dtype == torch.bfloat16


def test_padded_vocabulary(tmp_path):
    config = dict(n_embd=64, n_layer=1, n_head=4, kv_channels=16, ffn_hidden_size=96, use_flash_attn=False)
    QWenLMHeadModel(QWenConfig(vocab_size=300, padded_vocab_size=320, **config)).save_pretrained(tmp_path)
    model = load(tmp_path)
    assert (model.config.vocab_size, model.lm_head.weight.shape[0]) == (300, 320)
    model.resize_token_embeddings(310)
    model.save_pretrained(tmp_path)
    assert load(tmp_path).lm_head.weight.shape[0] == 310


@pytest.mark.parametrize("cls", [QWenModel, QWenForSequenceClassification])
def test_other_classes_load_the_language_model(folder, cls):
    """The model without a head reports it, as those of transformers do: vLLM drops what that class ignores."""
    model, report = cls.from_pretrained(folder, output_loading_info=True)
    assert set(report["unexpected_keys"]) == ({"lm_head.weight"} if cls is QWenModel else set())
    assert set(report["missing_keys"]) == (set() if cls is QWenModel else {"score.weight"})
    base = model if cls is QWenModel else model.transformer
    assert torch.equal(base.wte.weight, load(folder).transformer.wte.weight)


def test_weights_that_come_without_a_folder(tiny_model):
    """As transformers' own tests load models."""
    model = tiny_model()
    weights = model.state_dict()
    loaded = QWenLMHeadModel.from_pretrained(None, config=model.config, state_dict=weights)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in loaded.state_dict().items())


def test_leftovers_of_early_releases_are_ignored(folder):
    state = load_file(folder / "model.safetensors")
    state["transformer.h.0.attn.rotary_emb.inv_freq"] = torch.ones(8)
    state["transformer.h.1.attn.bias"] = torch.ones(1, 1, 4, 4)
    state["transformer.h.1.attn.masked_bias"] = torch.tensor(-1e4)
    torch.save(state, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    _, report = load(folder, output_loading_info=True)
    assert not any(report.values())


def test_save_load_and_save_again(folder, code_of, tmp_path):
    first = load(folder)
    first.save_pretrained(tmp_path / "1", max_shard_size="100KB")
    assert len(list((tmp_path / "1").glob("*.safetensors"))) > 1
    second = load(tmp_path / "1")
    second.save_pretrained(tmp_path / "2")
    third = load(tmp_path / "2")
    original = load_file(folder / "model.safetensors")
    for model in (second, third):
        assert model.state_dict().keys() == original.keys()
        assert all(torch.equal(tensor, original[name]) for name, tensor in model.state_dict().items())
        tensors = [*model.parameters(), *model.buffers()]
        assert all(tensor.device.type != "meta" for tensor in tensors)
    for saved in ("1", "2"):
        assert {path.name for path in code_of("modeling_qwen")} <= {file.name for file in (tmp_path / saved).iterdir()}
        config = json.loads((tmp_path / saved / "config.json").read_text())
        assert config["auto_map"] == AUTO_MAP
        assert config["architectures"] == ["QWenLMHeadModel"]


def test_tied_embeddings_are_stored_once(tiny_model, tmp_path):
    model = tiny_model(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    loaded = load(tmp_path)
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


def test_nothing_computed_in_a_constructor_is_lost_on_meta(folder):
    """A model loaded through the meta device gives the logits of one that was built in memory."""
    loaded = load(folder, attn_implementation="eager").eval()
    built = QWenLMHeadModel(QWenConfig.from_pretrained(folder, attn_implementation="eager")).eval()
    built.load_state_dict(load_file(folder / "model.safetensors"))
    ids = torch.arange(50)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, built(ids).logits)


@pytest.mark.parametrize("offloaded", ["transformer.h.1", "transformer.wte"])
def test_offloaded_to_disk(folder, tmp_path, offloaded):
    device_map = dict.fromkeys(["transformer.wte", "transformer.h.0", "transformer.h.1", "transformer.ln_f"], "cpu")
    device_map |= {"transformer.rotary_emb": "cpu", "transformer.drop": "cpu", "lm_head": "cpu", offloaded: "disk"}
    model = load(folder, device_map=device_map, offload_folder=tmp_path / "offload")
    ids = torch.arange(50)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, load(folder)(ids).logits)
    settings = dict(max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert model.generate(ids, **settings).tolist() == load(folder).generate(ids, **settings).tolist()


@pytest.mark.parametrize("given", ["in the file", "as an argument"])
@pytest.mark.parametrize(
    ("quantization", "packages"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "gptqmodel and optimum"),
        ({"quant_method": "awq", "bits": 4, "group_size": 128}, "gptqmodel and accelerate"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes and accelerate"),
    ],
    ids=["gptq", "awq", "bitsandbytes"],
)
def test_missing_packages_of_a_quantisation_are_named(folder, monkeypatch, quantization, packages, given):
    """And not the GPU that transformers asks for first."""
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: None)
    arguments = {"quantization_config": quantization}
    if given == "in the file":
        change(folder, **arguments)
        arguments = {"device_map": "cuda"}  # on a processor some are read without packages
    for cls in (QWenLMHeadModel, AutoModelForCausalLM):
        with pytest.raises(ImportError, match=rf"needs {packages}; .*pip install {packages.replace(' and ', ' ')}\)"):
            cls.from_pretrained(folder, **arguments)
