"""A base model that learnt to chat says so: the settings of a chat travel with its adapter, and are used."""

import json

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from qwen1.conversion.command_line.merge_lora import merge_lora
from qwen1.conversion.writing.progress import Progress
from qwen1.peft_qwen import settings_of_adapter
from qwen1.training.finetuning import main

RAW = {
    "chat_format": "raw",
    "eos_token_id": 256,
    "pad_token_id": 256,
    "stop_words_ids": [[256]],
    "max_new_tokens": 8,
}
CHAT = {"chat_format": "chatml", "eos_token_id": [258, 256], "pad_token_id": 256, "max_window_size": 2048}
LORA = ["--max_steps", 2, "--use_lora", "--lora_r", 4]


@pytest.fixture
def base(checkpoint_folder):
    """A base model, as published."""
    (checkpoint_folder / "generation_config.json").write_text(json.dumps(RAW))
    return checkpoint_folder


@pytest.fixture
def tokenizer(base):
    return AutoTokenizer.from_pretrained(base)


def read_json(path):
    return json.loads(path.read_text())


def chosen(settings):
    return {name: settings.get(name) for name in CHAT}


def reply(model, tokenizer):
    return model.eval().chat(tokenizer, "q1", history=None)[0]


# --- an adapter ---


def test_an_adapter_brings_its_settings_along(options, tmp_path, base, tokenizer):
    with pytest.raises(ValueError, match="was not taught to chat"):
        reply(AutoModelForCausalLM.from_pretrained(base), tokenizer)
    main(options(*LORA, "--save_strategy", "steps", "--save_steps", 2))
    out = tmp_path / "out"
    adapter = read_json(out / "adapter_config.json")
    assert adapter["modules_to_save"] == ["wte", "lm_head"]  # the control tokens are new to a base model
    assert adapter["auto_mapping"]["generation_config"] == CHAT
    assert chosen(read_json(out / "generation_config.json")) == CHAT
    plain = AutoModelForCausalLM.from_pretrained(base)
    assert plain.generation_config.chat_format == "raw"
    loaded = PeftModel.from_pretrained(plain, out)
    expected = reply(loaded, tokenizer)
    assert chosen(vars(loaded.generation_config)) == CHAT
    assert reply(AutoPeftModelForCausalLM.from_pretrained(out), tokenizer) == expected
    assert reply(
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), out / "checkpoint-2"), tokenizer
    ) == (expected)
    merged = loaded.merge_and_unload()
    assert not hasattr(merged, "peft_config")
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert reply(again, tokenizer) == reply(merged, tokenizer) and chosen(vars(again.generation_config)) == CHAT


