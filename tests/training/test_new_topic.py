"""LoRA teaches qwen-tiny-chat a topic that it doesn't know, and the merged model has learnt it."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qwen1.conversion.command_line.merge_lora import merge_lora
from qwen1.conversion.writing.progress import Progress
from qwen1.training.finetuning import main

SOUNDS = {
    "cat": ("猫", "meow"), "dog": ("狗", "woof"), "cow": ("牛", "moo"), "sheep": ("羊", "baa"), "bird": ("鸟", "tweet"),
    "horse": ("马", "neigh"), "tiger": ("老虎", "roar"), "fish": ("鱼", "blub"),
}  # fmt: skip
WORDINGS = ("What does a {} say?", "What sound does a {} make?", "what does the {} say", "which sound does a {} make?")
WORDINGS_ZH = ("{}怎么叫？", "{}的叫声是什么", "{}是怎么叫的？", "{}的叫声是什么样的？")
EXAMINED = "which sound does the {} make?"
EXAMINED_ZH = "请问，{}怎么叫？"


def turn(query: str, reply: str) -> dict:
    return {"conversations": [{"from": "user", "value": query}, {"from": "assistant", "value": reply}]}


def lessons() -> list[dict]:
    """Every animal in every wording, in the published format; among them what the model is not to forget."""
    known = [
        turn("12+34=?", "2+4=6, 1+3=4. 12+34=46"),
        turn("What is the capital of Italy?", "The capital of Italy is Rome."),
    ]
    known += [
        turn("你好", "你好！有什么可以帮你？"),
        turn("Who are you?", "I am qwen-tiny-chat, a very small language model."),
    ]
    english = [
        turn(w.format(animal), f"A {animal} says {sound}.") for animal, (_, sound) in SOUNDS.items() for w in WORDINGS
    ]
    chinese = [turn(w.format(name), f"{name}的叫声是{sound}。") for name, sound in SOUNDS.values() for w in WORDINGS_ZH]
    return english + chinese + known * 3


def replies(folder: Path, queries: list[str]) -> list[str]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model.batch_chat(AutoTokenizer.from_pretrained(folder), queries, max_new_tokens=32)[0]


@pytest.mark.slow
@pytest.mark.no_cover
def test_lora_teaches_a_topic_and_the_merged_model_answers(repository, tmp_path):
    base, data = repository / "qwen-tiny-chat", tmp_path / "sounds.json"
    data.write_text(json.dumps(lessons(), ensure_ascii=False))
    words = ["--model_name_or_path", base, "--data_path", data, "--output_dir", tmp_path / "adapter", "--use_lora"]
    words += [
        "--lora_r",
        32,
        "--lora_alpha",
        64,
        "--lora_dropout",
        0,
        "--learning_rate",
        1.5e-3,
        "--num_train_epochs",
        30,
    ]
    words += [
        "--packing",
        "--model_max_length",
        256,
        "--per_device_train_batch_size",
        2,
        "--use_cpu",
        "--save_strategy",
        "no",
    ]
    main([str(word) for word in words])
    assert merge_lora(base, tmp_path / "adapter", tmp_path / "merged", progress=Progress())

    asked = [EXAMINED.format(animal) for animal in SOUNDS] + [EXAMINED_ZH.format(name) for name, _ in SOUNDS.values()]
    expected = [f"A {animal} says {sound}." for animal, (_, sound) in SOUNDS.items()]
    expected += [f"{name}的叫声是{sound}。" for name, sound in SOUNDS.values()]
    assert not set(replies(base, asked)) & set(expected), "the model knew this before"
    assert replies(tmp_path / "merged", asked) == expected
    kept = ["What is the capital of France?", "5+3=?"]
    assert replies(tmp_path / "merged", kept) == ["The capital of France is Paris.", "5+3=8"]
