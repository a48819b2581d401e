"""Checkpoints as people have them: which format a folder or file is in, and whether all its parts agree."""

import json
import shutil
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from qwen1 import QWenConfig, QWenLMHeadModel
from qwen1.conversion.errors import CheckpointError
from qwen1.conversion.formats.kinds import Kind, detect_kind
from qwen1.conversion.formats.llama_original import embedding_split
from qwen1.conversion.formats.names import hf_shapes
from qwen1.conversion.formats.qwen import as_qwen, hf_to_qwen, qwen_config
from qwen1.conversion.formats.recipes import compose, convert_tensors
from qwen1.conversion.formats.registry import FORMATS
from qwen1.conversion.opening.sources import open_source, read_source_config

CHECKPOINTS = {
    "model/aug_plain": Kind.QWEN_2023_08,
    "model/aug_ntk_logn": Kind.QWEN_2023_08,
    "model/dec_ntk_logn": Kind.QWEN_2023_12,
    "model/dec_cache_int8": Kind.QWEN_2023_12,
    "native/qwen2_gqa_tied": Kind.QWEN2,
    "native/qwen2_mha_untied": Kind.QWEN2,
    "native/llama_gqa": Kind.LLAMA,
    "llama_meta/mp1": Kind.LLAMA_ORIGINAL,
    "llama_meta/mp2": Kind.LLAMA_ORIGINAL,
}


@pytest.fixture
def editable(tmp_path, golden):
    """Copy a golden checkpoint: (name, edit of its tensors, **changes of its configuration) -> folder."""

    def copy(name, edit=None, **changes):
        folder = tmp_path / name.replace("/", "-")
        shutil.copytree(golden / name, folder)
        config = folder / ("params.json" if name.startswith("llama_meta") else "config.json")
        config.write_text(json.dumps(json.loads(config.read_text()) | changes))
        if edit is not None:
            path = next(iter(sorted([*folder.glob("model.safetensors"), *folder.glob("consolidated.*.pth")])))
            pickled = path.suffix == ".pth"
            tensors = dict(torch.load(path, weights_only=True) if pickled else load_file(path))
            edit(tensors)
            path.unlink()
            torch.save(tensors, path) if pickled else save_file(tensors, path)
        return folder

    return copy


@pytest.fixture
def training(golden):
    """State dict and settings of a small LLaMA training."""
    folder = golden / "llama_meta" / "mp1"
    state = torch.load(folder / "consolidated.00.pth", weights_only=True)
    params = json.loads((folder / "params.json").read_text())
    return dict(state), {**params, "max_seq_len": 256, "dropout": 0.0}


def refusal(path, params=None):
    """What opening or checking a checkpoint complains of."""
    with pytest.raises(CheckpointError) as error:
        open_source(path, params).check()
    return str(error.value)


def as_qwen_model(source):
    architecture = source.architecture
    recipes = compose(source.to_hf(), hf_to_qwen(architecture, source.dtype))
    tensors = {name: source.weights.read(name).clone() for name in source.weights.infos}
    state = convert_tensors(recipes, tensors)
    config = QWenConfig.from_dict({**qwen_config(as_qwen(architecture)), "use_flash_attn": False})
    config._attn_implementation = "eager"
    model = QWenLMHeadModel(config).eval()
    model.load_state_dict({"lm_head.weight": state["transformer.wte.weight"], **state})
    return model


def golden_logits_agree(source, golden):
    expected = load_file(golden / "llama_meta" / "expected.safetensors")
    with torch.no_grad():
        torch.testing.assert_close(as_qwen_model(source)(expected["ids"]).logits, expected["logits"], atol=5e-5, rtol=0)


# --- formats ---


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_golden_checkpoints_are_recognised_and_fit(golden, name):
    source = open_source(golden / name)
    assert source.kind is CHECKPOINTS[name] and source.folder == source.path == golden / name
    source.check()
    assert source.dtype == torch.float32
    tensors = {name: source.weights.read(name) for name in source.weights.infos}
    result = {name: tuple(tensor.shape) for name, tensor in convert_tensors(source.to_hf(), tensors).items()}
    assert result == hf_shapes(source.architecture)


@pytest.mark.parametrize("name, kind", [("2023-08-chat", Kind.QWEN_2023_08), ("2023-12-base", Kind.QWEN_2023_12)])
def test_published_configurations_are_recognised(golden, name, kind):
    config = json.loads((golden / "published_configs" / f"{name}.config.json").read_text())
    assert detect_kind(config) is kind and kind.is_qwen
    assert detect_kind(QWenConfig.from_dict(config).to_dict()) is Kind.QWEN


