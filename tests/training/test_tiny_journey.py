"""The whole journey to a chat model, in a few minutes at most."""

import dataclasses
import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from typer.testing import CliRunner

from qwen1.conversion.formats.companions import CODE_FILES
from qwen1.programs.shipped import TINY_CHAT
from qwen1.schemas_qwen import as_tools
from qwen1.tools_qwen import Exchange
from qwen1.training.tiny import commands, examination, journey, report, training
from qwen1.training.tiny.dialogues import KINDS, Dialogue
from qwen1.training.tiny.tools import calculator, exchange

runner = CliRunner()
SMALL = journey.Size(
    texts=60,
    dialogues=150,
    practice=60,
    refinement=60,
    sharpening=60,
    equipping=60,
    vocabulary=700,
    n_embd=32,
    n_layer=1,
    ffn_hidden_size=64,
    tokens=512,
    row_length=512,
    save_steps=3,
)


@pytest.mark.slow
def test_make_goes_all_the_way(tmp_path, monkeypatch):
    fewer = dict(texts=350, refinement=150, sharpening=100, equipping=50)
    monkeypatch.setattr(journey, "QUICK", dataclasses.replace(journey.QUICK, **fewer))
    output = tmp_path / "model"
    done = runner.invoke(commands.app, ["make", str(output), "--quick", "--per-kind", "5"])
    assert done.exit_code == 0, done.output
    assert {path.name for path in output.iterdir()} == {
        *CODE_FILES, "README.md", "chat_template.jinja", "config.json", "examination.json", "generation_config.json",
        "losses.png", "model.safetensors", "qwen.tiktoken", "tokenizer.json", "tokenizer_config.json",
        "training_log.json",
    }  # fmt: skip
    log = json.loads((output / "training_log.json").read_text())
    evaluations = {
        stage: [entry["eval_loss"] for entry in log[stage] if "eval_loss" in entry] for stage in journey.STAGES
    }
    assert all(evaluations.values()) and all(losses[-1] <= losses[0] for losses in evaluations.values())
    # Of conversations of about the same sorts; those of the last part are the hard ones.
    assert evaluations["practised"][-1] < 0.7 * evaluations["tuned"][0], "nothing was learnt"
    model = AutoModelForCausalLM.from_pretrained(output)
    assert model.dtype == torch.bfloat16
    assert AutoModel.from_pretrained(output).config.model_type == "qwen"
    tokenizer = AutoTokenizer.from_pretrained(output)
    assert model.chat(tokenizer, "hello")[0]
    card, figures = (output / "README.md").read_text(), json.loads((output / "examination.json").read_text())
    assert "| all | 55 |" in card
    can = re.search(r"It can, (.*?)\n\n", card, re.S)
    for kind in KINDS:
        reliable = figures["right"][kind] >= report.RELIABLE * figures["asked"][kind]
        claimed = can is not None and report.ABILITIES[kind] in " ".join(can[1].split())
        assert claimed == reliable, kind
    again = runner.invoke(commands.app, ["make", str(output), "--quick"])
    assert again.exit_code == 1 and "exists" in again.output


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The work folder of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    journey.run(folder, 0, SMALL)
    return folder


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_model(whole, tmp_path, monkeypatch):
    killed = []

    class KillOnce(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            if args.output_dir not in killed:
                killed.append(args.output_dir)
                raise KeyboardInterrupt

    monkeypatch.setattr(journey, "train", lambda *a, **k: training.train(*a, **k, callbacks=[KillOnce()]))
    for _ in journey.STAGES:
        with pytest.raises(KeyboardInterrupt):
            journey.run(tmp_path / "killed", 0, SMALL)
    resumed = journey.run(tmp_path / "killed", 0, SMALL)
    assert len(killed) == len(journey.STAGES)
    for name in ("model.safetensors", "qwen.tiktoken", "config.json"):
        assert (resumed / name).read_bytes() == (whole / "model" / name).read_bytes(), name


@pytest.mark.slow
def test_the_model_lies_between_the_stages_before_and_the_last(whole):
    files = [whole / stage for stage in journey.STAGES[-3:]] + [whole / "model"]
    refined, sharpened, equipped, found = (load_file(folder / "model.safetensors") for folder in files)
    assert refined.keys() == sharpened.keys() == equipped.keys() == found.keys()
    for name, weight in found.items():
        start = refined[name].lerp(sharpened[name], 0.5)
        assert torch.equal(weight, start.lerp(equipped[name], journey.LAST_SHARE).bfloat16()), name
    assert any(not torch.equal(refined[name], sharpened[name]) for name in refined)


def test_the_last_part_starts_from_the_mean_of_the_two_before_it(whole, tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(journey, "_converse", lambda tokenizer, start, *rest: started.append(start))
    journey.equip(None, whole / "refined", whole / "sharpened", tmp_path, 0, SMALL)
    before, last = (load_file(whole / stage / "model.safetensors") for stage in ("refined", "sharpened"))
    weights = dict(started[0].named_parameters())
    assert before.keys() == last.keys() == weights.keys()
    for name, weight in weights.items():
        assert torch.equal(weight, before[name].lerp(last[name], 0.5)), name


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


class Caller:
    """Stands for a model that makes a call and reads its result."""

    def __init__(self, *replies):
        self.replies = list(replies)
        self.asked = []

    def chat(self, tokenizer, query, history, system, tools, do_sample):
        self.asked.append(query)
        exchange = Exchange.begin(query, history, tools)
        reply = self.replies.pop(0)
        return exchange.reply(reply), exchange.history(reply)


@pytest.mark.parametrize(
    ("replies", "right"),
    [
        (["{call}", "I now know the final answer.\nFinal Answer: 6*7=42"], True),
        (["{call}", "I now know the final answer.\nFinal Answer: 6*7=43"], False),
        (["{call}4"], False),
        (["Thought: I now know the final answer.\nFinal Answer: 6*7=42"], False),
    ],
)
def test_a_call_and_its_answer_have_to_be_right(replies, right):
    expected = exchange("calculator", {"expression": "6*7"}, "42", "6*7=42", "en")
    call = expected.partition("\nObservation")[0]
    dialogue = Dialogue("tools", "en", [("6*7", expected)], tools=list(as_tools([calculator]).values()))
    model = Caller(*(reply.replace("{call}", call) for reply in replies))
    assert (examination.with_tools(model, None, dialogue) == expected) == right
    assert len(model.asked) == len(replies)


def figures(**shares):
    result = examination.Result(dict.fromkeys(KINDS, 100), dict.fromkeys(KINDS, 100))
    result.right.update({kind.replace("_", " "): round(100 * share) for kind, share in shares.items()})
    return result


def test_the_card_claims_what_the_examination_shows():
    said = " ".join(report.abilities(figures(names=0.3, tools=0, three_digits=0.94)).split())
    can, tries, cannot = said.split(" It ")
    assert "remember a name" in can and "language of the last message" in can
    assert "three digits (94.0%)" in tries and "names that it never saw (30.0%)" in tries
    assert "call a calculator" in cannot
    assert "It tries" not in report.abilities(figures())


def test_perplexity_is_that_of_the_model_loss(byte_tokenizer, tiny_model):
    dialogue = Dialogue("facts", "en", [("a", "right"), ("b", "no")])
    model = tiny_model()
    example = training.encode_all(byte_tokenizer, [dialogue.messages()], progress=False).examples[0]
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


def test_each_training_is_drawn_behind_the_one_before():
    log = {
        "pretrained": [{"step": 5, "loss": 3.0}, {"step": 9}],
        "tuned": [{"step": 2, "loss": 1.0}],
        "practised": [{"step": 1, "loss": 0.5}],
        "refined": [{"step": 3, "loss": 0.4}],
        "sharpened": [{"step": 4, "loss": 0.3}],
        "equipped": [{"step": 1, "loss": 0.2}],
    }
    assert report.losses(log, "loss") == [(5, 3.0), (11, 1.0), (12, 0.5), (15, 0.4), (19, 0.3), (20, 0.2)]


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
