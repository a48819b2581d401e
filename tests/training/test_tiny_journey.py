"""The whole journey to a chat model, in a few minutes at most."""

import json
import shutil

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from typer.testing import CliRunner

from qwen1.conversion.formats.companions import CODE_FILES
from qwen1.programs.shipped import TINY_CHAT
from qwen1.training import finetuning
from qwen1.training.tiny import commands, examination, journey, report
from qwen1.training.tiny.dialogues import Dialogue

runner = CliRunner()
SMALL = journey.Size(
    texts=60,
    dialogues=150,
    vocabulary=700,
    n_embd=32,
    n_layer=1,
    ffn_hidden_size=64,
    rows=4,
    row_length=256,
    save_steps=3,
)


@pytest.mark.slow
def test_make_goes_all_the_way(tmp_path):
    output = tmp_path / "model"
    done = runner.invoke(commands.app, ["make", str(output), "--quick", "--per-kind", "5"])
    assert done.exit_code == 0, done.output
    assert {path.name for path in output.iterdir()} == {
        *CODE_FILES, "README.md", "chat_template.jinja", "config.json", "examination.json", "generation_config.json",
        "losses.png", "model.safetensors", "qwen.tiktoken", "tokenizer.json", "tokenizer_config.json",
        "training_log.json",
    }  # fmt: skip
    log = json.loads((output / "training_log.json").read_text())
    evaluations = [entry["eval_loss"] for entry in log["tuned"] if "eval_loss" in entry]
    assert evaluations[-1] < 0.7 * evaluations[0], "nothing was learnt"
    model = AutoModelForCausalLM.from_pretrained(output)
    assert model.dtype == torch.bfloat16
    assert AutoModel.from_pretrained(output).config.model_type == "qwen"
    tokenizer = AutoTokenizer.from_pretrained(output)
    assert model.chat(tokenizer, "hello")[0]
    assert "| all | 35 |" in (output / "README.md").read_text()
    again = runner.invoke(commands.app, ["make", str(output), "--quick"])
    assert again.exit_code == 1 and "exists" in again.output


def test_a_killed_run_goes_on_to_the_same_model(tmp_path, monkeypatch):
    whole = journey.run(tmp_path / "whole", 0, SMALL)
    killed = []

    class KillOnce(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            if args.output_dir not in killed:
                killed.append(args.output_dir)
                raise KeyboardInterrupt

    monkeypatch.setattr(journey, "train", lambda *a, **k: finetuning.train(*a, **k, callbacks=[KillOnce()]))
    for _ in ("pretraining", "fine-tuning"):
        with pytest.raises(KeyboardInterrupt):
            journey.run(tmp_path / "killed", 0, SMALL)
    resumed = journey.run(tmp_path / "killed", 0, SMALL)
    assert len(killed) == 2
    for name in ("model.safetensors", "qwen.tiktoken", "config.json"):
        assert (resumed / name).read_bytes() == (whole / name).read_bytes(), name


def test_a_work_folder_keeps_to_its_seed(tmp_path):
    journey._claim(tmp_path, 0, SMALL)
    journey._claim(tmp_path, 0, SMALL)
    with pytest.raises(ValueError, match="another work folder"):
        journey._claim(tmp_path, 1, SMALL)


def test_the_plan_is_there_whole_or_not_at_all(tmp_path, monkeypatch):
    def cut_short(path, text, *args):
        with path.open("w") as file:
            file.write(text[:9])
        raise OSError("killed")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="killed"):
        patch.setattr(type(tmp_path), "write_text", cut_short)
        journey._claim(tmp_path, 0, SMALL)
    journey._claim(tmp_path, 0, SMALL)
    written = (tmp_path / "plan.json").read_text()
    assert json.loads(written)["seed"] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_a_damaged_plan_is_named(tmp_path):
    (tmp_path / "plan.json").write_text('{"seed": 0')
    with pytest.raises(ValueError, match=r"plan\.json is damaged .*delete it if"):
        journey._claim(tmp_path, 0, SMALL)
    assert (tmp_path / "plan.json").read_text() == '{"seed": 0'


def test_an_examination_counts_exact_replies_only(byte_tokenizer, tiny_model, monkeypatch):
    dialogues = [Dialogue("facts", "en", [("a", "right")]), Dialogue("memory", "en", [("b", "c"), ("d", "Right")])]
    model = tiny_model()
    monkeypatch.setattr(
        type(model), "batch_chat", lambda self, tokenizer, queries, *a, **k: (["right"] * len(queries), [])
    )
    result = examination.examine(model, byte_tokenizer, dialogues)
    assert (result.right["facts"], result.right["memory"], result.share) == (1, 0, 0.5)
    assert result.wrong == [("memory", "d", "Right", "right")]
    assert result.perplexity > 1


def test_perplexity_is_that_of_the_model_loss(byte_tokenizer, tiny_model):
    dialogue = Dialogue("facts", "en", [("a", "right"), ("b", "no")])
    model = tiny_model()
    example = examination.encode_all(byte_tokenizer, [dialogue.messages()], progress=False).examples[0]
    with torch.no_grad():
        loss = model(torch.tensor([list(example["input_ids"])]), labels=torch.tensor([list(example["labels"])])).loss
    assert examination.perplexity(model, byte_tokenizer, [dialogue]) == pytest.approx(float(loss.exp()), rel=1e-5)


def test_a_folder_without_its_plan_is_an_error(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(TINY_CHAT, folder, ignore=shutil.ignore_patterns("training_log.json"))
    done = runner.invoke(commands.app, ["examine", str(folder)])
    assert done.exit_code == 1
    assert "training_log.json" in done.output


def test_dialogues_are_printed_in_the_messages_format():
    lines = runner.invoke(commands.app, ["dialogues", "--count", "3"]).stdout.splitlines()
    assert len(lines) == 3
    assert [message["role"] for message in json.loads(lines[0])["messages"]][:3] == ["system", "user", "assistant"]


def test_the_second_training_is_drawn_behind_the_first():
    log = {"pretrained": [{"step": 5, "loss": 3.0}, {"step": 9}], "tuned": [{"step": 2, "loss": 1.0}]}
    assert report.losses(log, "loss") == [(5, 3.0), (11, 1.0)]


def test_an_interruption_has_its_exit_code(tmp_path, monkeypatch):
    monkeypatch.setattr(journey, "run", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    done = runner.invoke(commands.app, ["make", str(tmp_path / "model")])
    assert done.exit_code == 130
    shutil.rmtree(tmp_path)


def test_what_a_kill_leaves_behind_a_complete_stage_goes(tmp_path):
    (tmp_path / "tuned").mkdir()
    (tmp_path / "tuned.partial" / "checkpoint-3").mkdir(parents=True)
    journey._stage(tmp_path / "tuned", lambda folder: pytest.fail("it is complete"))
    assert [path.name for path in tmp_path.iterdir()] == ["tuned"]
