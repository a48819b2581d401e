"""`merge_lora`: adapters of peft against peft's own model, the files that go along, and what is refused."""

import base64
import hashlib
import json
import os
import shutil
import sys
from unittest.mock import patch

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from qwen1 import QWenLMHeadModel, QWenTokenizer
from qwen1.conversion.command_line.merge_lora import merge_lora
from qwen1.conversion.errors import CheckpointError
from qwen1.conversion.formats.companions import CODE_FILES
from qwen1.conversion.inspecting.inspection import inspect
from qwen1.conversion.opening.adapters import MERGEABLE
from qwen1.conversion.writing.progress import Progress

LINEAR = ["c_attn", "c_proj", "w1", "w2"]
SIGNED = ["c_attn", "attn.c_proj"]  # square enough for methods that need it
IDS = torch.randint(0, 464, (2, 24), generator=torch.Generator().manual_seed(3))


class Notes(Progress):
    """Keeps what is told."""

    def __init__(self):
        self.notes, self.tensors, self.advanced = [], 0, []

    def begin(self, tensors, nbytes):
        self.tensors = tensors

    def advance(self, name, nbytes, tensors=1):
        self.advanced += [name] * tensors

    def note(self, text):
        self.notes.append(text)


def lora(**options):
    return LoraConfig(**{"r": 4, "lora_alpha": 4, "target_modules": LINEAR, "task_type": "CAUSAL_LM", **options})


def load(folder, dtype=torch.float32):
    return QWenLMHeadModel.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()


def logits(model, ids=IDS):
    with torch.no_grad():
        return model.eval()(ids).logits


