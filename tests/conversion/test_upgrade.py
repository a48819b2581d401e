"""`upgrade`: what becomes of each file of a published folder, beside it or in place, and that users can chat then."""

import ast
import errno
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer
from typer.testing import CliRunner

from qwen1 import QWenConfig, QWenLMHeadModel, QWenTokenizerFast
from qwen1.configuration_qwen import AUTO_MAP
from qwen1.conversion import commands
from qwen1.conversion.command_line.upgrade import upgrade_in_place
from qwen1.conversion.errors import CheckpointError
from qwen1.conversion.formats.companions import CODE_FILES
from qwen1.conversion.formats.endings import qwen_generation
from qwen1.conversion.formats.names import IGNORED
from qwen1.conversion.inspecting.inspection import inspect
from qwen1.conversion.opening.sources import WORK_FOLDER, open_source
from qwen1.conversion.planning.companions import plain_template
from qwen1.conversion.planning.upgrade import plan_upgrade, upgraded_config
from qwen1.conversion.writing.plans import write_plan
from qwen1.conversion.writing.progress import Progress
from qwen1.tokenization_qwen import CHAT_TEMPLATE, build_backend

SHARD = "100KB"
OLD_CODE = {
    "cache_autogptq_cuda_256.cpp",
    "cache_autogptq_cuda_kernel_256.cu",
    "configuration_qwen.py",
    "cpp_kernels.py",
    "modeling_qwen.py",
    "qwen_generation_utils.py",
    "tokenization_qwen.py",
}
COMPANY = {"LICENSE", "NOTICE", "README.md", ".gitattributes", "assets/logo.png", "examples/react_prompt.md"}
SETTINGS = {"config.json", "generation_config.json", "tokenizer_config.json"}
RELEASES = ["2023-08-chat", "2023-12-base"]

CHAT = """
import json, sys, torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, expected = sys.argv[1], load_file(sys.argv[2])
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, attn_implementation="eager").eval()
assert "qwen1" not in sys.modules and type(tokenizer).__name__ == "QWenTokenizerFast"
differences = []
for name, logits in expected.items():
    kind, _, length = name.partition("_")
    if kind == "prefill":
        with torch.no_grad():
            computed = model(expected[f"ids_{length}"][:, :int(length)]).logits
        differences.append((computed - logits).abs().max().item())
settings = dict(max_new_tokens=12, do_sample=False)
reply, history = model.chat(tokenizer, "你好", history=None, **settings)
again, history = model.chat(tokenizer, "再说一遍", history=history, **settings)
streamed = list(model.chat_stream(tokenizer, "你好", history=None, **settings))
print(json.dumps(dict(reply=reply, again=again, history=history, streamed=streamed, differences=differences)))
"""


@pytest.fixture
def release(tmp_path, golden, byte_vocabulary):
    """Make a folder laid out as the release of 2023-08, sharded pickles and all, with golden weights.

    Its vocabulary has 256 single bytes, so that <|endoftext|> is 256, not 151643.
    """

    def make(weights="bin", case="aug_ntk_logn", tensors=None, shards=3, **changes):
        folder = tmp_path / "2023"
        folder.mkdir()
        for name in OLD_CODE:
            (folder / name).write_text("raise ImportError('code of 2023')\n")
        for name in COMPANY:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(f"{name} of 2023")
        config = json.loads((golden / "model" / case / "config.json").read_text())
        config |= {"bos_token_id": 256, "eos_token_id": 256, "transformers_version": "4.31.0", **changes}
        (folder / "config.json").write_text(json.dumps(config, indent=2))
        for name in ("generation_config", "tokenizer_config"):
            published = (golden / "published_configs" / f"2023-08-chat.{name}.json").read_text()
            (folder / f"{name}.json").write_text(published.replace("151643", "256"))
        shutil.copy(byte_vocabulary, folder)
        save(folder, golden_tensors(golden, case) if tensors is None else tensors, weights, shards)
        return folder

    return make


@pytest.fixture
def upgraded(tmp_path):
    """Upgrade a folder: (folder, **options of plan_upgrade) -> new folder."""

    def run(source, name="new", **options):
        run_upgrade(source, tmp_path / name, **options)
        return tmp_path / name

    return run


def golden_tensors(golden, case="aug_ntk_logn"):
    return load_file(golden / "model" / case / "model.safetensors")


def save(folder, tensors, suffix, count):
    """Write weights as a single file, or as shards with an index."""
    stem, write = ("pytorch_model", torch.save) if suffix == "bin" else ("model", save_file)
    if count == 1:
        return write(tensors, folder / f"{stem}.{suffix}")
    placed = {name: f"{stem}-{1 + i % count:05d}-of-{count:05d}.{suffix}" for i, name in enumerate(sorted(tensors))}
    for file in set(placed.values()):
        write({name: tensor for name, tensor in tensors.items() if placed[name] == file}, folder / file)
    index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())}, "weight_map": placed}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))


