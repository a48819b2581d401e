"""What a training leaves beside the weights: its model card, and the last words with the command that chats."""

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from qwen1.training.card import Training, chat_command, farewell, model_card
from qwen1.training.finetuning import main

LORA = ["--use_lora", "--lora_r", "4"]


@pytest.fixture
def card(tmp_path):
    """Make the card of a result in the folder `out`: (**of Training)."""

    def make(**changes):
        values = {"folder": tmp_path / "out", "base": "org/base", "method": "sft", "adapter": False, "chats": True}
        return model_card(Training(**{**values, "data": {"data.jsonl": "3 examples"}, **changes}))

    return make


def run_code(text, folder, monkeypatch):
    """What the Python of a card prints, in a folder where the names in it are."""
    monkeypatch.chdir(folder)
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, {})
    return printed.getvalue()


# --- the card of a run ---


@pytest.mark.parametrize("words", [[], LORA], ids=["full", "lora"])
def test_the_card_of_a_run(options, tmp_path, monkeypatch, words):
    main(options("--max_steps", 2, "--eval_fraction", 0.2, "--learning_rate", 0.002, *words))
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "# Model Card for Model ID" not in text and "[More Information Needed]" not in text
    assert "- `data.jsonl`: 12 conversations, " in text and "- `evaluation`: 2 of 12 examples, held out by " in text
    assert "| steps | 2 |" in text and "| learning rate | 0.002 |" in text and "| examples in a step | 2 |" in text
    assert ("| rank, alpha, dropout | 4, 16, 0.05 |" in text) == bool(words)
    assert re.search(r"\| step \| training loss \| evaluation loss \|\n.*\n\| 1 \| [\d.]+ \|  \|", text)
    assert str(tmp_path) not in text
    data = ModelCard(text).data
    assert data.library_name == ("peft" if words else "transformers") and data.pipeline_tag == "text-generation"
    assert data.base_model is None  # a folder of this machine, of which the Hub knows nothing
    assert run_code(text, tmp_path, monkeypatch).endswith("\n")


@pytest.mark.slow
def test_the_card_of_an_adapter_that_goes_on_has_its_own_settings(options, tmp_path):
    main(options("--max_steps", 1, *LORA, output="first"))
    main(options("--max_steps", 1, "--use_lora", "--lora_weight_path", tmp_path / "first"))
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "| rank, alpha, dropout | 4, 16, 0.05 |" in text and "| layers with an adapter | c_attn, c_proj" in text


def test_the_card_of_texts_continues_them(options, tmp_path, checkpoint_folder, edit_json, monkeypatch):
    edit_json(checkpoint_folder / "generation_config.json", chat_format="raw")
    (tmp_path / "texts.txt").write_text("one text\n\nanother\n\n" + "long " * 40)
    main(options("--max_steps", 1, "--plain_texts", data=tmp_path / "texts.txt"))
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "model.chat" not in text and "- `texts.txt`: 3 texts, 219 tokens, " in text
    assert run_code(text, tmp_path, monkeypatch).startswith("Once upon a time")


@pytest.mark.parametrize("words", [[], LORA], ids=["full", "lora"])
def test_a_text_of_an_author_is_kept(options, tmp_path, words):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "README.md").write_text("# Mine\n")
    main(options("--max_steps", 1, *words))
    assert (tmp_path / "out" / "README.md").read_text() == "# Mine\n"


@pytest.mark.slow
@pytest.mark.parametrize("before", ["# Model Card for Model ID\n\n[More Information Needed]\n", None])
def test_what_no_author_wrote_gives_way(options, tmp_path, before):
    if before is None:
        main(options("--max_steps", 1))
    else:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "README.md").write_text(before)
    main(options("--max_steps", 2, "--overwrite_output_dir"))
    assert "| steps | 2 |" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


# --- its parts ---


@pytest.mark.parametrize("adapter, relation", [(False, "finetune"), (True, "adapter")])
def test_a_base_on_the_hub_is_named(card, adapter, relation):
    data = ModelCard(card(adapter=adapter)).data.to_dict()
    assert data["base_model"] == "org/base" and data["base_model_relation"] == relation


def test_the_losses_are_a_short_table(card):
    log = [{"step": step, "loss": 1 / step, "rewards/margins": step / 7} for step in range(1, 1001)]
    log += [{"step": 1000, "eval_loss": 0.5}, {"step": 1000, "train_runtime": 3.0}]
    rows = re.findall(r"^\| (\d+) \|.*\|$", card(method="dpo", log=log), re.MULTILINE)
    assert len(rows) <= 11 and rows[0] == "1" and rows[-1] == "1000"
    assert "| step | training loss | evaluation loss | margin |" in card(log=log)
    assert "| 1000 | 0.001 | 0.5 | 142.9 |" in card(log=log)


def test_nothing_logged(card):
    assert "| step |" not in card(log=[{"step": 3, "train_runtime": 3.0}])


def test_a_picture_is_shown_where_there_is_one(card, tmp_path):
    assert "training.png" not in card()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "training.png").write_bytes(b"")
    assert "![curves](training.png)" in card()


# --- the last words ---


@pytest.mark.slow
@pytest.mark.parametrize("words", [[], LORA], ids=["full", "lora"])
def test_the_command_of_the_last_words_chats(options, tmp_path, repository, monkeypatch, capfd, words):
    """As it is printed, with names relative to the working directory, in a shell that finds the programs."""
    program = tmp_path / "bin" / "qwen1-chat"
    program.parent.mkdir()
    program.write_text(f"#!{sys.executable}\nimport qwen1_commands\n\nqwen1_commands.chat()\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(repository))
    monkeypatch.chdir(tmp_path)
    main(options("--max_steps", 1, *words, "--model_name_or_path", "checkpoint", "--output_dir", "my model"))
    said = capfd.readouterr().err
    (command,) = re.findall(r"is in my model\. Chat with it:\n  (.*)\n", said)
    assert command == "qwen1-chat 'my model'"
    assert ("merge-lora checkpoint 'my model' NEW" in said) == bool(words)
    done = subprocess.run(command, shell=True, input="Hello\n", capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_a_program_that_the_shell_does_not_find_is_named_by_its_path(tmp_path, monkeypatch):
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    for path in (python, python.with_name("qwen1-chat")):
        path.write_text("")
        path.chmod(0o755)
    monkeypatch.setenv("PATH", os.defpath)
    monkeypatch.setattr(sys, "executable", str(python))
    assert chat_command(Path("out")) == f"{tmp_path}/bin/qwen1-chat out"
    monkeypatch.chdir(tmp_path)
    assert chat_command(Path("out")) == "bin/qwen1-chat out"


def test_a_name_that_looks_like_an_option_is_none():
    assert shlex.split(chat_command(Path("-out")))[-1] == "./-out"


def test_a_model_that_cannot_chat_is_not_offered_for_it(tmp_path):
    said = farewell(Training(tmp_path, "base", "texts", adapter=False, chats=False, data={}))
    assert f"The model is in {tmp_path}." in said and "was not taught to chat" in said and "qwen1-chat" not in said