def change(model, scale=0.01):
    """Random values in place of what an adapter starts with."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.is_floating_point():
            parameter.data += scale * torch.randn(parameter.shape, generator=generator)


def hashes(folder):
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture(autouse=True)
def compilers():
    """peft's BOFT names compilers in the environment, and leaves them there where it can't compile."""
    with patch.dict(os.environ):
        yield


@pytest.fixture
def base(tmp_path, tiny_model):
    """Save a tiny model: (dtype, **configuration) -> folder."""

    def make(dtype=torch.float32, **changes):
        folder = tmp_path / "base"
        tiny_model(initializer_range=0.1, **changes).to(dtype).save_pretrained(folder)
        return folder

    return make


@pytest.fixture
def adapter(tmp_path):
    """Train nothing, but save an adapter of random values: (base, configuration, **save options) -> folder."""

    def make(folder, config, prepare=None, scale=0.01, **options):
        model = load(folder)
        if prepare is not None:
            prepare(model)
        torch.manual_seed(0)
        model = get_peft_model(model, config)
        change(model, scale)
        model.save_pretrained(tmp_path / "adapter", **options)
        return tmp_path / "adapter"

    return make


@pytest.fixture
def merged(tmp_path):
    """Merge: (base, adapter, **options) -> new folder."""

    def run(base, adapter, progress=None, **options):
        assert merge_lora(base, adapter, tmp_path / "merged", progress=progress or Progress(), **options)
        return tmp_path / "merged"

    return run


@pytest.fixture
def refused(tmp_path):
    """The error of a merge, which must leave nothing behind: (base, adapter, **options) -> text."""

    def run(base, adapter, **options):
        with pytest.raises(CheckpointError) as error:
            merge_lora(base, adapter, tmp_path / "refused", progress=Progress(), **options)
        assert not (tmp_path / "refused").exists() and not (tmp_path / "refused.partial").exists()
        return str(error.value)

    return run


def wrapped(base, adapter):
    """The base in float32 with the adapter on it, by peft alone."""
    return PeftModel.from_pretrained(load(base), adapter)


# --- logits ---


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True, "rank_pattern": {"w1": 2, "h.0.attn.c_attn": 8}, "alpha_pattern": {"w2": 3}},
        {"use_dora": True},
        {"target_modules": [*LINEAR, "wte", "lm_head"]},
        {"modules_to_save": ["wte", "lm_head"]},
        {"modules_to_save": ["ln_f", "h.1.mlp.w1"]},
        {"bias": "lora_only"},
        {"bias": "all", "target_modules": ["w1"]},
        {"lora_bias": True, "target_modules": ["c_attn"]},
        {"trainable_token_indices": {"wte": [1, 5], "lm_head": [1, 5]}},
        {"target_modules": ["c_attn"], "target_parameters": ["w1.weight"]},
        {"target_modules": r".*h\.0\..*c_proj"},
        {"target_modules": ["c_attn"], "layers_to_transform": [1], "layers_pattern": "h"},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"},
    ],
    ids=lambda options: "-".join(map(str, options)) or "plain",
)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_the_merged_model_gives_the_logits_of_the_adapter(base, adapter, merged, options, tied):
    source = base(tie_word_embeddings=tied)
    before = hashes(source)
    trained = adapter(source, lora(**{"init_lora_weights": False, **options}))
    expected = logits(wrapped(source, trained))
    assert (expected - logits(load(source))).abs().max() > 0.01
    folder = merged(source, trained)
    torch.testing.assert_close(logits(load(folder)), expected, atol=1e-5, rtol=0)
    auto = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    assert type(auto) is QWenLMHeadModel and torch.equal(logits(auto), logits(load(folder)))
    assert hashes(source) == before


METHODS = {
    "ADALORA": lambda: peft.AdaLoraConfig(total_step=10, target_modules=LINEAR),
    "BOFT": lambda: peft.BOFTConfig(boft_block_size=4, target_modules=LINEAR),
    "C3A": lambda: peft.C3AConfig(block_size=16, target_modules=SIGNED),
    "DELORA": lambda: peft.DeloraConfig(r=4, target_modules=LINEAR),
    "FOURIERFT": lambda: peft.FourierFTConfig(n_frequency=50, target_modules=LINEAR),
    "GRALORA": lambda: peft.GraloraConfig(r=4, gralora_k=2, target_modules=LINEAR),
    "HIRA": lambda: peft.HiraConfig(r=4, target_modules=LINEAR),
    "HRA": lambda: peft.HRAConfig(r=4, target_modules=LINEAR),
    "IA3": lambda: peft.IA3Config(target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"]),
    "LN_TUNING": lambda: peft.LNTuningConfig(target_modules=["ln_1", "ln_f"]),
    "LOHA": lambda: peft.LoHaConfig(r=4, target_modules=LINEAR),
    "LOKR": lambda: peft.LoKrConfig(r=4, target_modules=LINEAR),
    "LORA": lambda: lora(),
    "MISS": lambda: peft.MissConfig(r=4, target_modules=LINEAR),
    "OFT": lambda: peft.OFTConfig(oft_block_size=8, target_modules=LINEAR),
    "RANDLORA": lambda: peft.RandLoraConfig(r=4, target_modules=LINEAR),
    "ROAD": lambda: peft.RoadConfig(group_size=16, target_modules=SIGNED),
    "SHIRA": lambda: peft.ShiraConfig(r=4, target_modules=SIGNED),
    "TRAINABLE_TOKENS": lambda: peft.TrainableTokensConfig(token_indices=[1, 2], target_modules=["wte"]),
    "VBLORA": lambda: peft.VBLoRAConfig(r=4, num_vectors=16, vector_length=16, topk=2, target_modules=SIGNED),
    "VERA": lambda: peft.VeraConfig(r=4, target_modules=["c_attn"]),
    "WAVEFT": lambda: peft.WaveFTConfig(n_frequency=50, target_modules=LINEAR),
}


@pytest.mark.parametrize("method", MERGEABLE)
def test_half_precision_is_the_float32_merge_rounded_once(base, adapter, merged, method):
    """Of every method that is merged at all, bit for bit, against the merge of peft on the whole model."""
    if method not in peft.PeftType.__members__:
        pytest.skip(f"this version of peft has no {method}")
    source = base(torch.bfloat16)
    trained = adapter(source, METHODS[method](), scale=0.05)
    exact = wrapped(source, trained).merge_and_unload(safe_merge=True).state_dict()
    found = load_file(merged(source, trained) / "model.safetensors")
    assert found.keys() == exact.keys()
    assert all(torch.equal(tensor, exact[name].bfloat16()) for name, tensor in found.items())
    assert any(not torch.equal(tensor, exact[name]) for name, tensor in found.items())


def test_an_adapter_in_half_precision_is_taken_as_it_is(base, adapter, merged):
    source = base(torch.bfloat16)
    trained = adapter(source, lora(init_lora_weights=False))
    file = trained / "adapter_model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(file).items()}, file)
    exact = wrapped(source, trained).merge_and_unload().state_dict()
    found = load_file(merged(source, trained) / "model.safetensors")
    assert all(torch.equal(tensor, exact[name].bfloat16()) for name, tensor in found.items())


def test_ranks_that_adalora_has_pruned(base, adapter, merged):
    source = base()
    model = get_peft_model(load(source), peft.AdaLoraConfig(init_r=4, total_step=10, target_modules=["w1"]))
    change(model, 0.05)
    kept = {f"transformer.h.{layer}.mlp.w1.lora_E.default": [True, False, True, layer == 0] for layer in (0, 1)}
    model.peft_config["default"].rank_pattern = kept
    model.save_pretrained(source.with_name("adapter"))
    trained = source.with_name("adapter")
    stored = load_file(trained / "adapter_model.safetensors")
    assert {tensor.shape[0] for name, tensor in stored.items() if "lora_A" in name} == {2, 3}
    expected = logits(wrapped(source, trained))
    torch.testing.assert_close(logits(load(merged(source, trained))), expected, atol=1e-5, rtol=0)


# --- which weights there are afterwards ---


def test_embeddings_that_remain_equal_stay_tied(base, adapter, merged):
    source = base(tie_word_embeddings=True)
    folder = merged(source, adapter(source, lora(init_lora_weights=False)))
    assert config_of(folder)["tie_word_embeddings"] is True
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")


def test_embeddings_that_the_adapter_sets_apart_are_untied(base, adapter, merged):
    source = base(tie_word_embeddings=True)
    progress = Notes()
    folder = merged(source, adapter(source, lora(init_lora_weights=False, target_modules=["lm_head"])), progress)
    assert config_of(folder)["tie_word_embeddings"] is False
    stored = load_file(folder / "model.safetensors")
    assert torch.equal(stored["transformer.wte.weight"], load(source).lm_head.weight)
    assert any("no longer tied" in note for note in progress.notes)


def test_embeddings_that_were_trained_as_one_stay_tied(base, adapter, merged):
    if "ensure_weight_tying" not in LoraConfig.__dataclass_fields__:
        pytest.skip("this version of peft doesn't tie adapters")
    source = base(tie_word_embeddings=True)
    options = {"modules_to_save": ["wte", "lm_head"], "ensure_weight_tying": True}
    trained = adapter(source, lora(init_lora_weights=False, **options))
    expected = logits(wrapped(source, trained))
    folder = merged(source, trained)
    assert config_of(folder)["tie_word_embeddings"] is True
    torch.testing.assert_close(logits(load(folder)), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    "options", [{}, {"modules_to_save": ["wte", "lm_head"]}, {"target_modules": ["c_attn", "wte", "lm_head"]}]
)
def test_a_resized_embedding_takes_the_configuration_along(base, adapter, merged, tied, options):
    source = base(tie_word_embeddings=tied, padded_vocab_size=464)

    def resize(model):
        model.resize_token_embeddings(470, mean_resizing=False)
        model.lm_head.out_features = 470  # which transformers 5.4 forgets where they are tied

    trained = adapter(source, lora(init_lora_weights=False, **options), prepare=resize, save_embedding_layers=True)
    ids = torch.arange(446, 470)[None]
    reference = load(source)
    resize(reference)
    expected = logits(PeftModel.from_pretrained(reference, trained), ids)
    folder = merged(source, trained)
    config = config_of(folder)
    assert config["vocab_size"] == config["padded_vocab_size"] == 470
    torch.testing.assert_close(logits(load(folder), ids), expected, atol=1e-5, rtol=0)


def test_dtype_of_the_result(base, adapter, merged):
    source = base(torch.bfloat16)
    edit_json(source / "config.json", bf16=True, torch_dtype="bfloat16")
    trained = adapter(source, lora(init_lora_weights=False))
    expected = logits(wrapped(source, trained))
    folder = merged(source, trained, dtype=torch.float32)
    config = config_of(folder)
    assert (config["bf16"], config["fp16"], config["fp32"]) == (False, False, True)
    assert config["torch_dtype"] == config["dtype"] == "float32"
    model = QWenLMHeadModel.from_pretrained(folder, attn_implementation="eager")
    assert model.dtype == torch.float32
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=0)


def test_shards(base, adapter, merged):
    source = base()
    trained = adapter(source, lora(init_lora_weights=False))
    progress = Notes()
    folder = merged(source, trained, progress, max_shard_size="100KB")
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) > 2 and set(index.values()) == {path.name for path in folder.glob("*.safetensors")}
    assert sorted(progress.advanced) == sorted(index) and progress.tensors == len(index)
    torch.testing.assert_close(logits(load(folder)), logits(wrapped(source, trained)), atol=1e-5, rtol=0)


# --- what goes along ---


@pytest.fixture
def folder_of_2023(tmp_path, golden, tiny_model, byte_vocabulary):
    """A folder as released in 2023-08: two pickled shards, and code that must not run."""
    folder = tmp_path / "Qwen-7B-Chat"
    folder.mkdir()
    published = golden / "published_configs"
    config = json.loads((golden / "model" / "aug_ntk_logn" / "config.json").read_text())
    sizes = {"vocab_size": 464, "padded_vocab_size": 464, "ffn_hidden_size": 192, "layer_norm_epsilon": 1e-5}
    auto_map = json.loads((published / "2023-08-chat.config.json").read_text())["auto_map"]
    (folder / "config.json").write_text(json.dumps({**config, **sizes, "eos_token_id": 256, "auto_map": auto_map}))
    generation = json.loads((published / "2023-08-chat.generation_config.json").read_text())
    changes = {"eos_token_id": 256, "pad_token_id": 256, "max_new_tokens": 8}
    (folder / "generation_config.json").write_text(json.dumps(generation | changes))
    shutil.copy(published / "2023-08-chat.tokenizer_config.json", folder / "tokenizer_config.json")
    shutil.copy(byte_vocabulary, folder)
    for name in ("configuration_qwen.py", "modeling_qwen.py", "tokenization_qwen.py", "cpp_kernels.py"):
        (folder / name).write_text("raise SystemExit('code of 2023 ran')\n")
    state = tiny_model(initializer_range=0.1).state_dict()
    names = list(state)
    files = {"pytorch_model-00001-of-00002.bin": names[:7], "pytorch_model-00002-of-00002.bin": names[7:]}
    for file, part in files.items():
        torch.save({name: state[name] for name in part}, folder / file)
    places = {name: file for file, part in files.items() for name in part}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def test_a_folder_of_2023_becomes_a_whole_one_of_ours(folder_of_2023, adapter, merged, repository):
    trained = adapter(folder_of_2023, lora(init_lora_weights=False))
    expected = logits(wrapped(folder_of_2023, trained))
    before = hashes(folder_of_2023)
    folder = merged(folder_of_2023, trained)
    assert hashes(folder_of_2023) == before
    torch.testing.assert_close(logits(load(folder)), expected, atol=1e-5, rtol=0)
    assert not [name for name in hashes(folder) if name.endswith(".bin") or "adapter" in name or "cpp" in name]
    for name in CODE_FILES:
        assert (folder / name).read_bytes() == (repository / name).read_bytes()
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    response, history = model.chat(tokenizer, "你好", history=None)
    assert history == [("你好", response)]


def test_a_vocabulary_that_was_extended_goes_along(checkpoint_folder, adapter, merged):
    model_folder = checkpoint_folder
    QWenTokenizer.from_pretrained(model_folder).save_pretrained(model_folder)
    (model_folder / "tokenizer.json").write_text("{}")  # of the old vocabulary
    trained = adapter(
        model_folder,
        lora(init_lora_weights=False, modules_to_save=["wte", "lm_head"]),
        prepare=lambda model: model.resize_token_embeddings(466, mean_resizing=False),
    )
    words = [base64.b64encode(word).decode() + f" {464 + i}\n" for i, word in enumerate((b"he", b"wo"))]
    (trained / "qwen_extra.tiktoken").write_text("".join(words))
    folder = merged(model_folder, trained)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == config_of(folder)["vocab_size"] == 466
    assert tokenizer("he wo")["input_ids"] == [464, 32, 465]
    assert not (folder / "tokenizer.json").exists()
    load(folder).chat(tokenizer, "he", history=None)


def test_a_saved_tokenizer_takes_the_place_of_the_old_one(checkpoint_folder, byte_vocabulary, adapter, merged):
    trained = adapter(checkpoint_folder, lora(init_lora_weights=False))
    (checkpoint_folder / "qwen_extra.tiktoken").write_text(base64.b64encode(b"he").decode() + " 464\n")
    tokenizer = QWenTokenizer(str(byte_vocabulary), model_max_length=1234)
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(trained)
    folder = merged(checkpoint_folder, trained)
    assert not (folder / "qwen_extra.tiktoken").exists()
    loaded = AutoTokenizer.from_pretrained(folder)
    assert loaded.chat_template == tokenizer.chat_template and loaded.model_max_length == 1234
    assert loaded.apply_chat_template([{"role": "user", "content": "hi"}]).input_ids == [104, 105]


def test_a_template_of_the_base_outlives_settings_without_one(checkpoint_folder, adapter, merged):
    trained = adapter(checkpoint_folder, lora(init_lora_weights=False))
    (checkpoint_folder / "chat_template.jinja").unlink()
    edit_json(checkpoint_folder / "tokenizer_config.json", chat_template="{{ messages }}")
    (trained / "tokenizer_config.json").write_text('{"tokenizer_class": "QWenTokenizer", "model_max_length": 99}')
    loaded = AutoTokenizer.from_pretrained(merged(checkpoint_folder, trained))
    assert loaded.chat_template == "{{ messages }}" and loaded.model_max_length == 99


def test_a_fast_tokenizer_brings_its_vocabulary(checkpoint_folder, byte_vocabulary, adapter, merged):
    trained = adapter(checkpoint_folder, lora(init_lora_weights=False))
    tokenizer = AutoTokenizer.from_pretrained(checkpoint_folder)
    tokenizer.save_pretrained(trained)
    (trained / "qwen.tiktoken").unlink()
    (checkpoint_folder / "qwen.tiktoken").unlink()
    folder = merged(checkpoint_folder, trained)
    assert (folder / "qwen.tiktoken").read_bytes() == byte_vocabulary.read_bytes()
    assert AutoTokenizer.from_pretrained(folder)("hi")["input_ids"] == [104, 105]


def test_an_adapter_inside_the_base(checkpoint_folder, adapter, merged):
    """As trainings leave them: neither the adapter nor its settings become part of the result."""
    inside = checkpoint_folder / "checkpoint-10"
    adapter(checkpoint_folder, lora(init_lora_weights=False)).rename(inside)
    expected = wrapped(checkpoint_folder, inside).merge_and_unload().state_dict()
    shutil.copy(inside / "adapter_config.json", checkpoint_folder)
    folder = merged(checkpoint_folder, inside)
    assert not [name for name in hashes(folder) if "adapter" in name or "checkpoint" in name]
    found = load(folder).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def test_an_adapter_in_the_same_folder_as_its_base(checkpoint_folder, adapter, merged):
    trained = adapter(checkpoint_folder, lora(init_lora_weights=False))
    expected = wrapped(checkpoint_folder, trained).merge_and_unload().state_dict()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(trained / name, checkpoint_folder)
    folder = merged(checkpoint_folder, checkpoint_folder)
    assert not [name for name in hashes(folder) if "adapter" in name]
    assert all(torch.equal(tensor, expected[name]) for name, tensor in load(folder).state_dict().items())


# --- again ---


def test_twice_changes_nothing(base, adapter, merged, tmp_path):
    source = base(torch.bfloat16)
    trained = adapter(source, lora(init_lora_weights=False, use_dora=True))
    folder = merged(source, trained)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert not merge_lora(source, trained, folder, progress=Progress())
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    with pytest.raises(CheckpointError, match="holds something else"):
        merge_lora(source, trained, folder, dtype=torch.float32, progress=Progress())


class Interrupted(Exception):
    pass


class Interrupting(Notes):
    def advance(self, name, nbytes, tensors=1):
        super().advance(name, nbytes, tensors)
        if len(self.advanced) > 12:
            raise Interrupted


def test_an_interrupted_merge_is_taken_up_unless_the_adapter_is_another(base, adapter, tmp_path):
    source = base()
    trained = adapter(source, lora(init_lora_weights=False))

    def run(progress, name):
        merge_lora(source, trained, tmp_path / name, max_shard_size="60KB", progress=progress)

    for name in ("first", "second"):
        with pytest.raises(Interrupted):
            run(Interrupting(), name)
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "first.partial").glob("*.safetensors")}
    progress = Notes()
    run(progress, "first")
    assert kept and all((tmp_path / "first" / name).stat().st_mtime_ns == stamp for name, stamp in kept.items())
    assert any("interrupted" in note for note in progress.notes)
    os.utime(trained / "adapter_model.safetensors", ns=(0, 0))
    progress = Notes()
    run(progress, "second")
    assert not any("interrupted" in note for note in progress.notes)
    assert hashes(tmp_path / "first") == hashes(tmp_path / "second")


# --- refusals ---


def test_prompts_are_refused(base, adapter, refused):
    source = base()
    for config in (
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
        peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    ):
        message = refused(source, adapter(source, config))
        assert config.peft_type.value in message and "PeftModel.from_pretrained" in message


def test_classifiers_are_refused(base, adapter, refused):
    source = base()
    trained = adapter(source, lora(init_lora_weights=False))
    edit_json(trained / "adapter_config.json", task_type="SEQ_CLS")
    assert "SEQ_CLS" in refused(source, trained)
    edit_json(trained / "adapter_config.json", task_type=None, modules_to_save=["score"])
    assert "'score'" in refused(source, trained)


def test_other_layers_than_the_base_has_are_refused(base, adapter, refused):
    source = base()
    trained = adapter(source, lora(init_lora_weights=False))
    edit_json(trained / "adapter_config.json", layer_replication=[[0, 1], [0, 2]])
    assert "layer_replication" in refused(source, trained)
    edit_json(trained / "adapter_config.json", layer_replication=None, megatron_config={"a": 1})
    assert "megatron_config" in refused(source, trained)


def test_an_adapter_of_another_base_is_refused_by_name(base, adapter, refused, tiny_model, tmp_path):
    trained = adapter(base(), lora(init_lora_weights=False, target_modules=["w1"]))

    def other(**changes):
        folder = tmp_path / f"other-{'-'.join(changes)}"
        tiny_model(**changes).save_pretrained(folder)
        return refused(folder, trained)

    name = "base_model.model.transformer.h.{}.mlp.w1.lora_{}.weight"
    assert name.format(1, "A") in other(n_layer=1)
    assert name.format(2, "A") in other(n_layer=3)
    message = other(ffn_hidden_size=128)
    assert name.format(0, "B") in message and "(96, 4)" in message and "(64, 4)" in message
    edit_json(trained / "adapter_config.json", target_modules=["q_proj"])
    assert "q_proj" in refused(base(), trained)


def test_embeddings_of_another_base_are_refused(base, adapter, refused, tiny_model, tmp_path):
    trained = adapter(base(), lora(init_lora_weights=False, modules_to_save=["wte"]))
    tiny_model(n_embd=32).save_pretrained(tmp_path / "narrow")
    message = refused(tmp_path / "narrow", trained)
    assert "transformer.wte.weight" in message and "(464, 64)" in message and "(464, 32)" in message
    tiny_model(vocab_size=400).save_pretrained(tmp_path / "short")
    message = refused(tmp_path / "short", trained)
    assert "464 rows" in message and "'lm_head.weight' has 400" in message and "save_embedding_layers" in message


def test_a_vocabulary_without_its_rows_is_refused(checkpoint_folder, adapter, refused):
    trained = adapter(checkpoint_folder, lora(init_lora_weights=False))
    extra = trained / "qwen_extra.tiktoken"
    extra.write_text(base64.b64encode(b"he").decode() + " 464\n")
    message = refused(checkpoint_folder, trained)
    assert "465 tokens" in message and "464 rows" in message and "resize_token_embeddings" in message
    extra.write_text("?")
    assert "can't be read" in refused(checkpoint_folder, trained)


def test_quantised_weights_are_refused(base, adapter, refused):
    source = base()
    trained = adapter(source, lora(init_lora_weights=False))
    edit_json(source / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    message = refused(source, trained)
    assert "gptq" in message and "full weights" in message


def test_what_is_no_adapter_is_refused(base, adapter, refused, tmp_path):
    source = base()
    trained = adapter(source, lora(init_lora_weights=False))
    assert "adapter_config.json doesn't exist" in refused(source, source)
    assert "its folders adapter" in refused(source, tmp_path)
    stored = (trained / "adapter_model.safetensors").read_bytes()
    (trained / "adapter_model.safetensors").write_bytes(stored[: len(stored) // 2])
    assert "truncated or damaged" in refused(source, trained)
    (trained / "adapter_model.safetensors").unlink()
    assert "has no weights" in refused(source, trained)


def test_only_qwen_is_a_base(golden, base, adapter, refused):
    trained = adapter(base(), lora(init_lora_weights=False))
    assert "only adapters of QWen" in refused(golden / "native" / "qwen2_mha_untied", trained)


def test_pickled_adapters_hold_tensors_only(base, adapter, merged, refused):
    source = base()
    trained = adapter(source, lora(init_lora_weights=False), safe_serialization=False)
    assert (trained / "adapter_model.bin").is_file()
    expected = logits(wrapped(source, trained))
    torch.testing.assert_close(logits(load(merged(source, trained))), expected, atol=1e-5, rtol=0)

    class Payload:
        def __reduce__(self):
            return print, ("code ran",)

    torch.save({"weight": Payload()}, trained / "adapter_model.bin")
    assert "pickles more than tensors" in refused(source, trained)


@pytest.mark.parametrize("where", ["adapter", "base"])
def test_values_that_are_not_finite_are_refused_by_name(base, adapter, refused, where):
    source = base()
    trained = adapter(source, lora(init_lora_weights=False, target_modules=["w1"]))
    file, name = {
        "adapter": (trained / "adapter_model.safetensors", "base_model.model.transformer.h.1.mlp.w1.lora_A.weight"),
        "base": (source / "model.safetensors", "transformer.h.1.mlp.w1.weight"),
    }[where]
    tensors = load_file(file)
    tensors[name][0, 0] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    message = refused(source, trained)
    assert "transformer.h.1.mlp.w1.weight" in message and str(file) in message


def test_values_too_large_for_the_dtype_are_refused(base, adapter, refused):
    source = base()
    trained = adapter(source, lora(init_lora_weights=False, target_modules=["w1"], lora_alpha=1e7))
    assert "torch.float16 is too narrow" in refused(source, trained, dtype=torch.float16)


def test_a_layer_that_cannot_take_the_change_is_named(base, adapter, refused):
    source = base()
    with pytest.warns(UserWarning, match="bias"):
        trained = adapter(source, lora(init_lora_weights=False, lora_bias=True, target_modules=["w1"]))
    message = refused(source, trained)
    assert "transformer.h.0.mlp.w1" in message and "no bias" in message


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_base_that_peft_changes_unexpectedly_is_noticed(base, adapter, refused, monkeypatch, start):
    """LoRAs are merged without showing peft the base: that must never go unnoticed where it matters."""
    source = base()
    trained = adapter(source, lora(init_lora_weights=start))
    monkeypatch.setattr("qwen1.conversion.opening.adapters._PLAIN_STARTS", (start,))
    refused(source, trained)


@pytest.mark.parametrize("form", ["safetensors", "bin"])
@pytest.mark.parametrize("which", ["one", "all"])
def test_what_zero_3_left_empty_is_named_with_its_cause(base, adapter, refused, form, which):
    """As save_pretrained of a model whose tensors DeepSpeed had spread over processes."""
    source = base()
    trained = adapter(source, lora(init_lora_weights=False))
    tensors = load_file(trained / "adapter_model.safetensors")
    emptied = sorted(tensors)[:1] if which == "one" else sorted(tensors)
    tensors |= {name: torch.empty(0) for name in emptied}
    if form == "bin":
        (trained / "adapter_model.safetensors").unlink()
        torch.save(tensors, trained / "adapter_model.bin")
    else:
        save_file(tensors, trained / "adapter_model.safetensors")
    text = refused(source, trained)
    assert repr(emptied[0]) in text and f"{len(emptied)} of {len(tensors)} tensors" in text
    for told in (text, " ".join(inspect(trained).problems)):
        assert "ZeRO-3" in told and "stage3_gather_16bit_weights_on_model_save" in told and "zero_to_fp32" in told


def test_an_empty_base_is_named_with_its_cause_too(base, adapter, refused):
    source = base()
    trained = adapter(source, lora(init_lora_weights=False))
    tensors = load_file(source / "model.safetensors")
    save_file({**tensors, "transformer.h.1.mlp.w1.weight": torch.empty(0)}, source / "model.safetensors")
    for text in (refused(source, trained), " ".join(inspect(source).problems)):
        assert "'transformer.h.1.mlp.w1.weight'" in text and "empty" in text and "ZeRO-3" in text


def test_a_change_that_depends_on_the_text_is_refused(base, adapter, refused):
    if "alora_invocation_tokens" not in LoraConfig.__dataclass_fields__:
        pytest.skip("this version of peft has no activated LoRA")
    source = base()
    trained = adapter(source, lora(init_lora_weights=False, alora_invocation_tokens=[1, 2]))
    assert "aLoRA does not support" in refused(source, trained)


def test_a_target_inside_the_base_is_refused(base, adapter):
    source = base()
    trained = adapter(source, lora(init_lora_weights=False))
    for target in (source, source / "merged"):
        with pytest.raises(CheckpointError, match="in the folder of the base"):
            merge_lora(source, trained, target, progress=Progress())


def test_peft_is_needed(base, adapter, refused, monkeypatch):
    source = base()
    trained = adapter(source, lora(init_lora_weights=False))
    monkeypatch.setitem(sys.modules, "peft", None)
    assert "pip install peft" in refused(source, trained)


def test_what_this_version_of_peft_does_not_know_is_told(base, adapter, merged, refused, monkeypatch):
    source = base()
    trained = adapter(source, lora(init_lora_weights=False))
    edit_json(trained / "adapter_config.json", invented_option=True)
    progress = Notes()
    merged(source, trained, progress)
    assert any("invented_option" in note for note in progress.notes)
    monkeypatch.setattr("qwen1.conversion.opening.adapters.MERGEABLE", ("INVENTED",))
    edit_json(trained / "adapter_config.json", peft_type="INVENTED")
    assert "pip install -U peft" in refused(source, trained)
