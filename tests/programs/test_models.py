"""The name of a model on a command line: which words are one, and what is said of those that lead to none."""

import json
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qwen1 import QWenBitsConfig
from qwen1.programs import models
from qwen1.programs.models import ModelError, check_model, names_model, open_model
from qwen1.training.finetuning import main as finetune
from qwen1.training.models import load_tokenizer


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def folder(here):
    """Make a folder: (name, file=its JSON, …)."""

    def make(name="model", **files):
        path = here / name
        path.mkdir(parents=True)
        for stem, values in files.items():
            (path / f"{stem}.json").write_text(json.dumps(values))
        return path

    return make


@pytest.mark.parametrize(
    "word",
    [
        *("./here", "../there", "/folder/model", "~/model", ".\\model", "C:\\models\\chat"),
        *("Qwen/Qwen-7B-Chat", "me/my.model", "models/tuned"),
        *("Qwen-7B-Chat", "my-qwen", "qwen"),
    ],
)
def test_a_word_in_the_form_of_a_model(here, word):
    assert names_model(word)


@pytest.mark.parametrize(
    "word",
    [
        *("", " ", "你好", "你好/再见", "hello", "12+34=?", "3/4", "What is and/or?", "Is this qwen?", "Qwen, hello"),
        *("a\0b", "x" * 5000, "... why?", "~"),
    ],
)
def test_a_word_in_the_form_of_a_question(here, word):
    assert not names_model(word)


def test_a_word_that_is_there_is_a_model(folder):
    folder("data")
    assert names_model("data") and not names_model("date?")


def test_a_word_that_is_nearly_the_folder_of_a_model(folder):
    folder("tuned-model", config={})
    folder("weather")
    assert names_model("tunedmodel") and names_model("tuned-modle")
    assert not names_model("wether"), "no model is in that folder"
    assert not names_model("tuned model")


# --- what is said ---


def said(name, **options):
    with pytest.raises(ModelError) as raised:
        check_model(name, **options)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_a_good_folder_and_an_id_pass(checkpoint_folder, here):
    check_model(checkpoint_folder)
    check_model("Qwen/Qwen-7B-Chat")


@pytest.mark.parametrize("name", ["./Qwen-7B", "Qwen-7B", "models/Qwen-7B", "a/b/c"])
def test_a_path_that_is_not_there(folder, name):
    folder("Qwen-7B-Chat")
    folder("models/Qwen-7B-Chat")
    text = said(name)
    assert f"{name} doesn't exist" in text and "organisation/name" in text
    assert ("did you mean" in text) == (name != "a/b/c")


def test_an_empty_name_is_not_the_current_folder(here):
    (here / "config.json").write_text("{}")
    assert "name of the model is empty" in said("")


def test_a_file(here):
    (here / "model.gguf").touch()
    (here / "config.json").touch()
    assert "llama.cpp" in said("model.gguf")
    assert "is a file: name the folder" in said("config.json")


def test_a_folder_without_a_model(folder):
    assert "no config.json, so it is no model" in said(folder("empty"))
    folder("outer/inner", config={})
    assert "name outer/inner" in said("outer")
    assert "qwen1-checkpoint convert meta NEW --to qwen" in said(folder("meta", params={}).name)


def test_a_training_that_has_not_ended(folder):
    for step in (20, 100, 3):
        folder(f"out/checkpoint-{step}", config={})
    assert "name out/checkpoint-100" in said("out")


@pytest.mark.parametrize("kind, command", [("qwen2", True), ("llama", True), ("gpt2", False)])
def test_a_model_of_another_type(folder, kind, command):
    text = said(folder("other", config={"model_type": kind}).name)
    assert repr(kind) in text and ("qwen1-checkpoint convert other NEW --to qwen" in text) == command