def run_upgrade(source, target, max_shard_size=SHARD, **options):
    origin = open_source(source)
    return write_plan(plan_upgrade(origin, max_shard_size, **options), target, Progress())


def in_place(folder):
    """Names of the files that an upgrade in place moved."""
    return upgrade_in_place(folder, SHARD, Progress())[1]


def notes_of(source):
    return " ".join(plan_upgrade(open_source(source)).notes)


def refusal(run, *arguments, **options):
    with pytest.raises(CheckpointError) as error:
        run(*arguments, **options)
    return str(error.value)


def names_in(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def contents(folder):
    return {name: (folder / name).read_bytes() for name in names_in(folder)}


def state(folder):
    """Content, inode and time of each file."""
    stats = {name: (folder / name).stat() for name in names_in(folder)}
    return {name: (stats[name].st_ino, stats[name].st_mtime_ns, data) for name, data in contents(folder).items()}


def tensors_of(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def same_tensors(first, second):
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]) for name in first
    )


def json_of(path):
    return json.loads(path.read_text())


def published(golden, release, name):
    return json_of(golden / "published_configs" / f"{release}.{name}.json")


def loading_problems(folder):
    """What transformers finds wrong with the weights of a folder."""
    _, info = QWenLMHeadModel.from_pretrained(folder, output_loading_info=True)
    return [problem for problem in info.values() if problem]


# --- the journey of a user ---


