"""`inspect`: what a checkpoint is, what it needs, what is wrong or odd, and nothing that makes it stop."""

import hashlib
import json
import os
import shutil
from io import StringIO

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from qwen1 import QWenInt8Cache
from qwen1.conversion.errors import CheckpointError
from qwen1.conversion.files.weights import Weights
from qwen1.conversion.formats import lenient
from qwen1.conversion.formats.qwen import read_qwen
from qwen1.conversion.inspecting.inspection import inspect
from qwen1.conversion.inspecting.memory import int8_cache_per_token, memory_needs
from qwen1.conversion.inspecting.rendering import render
from qwen1.conversion.inspecting.words import size_text

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
BLOCK = "transformer.h.1.attn.c_attn.weight"


def change(file, *without, **values):
    content = json.loads(file.read_text()) if file.is_file() else {}
    content = {name: value for name, value in {**content, **values}.items() if name not in without}
    file.write_text(json.dumps(content))


def change_weights(folder, change_them, name="model.safetensors"):
    tensors = load_file(folder / name)
    change_them(tensors)
    save_file(tensors, folder / name)


def shard(folder, suffix="safetensors"):
    """Cut the weights into three files; gives the names of the tensors in each."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    names = [sorted(tensors)[start::3] for start in range(3)]
    places = {}
    for number, part in enumerate(names, start=1):
        file = f"{stem}-{number:05d}-of-00003.{suffix}"
        held = {name: tensors[name] for name in part}
        save_file(held, folder / file) if suffix == "safetensors" else torch.save(held, folder / file)
        places |= dict.fromkeys(part, file)
    size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": places}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    return names


@pytest.fixture
def folder(golden, tmp_path):
    """A 2023-08 checkpoint without remarks but those on files that it lacks."""
    shutil.copytree(golden / "model" / "aug_plain", tmp_path / "aug", copy_function=shutil.copyfile)
    (tmp_path / "aug" / "expected.safetensors").unlink()
    return tmp_path / "aug"


@pytest.fixture
def hf_folder(golden, tmp_path):
    shutil.copytree(golden / "native" / "llama_gqa", tmp_path / "llama", copy_function=shutil.copyfile)
    return tmp_path / "llama"


@pytest.fixture
def meta_folder(golden, tmp_path):
    shutil.copytree(golden / "llama_meta" / "mp2", tmp_path / "meta", copy_function=shutil.copyfile)
    return tmp_path / "meta"


def problem(path, **options):
    """The only problem of a checkpoint."""
    (only,) = inspect(path, **options).problems
    return only


def remark(path, *words):
    """The only remark with these words, of a checkpoint without problems."""
    report = inspect(path)
    assert not report.problems
    (only,) = [text for text in report.remarks if all(word in text for word in words)]
    return only


# --- what it is ---


@pytest.mark.parametrize(
    ("case", "kind"),
    [
        ("model/aug_plain", "qwen-2023-08"),
        ("model/aug_residual_post_ln", "qwen-2023-08"),
        ("model/dec_ntk_logn", "qwen-2023-12"),
        ("native/qwen2_gqa_tied", "qwen2"),
        ("native/qwen2_mha_untied", "qwen2"),
        ("native/llama_gqa", "llama"),
        ("llama_meta/mp1", "llama-original"),
        ("llama_meta/mp2", "llama-original"),
    ],
)
def test_golden_checkpoints_are_recognised_and_sound(golden, case, kind):
    report = inspect(golden / case, scan=True)
    assert report.kind == kind
    assert report.problems == []
    assert list(report.dtypes) == ["float32"]


def test_a_folder_of_this_repository_has_nothing_odd_but_ntk(checkpoint_folder):
    change(checkpoint_folder / "generation_config.json", eos_token_id=[258, 256])
    report = inspect(checkpoint_folder, scan=True)
    assert (report.kind, report.problems, len(report.remarks)) == ("qwen", [], 1)
    assert "NTK and LogN are on" in report.remarks[0]
    assert report.tokenizer == ["qwen.tiktoken", "tokenizer_config.json", "chat_template.jinja"]


def test_architecture(golden):
    mp1, mp2 = (inspect(golden / "llama_meta" / name).architecture for name in ("mp1", "mp2"))
    assert mp1 == mp2
    expected = dict(layers=2, width=64, heads=4, kv_heads=2, head_dim=16, mlp=192, rows=320, rope_theta=10000.0)
    assert {name: mp1[name] for name in expected} == expected
    tied = inspect(golden / "native" / "qwen2_gqa_tied").architecture
    assert (tied["tied"], tied["rope_theta"], tied["length"], tied["kv_heads"]) == (True, 1e6, 256, 2)
    stretched = inspect(golden / "model" / "aug_ntk_logn").architecture
    assert (stretched["ntk"], stretched["logn"], stretched["length"]) == (True, True, 32)


def test_parameters_are_those_of_the_model(golden, golden_model):
    model = golden_model("aug_plain")
    report = inspect(golden / "model" / "aug_plain")
    assert report.parameters["total"] == model.num_parameters() == sum(report.dtypes.values())
    assert report.parameters["without_embeddings"] == model.num_parameters() - 2 * 320 * 64
    assert report.weights_bytes == 4 * model.num_parameters()


def test_parameters_count_shared_and_repeated_tensors_once(golden):
    mp1, mp2 = (inspect(golden / "llama_meta" / name) for name in ("mp1", "mp2"))
    assert mp1.parameters == mp2.parameters and mp1.dtypes == mp2.dtypes
    assert sum(mp1.dtypes.values()) == mp1.parameters["total"]
    tied = inspect(golden / "native" / "qwen2_gqa_tied").parameters
    assert tied["total"] - tied["without_embeddings"] == 320 * 64


def test_files(folder):
    names = shard(folder)
    files = inspect(folder).files
    assert [file.tensors for file in files] == [len(part) for part in names]
    assert [file.bytes for file in files] == [(folder / file.name).stat().st_size for file in files]


def test_a_training_checkpoint_in_one_file(golden, tmp_path):
    tensors = torch.load(golden / "llama_meta" / "mp1" / "consolidated.00.pth", weights_only=True)
    arguments = json.loads((golden / "llama_meta" / "mp1" / "params.json").read_text())
    torch.save({"model": tensors, "model_args": arguments, "iter_num": 3}, tmp_path / "ckpt.pt")
    report = inspect(tmp_path / "ckpt.pt", scan=True)
    assert (report.kind, report.problems) == ("llama-original", [])
    assert report.architecture["kv_heads"] == 2


@pytest.mark.parametrize(
    "names", [("tok_embeddings.weight", "output.weight"), ("output.weight", "tok_embeddings.weight")]
)
def test_a_tied_head_in_the_same_memory(golden, tmp_path, names):
    tensors = torch.load(golden / "llama_meta" / "mp1" / "consolidated.00.pth", weights_only=True)
    embedding = tensors["tok_embeddings.weight"]
    tensors = dict.fromkeys(names, embedding) | {name: value for name, value in tensors.items() if name not in names}
    torch.save(tensors, tmp_path / "consolidated.00.pth")
    shutil.copyfile(golden / "llama_meta" / "mp1" / "params.json", tmp_path / "params.json")
    report = inspect(tmp_path, scan=True)
    assert report.problems == [] and report.architecture["tied"]
    assert sum(report.dtypes.values()) == report.parameters["total"] == 139_584 - 320 * 64
    assert not any("tie_word_embeddings" in text for text in report.remarks)


def test_llama_parameters_that_cannot_be_converted(meta_folder):
    change(meta_folder / "params.json", use_scaled_rope=True)
    assert "use_scaled_rope=True" in remark(meta_folder, "Can't be converted to QWen")
    assert inspect(meta_folder).architecture["mlp"] == 192


def test_params_from_elsewhere(meta_folder, tmp_path):
    (meta_folder / "params.json").rename(tmp_path / "other.json")
    assert "params.json doesn't exist" in problem(meta_folder)
    report = inspect(meta_folder, params=tmp_path / "other.json")
    assert report.problems == [] and report.architecture["heads"] == 4


def test_a_model_that_cannot_be_converted_is_described_all_the_same(hf_folder):
    rope = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, rope_theta=500000.0)
    rope["original_max_position_embeddings"] = 64
    change(hf_folder / "config.json", rope_parameters=rope)
    assert "llama3" in remark(hf_folder, "Can't be converted to QWen")
    architecture = inspect(hf_folder).architecture
    assert (architecture["rope_theta"], architecture["length"]) == (500000.0, 256)


def test_an_adapter(tmp_path):
    change(tmp_path / "adapter_config.json", peft_type="LORA", base_model_name_or_path="Qwen/Qwen-7B")
    save_file({"lora_A.weight": torch.zeros(2, 3)}, tmp_path / "adapter_model.safetensors")
    report = inspect(tmp_path)
    assert (report.kind, report.problems, report.parameters["total"]) == ("adapter", [], 6)
    assert "'Qwen/Qwen-7B'" in report.remarks[0] and "merge-lora" in report.remarks[0]
    (tmp_path / "adapter_model.safetensors").unlink()
    assert "No weights" in problem(tmp_path)


def test_nothing_there_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="no-such-folder doesn't exist"):
        inspect(tmp_path / "no-such-folder")


# --- memory ---


def test_memory_of_the_published_7b(golden):
    config = json.loads((golden / "published_configs" / "2023-08-chat.config.json").read_text())
    needs = memory_needs(read_qwen(config), fused=True)
    assert needs["bfloat16"] == needs["float16"]
    assert needs["bfloat16"].weights == 15_442_649_088  # total_size in the published index
    assert needs["bfloat16"].cache_per_token == 2**19
    assert needs["bfloat16"].total == 15_442_649_088 + 2048 * 2**19
    assert needs["float32"].weights == 2 * 15_442_649_088


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_is_what_a_model_takes(tiny_model, dtype):
    model = tiny_model(num_key_value_heads=2).to(dtype)
    need = memory_needs(read_qwen(model.config.to_dict()), fused=True)[str(dtype).removeprefix("torch.")]
    assert need.weights == sum(weight.nbytes for weight in model.parameters())
    cache = model(torch.arange(5)[None], use_cache=True).past_key_values
    assert 5 * need.cache_per_token == sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert need.total == need.weights + 32 * need.cache_per_token


def test_memory_of_the_int8_cache_is_what_it_takes(tiny_model):
    model = tiny_model(use_cache_quantization=True)
    cache = model(torch.arange(5)[None], use_cache=True).past_key_values
    assert isinstance(cache, QWenInt8Cache)
    taken = sum(getattr(layer, name).nbytes for layer in cache.layers for name in layer._STORED)
    assert 5 * int8_cache_per_token(read_qwen(model.config.to_dict())) == taken


def test_memory_of_quantised_weights(golden):
    architecture = read_qwen(json.loads((golden / "model" / "aug_plain" / "config.json").read_text()))
    needs = memory_needs(architecture, fused=True)
    linear = [(192, 64), (64, 64), (172, 64), (172, 64), (64, 172)] * 2  # two blocks
    values = sum(rows * columns for rows, columns in linear)
    others = 2 * (140_480 - values)
    assert needs["int8"].weights == others + values + 4 * sum(rows for rows, _ in linear)
    assert needs["int4"].weights == others + values // 2 + 4 * (values // 64)
    assert needs["int4"].cache_per_token == needs["bfloat16"].cache_per_token


# --- problems: configuration ---


def test_damaged_and_missing_configurations(folder):
    (folder / "config.json").write_text('{"model_type": "qw')
    assert "config.json is truncated or damaged" in problem(folder)
    (folder / "config.json").unlink()
    assert problem(folder).startswith("config.json is missing")
    report = inspect(folder)
    assert (report.kind, report.parameters["total"], report.weights_bytes) == (None, 140_480, 561_920)


def test_other_model_types_are_named(folder):
    change(folder / "config.json", model_type="mixtral")
    assert "'mixtral' (a mixture of experts)" in problem(folder)


def test_what_no_reader_expects_is_a_problem_too(folder, monkeypatch):
    def read(config):
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr(lenient, "read_qwen", read)
    assert problem(folder) == "Something can't be read: by zero (ZeroDivisionError)."


def test_contradicting_spellings(folder):
    change(folder / "config.json", num_hidden_layers=3)
    assert "n_layer=2 and num_hidden_layers=3" in problem(folder)


def test_a_file_of_a_folder(folder):
    assert "inspect its folder" in problem(folder / "model.safetensors")


# --- problems: files ---


def test_no_weights(folder):
    (folder / "model.safetensors").unlink()
    assert "No weights" in problem(folder)


def test_missing_shards_don_t_count_as_missing_tensors(folder):
    names = shard(folder)
    for number in (1, 3):
        (folder / f"model-{number:05d}-of-00003.safetensors").unlink()
    text = problem(folder)
    assert "2 of 3 files" in text and "model-00001-of-00003.safetensors, model-00003-of-00003.safetensors" in text
    missing, there, _ = inspect(folder).files
    assert (missing.bytes, missing.tensors, there.tensors) == (None, None, len(names[1]))


def test_all_problems_are_found_at_once(folder):
    names = shard(folder)
    (folder / "model-00001-of-00003.safetensors").unlink()
    second = folder / "model-00002-of-00003.safetensors"
    os.truncate(second, second.stat().st_size - 8)
    change_weights(folder, lambda tensors: tensors.pop(names[2][0]), "model-00003-of-00003.safetensors")
    (folder / "generation_config.json").write_text("{")
    (folder / "tokenizer_config.json").write_text("")
    (folder / "qwen.tiktoken").write_text("!!!! 0\n")
    texts = inspect(folder).problems
    assert len(texts) == 6
    for words in (
        "1 of 3 files with weights is missing",
        "model-00002-of-00003.safetensors is truncated",
        f"not in the file that the index names: {names[2][0]!r}",
        "generation_config.json is truncated or damaged",
        "tokenizer_config.json is truncated or damaged",
        "qwen.tiktoken, line 1",
    ):
        assert sum(words in text for text in texts) == 1, words


@pytest.mark.parametrize("name, content", [("notes.txt", b"root:x:0"), ("passwd", b""), ("page", b"<html>")])
def test_a_file_that_is_no_checkpoint(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert (
        problem(tmp_path / name)
        == f"{tmp_path / name} is no checkpoint, and no file of one: name the folder of a model."
    )


@pytest.mark.parametrize("name, content", [("model.pth", b"cut"), ("model", b"PK\3\4cut"), ("model", b"\x80\2cut")])
def test_a_file_that_may_be_one(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert "is truncated, damaged, or older than torch 1.6" in problem(tmp_path / name)


@pytest.mark.parametrize("content", ["{}", '{"model": 5}'])
def test_json_that_is_no_tokenizer(folder, content):
    (folder / "tokenizer.json").write_text(content)
    assert "tokenizer.json has no 'model', so it is no tokenizer" in problem(folder)


def test_a_damaged_or_missing_index(folder):
    names = shard(folder)
    index = folder / "model.safetensors.index.json"
    for content, words in (("{", "truncated or damaged"), ("{}", "no 'weight_map'"), (None, "is missing")):
        index.unlink()
        if content is not None:
            index.write_text(content)
        assert words in problem(folder)
        assert [file.tensors for file in inspect(folder).files] == [len(part) for part in names]
        index.touch()
    index.write_text(json.dumps({"weight_map": {"a": "../../secret.safetensors"}}))
    assert "'../../secret.safetensors', which is not a file of the same folder" in problem(folder)


def test_pointers_of_git_lfs(folder):
    for name in ("model.safetensors", "qwen.tiktoken"):
        (folder / name).write_text(POINTER)
    assert "2 files" in problem(folder) and "git lfs pull" in problem(folder)


def test_a_pickle_that_holds_more_than_tensors_is_not_run(folder, tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "run"),))

    (folder / "model.safetensors").unlink()
    torch.save({"x": Evil()}, folder / "pytorch_model.bin")
    assert "is refused" in problem(folder)
    assert not (tmp_path / "run").exists()


def test_two_versions_of_the_weights(folder):
    shutil.copyfile(folder / "model.safetensors", folder / "kept")
    shard(folder)
    (folder / "kept").rename(folder / "model.safetensors")
    assert "two versions of the weights" in problem(folder)


def test_missing_model_parallel_files(meta_folder):
    (meta_folder / "consolidated.01.pth").rename(meta_folder / "consolidated.02.pth")
    assert "1 of 3 files with weights is missing: consolidated.01.pth" in inspect(meta_folder).problems[0]
    (meta_folder / "consolidated.02.pth").unlink()
    assert "shapes are those of 2 model-parallel files: consolidated.01.pth is missing" in problem(meta_folder)
    assert inspect(meta_folder).architecture["mlp"] == 192
    assert inspect(meta_folder).files[1].bytes is None


def test_an_interrupted_upgrade(folder):
    (folder / ".upgrade.partial").mkdir()
    (folder / ".upgrade.partial" / "moves.json").write_text("[]")
    assert "upgrade --in-place again" in problem(folder)


# --- problems: tensors ---


def test_missing_tensors_are_counted_and_the_first_are_named(folder):
    change(folder / "config.json", n_layer=4)
    text = problem(folder)
    assert text.startswith("16 of 35 tensors are missing: 'transformer.h.2.ln_1.weight', ")
    assert text.count("'transformer") == 3 and "and 13 more" in text


def test_unknown_tensors(folder):
    change_weights(folder, lambda tensors: tensors.update({"transformer.h.1.attn.c_attn.lora": torch.zeros(1)}))
    assert "1 tensor is not part of this architecture: 'transformer.h.1.attn.c_attn.lora'" in problem(folder)


def test_wrong_shapes(folder):
    change(folder / "config.json", ffn_hidden_size=352)
    text = problem(folder)
    assert text.startswith("6 tensors have a shape")
    assert "'transformer.h.0.mlp.w2.weight' is (172, 64), not (176, 64)" in text


def test_tensors_of_one_name_in_two_files(folder):
    names = shard(folder)
    extra = {names[0][0]: torch.zeros(3)}
    change_weights(folder, lambda tensors: tensors.update(extra), "model-00002-of-00003.safetensors")
    assert f"{names[0][0]!r} in" in problem(folder) and "as well" in problem(folder)


def test_tensors_that_the_index_doesn_t_name(folder):
    names = shard(folder)
    change(
        folder / "model.safetensors.index.json", weight_map=dict.fromkeys(names[0], "model-00001-of-00003.safetensors")
    )
    change_weights(folder, lambda tensors: tensors.pop(names[0][0]), "model-00001-of-00003.safetensors")
    texts = inspect(folder).problems
    assert any("not in the file that the index names" in text and names[0][0] in text for text in texts)
    stale = load_file(folder / "model-00002-of-00003.safetensors")
    change_weights(folder, lambda tensors: tensors.update(stale), "model-00001-of-00003.safetensors")
    assert any(f"{len(stale)} tensors are stored, but not in the index" in text for text in inspect(folder).problems)


def test_whole_numbers_without_a_quantization_config(folder):
    change_weights(folder, lambda tensors: tensors.update({BLOCK: tensors[BLOCK].to(torch.int8)}))
    assert f"1 tensor is whole numbers: {BLOCK!r}" in problem(folder)


def test_a_vocabulary_of_another_checkpoint(folder, published_vocabulary):
    shutil.copyfile(published_vocabulary, folder / "qwen.tiktoken")
    assert "token 151,645, but the embedding has 320 rows" in problem(folder)


# --- remarks ---


def test_code_of_2023_is_named_and_not_run(folder):
    auto_map = {"AutoConfig": "configuration_qwen.QWenConfig", "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel"}
    change(folder / "config.json", auto_map=auto_map)
    assert "isn't there (configuration_qwen.py, modeling_qwen.py)" in remark(folder, "auto_map")
    for name in ("configuration_qwen.py", "modeling_qwen.py"):
        (folder / name).write_text("raise ImportError('made for transformers 4.31')")
    assert "upgrade replaces it" in remark(folder, "that of 2023", "modeling_qwen.py")


def test_pickles(folder, hf_folder):
    for path, remedy in ((folder, "upgrade"), (hf_folder, "save_pretrained")):
        torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
        assert "pytorch_model.bin is not read" in remark(path, "there twice")
        (path / "model.safetensors").unlink()
        assert f"{remedy} writes safetensors" in remark(path, "pickles")


def test_sharded_pickles(folder):
    shard(folder, "bin")
    report = inspect(folder, scan=True)
    assert report.problems == [] and len(report.files) == 3
    assert sum(report.dtypes.values()) == 140_480


def test_files_that_the_index_doesn_t_name(folder):
    shard(folder)
    shutil.copyfile(folder / "model-00001-of-00003.safetensors", folder / "model-00001-of-00002.safetensors")
    assert "model-00001-of-00002.safetensors is not part" in remark(folder, "index")


def test_total_size(folder):
    shard(folder)
    change(folder / "model.safetensors.index.json", metadata={"total_size": 561_921})
    assert "561,920 bytes are stored" in remark(folder, "total_size=561921")


def test_stored_tables(folder, golden):
    change_weights(folder, lambda tensors: tensors.update({"transformer.rotary_emb.inv_freq": torch.ones(8)}))
    assert "1 stored tensor is part of a table" in remark(folder, "'transformer.rotary_emb.inv_freq'")
    assert "'00/rope.freqs'" in remark(golden / "llama_meta" / "mp1", "table")


def test_mixed_and_misannounced_dtypes(folder, hf_folder):
    change_weights(folder, lambda tensors: tensors.update({BLOCK: tensors[BLOCK].half()}))
    assert "12,288 parameters in float16" in remark(folder, "Mixed dtypes")
    change(hf_folder / "config.json", dtype="bfloat16")
    assert "announces bfloat16, stored is float32" in remark(hf_folder, "announces")


def test_missing_companions(folder, hf_folder, byte_vocabulary):
    assert remark(folder, "There is no tokenizer")
    assert remark(folder, "generation_config.json is missing")
    (hf_folder / "tokenizer.json").write_text('{"model": {}}')
    assert remark(hf_folder, "no chat template")
    change(hf_folder / "tokenizer_config.json", chat_template="{{ messages }}")
    assert not any("chat template" in text for text in inspect(hf_folder).remarks)


def test_chat_template_of_a_chat_model(folder, byte_vocabulary):
    change(folder / "config.json", vocab_size=464, padded_vocab_size=464)
    change_weights(folder, lambda tensors: tensors.update({name: torch.zeros(464, 64) for name in EMBEDDINGS}))
    shutil.copyfile(byte_vocabulary, folder / "qwen.tiktoken")
    change(folder / "generation_config.json", chat_format="chatml", eos_token_id=256)
    assert "upgrade adds it" in remark(folder, "no chat template")
    assert "<|im_end|>, 258, is not in eos_token_id=[256]" in remark(folder, "eos_token_id")
    change(folder / "generation_config.json", chat_format="raw")
    assert not any("template" in text or "eos_token_id" in text for text in inspect(folder).remarks)
    change(folder / "generation_config.json", chat_format="chatml", eos_token_id=[258, 256])
    assert not any("eos_token_id" in text for text in inspect(folder).remarks)


EMBEDDINGS = ("transformer.wte.weight", "lm_head.weight")


def test_end_of_turn_of_a_qwen2_chat_model(hf_folder):
    added = {"10": {"content": "<|endoftext|>"}, "12": {"content": "<|im_end|>"}}
    change(hf_folder / "tokenizer_config.json", added_tokens_decoder=added, chat_template="…<|im_end|>")
    change(hf_folder / "generation_config.json", eos_token_id=10)
    assert "12, is not in eos_token_id=[10]" in remark(hf_folder, "pipelines")
    change(hf_folder / "generation_config.json", eos_token_id=[12, 10])
    assert not any("eos_token_id" in text for text in inspect(hf_folder).remarks)


def test_ntk_and_logn(golden, folder):
    assert "NTK and LogN are on: texts longer than 32 tokens" in remark(golden / "model" / "aug_ntk_logn", "NTK")
    assert "NTK is on" in remark(golden / "model" / "dec_ntk_padded", "NTK")
    assert not any("NTK" in text for text in inspect(folder).remarks)


def test_a_stored_head_although_it_is_tied(golden, tmp_path):
    tied = tmp_path / "tied"
    shutil.copytree(golden / "native" / "qwen2_gqa_tied", tied, copy_function=shutil.copyfile)
    embedding = load_file(tied / "model.safetensors")["model.embed_tokens.weight"]
    change_weights(tied, lambda tensors: tensors.update({"lm_head.weight": embedding.clone()}))
    assert remark(tied, "'lm_head.weight' is stored", "tie_word_embeddings")
    assert inspect(tied, scan=True).problems == []
    change_weights(tied, lambda tensors: tensors.update({"lm_head.weight": embedding + 1}))
    assert "'lm_head.weight' differs from 'model.embed_tokens.weight'" in problem(tied, scan=True)


def test_an_adapter_beside_a_model(folder):
    change(folder / "adapter_config.json", base_model_name_or_path="elsewhere")
    assert "loads 'elsewhere' and the adapter in its place" in remark(folder, "adapter_config.json")


# --- values ---


def test_values_are_read_for_a_scan_only(folder, monkeypatch):
    change_weights(folder, lambda tensors: tensors[BLOCK].view(-1)[7].fill_(float("nan")))
    assert inspect(folder).problems == []
    text = problem(folder, scan=True)
    assert "1 tensor has NaN or infinite values" in text and BLOCK in text
    monkeypatch.setattr(Weights, "read", lambda *_: pytest.fail("a value was read"))
    inspect(folder)


def test_infinity_in_half_precision(folder):
    def spoil(tensors):
        for name in tensors:
            tensors[name] = tensors[name].half()
        tensors[BLOCK][0, 0] = float("-inf")

    change_weights(folder, spoil)
    assert BLOCK in problem(folder, scan=True)


def test_checksums(folder, meta_folder):
    weights = folder / "model.safetensors"
    (folder / "SHA256SUMS").write_text(f"{hashlib.sha256(weights.read_bytes()).hexdigest()}  model.safetensors\n")
    assert inspect(folder, scan=True).problems == []
    change_weights(folder, lambda tensors: tensors[BLOCK].view(-1)[0].add_(1))
    assert inspect(folder).problems == []
    assert "model.safetensors is damaged: its sha256 is" in problem(folder, scan=True)
    pickle = meta_folder / "consolidated.01.pth"
    content = bytearray(pickle.read_bytes())
    content[len(content) // 2] ^= 1
    pickle.write_bytes(content)
    assert "consolidated.01.pth is truncated or damaged (Bad CRC" in problem(meta_folder, scan=True)


def test_progress_of_a_scan(folder, meta_folder):
    for path, first in ((folder, "lm_head.weight"), (meta_folder, "00/tok_embeddings.weight")):
        seen = []
        report = inspect(path, scan=True, progress=lambda *step, seen=seen: seen.append(step))
        assert first in dict(seen) and len(dict(seen)) == sum(file.tensors for file in report.files)
        assert sum(nbytes for _, nbytes in seen) == report.weights_bytes


# --- nothing makes it stop ---

WRONG = ("abc", "", None, 0, -1, 1.5, True, [1], {"a": 1}, float("nan"))


@pytest.mark.slow
@pytest.mark.parametrize("case", ["model/dec_ntk_logn", "native/llama_gqa", "native/qwen2_gqa_tied"])
@pytest.mark.no_cover
def test_any_value_in_a_configuration_is_reported_on(golden, tmp_path, case):
    original = json.loads((golden / case / "config.json").read_text())
    (tmp_path / "model.safetensors").symlink_to(golden / case / "model.safetensors")
    for key in (*original, "auto_map", "quantization_config", "rope_scaling", "eos_token_id"):
        for value in WRONG:
            (tmp_path / "config.json").write_text(json.dumps({**original, key: value}))
            Console(file=StringIO()).print(render(inspect(tmp_path)))


def test_any_value_in_params_is_reported_on(meta_folder):
    original = json.loads((meta_folder / "params.json").read_text())
    for key in (*original, "rope_theta", "max_seq_len"):
        for value in WRONG:
            (meta_folder / "params.json").write_text(json.dumps({**original, key: value}))
            Console(file=StringIO()).print(render(inspect(meta_folder)))


def test_any_value_in_companions_is_reported_on(checkpoint_folder, hf_folder):
    change(hf_folder / "tokenizer_config.json", chat_template="<|im_end|>")
    for path in (checkpoint_folder, hf_folder):
        for value in WRONG:
            change(path / "generation_config.json", eos_token_id=value, chat_format=value)
            change(path / "tokenizer_config.json", added_tokens_decoder=value)
            inspect(path)
        for value in (b"\xff\xfe", b"[]", b"1", b"null"):
            (path / "generation_config.json").write_bytes(value)
            assert "generation_config.json" in problem(path)


def test_files_cut_anywhere_are_reported_on(folder):
    content = (folder / "model.safetensors").read_bytes()
    for length in (0, 1, 7, 8, 100, 2000, len(content) - 1):
        (folder / "model.safetensors").write_bytes(content[:length])
        assert "model.safetensors is truncated or damaged" in problem(folder)


# --- the report ---


def test_json_is_plain_and_stable(golden, folder):
    change(folder / "config.json", n_layer=4)
    for path in (folder, golden / "llama_meta" / "mp2", golden):
        report = inspect(path).to_json()
        assert json.loads(json.dumps(report, allow_nan=False)) == report == inspect(path).to_json()
    assert list(report) == [
        "path",
        "kind",
        "description",
        "architecture",
        "quantization",
        "parameters",
        "dtypes",
        "files",
        "weights_bytes",
        "memory",
        "int8_cache_per_token",
        "tokenizer",
        "problems",
        "remarks",
        "scanned",
    ]


def printed(report, width=100, **options):
    console = Console(file=StringIO(), width=width, **options)
    console.print(render(report))
    return console.file.getvalue()


def test_people_read_sizes_and_numbers(checkpoint_folder):
    text = printed(inspect(checkpoint_folder))
    for words in (str(checkpoint_folder), "QWen of this repository", "2 of width 64", "464 rows", "NTK and LogN"):
        assert words in text.replace("\n", "")
    assert "129,728; 70,336 without embeddings" in text
    assert "519 kB in 1 file" in text
    assert "No problems (headers only" in text
    assert all(len(line) <= 100 for line in text.splitlines())


def test_people_see_problems_last_and_in_red(folder):
    shard(folder)
    (folder / "model-00002-of-00003.safetensors").unlink()
    text = printed(inspect(folder), force_terminal=True, color_system="standard")
    end = text[text.index("Remarks") :]
    assert "\x1b[31m1 of 3 files with weights is missing" in end[end.index("Problems") :]
    assert "missing" in text[: text.index("Remarks")]  # in the table of files


def test_people_see_no_more_than_some_whole_files(folder):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    places = {name: f"model-{i:05d}-of-00019.safetensors" for i, name in enumerate(tensors, start=1)}
    for name, file in places.items():
        save_file({name: tensors[name]}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    (folder / "model-00018-of-00019.safetensors").unlink()
    text = printed(inspect(folder))
    assert text.count("-of-00019.safetensors") == 12 + 2 and "and 6 files more" in text


def test_text_from_files_cannot_drive_the_terminal(folder):
    name = "a\x1b[2Jb"
    change_weights(folder, lambda tensors: tensors.update({name: torch.zeros(1)}))
    change(folder / "config.json", quantization_config={"quant_method": name})
    (folder / "pytorch_model-1-of-1.bin").touch()
    assert "\x1b" not in printed(inspect(folder))


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (999_499, "999 kB"),
        (999_500, "1.00 MB"),
        (9_994_999, "9.99 MB"),
        (9_996_000, "10.0 MB"),
        (15_442_649_088, "15.4 GB"),
        (144_800_000_000, "145 GB"),
        (2_500_000_000_000_000, "2500 TB"),
    ],
)
def test_sizes_have_three_digits(nbytes, text):
    assert size_text(nbytes) == text