def test_a_model_without_vocabulary(folder):
    assert "no vocabulary (qwen.tiktoken or tokenizer.json)" in said(folder(config={"model_type": "qwen"}))


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe", b"[" * 100_000])
def test_a_damaged_configuration(folder, content):
    path = folder()
    (path / "config.json").write_bytes(content)
    assert "config.json is damaged" in said(path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]"])
@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer_config.json"])
def test_damaged_settings(checkpoint_folder, name, content):
    (checkpoint_folder / name).write_bytes(content)
    assert f"{checkpoint_folder / name} is damaged" in said(checkpoint_folder)
    (checkpoint_folder / name).unlink()
    check_model(checkpoint_folder)


def test_a_pointer_of_git_lfs(folder):
    path = folder()
    (path / "config.json").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    assert "git lfs pull" in said(path)


def test_an_adapter_without_peft(folder, monkeypatch):
    path = folder("adapter", adapter_config={"base_model_name_or_path": "Qwen/Qwen-7B-Chat"})
    monkeypatch.setitem(sys.modules, "peft", None)
    text = said("adapter")
    assert "pip install peft" in text and "merge-lora Qwen/Qwen-7B-Chat adapter NEW" in text
    assert path.is_dir()


def test_an_adapter_whose_base_is_gone(folder, monkeypatch):
    monkeypatch.setattr(models, "find_spec", lambda name: name)
    folder("adapter", adapter_config={"base_model_name_or_path": "/folder/of/another"})
    assert "adapter of /folder/of/another, which isn't there" in said("adapter")
    folder("nameless", adapter_config={})
    assert "merge-lora BASE nameless NEW" in said("nameless")


def test_an_adapter_where_a_whole_model_is_needed(folder):
    folder("adapter", adapter_config={"base_model_name_or_path": "base"})
    assert "merge-lora base adapter NEW" in said("adapter", adapters=False)


def test_an_id_that_the_hub_gives_nothing_for(monkeypatch, here):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="can't be had from the Hub.*`hf download nobody/nothing`") as raised:
        open_model("nobody/nothing")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("installed", [True, False])
def test_an_adapter_on_the_hub(monkeypatch, here, installed):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("transformers.utils.find_adapter_config_file", lambda name: "adapter_config.json")
    monkeypatch.setattr(models, "find_spec", lambda name: installed or None)
    opened = []
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", opened.append)
    monkeypatch.setattr(models, "_load_adapted", lambda name: opened.append(name) or Model())
    if installed:
        open_model("me/adapter")
        assert opened == ["me/adapter"] * 2
    else:
        with pytest.raises(ModelError, match="pip install peft"):
            open_model("me/adapter")


class Model:
    config = generation_config = None

    def eval(self):
        return self


def adapted(base, target, **settings):
    """A model with an adapter, which is saved."""
    peft = pytest.importorskip("peft", reason="peft isn't installed")
    config = peft.LoraConfig(r=2, target_modules=["c_attn"], task_type="CAUSAL_LM", **settings)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).eval()
    for name, weight in model.named_parameters():
        if "magnitude" in name:
            weight.data *= 2
    model.save_pretrained(target)
    return model


def test_an_adapter_takes_the_vocabulary_of_its_base(checkpoint_folder, folder):
    adapted(checkpoint_folder, folder("adapter"))
    model, tokenizer = open_model("adapter")
    assert type(model).__name__ == "QWenLMHeadModel" and not model.training
    assert tokenizer("hello").input_ids == open_model(checkpoint_folder)[1]("hello").input_ids


def test_an_adapter_that_lacks_tensors_is_refused(checkpoint_folder, here):
    adapted(checkpoint_folder, here / "adapter")
    file = here / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    del tensors["base_model.model.transformer.h.1.attn.c_attn.lora_B.weight"]
    save_file(tensors, file)
    with pytest.raises(ModelError, match=r"adapter lacks tensors .*transformer\.h\.1\.attn\.c_attn\.lora_B"):
        open_model("adapter")


@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_is_the_one_that_was_trained(checkpoint_folder, here, dora):
    trained = adapted(checkpoint_folder, here / "adapter", use_dora=dora, init_lora_weights=False)
    model, _ = open_model("adapter", dtype=torch.float32)
    ids = torch.arange(1, 9)[None]
    with trained.disable_adapter():
        before = trained(ids).logits
    assert not torch.allclose(trained(ids).logits, before, atol=0.01)
    torch.testing.assert_close(model(ids).logits, trained(ids).logits)


def test_an_adapter_without_layers_is_refused(checkpoint_folder, here):
    peft = pytest.importorskip("peft", reason="peft isn't installed")
    base = AutoModelForCausalLM.from_pretrained(checkpoint_folder)
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    peft.get_peft_model(base, config).save_pretrained(here / "adapter")
    with pytest.raises(ModelError, match="adapter of the kind PROMPT_TUNING, .*AutoPeftModelForCausalLM"):
        open_model("adapter")