def test_a_checkpoint_of_this_repository_is_recognised_and_fits(checkpoint_folder):
    source = open_source(checkpoint_folder)
    assert source.kind is Kind.QWEN
    source.check()


@pytest.mark.parametrize("shard_size", ["20KB", "5GB"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "config_class, model_class, kind",
    [(Qwen2Config, Qwen2ForCausalLM, Kind.QWEN2), (LlamaConfig, LlamaForCausalLM, Kind.LLAMA)],
)
def test_what_transformers_saves_is_recognised_and_fits(tmp_path, config_class, model_class, kind, tied, shard_size):
    config = config_class(
        vocab_size=320,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=172,
        tie_word_embeddings=tied,
    )
    model = model_class(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    source = open_source(tmp_path)
    assert source.kind is kind and source.dtype == torch.bfloat16
    assert (len(source.weights.files) > 1) == (shard_size == "20KB")
    source.check()
    for name, parameter in model.named_parameters():
        assert torch.equal(source.weights.read(name), parameter)


@pytest.mark.parametrize("auto_map", [None, 5, [], {}, {"AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel"}])
def test_only_this_repository_names_a_plain_auto_model(auto_map):
    assert detect_kind({"model_type": "qwen", "n_embd": 64, "auto_map": auto_map}) is Kind.QWEN_2023_08


@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe", "gpt2", None])
def test_other_formats_are_refused_by_name(tmp_path, model_type):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    assert f"model_type={model_type!r}" in refusal(tmp_path)


def test_a_folder_without_configuration_is_none(tmp_path, golden):
    assert read_source_config(tmp_path) is None
    assert read_source_config(golden / "llama_meta" / "mp1")[0] is Kind.LLAMA_ORIGINAL


def test_a_path_where_nothing_is(tmp_path):
    assert f"{tmp_path / 'nowhere'} doesn't exist" in refusal(tmp_path / "nowhere")
    assert str(tmp_path) in refusal(tmp_path)


@pytest.mark.parametrize("name", ["native/llama_gqa", "llama_meta/mp1"])
def test_a_damaged_configuration_is_named(editable, name):
    folder = editable(name)
    path = next(path for path in (folder / "config.json", folder / "params.json") if path.is_file())
    path.write_text(path.read_text()[:-10])
    assert str(path) in refusal(folder)


def test_an_upgrade_that_was_interrupted_is_told(editable):
    folder = editable("model/aug_plain")
    (folder / ".upgrade.partial").mkdir()
    (folder / ".upgrade.partial" / "moves.json").write_text("{}")
    assert "run upgrade --in-place again" in refusal(folder)


# --- LLaMA in the original format ---


@pytest.mark.parametrize("name", ["mp1", "mp2"])
def test_the_original_format_gives_its_golden_logits(golden, name):
    golden_logits_agree(open_source(golden / "llama_meta" / name), golden)


def test_an_embedding_that_is_split_by_rows_gives_the_same_logits(tmp_path, golden):
    """As later files of the format have it."""
    shutil.copytree(golden / "llama_meta" / "mp2", tmp_path / "mp2")
    whole = torch.load(golden / "llama_meta" / "mp1" / "consolidated.00.pth", weights_only=True)
    for number, rows in enumerate(whole["tok_embeddings.weight"].chunk(2)):
        path = tmp_path / "mp2" / f"consolidated.{number:02d}.pth"
        state = torch.load(path, weights_only=True)
        torch.save({**state, "tok_embeddings.weight": rows.clone()}, path)
    source = open_source(tmp_path / "mp2")
    assert embedding_split(source.architecture, source.weights.infos) == 0
    source.check()
    golden_logits_agree(source, golden)


@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_a_training_checkpoint_with_settings_needs_nothing_else(tmp_path, golden, training, prefix):
    """As llama2.c writes them."""
    state, params = training
    content = {
        "model": {prefix + name: tensor for name, tensor in state.items()},
        "optimizer": {"state": {0: {"step": torch.tensor(7.0)}}, "param_groups": [{"lr": 5e-4, "betas": (0.9, 0.95)}]},
        "model_args": params,
        "iter_num": 7,
        "best_val_loss": torch.tensor(1.5),
        "config": {"dtype": "bfloat16"},
    }
    torch.save(content, tmp_path / "ckpt.pt")
    source = open_source(tmp_path / "ckpt.pt")
    assert (source.kind, source.architecture.length, source.folder) == (Kind.LLAMA_ORIGINAL, 256, tmp_path)
    source.check()
    golden_logits_agree(source, golden)


@pytest.mark.parametrize("beside", [True, False])
def test_a_bare_state_dict_takes_its_settings_from_params(tmp_path, golden, training, beside):
    """As minimind writes them."""
    state, params = training
    torch.save(OrderedDict(state), tmp_path / "full_sft_512.pth")
    place = tmp_path / ("params.json" if beside else "settings.json")
    place.write_text(json.dumps(params))
    source = open_source(tmp_path / "full_sft_512.pth", None if beside else place)
    source.check()
    golden_logits_agree(source, golden)


def test_named_params_come_before_those_in_the_file(tmp_path, training):
    state, params = training
    torch.save({"model": state, "model_args": params}, tmp_path / "ckpt.pt")
    (tmp_path / "other.json").write_text(json.dumps({**params, "max_seq_len": 99}))
    assert open_source(tmp_path / "ckpt.pt", tmp_path / "other.json").architecture.length == 99


def test_without_settings_the_remedy_is_told(tmp_path, training):
    torch.save(training[0], tmp_path / "a.pth")
    message = refusal(tmp_path / "a.pth")
    assert str(tmp_path / "params.json") in message and '"n_heads"' in message and "--params" in message


@pytest.mark.parametrize("order", ["embedding first", "head first"])
def test_a_shared_embedding_is_tied_in_any_order(tmp_path, training, order):
    state, params = training
    state["output.weight"] = state["tok_embeddings.weight"]
    if order == "head first":
        state = dict(reversed(state.items()))
    torch.save({"model": state, "model_args": params}, tmp_path / "ckpt.pt")
    source = open_source(tmp_path / "ckpt.pt")
    assert source.architecture.tied and "lm_head.weight" not in {recipe.name for recipe in source.to_hf()}
    source.check()
    model = as_qwen_model(source)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert torch.equal(model.lm_head.weight, state["tok_embeddings.weight"])


def test_a_head_that_is_equal_but_stored_on_its_own_stays_so(tmp_path, training):
    state, params = training
    state["output.weight"] = state["tok_embeddings.weight"].clone()
    torch.save({"model": state, "model_args": params}, tmp_path / "ckpt.pt")
    source = open_source(tmp_path / "ckpt.pt")
    source.check()
    assert not source.architecture.tied
    assert torch.equal(as_qwen_model(source).lm_head.weight, state["tok_embeddings.weight"])


def test_a_head_that_was_left_out_is_tied(tmp_path, training):
    state, params = training
    del state["output.weight"]
    torch.save({"model": state, "model_args": params}, tmp_path / "ckpt.pt")
    source = open_source(tmp_path / "ckpt.pt")
    source.check()
    assert source.architecture.tied


def test_one_of_two_model_parallel_files_does_not_pass_for_the_whole(editable):
    folder = editable("llama_meta/mp2")
    (folder / "consolidated.01.pth").unlink()
    assert "has shape" in refusal(folder)


def test_a_model_of_another_kind_is_no_llama(tmp_path, golden):
    shutil.copy(golden / "native" / "llama_gqa" / "model.safetensors", tmp_path)
    assert "config.json" in refusal(tmp_path)
    torch.save({"conv.weight": torch.ones(3)}, tmp_path / "a.pth")
    assert str(tmp_path / "a.pth") in refusal(tmp_path / "a.pth")


@pytest.mark.parametrize("shape", [(), (64,), (2, 3, 4)])
@pytest.mark.parametrize("name", ["tok_embeddings.weight", "layers.0.feed_forward.w1.weight"])
def test_weights_of_another_rank_are_named(editable, name, shape):
    folder = editable("llama_meta/mp1", lambda tensors: tensors.update({name: torch.ones(shape)}))
    assert repr(name) in refusal(folder)


@pytest.mark.parametrize(
    "changes, named", [({"use_scaled_rope": True}, "use_scaled_rope"), ({"n_heads": 3}, "n_heads=3")]
)
def test_params_that_cannot_be_represented_are_named(editable, changes, named):
    assert named in refusal(editable("llama_meta/mp1", **changes))


# --- what doesn't fit ---

FIRST = {
    "model/aug_plain": "transformer.h.0.ln_1.weight",
    "model/dec_ntk_logn": "transformer.h.0.attn.c_attn.bias",
    "native/qwen2_gqa_tied": "model.layers.1.self_attn.k_proj.bias",
    "native/llama_gqa": "model.layers.1.mlp.down_proj.weight",
    "llama_meta/mp1": "layers.1.attention.wo.weight",
    "llama_meta/mp2": "layers.0.feed_forward.w3.weight",
}


@pytest.mark.parametrize("name", FIRST)
def test_a_missing_tensor_is_named(editable, name):
    folder = editable(name, lambda tensors: tensors.pop(FIRST[name]))
    assert FIRST[name] in (message := refusal(folder)) and "is missing" in message


@pytest.mark.parametrize("name", FIRST)
def test_an_unknown_tensor_is_named_with_its_file(editable, name):
    folder = editable(name, lambda tensors: tensors.update({"extra.weight": torch.ones(2)}))
    assert "extra.weight" in (message := refusal(folder)) and "is not a weight" in message and str(folder) in message


@pytest.mark.parametrize("name", FIRST)
def test_a_wrong_shape_is_named_with_its_file(editable, name):
    folder = editable(name, lambda tensors: tensors.update({FIRST[name]: torch.ones(5)}))
    message = refusal(folder)
    assert FIRST[name] in message and "has shape (5,)" in message and str(folder) in message


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool])
@pytest.mark.parametrize("name", FIRST)
def test_weights_that_are_no_numbers_with_fractions_are_refused(editable, name, dtype):
    folder = editable(name, lambda tensors: tensors.update({FIRST[name]: tensors[FIRST[name]].to(dtype)}))
    assert FIRST[name] in (message := refusal(folder)) and str(dtype) in message