@pytest.mark.slow
@pytest.mark.no_cover
def test_a_folder_of_2023_chats_once_it_is_upgraded(release, golden, tmp_path):
    """Sharded pickles, the old code, no template; then remote code in a process that knows nothing of this package."""
    source, target = release(), tmp_path / "new"
    before = contents(source)
    done = CliRunner().invoke(commands.app, ["upgrade", str(source), str(target), "--max-shard-size", SHARD])
    assert done.exit_code == 0, done.output
    assert contents(source) == before and len(list(target.glob("model-*-of-*.safetensors"))) > 1
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "COV_", "PYTHON"))}
    command = [sys.executable, "-c", CHAT, target, golden / "model" / "aug_ntk_logn" / "expected.safetensors"]
    result = subprocess.run(
        [str(part) for part in command],
        env={**environment, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    said = json.loads(result.stdout)
    assert len(said["differences"]) > 5 and max(said["differences"]) < 5e-5
    assert said["reply"] and said["streamed"][-1] == said["reply"] and len(said["streamed"]) > 1
    assert said["history"] == [["你好", said["reply"]], ["再说一遍", said["again"]]]


def test_an_upgraded_folder_holds_what_it_should_and_nothing_else(release, upgraded):
    target = upgraded(release())
    weights = {path.name for path in target.glob("model-*.safetensors")} | {"model.safetensors.index.json"}
    expected = {*CODE_FILES, *COMPANY, *SETTINGS, *weights, "qwen.tiktoken", "chat_template.jinja"}
    assert names_in(target) == expected and len(weights) > 3


# --- configuration ---


def test_the_published_configuration_becomes_that_of_this_repository(golden, repository):
    """Its transformers_version stays, as every key does; the repository's own file tells none."""
    upgraded = upgraded_config(published(golden, "2023-08-chat", "config"))
    assert upgraded.pop("transformers_version") == "4.31.0"
    assert upgraded == json_of(repository / "config.json")


@pytest.mark.parametrize(
    "release, added",
    [
        ("2023-08-chat", {"intermediate_size": 22016, "rms_norm_eps": 1e-6, "rope_theta": 10000}),
        ("2023-12-base", {"rms_norm_eps": 1e-6, "rope_theta": 10000}),
    ],
)
def test_every_key_stays_and_only_other_spellings_of_present_values_are_added(golden, release, added):
    before = published(golden, release, "config")
    after = upgraded_config(before)
    assert after["auto_map"] == AUTO_MAP and before["auto_map"] != AUTO_MAP
    assert {**before, **added, "auto_map": AUTO_MAP} == after
    assert list(after) == [*before, *added]
    assert upgraded_config(after) == after


@pytest.mark.parametrize("release", RELEASES)
def test_an_upgraded_configuration_means_the_same(golden, release):
    before = published(golden, release, "config")
    assert QWenConfig.from_dict(upgraded_config(before)).to_dict() == QWenConfig.from_dict(before).to_dict()


def test_keys_that_nobody_knows_and_classes_of_others_stay(release, upgraded):
    auto_map = {"AutoConfig": "configuration_qwen.QWenConfig", "AutoModelForVision": "vision.Tower"}
    config = json_of(upgraded(release(my_key=[1, {"a": None}], n_inner=None, auto_map=auto_map)) / "config.json")
    assert config["my_key"] == [1, {"a": None}] and "n_inner" in config and config["transformers_version"] == "4.31.0"
    assert config["auto_map"] == {**AUTO_MAP, "AutoModelForVision": "vision.Tower"}


# --- generation settings ---


def test_published_chat_settings_become_those_of_this_repository(golden, repository):
    """But for two keys: 2023-08 published no max_window_size, which 6144 is for, and told its transformers_version."""
    upgraded = qwen_generation(published(golden, "2023-08-chat", "generation_config"), 151643, 151645)
    ours = json_of(repository / "generation_config.json")
    assert ours.pop("max_window_size") == 6144 and upgraded.pop("transformers_version") == "4.31.0"
    assert upgraded == ours and ours["eos_token_id"] == [151645, 151643]


def test_a_base_model_goes_on_to_the_end_of_the_text(golden):
    before = published(golden, "2023-12-base", "generation_config")
    assert qwen_generation(before, 151643, 151645) == before


@pytest.mark.parametrize(
    "eos, expected", [(256, [258, 256]), ([256], [258, 256]), ([258, 256], [258, 256]), ([256, 258, 9], [258, 256, 9])]
)
def test_chats_end_at_im_end_as_well(release, upgraded, eos, expected):
    source = release()
    before = json_of(source / "generation_config.json") | {"eos_token_id": eos}
    (source / "generation_config.json").write_text(json.dumps(before))
    assert json_of(upgraded(source) / "generation_config.json") == {**before, "eos_token_id": expected}


@pytest.mark.parametrize("end", [250, [250, 248]])
@pytest.mark.parametrize("name", ["config", "generation_config"])
def test_ends_of_another_vocabulary_are_not_added_to(release, name, end):
    """As where qwen.tiktoken is cut short, by which all control tokens have other ids."""
    folder = release()
    values = json_of(folder / f"{name}.json")
    (folder / f"{name}.json").write_text(json.dumps({**values, "eos_token_id": end}))
    said = refusal(plan_upgrade, open_source(folder))
    assert f"{name}.json has eos_token_id={end}: the vocabulary is truncated or another model's" in said
    report = inspect(folder)
    assert said in report.problems and not any("is not in eos_token_id" in remark for remark in report.remarks)


def test_two_vocabularies_that_differ(release, byte_tokenizer):
    folder = release()
    backend = build_backend(byte_tokenizer.mergeable_ranks, byte_tokenizer.special_tokens)
    backend.save(str(folder / "tokenizer.json"))
    plan_upgrade(open_source(folder))
    text = (folder / "tokenizer.json").read_text(encoding="utf-8")
    (folder / "tokenizer.json").write_text(re.sub(r'("id": ?)256\b', r"\g<1>999", text), encoding="utf-8")
    said = refusal(plan_upgrade, open_source(folder))
    assert "<|endoftext|> is token 256 by" in said and "but 999 by tokenizer.json" in said
    assert said in inspect(folder).problems


def test_an_end_that_the_tokenizer_names(release):
    folder = release()
    for name, value in (("config", {"eos_token_id": 259}), ("tokenizer_config", {"eos_token": "<|extra_0|>"})):
        values = json_of(folder / f"{name}.json")
        (folder / f"{name}.json").write_text(json.dumps({**values, **value}))
    (folder / "generation_config.json").unlink()
    assert plan_upgrade(open_source(folder)).files


def test_missing_generation_settings_are_those_of_a_base_model_and_told(release, upgraded):
    source = release()
    (source / "generation_config.json").unlink()
    assert "There is no generation_config.json" in notes_of(source) and "[258, 256]" in notes_of(source)
    assert json_of(upgraded(source) / "generation_config.json") == {"eos_token_id": 256, "pad_token_id": 256}


def test_control_tokens_are_looked_up_in_tokenizer_json_too(release, upgraded, byte_tokenizer):
    """A folder converted from Qwen2.5 has no vocabulary, and its eos_token_id is that of <|im_end|> already."""
    source = release(eos_token_id=258)
    (source / "qwen.tiktoken").unlink()
    backend = {"added_tokens": [{"content": text, "id": i} for text, i in byte_tokenizer.special_tokens.items()]}
    (source / "tokenizer.json").write_text(json.dumps(backend))
    assert json_of(upgraded(source) / "generation_config.json")["eos_token_id"] == [258, 256]


@pytest.mark.parametrize("tokenizer", ["tokenizer.json", "tokenizer.model"])
def test_settings_of_a_foreign_tokenizer_stay_byte_for_byte(release, upgraded, tokenizer):
    source = release(eos_token_id=2)
    for name in ("qwen.tiktoken", "chat_template.jinja"):
        (source / name).unlink(missing_ok=True)
    (source / tokenizer).write_text('{"added_tokens": [{"content": "</s>", "id": 2}]}')
    target = upgraded(source)
    for name in ("generation_config.json", "tokenizer_config.json", tokenizer):
        assert (target / name).read_bytes() == (source / name).read_bytes()
    assert not (target / "chat_template.jinja").exists() and "<|im_end|>" in notes_of(source)


def test_a_known_checksum_is_compared_before_a_file_is_linked(release, tmp_path):
    source = release("safetensors", shards=1)
    (source / "SHA256SUMS").write_text(f"{'0' * 64}  model.safetensors\n")
    assert "model.safetensors is damaged" in refusal(run_upgrade, source, tmp_path / "new")


def test_a_mount_point_is_refused_before_anything_is_written(release, tmp_path, monkeypatch):
    monkeypatch.setattr(os.path, "ismount", lambda path: str(path) == str(tmp_path / "mounted"))
    assert "mount point" in refusal(run_upgrade, release(), tmp_path / "mounted")


def test_what_training_leaves_behind_is_left_out(release, upgraded):
    source = release()
    for name in ("checkpoint-500/config.json", "runs/events", "trainer_state.json", "adapter_config.json"):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text("{}")
    target = upgraded(source)
    assert not {"checkpoint-500", "runs", "trainer_state.json", "adapter_config.json"} & names_in(target)
    assert "checkpoint-500" in notes_of(source)


# --- tokenizer ---


@pytest.mark.parametrize("published_with", RELEASES)
def test_published_tokenizer_settings_keep_every_key(release, upgraded, golden, published_with):
    """What this repository's own file says besides, model_max_length, each release says for itself or not at all."""
    source = release()
    before = published(golden, published_with, "tokenizer_config")
    (source / "tokenizer_config.json").write_text(json.dumps(before))
    added = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    auto_map = {"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", "tokenization_qwen.QWenTokenizerFast"]}
    assert json_of(upgraded(source) / "tokenizer_config.json") == {**before, **added, "auto_map": auto_map}


def test_the_vocabulary_comes_along_and_the_tokenizer_loads(release, upgraded, byte_vocabulary):
    target = upgraded(release())
    assert (target / "qwen.tiktoken").read_bytes() == byte_vocabulary.read_bytes()
    tokenizer = AutoTokenizer.from_pretrained(target)
    assert type(tokenizer) is QWenTokenizerFast and tokenizer.eos_token_id == tokenizer.pad_token_id == 256
    text = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert text.endswith("<|im_start|>user\nhi<|im_end|>")


@pytest.mark.slow
@pytest.mark.no_cover
def test_published_ids_are_those_of_the_published_vocabulary(release, upgraded, published_vocabulary):
    source = release()
    shutil.copy(published_vocabulary, source / "qwen.tiktoken")
    settings = json_of(source / "generation_config.json") | {"eos_token_id": 151643}
    (source / "generation_config.json").write_text(json.dumps(settings))
    target = upgraded(source)
    assert json_of(target / "generation_config.json")["eos_token_id"] == [151645, 151643]
    assert AutoTokenizer.from_pretrained(target)("你好<|im_end|>").input_ids == [108386, 151645]


@pytest.mark.slow
@pytest.mark.no_cover
def test_extra_words_come_along(release, upgraded, golden, published_vocabulary):
    source = release()
    shutil.copy(published_vocabulary, source / "qwen.tiktoken")
    shutil.copy(golden / "tokenizer" / "qwen_extra.tiktoken", source)
    target = upgraded(source)
    assert json_of(target / "generation_config.json")["eos_token_id"][0] == 151645
    assert AutoTokenizer.from_pretrained(target)("我是一只猫<|im_end|>").input_ids == [151854, 151645]


def test_a_missing_vocabulary_is_told_and_ids_are_counted_from_the_configuration(release, upgraded):
    source = release(eos_token_id=300)
    (source / "qwen.tiktoken").unlink()
    (source / "generation_config.json").unlink()
    assert "There is no qwen.tiktoken" in notes_of(source)
    target = upgraded(source)
    assert json_of(target / "generation_config.json")["eos_token_id"] == 300
    assert "qwen.tiktoken" not in names_in(target)


def test_a_damaged_vocabulary_is_refused(release, tmp_path):
    source = release()
    (source / "qwen.tiktoken").write_text("not base64\n")
    assert "qwen.tiktoken" in refusal(run_upgrade, source, tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["2023"]


def test_missing_tokenizer_settings_are_written(release, upgraded):
    source = release()
    (source / "tokenizer_config.json").unlink()
    target = upgraded(source)
    assert json_of(target / "tokenizer_config.json") == {
        "tokenizer_class": "QWenTokenizer",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "auto_map": {"AutoTokenizer": AUTO_MAP["AutoTokenizer"]},
    }
    assert AutoTokenizer.from_pretrained(target)("a").input_ids == [97]


@pytest.mark.parametrize(
    "found, expected",
    [
        (None, CHAT_TEMPLATE),
        (CHAT_TEMPLATE, CHAT_TEMPLATE),
        (plain_template(), CHAT_TEMPLATE),
        ("{{ messages[0].content }}", "{{ messages[0].content }}"),
    ],
)
def test_a_template_of_somebodys_own_is_kept_and_ours_put_where_there_is_none(release, upgraded, found, expected):
    source = release()
    if found is not None:
        (source / "chat_template.jinja").write_text(found)
    assert (upgraded(source) / "chat_template.jinja").read_text() == expected


def test_a_template_in_the_tokenizer_settings_is_kept_there(release, upgraded):
    source = release()
    settings = {**json_of(source / "tokenizer_config.json"), "chat_template": "{{ messages[0].content }}"}
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    target = upgraded(source)
    assert "chat_template.jinja" not in names_in(target)
    messages = [{"role": "user", "content": "said"}]
    assert AutoTokenizer.from_pretrained(target).apply_chat_template(messages, tokenize=False) == "said"


# --- code ---


def imported_by(path):
    """Files of the same folder that a module imports, and what these import."""
    found = {path.name}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            found |= imported_by(path.with_name(f"{node.module}.py"))
    return found


@pytest.mark.slow
def test_the_code_is_all_that_the_model_and_the_tokenizer_import(repository):
    needed = imported_by(repository / "modeling_qwen.py") | imported_by(repository / "tokenization_qwen.py")
    assert needed == set(CODE_FILES) and len(set(CODE_FILES)) == len(CODE_FILES)


def test_the_code_is_what_saving_copies(tmp_path, tiny_model, byte_tokenizer):
    tiny_model().save_pretrained(tmp_path)
    byte_tokenizer.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.glob("*.py")} == set(CODE_FILES)


def test_old_code_is_replaced_or_left_behind(release, upgraded, repository):
    target = upgraded(release())
    for name in CODE_FILES:
        assert (target / name).read_bytes() == (repository / name).read_bytes()
    assert not OLD_CODE - set(CODE_FILES) & names_in(target)


# --- weights ---


@pytest.mark.parametrize("case", ["aug_ntk_logn", "dec_ntk_logn"])
@pytest.mark.parametrize("weights", ["bin", "safetensors"])
@pytest.mark.parametrize("shards", [1, 3])
def test_weights_stay_the_same_to_the_bit(release, upgraded, golden, case, weights, shards):
    target = upgraded(release(weights, case, shards=shards))
    assert same_tensors(tensors_of(target), golden_tensors(golden, case))
    assert loading_problems(target) == [] and not list(target.glob("*.bin*"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_half_precision(release, upgraded, golden, dtype):
    tensors = {name: tensor.to(dtype) for name, tensor in golden_tensors(golden).items()}
    assert same_tensors(tensors_of(upgraded(release(tensors=tensors, fp32=False))), tensors)


@pytest.mark.parametrize("shards", [1, 3])
def test_safetensors_get_a_second_name(release, upgraded, shards):
    source = release("safetensors", shards=shards)
    target = upgraded(source)
    files = [path.name for path in source.glob("*.safetensors")]
    assert len(files) == shards and all((target / name).samefile(source / name) for name in files)
    index = "model.safetensors.index.json"
    assert (source / index).exists() == (target / index).exists()
    others = names_in(target) - set(files)
    assert not any((target / name).samefile(source / name) for name in others if (source / name).exists())


def test_safetensors_are_copied_if_asked_for(release, upgraded):
    source = release("safetensors")
    target = upgraded(source, link=False)
    assert not any((target / path.name).samefile(path) for path in source.glob("*.safetensors"))
    assert same_tensors(tensors_of(target), tensors_of(source))


def test_safetensors_are_copied_to_another_file_system(release, upgraded, monkeypatch):
    def refuse(*arguments, **options):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    source = release("safetensors")
    target = upgraded(source)
    assert not any((target / path.name).samefile(path) for path in source.glob("*.safetensors"))
    assert same_tensors(tensors_of(target), tensors_of(source))


def test_where_both_are_there_safetensors_are_taken_and_pickles_left_behind(release, upgraded, golden):
    source = release("safetensors", shards=1)
    torch.save({name: 2 * tensor for name, tensor in golden_tensors(golden).items()}, source / "pytorch_model.bin")
    assert "pytorch_model.bin" in notes_of(source)
    target = upgraded(source)
    assert same_tensors(tensors_of(target), golden_tensors(golden)) and "pytorch_model.bin" not in names_in(target)


@pytest.mark.parametrize("head", ["shared", "equal", "missing"])
def test_a_tied_head_is_not_written_twice(release, upgraded, golden, head):
    tensors = golden_tensors(golden)
    embedding = tensors["transformer.wte.weight"]
    del tensors["lm_head.weight"]
    heads = {"shared": {"lm_head.weight": embedding}, "equal": {"lm_head.weight": embedding.clone()}, "missing": {}}
    target = upgraded(release(tensors={**tensors, **heads[head]}, shards=1, tie_word_embeddings=True))
    assert same_tensors(tensors_of(target), tensors) and loading_problems(target) == []
    assert torch.equal(QWenLMHeadModel.from_pretrained(target).lm_head.weight, embedding)


def test_a_head_that_only_happens_to_share_its_memory_is_written(release, upgraded, golden):
    tensors = golden_tensors(golden)
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"]
    target = upgraded(release(tensors=tensors, shards=1))
    assert same_tensors(tensors_of(target), tensors) and loading_problems(target) == []


@pytest.mark.parametrize("weights", ["bin", "safetensors"])
def test_tables_beside_the_weights_do_no_harm(release, upgraded, golden, weights):
    """Pickles lose them; safetensors are not touched, and nothing complains when they are loaded."""
    mask = torch.tril(torch.ones(8, 8, dtype=torch.bool)).view(1, 1, 8, 8)
    tables = {
        **{f"transformer.h.{i}.attn.bias": mask.clone() for i in range(2)},
        "transformer.h.0.attn.masked_bias": torch.tensor(-1e4),
        "transformer.h.1.attn.rotary_emb.inv_freq": torch.rand(8),
        "transformer.rotary_emb.inv_freq": torch.rand(8),
    }
    target = upgraded(release(weights, tensors={**golden_tensors(golden), **tables}))
    found = tensors_of(target)
    assert (tables.keys() <= found.keys()) == (weights == "safetensors")
    assert same_tensors({k: v for k, v in found.items() if not IGNORED.fullmatch(k)}, golden_tensors(golden))
    assert loading_problems(target) == []


@pytest.mark.parametrize("quantization", [{"quant_method": "hqq"}, "int4"])
def test_quantised_weights_of_an_unknown_layout_are_taken_over_without_a_check(release, upgraded, quantization):
    tensors = {"transformer.h.0.attn.c_attn.W_q": torch.arange(8, dtype=torch.int32)}
    source = release(tensors=tensors, shards=1, quantization_config=quantization)
    assert "without a check" in notes_of(source)
    written = load_file(upgraded(source) / "model.safetensors")
    assert written.keys() == tensors.keys() and all(torch.equal(written[name], tensors[name]) for name in tensors)


def broken(tensors, kind):
    """Tensors with a fault, and what the error must name."""
    name = "transformer.h.1.mlp.w2.weight"
    if kind == "unknown":
        return {**tensors, "transformer.h.7.mlp.w2.weight": tensors[name]}, "transformer.h.7.mlp.w2.weight"
    if kind == "missing":
        return {key: tensor for key, tensor in tensors.items() if key != name}, name
    if kind == "shape":
        return {**tensors, name: tensors[name][:-1].clone()}, name
    if kind == "integers":
        return {**tensors, name: tensors[name].int()}, name
    changed = tensors[name].clone()
    changed[3, 5] = float(kind)
    return {**tensors, name: changed}, name


@pytest.mark.parametrize(
    "weights, kind",
    [("bin", kind) for kind in ("unknown", "missing", "shape", "integers", "nan", "inf", "-inf")]
    + [("safetensors", kind) for kind in ("unknown", "missing", "shape", "integers")],
)
def test_wrong_weights_are_errors_that_name_them_and_leave_nothing(release, golden, tmp_path, weights, kind):
    tensors, name = broken(golden_tensors(golden), kind)
    source = release(weights, tensors=tensors)
    before = state(source)
    assert f"'{name}'" in refusal(run_upgrade, source, tmp_path / "new")
    assert f"'{name}'" in refusal(in_place, source)
    assert [path.name for path in tmp_path.iterdir()] == ["2023"] and state(source) == before


# --- what else is there ---


def test_what_is_no_part_of_a_model_is_left_behind_and_told(release, upgraded):
    source = release()
    left = {"training_args.bin", "optimizer.pt", "old/pytorch_model.bin", "rng_state.pth"}
    unseen = {".cache/huggingface/x.metadata", "__pycache__/modeling_qwen.cpython-311.pyc", "config.json.bak", "a.bak2"}
    for name in left | unseen:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text("x")
    assert not (left | unseen) & names_in(upgraded(source))
    notes = notes_of(source)
    assert all(name in notes for name in left) and not any(name in notes for name in unseen)


def test_company_comes_along_unchanged(release, upgraded):
    source = release()
    for name in ("finetune.py", "notes.bak.txt", "examples/add_merges.py", "标记.txt"):
        (source / name).write_text(name)
    target = upgraded(source)
    for name in (*COMPANY, "finetune.py", "notes.bak.txt", "examples/add_merges.py", "标记.txt"):
        assert (target / name).read_bytes() == (source / name).read_bytes()


# --- places ---


def as_in_the_hubs_cache(source, cache):
    """Lay a folder out as the Hub's cache does: links to files that are called after their hashes."""
    snapshot = cache / "snapshots" / "0123456789abcdef"
    (cache / "blobs").mkdir(parents=True)
    for name, data in contents(source).items():
        blob = cache / "blobs" / hashlib.sha256(data).hexdigest()
        blob.write_bytes(data)
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(os.path.relpath(blob, (snapshot / name).parent))
    return snapshot


@pytest.mark.parametrize("weights", ["bin", "safetensors"])
def test_a_folder_in_the_hubs_cache_is_upgraded_to_files_of_its_own(release, tmp_path, upgraded, weights):
    source = release(weights)
    snapshot = as_in_the_hubs_cache(source, tmp_path / "cache")
    before = state(tmp_path / "cache")
    target, expected = upgraded(snapshot), upgraded(source, "expected")
    assert not any(path.is_symlink() for path in target.rglob("*"))
    assert contents(target) == contents(expected) and state(tmp_path / "cache") == before
    for path in snapshot.glob("*.safetensors"):
        assert (target / path.name).samefile(path)


def test_an_upgrade_in_place_leaves_the_blobs_of_the_hubs_cache_alone(release, tmp_path):
    snapshot = as_in_the_hubs_cache(release(), tmp_path / "cache")
    blobs = state(tmp_path / "cache" / "blobs")
    assert "config.json" in in_place(snapshot) and in_place(snapshot) == []
    assert state(tmp_path / "cache" / "blobs") == blobs and loading_problems(snapshot) == []
    assert (snapshot / "config.json.bak").is_symlink() and not (snapshot / "config.json").is_symlink()


@pytest.mark.parametrize("spelling", ["same", "dotted", "linked"])
def test_the_source_is_no_target(release, tmp_path, spelling):
    source = release()
    (tmp_path / "link").symlink_to(source)
    spellings = {"same": source, "dotted": source / "assets" / "..", "linked": tmp_path / "link"}
    before = state(source)
    assert "--in-place" in refusal(run_upgrade, source, spellings[spelling])
    assert state(source) == before


@pytest.mark.parametrize("spelling", ["inside", "deep", "linked"])
def test_a_folder_in_the_source_is_no_target(release, tmp_path, spelling):
    """The next run would take it for a part of the source."""
    source = release()
    (tmp_path / "link").symlink_to(source)
    spellings = {"inside": source / "new", "deep": source / "assets" / "a" / "b", "linked": tmp_path / "link" / "new"}
    before = state(source)
    assert "inside the source" in refusal(run_upgrade, source, spellings[spelling])
    assert state(source) == before and sorted(path.name for path in tmp_path.iterdir()) == ["2023", "link"]


@pytest.mark.parametrize(
    "run", [lambda source, target: run_upgrade(source, target), lambda source, _: in_place(source)]
)
@pytest.mark.parametrize("name, kind", [("qwen2_gqa_tied", "Qwen2"), ("llama_gqa", "LLaMA")])
def test_only_qwen_is_upgraded(golden, tmp_path, run, name, kind):
    source = shutil.copytree(golden / "native" / name, tmp_path / "source")
    before = state(source)
    message = refusal(run, source, tmp_path / "new")
    assert kind in message and "convert" in message
    assert state(source) == before and [path.name for path in tmp_path.iterdir()] == ["source"]
    assert not (source / WORK_FOLDER).exists()


@pytest.mark.parametrize(
    "run", [lambda source, target: run_upgrade(source, target), lambda source, _: in_place(source)]
)
def test_what_is_no_checkpoint_is_refused(tmp_path, run):
    (tmp_path / "file").write_text("{}")
    (tmp_path / "empty").mkdir()
    for name in ("file", "empty", "missing"):
        assert name in refusal(run, tmp_path / name, tmp_path / "new")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["empty", "file"]


# --- twice ---


@pytest.mark.parametrize("weights", ["bin", "safetensors"])
def test_the_same_upgrade_again_changes_nothing(release, tmp_path, weights):
    source = release(weights)
    assert run_upgrade(source, tmp_path / "new") is True
    before = state(tmp_path)
    assert run_upgrade(source, tmp_path / "new") is False
    assert state(tmp_path) == before


@pytest.mark.parametrize("weights", ["bin", "safetensors"])
def test_an_upgraded_folder_upgraded_is_the_same(release, upgraded, weights):
    once = upgraded(release(weights))
    assert contents(upgraded(once, "twice")) == contents(once)


def test_an_upgraded_folder_changes_with_the_source(release, upgraded, tmp_path):
    source = release()
    target = upgraded(source)
    before = state(target)
    (source / "LICENSE").write_text("another licence")
    assert "LICENSE differs" in refusal(run_upgrade, source, target)
    assert state(target) == before


def test_what_this_code_saves_is_up_to_date(checkpoint_folder, tmp_path):
    """Apart from the end of chats, which its owner may have wanted so."""
    moved = in_place(checkpoint_folder)
    assert set(moved) <= {"config.json", "generation_config.json", "tokenizer_config.json"}
    assert QWenLMHeadModel.from_pretrained(checkpoint_folder).generation_config.eos_token_id == [258, 256]


# --- in place ---


@pytest.mark.parametrize("weights", ["bin", "safetensors"])
def test_in_place_gives_what_a_new_folder_would_and_keeps_what_it_replaces(release, upgraded, weights):
    source = release(weights)
    (source / "training_args.bin").write_text("x")
    before, expected = contents(source), contents(upgraded(source))
    moved = in_place(source)
    after = contents(source)
    assert expected.items() <= after.items()
    pickles = {name for name in before if name.startswith("pytorch_model")}
    replaced = {name for name in before if expected.get(name, b"") != before[name]} - {"training_args.bin"}
    assert replaced == pickles | OLD_CODE | SETTINGS and replaced <= set(moved)
    assert set(moved) == replaced | (expected.keys() - before.keys())
    assert {f"{name}.bak" for name in replaced} == {name for name in after if ".bak" in name}
    assert all(after[f"{name}.bak"] == before[name] for name in replaced)
    assert after.keys() == expected.keys() | {f"{name}.bak" for name in replaced} | {"training_args.bin"}
    assert loading_problems(source) == []


def test_in_place_leaves_alone_what_does_not_change(release):
    source = release("safetensors")
    (source / ".cache").mkdir()
    for name in ("training_args.bin", ".cache/x", "events.out"):
        (source / name).write_text("x")
    before = state(source)
    in_place(source)
    kept = {*COMPANY, "qwen.tiktoken", "training_args.bin", ".cache/x", "events.out", "model.safetensors.index.json"}
    kept |= {path.name for path in source.glob("*.safetensors")}
    after = state(source)
    assert len(kept) == 14 and all(after[name] == before[name] for name in kept)


@pytest.mark.parametrize("weights", ["bin", "safetensors"])
def test_in_place_twice_changes_nothing(release, weights):
    source = release(weights)
    assert in_place(source)
    before = state(source)
    assert in_place(source) == [] and state(source) == before


def test_backups_never_take_the_place_of_others(release):
    source = release("safetensors")
    (source / "config.json.bak").write_text("mine")
    original = (source / "config.json").read_bytes()
    in_place(source)
    assert (source / "config.json.bak").read_text() == "mine"
    assert (source / "config.json.bak2").read_bytes() == original
    (source / "config.json").write_bytes(original)
    (source / "modeling_qwen.py").write_text("mine as well")
    assert sorted(in_place(source)) == ["config.json", "modeling_qwen.py"]
    assert (source / "config.json.bak3").read_bytes() == original
    assert (source / "modeling_qwen.py.bak2").read_text() == "mine as well"
    assert in_place(source) == []


def test_in_place_needs_space_for_what_is_new_and_says_so_before_anything_changes(release, monkeypatch):
    source = release()
    before = state(source)
    usage = namedtuple("usage", "total used free")(2**40, 2**40 - 2**20, 2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match="are needed"):
        in_place(source)
    assert state(source) == before and not (source / WORK_FOLDER).exists()


@pytest.mark.parametrize("name", ["config.json", "modeling_qwen.py", "chat_template.jinja"])
@pytest.mark.parametrize("weights", ["bin", "safetensors"])
def test_an_error_while_files_are_moved_loses_nothing_and_the_next_run_goes_on(release, monkeypatch, weights, name):
    source = release(weights)
    before, whole = contents(source), shutil.copytree(source, source.parent / "whole")
    in_place(whole)

    def refuse(path, target, replace=Path.replace):
        if Path(target) == source / name:
            raise OSError(errno.EACCES, "Permission denied", str(target))
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(OSError, match="Permission denied"):
        in_place(source)
    found = contents(source)
    assert all(data in (found.get(file), found.get(f"{file}.bak")) for file, data in before.items())
    monkeypatch.undo()
    assert name in in_place(source) and contents(source) == contents(whole)


def test_a_folder_of_somebody_else_in_the_place_of_the_work_folder_is_refused_and_kept(release):
    source = release()
    (source / WORK_FOLDER).mkdir()
    (source / WORK_FOLDER / "thesis.txt").write_text("mine")
    before = state(source)
    assert "in the way" in refusal(in_place, source)
    assert state(source) == before


def test_a_relative_folder_may_be_named(release, monkeypatch):
    source = release()
    monkeypatch.chdir(source)
    assert "config.json" in in_place(Path("."))
    monkeypatch.chdir(source.parent)
    assert run_upgrade(Path("2023"), Path("new")) and not run_upgrade(source, source.parent / "new")