# --- files that don't belong together ---


@pytest.fixture
def tiny_chat(repository, tmp_path):
    """A copy of the model that ships, without its code."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    for path in (repository / "qwen-tiny-chat").iterdir():
        if path.suffix in (".json", ".safetensors", ".tiktoken"):
            shutil.copyfile(path, folder / path.name)
    return folder


def cut(path, lines):
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:lines]))


def not_opened(folder):
    with pytest.raises(ModelError) as raised:
        open_model(folder)
    return str(raised.value)


@pytest.mark.parametrize(
    "options", [{}, {"device_map": "cpu", "quantization_config": QWenBitsConfig(8)}], ids=["", "bits"]
)
def test_weights_that_lack_a_layer(tiny_chat, options):
    values = json.loads((tiny_chat / "config.json").read_text())
    (tiny_chat / "config.json").write_text(json.dumps({**values, "n_layer": 7, "num_hidden_layers": 7}))
    with pytest.raises(ValueError if options else ModelError, match="transformer.h.6.attn.c_attn"):
        open_model(tiny_chat, **options)


def test_a_training_lacks_no_layer(tiny_chat, tmp_path, capsys):
    values = json.loads((tiny_chat / "config.json").read_text())
    (tiny_chat / "config.json").write_text(json.dumps({**values, "n_layer": 7, "num_hidden_layers": 7}))
    record = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    (tmp_path / "data.jsonl").write_text(json.dumps(record))
    words = [
        "--model_name_or_path",
        tiny_chat,
        "--data_path",
        tmp_path / "data.jsonl",
        "--output_dir",
        tmp_path / "out",
    ]
    with pytest.raises(SystemExit) as end:
        finetune([*map(str, words), "--use_cpu", "True"])
    assert end.value.code == 1 and "lacks 8 of the weights that its config.json asks for" in capsys.readouterr().err


@pytest.mark.parametrize("lines", [567, 1990, 1999])
def test_a_vocabulary_that_is_cut_short(tiny_chat, lines):
    cut(tiny_chat / "qwen.tiktoken", lines)
    assert f"{tiny_chat / 'qwen.tiktoken'} has {lines:,} tokens" in not_opened(tiny_chat)
    (tiny_chat / "tokenizer.json").unlink()
    text = not_opened(tiny_chat)
    assert f"<|endoftext|> is token {lines:,} and" in text and "config.json has eos_token_id=2000" in text
    assert text.endswith("truncated or another model's. Download it again.")
    with pytest.raises(ModelError, match="truncated"):
        load_tokenizer(str(tiny_chat))


def test_generation_settings_that_are_another_models(tiny_chat):
    settings = json.loads((tiny_chat / "generation_config.json").read_text())
    (tiny_chat / "generation_config.json").write_text(json.dumps({**settings, "eos_token_id": 1643}))
    assert "generation_config.json has eos_token_id=1643" in not_opened(tiny_chat)


@pytest.mark.parametrize("ends", [2000, 2002, [2002], [198, 2000], 2003, None])
def test_a_vocabulary_that_is_the_models(tiny_chat, ends):
    settings = json.loads((tiny_chat / "generation_config.json").read_text())
    (tiny_chat / "generation_config.json").write_text(json.dumps({**settings, "eos_token_id": ends}))
    assert open_model(tiny_chat)[1].im_end_id == 2002


def test_ends_that_are_of_no_token(checkpoint_folder):
    """As the defaults are in a small vocabulary."""
    values = json.loads((checkpoint_folder / "config.json").read_text())
    (checkpoint_folder / "config.json").write_text(json.dumps({**values, "eos_token_id": 151643}))
    (checkpoint_folder / "generation_config.json").unlink()
    assert open_model(checkpoint_folder)[1].im_end_id == 258


def test_an_end_that_the_tokenizer_names(tiny_chat):
    for name in ("config", "generation_config", "tokenizer_config"):
        values = json.loads((tiny_chat / f"{name}.json").read_text())
        values |= {"eos_token": "<|extra_0|>"} if name == "tokenizer_config" else {"eos_token_id": 2003}
        (tiny_chat / f"{name}.json").write_text(json.dumps(values))
    assert open_model(tiny_chat)[1].eos_token_id == 2003