def test_complex_weights_are_refused_but_complex_tables_are_passed_over(editable):
    folder = editable("llama_meta/mp1", lambda tensors: tensors.update(freqs_cis=torch.ones(3, dtype=torch.complex64)))
    open_source(folder).check()
    name = FIRST["llama_meta/mp1"]
    shutil.rmtree(folder)
    folder = editable("llama_meta/mp1", lambda tensors: tensors.update({name: tensors[name].to(torch.complex64)}))
    assert name in (message := refusal(folder)) and "complex64" in message


@pytest.mark.parametrize("name", ["model/aug_plain", "native/qwen2_mha_untied"])
@pytest.mark.parametrize("layers", [1, 3])
def test_another_number_of_layers_is_noticed(editable, name, layers):
    key = "n_layer" if name.startswith("model") else "num_hidden_layers"
    folder = editable(name, **{key: layers, "layer_types": None})
    assert ("is missing" if layers == 3 else "is not a weight") in refusal(folder)


# --- tied heads that are stored all the same ---

TIED = {
    "model/aug_plain": ("transformer.wte.weight", "lm_head.weight"),
    "native/qwen2_gqa_tied": ("model.embed_tokens.weight", "lm_head.weight"),
    "native/llama_gqa": ("model.embed_tokens.weight", "lm_head.weight"),
}