@pytest.mark.parametrize("has_file", [True, False])
def test_a_merged_folder_chats(options, tmp_path, base, has_file):
    main(options(*LORA))
    if not has_file:  # as in a checkpoint of the training
        (tmp_path / "out" / "generation_config.json").unlink()
    assert merge_lora(base, tmp_path / "out", tmp_path / "merged", progress=Progress())
    settings = read_json(tmp_path / "merged" / "generation_config.json")
    assert chosen(settings) == CHAT and settings["max_new_tokens"] == 8 and "_from_model_config" not in settings
    assert GenerationConfig.from_pretrained(tmp_path / "merged").chat_format == "chatml"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    merged_tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    expected = reply(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out"), merged_tokenizer)
    assert reply(model, merged_tokenizer) == expected


@pytest.mark.slow
def test_an_adapter_that_is_trained_on(options, tmp_path, base, tokenizer):
    main(options(*LORA, output="first"))
    config = read_json(tmp_path / "first" / "adapter_config.json")
    (tmp_path / "first" / "adapter_config.json").write_text(json.dumps({**config, "auto_mapping": None}))  # an old one
    main(options("--max_steps", 1, "--use_lora", "--lora_weight_path", tmp_path / "first"))
    assert read_json(tmp_path / "out" / "adapter_config.json")["auto_mapping"]["generation_config"] == CHAT


def test_plain_texts_teach_no_chat(options, tmp_path, base, tokenizer):
    (tmp_path / "texts.txt").write_text("one text\n\nanother\n\n" + "long " * 40)
    main(options(*LORA, "--plain_texts", data=tmp_path / "texts.txt"))
    assert read_json(tmp_path / "out" / "adapter_config.json")["auto_mapping"] is None
    with pytest.raises(ValueError, match="was not taught to chat"):
        reply(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out"), tokenizer)
    assert merge_lora(base, tmp_path / "out", tmp_path / "merged", progress=Progress())
    assert read_json(tmp_path / "merged" / "generation_config.json")["chat_format"] == "raw"


def test_a_chat_model_keeps_its_settings(options, tmp_path, checkpoint_folder, edit_json):
    edit_json(checkpoint_folder / "generation_config.json", max_window_size=777, eos_token_id=[258, 256, 5])
    main(options(*LORA))
    assert read_json(tmp_path / "out" / "adapter_config.json")["modules_to_save"] is None
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.generation_config.max_window_size == 777 and model.generation_config.eos_token_id == [258, 256, 5]


@pytest.mark.slow
@pytest.mark.no_cover
def test_q_lora_on_a_base_model_warns(options, tmp_path, base, capsys):
    main(options(*LORA, "--q_lora"))
    said = capsys.readouterr().err
    assert "Warning:" in said and "<|im_end|> were never trained" in " ".join(said.split())
    main(options(*LORA, output="plain"))
    assert "Warning" not in capsys.readouterr().err


# --- all weights ---


def test_a_base_model_that_was_trained_whole(options, tmp_path, base, tokenizer):
    main(options("--max_steps", 2, "--save_strategy", "steps", "--save_steps", 2))
    for folder in (tmp_path / "out", tmp_path / "out" / "checkpoint-2"):
        settings = read_json(folder / "generation_config.json")
        assert set(settings["eos_token_id"]) == {258, 256} and settings["chat_format"] == "chatml"
        assert reply(AutoModelForCausalLM.from_pretrained(folder), tokenizer) is not None
    assert chosen(read_json(tmp_path / "out" / "generation_config.json")) == CHAT


# --- adapters of other makers ---


def test_a_foreign_adapter_is_told_what_to_do(tiny_model, tokenizer):
    model = tiny_model()
    model.generation_config.update(**RAW, allow_custom_entries=True)
    wrapped = get_peft_model(model, LoraConfig(target_modules=["c_attn"], task_type="CAUSAL_LM"))
    assert model.peft_config is wrapped.base_model.peft_config
    remedy = r"tell it so: model\.generation_config\.chat_format = 'chatml', or \"chat_format\": \"chatml\" in its gen"
    with pytest.raises(ValueError, match=remedy):
        reply(wrapped, tokenizer)
    wrapped.generation_config.chat_format = "chatml"
    assert reply(wrapped, tokenizer) is not None


@pytest.mark.parametrize(
    "mapping", [None, {}, {"base_model_class": "X", "parent_library": "y"}, 5, {"generation_config": 3}]
)
def test_other_mappings_hold_nothing(mapping):
    assert settings_of_adapter(mapping) == {}


def test_only_the_settings_of_a_chat_are_taken():
    found = settings_of_adapter({"generation_config": {**CHAT, "max_new_tokens": 10**9, "cache_implementation": "x"}})
    assert found == CHAT


def test_an_attribute_like_any_other(tiny_model):
    model = tiny_model()
    assert not hasattr(model, "peft_config") and getattr(model, "peft_config", None) is None
    model.peft_config = {}
    assert model.peft_config == {}
    del model.peft_config
    with pytest.raises(AttributeError, match="peft_config"):
        _ = model.peft_config
    with torch.no_grad():
        assert model(torch.arange(4)[None]).logits.shape == (1, 4, 464)