@pytest.mark.parametrize("name", TIED)
def test_a_tied_head_may_be_stored_if_it_is_equal(editable, name):
    embedding, head = TIED[name]
    folder = editable(
        name, lambda tensors: tensors.update({head: tensors[embedding].clone()}), tie_word_embeddings=True
    )
    open_source(folder).check()


@pytest.mark.parametrize(
    "change",
    [
        lambda tensor: tensor + torch.eye(*tensor.shape) * 1e-3,
        lambda tensor: tensor[:-1].clone(),
        lambda tensor: tensor.half(),
        lambda tensor: torch.full_like(tensor, torch.nan),
    ],
    ids=["values", "shape", "dtype", "NaN"],
)
@pytest.mark.parametrize("name", TIED)
def test_a_tied_head_that_differs_is_named(editable, name, change):
    embedding, head = TIED[name]
    folder = editable(
        name, lambda tensors: tensors.update({head: change(tensors[embedding])}), tie_word_embeddings=True
    )
    message = refusal(folder)
    assert f"{head!r} in {folder / 'model.safetensors'} differs from {embedding!r}" in message


def test_a_tied_head_in_a_pickle_shares_memory(editable):
    folder = editable("model/aug_plain", tie_word_embeddings=True)
    state = dict(load_file(folder / "model.safetensors"))
    state["lm_head.weight"] = state["transformer.wte.weight"]
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    source = open_source(folder)
    source.check()
    assert source.weights.infos["lm_head.weight"].same_as or source.weights.infos["transformer.wte.weight"].same_as


def test_the_dtype_is_that_of_most_parameters(editable):
    def edit(tensors):
        for name, tensor in tensors.items():
            tensors[name] = tensor if "ln_" in name else tensor.bfloat16()

    assert open_source(editable("model/aug_plain", edit)).dtype == torch.bfloat16


def test_a_file_of_a_folder_with_a_configuration_is_no_checkpoint_by_itself(golden):
    folder = golden / "native" / "llama_gqa"
    with pytest.raises(CheckpointError, match=f"name its folder, {folder}"):
        open_source(folder / "model.safetensors")


def test_every_kind_has_its_line_in_the_table_of_formats():
    assert set(FORMATS) == set(Kind)
