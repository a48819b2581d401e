"""What is found out before a model is loaded, what is said before and during a training, and what isn't."""

import functools
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tqdm.auto import tqdm

from qwen1.training import finetuning
from qwen1.training.finetuning import main, parse_arguments, run
from qwen1.training.noise import quiet
from qwen1.training.watching import Pace, duration

from .conftest import KillAfterSaving, Killed

EACH_STEP = ["--save_strategy", "steps", "--save_steps", 1]


@pytest.fixture
def unloaded(monkeypatch):
    """No weights may be loaded."""

    def load(*args, **kwargs):
        raise AssertionError("the model is loaded")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", load)


@pytest.fixture
def more_data(tmp_path):
    """A second file of six conversations."""
    path = tmp_path / "more.jsonl"
    records = [{"instruction": f"Say {i}.", "output": "b" * (i + 2)} for i in range(6)]
    path.write_text("\n".join(map(json.dumps, records)))
    return path


def weights(folder):
    return load_file(folder / "model.safetensors")


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# --- before a model is loaded ---


MISTAKES = {
    "data mistyped": (
        ["--data_path", "{folder}/dta.jsonl"],
        "--data_path {folder}/dta.jsonl doesn't exist (did you mean",
    ),
    "one of several": (["--data_path", "{folder}/data.jsonl", "{folder}/x"], "--data_path {folder}/x doesn't exist."),
    "data a folder": (["--data_path", "{folder}"], "is a folder: name the files in it, such as {folder}/"),
    "data a table": (["--data_path", "{folder}/a.csv"], "a.csv can't be read: write its rows as JSON Lines"),
    "bad record": (["--data_path", "{folder}/bad.jsonl"], "bad.jsonl, line 1: 'output' is missing"),
    "evaluation mistyped": (["--eval_data_path", "{folder}/x"], "--eval_data_path {folder}/x doesn't exist"),
    "attention": (["--attn_implementation", "sdpaa"], "--attn_implementation sdpaa is unknown (did you mean sdpa?)"),
    "layers": (
        ["--use_lora", "--lora_target_modules", "c_atn"],
        "c_atn is no layer of {folder}/checkpoint (did you mean",
    ),
    "adapter": (
        ["--use_lora", "--lora_weight_path", "{folder}/no/such/x"],
        "--lora_weight_path {folder}/no/such/x doesn't",
    ),
    "no adapter": (["--use_lora", "--lora_weight_path", "{folder}"], "{folder} has no adapter_config.json"),
    "output": (["--output_dir", "{folder}/data.jsonl/out"], "{folder}/data.jsonl is a file. Name another one"),
    "report": (["--report_to", "tensorbord"], "--report_to tensorbord is unknown (did you mean tensorboard?)"),
    "report missing": (["--report_to", "clearml"], "--report_to clearml needs clearml: pip install clearml"),
    "metric": (
        ["--metric_for_best_model", "eval_perplexty"],
        "--metric_for_best_model eval_perplexty is no metric of these evaluations (did you mean perplexity?)",
    ),
    "metric of other data": (
        ["--metric_for_best_model", "rewards/margins"],
        "evaluations: they have loss, perplexity.",
    ),
    "too long": (["--model_max_length", "8"], "none of it fits into --model_max_length 8; raise it"),
    "checkpoint": (["--resume_from_checkpoint", "{folder}/x"], "{folder}/x is no complete checkpoint"),
}


@pytest.mark.parametrize("words, reason", MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_found_before_the_model_is_loaded(options, failed, tmp_path, unloaded, words, reason):
    (tmp_path / "a.csv").write_text("a,b")
    (tmp_path / "bad.jsonl").write_text('{"instruction": "a"}')
    said = failed(options(*(word.format(folder=tmp_path) for word in words)))
    assert reason.format(folder=tmp_path) in said and said.count("qwen1-finetune: ") == 1
    assert "Traceback" not in said and not (tmp_path / "out").exists()


def test_without_mistakes_it_is_loaded(options, unloaded):
    with pytest.raises(AssertionError, match="the model is loaded"):
        main(options("--use_lora"))


def test_a_damaged_adapter_is_found_before_the_model_is_loaded(options, failed, tmp_path, unloaded):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"cut")
    said = failed(options("--use_lora", "--lora_weight_path", tmp_path / "adapter"))
    assert "adapter_model.safetensors is truncated or damaged" in said


@pytest.mark.parametrize(
    "words, reason",
    [
        (["--data_weights", 1, 2], "--data_weights 1 2 must be one for each of the 1 files of --data_path"),
        (["--data_weights", 0], "--data_weights 0 must be numbers above 0"),
        (["--data_weights", "inf"], "--data_weights inf must be numbers above 0"),
        (["--output_dir", ""], "--output_dir is empty"),
        (["--data_path", "a", "b", "a"], "--data_path names a file twice: give it a weight of 2"),
    ],
)
def test_wrong_options(options, failed, words, reason):
    assert reason in failed(options(*words), status=2)


# --- what is said ---


def test_what_is_said_before_and_during_a_training(options, data, more_data, tmp_path, capsys):
    words = options("--max_steps", 4, "--data_path", data, more_data, "--data_weights", 1, 0.5, "--use_lora")
    main([word for word in words if word not in ("--disable_tqdm", "True")])
    said = capsys.readouterr().err
    expected = [
        f"{data}: 12 conversations, ",
        f"{more_data}: 6 conversations, ",
        "LoRA trains ",
        f"{data}: weight 1, 12 of 12 rows in each epoch.",
        f"{more_data}: weight 0.5, 3 of 6 rows in each epoch.",
        "Training: 15 rows, 2 a step, 4 steps. Epochs: 0.5.",
        "for the 1 steps left: ",
    ]
    assert [text for text in expected if text not in said] == []
    assert [said.index(text) for text in expected] == sorted(said.index(text) for text in expected)
    assert "valuation" not in said.replace(
        "Evaluations and checkpoints come on top", ""
    )  # there is none, nor a bar of it
    assert "Warning" not in said and "Writing model shards" not in said[: said.index("4/4")]


@pytest.mark.slow
def test_libraries_say_nothing(options, repository, tmp_path):
    """In a process of its own, because what is said at import is said once."""
    words = options("--max_steps", 2, "--use_lora", "--gradient_checkpointing", *EACH_STEP)
    done = subprocess.run(
        [sys.executable, repository / "finetune.py", *words], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line for line in done.stderr.replace("\r", "\n").split("\n") if line.strip() and "%|" not in line]
    begins = (str(tmp_path), "LoRA trains", "Training:", "About", "The adapter of", "Join it")
    commands = ("qwen1-chat", "qwen1-checkpoint")
    ours = [
        line.startswith(begins) or line.startswith("  ") and any(name in line for name in commands) for line in lines
    ]
    assert [line for line, said in zip(lines, ours, strict=True) if not said] == []


def test_bars_start_no_thread(options, monkeypatch):
    """Without memory the thread never begins, and `Thread.start` waits for it without end."""
    started = []
    for bar in (tqdm, tqdm.__base__):  # the one that libraries take, and the one below it
        monkeypatch.setattr(bar, "monitor", None)
    monkeypatch.setattr("tqdm.std.TMonitor", lambda *of: started.append(of) or SimpleNamespace(report=lambda: True))
    main(options("--max_steps", 1))
    assert not started
    tqdm(disable=True)
    assert len(started) == 1


def test_warnings_that_users_can_act_on_are_shown():
    import warnings

    with pytest.warns(UserWarning, match="act"), quiet():
        warnings.warn("act on this", UserWarning, stacklevel=1)
        warnings.warn("will be removed", FutureWarning, stacklevel=1)


# --- the time that is left ---


def paced(capsys, *times, steps=100, begun=0):
    """What is said when the steps take these times, with an hour of something else between them."""
    seconds = iter(
        [second for number, time in enumerate(times) for second in (3600.0 * number, 3600.0 * number + time)]
    )
    pace, state = Pace(lambda: next(seconds)), SimpleNamespace(max_steps=steps, is_world_process_zero=True)
    for number in range(1, len(times) + 1):
        pace.on_step_begin(None, state, None)
        state.global_step = begun + number
        pace.on_step_end(None, state, None)
    return capsys.readouterr().err


def test_the_first_step_is_left_out_of_the_pace(capsys):
    assert paced(capsys, 9, 1, 2, steps=103) == (
        "About 2 min for the 100 steps left: 1.5 s a step, measured on steps 2 to 3. "
        "Evaluations and checkpoints come on top.\n"
    )


def test_long_steps_are_not_waited_for(capsys):
    said = paced(capsys, 60, steps=61)
    assert "About 60 min for the 60 steps left: 60 s a step, measured on step 1, the first, which is often" in said
    assert "12 s a step, measured on step 2." in paced(capsys, 13, 12, steps=62)
    assert "measured on steps 12 to 13." in paced(capsys, 1, 1, 1, steps=62, begun=10)


def test_nothing_is_said_of_no_time(capsys):
    assert paced(capsys, 1, 1) == "" == paced(capsys, 1, 1, 1, steps=3)


@pytest.mark.parametrize(
    "seconds, said",
    [(0.2, "1 s"), (89, "89 s"), (90, "2 min"), (5340, "89 min"), (12000, "3 h 20 min"), (190800, "2 days 5 h")],
)
def test_durations(seconds, said):
    assert duration(seconds) == said


# --- streaming, weights, and going on ---


def test_what_a_killed_stream_left_is_taken_away(options, tmp_path):
    left = tmp_path / "out" / ".data-0"
    left.mkdir(parents=True)
    (left / "training").write_bytes(b"1234")
    main(options("--max_steps", 1))
    assert not left.exists()


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--packing", "--eval_fraction", 0.2]], ids=["rows", "packed"])
def test_streaming_learns_what_memory_does(options, tmp_path, data, more_data, more):
    words = [*more, "--max_steps", 3, "--data_path", data, more_data, "--data_weights", 1, 1.5]
    main(options(*words, output="memory"))
    main(options(*words, "--streaming", "--dataloader_num_workers", 1, output="streamed"))
    assert same(weights(tmp_path / "memory"), weights(tmp_path / "streamed"))
    assert not list((tmp_path / "streamed").glob(".data*"))


@pytest.fixture
def killed(monkeypatch):
    """Run the program until its first checkpoint: (words) -> None."""

    def run_until_then(words):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(finetuning, "train", functools.partial(finetuning.train, callbacks=[KillAfterSaving()]))
            main(words)

    return run_until_then


@pytest.mark.slow
@pytest.mark.parametrize("step", [4, 6], ids=["amid an epoch", "at its end"])
def test_a_stream_with_weights_is_taken_up_exactly(options, tmp_path, data, killed, step):
    words = ["--data_weights", 0.5, "--streaming", "--max_steps", 8, "--save_strategy", "steps", "--save_steps", step]
    main(options(*words, output="whole"))
    killed(options(*words))
    assert [path.name for path in (tmp_path / "out").iterdir()] == [f"checkpoint-{step}"]
    run(parse_arguments(options(*words, "--resume_from_checkpoint", "True")))
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "out"))


def test_weights_take_other_rows_in_each_epoch(options, data, monkeypatch):
    seen = []
    collate = finetuning.Collator.__call__
    monkeypatch.setattr(finetuning.Collator, "__call__", lambda self, rows: seen.extend(rows) or collate(self, rows))
    main(options("--data_weights", 0.5, "--max_steps", 6))
    assert len(seen) == 12 and len({len(row["input_ids"]) for row in seen}) == 12  # of twelve lengths


@pytest.mark.slow
def test_other_data_are_noticed(options, data, killed, capsys):
    words = options("--max_steps", 2, *EACH_STEP)
    killed(words)
    main([*words, "--resume_from_checkpoint", "True"])
    assert "Warning" not in capsys.readouterr().err
    main(
        [
            *words,
            "--resume_from_checkpoint",
            "True",
            "--overwrite_output_dir",
            "--max_steps",
            "3",
            "--data_weights",
            "2",
        ]
    )
    assert "aren't those that the checkpoint was trained on" in capsys.readouterr().err


NEW_SETTINGS = ["--learning_rate", 0.002, "--weight_decay", 0, "--adam_beta1", 0.5, "--adam_beta2", 0.9]
NEW_SETTINGS += ["--adam_epsilon", 1e-3]


@pytest.mark.parametrize("more", [[], ["--use_lora"]], ids=["whole", "adapter"])
def test_settings_that_the_checkpoint_holds_are_said_and_used(options, tmp_path, killed, capsys, more):
    words = ["--max_steps", 3, *EACH_STEP, *more]
    name = "adapter_model.safetensors" if more else "model.safetensors"
    main(options(*words, output="whole"))
    killed(options(*words))
    capsys.readouterr()
    main(options(*words, *NEW_SETTINGS, "--resume_from_checkpoint", "True"))
    said = capsys.readouterr().err
    assert "Warning: --learning_rate 0.002 isn't used: the checkpoint goes on with its own, 0.001. To change it" in said
    assert "--weight_decay 0 isn't used: the checkpoint goes on with its own, 0.1." in said
    assert (
        "--adam_beta1 0.5 isn't" in said and "--adam_beta2 0.9 isn't" in said and "--adam_epsilon 0.001 isn't" in said
    )
    assert same(*(load_file(tmp_path / output / name) for output in ("whole", "out")))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| learning rate | 0.001 |" in card and "| weight decay | 0.1 |" in card


ADAPTER = ["--use_lora", "--lora_r", 4]
ALL, RANK, LAYERS = "all weights of a model", "an adapter with --lora_r 4", "--lora_target_modules c_attn c_proj w1 w2"
OTHER_KINDS = {
    "adapter of all weights": ([], ADAPTER, [ALL, "but --use_lora trains an adapter: leave --use_lora out"]),
    "all weights of an adapter": (ADAPTER, [], ["has an adapter, but without --use_lora all weights are trained"]),
    "rank": (ADAPTER, ["--use_lora", "--lora_r", 8], [RANK, "but the options ask for --lora_r 8: go on with"]),
    "layers": (ADAPTER, [*ADAPTER, "--lora_target_modules", "w1"], [LAYERS, "ask for --lora_target_modules w1: "]),
    "biases": (ADAPTER, [*ADAPTER, "--lora_bias", "all"], ["with --lora_bias none", "ask for --lora_bias all: "]),
}


@pytest.mark.parametrize("begun, words, said", OTHER_KINDS.values(), ids=OTHER_KINDS)
def test_a_checkpoint_of_another_kind_is_refused(options, tmp_path, killed, failed, monkeypatch, begun, words, said):
    killed(options("--max_steps", 2, *EACH_STEP, *begun))
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", None)
    reason = failed(options("--max_steps", 2, *EACH_STEP, *words, "--resume_from_checkpoint", "True"))
    assert f"qwen1-finetune: {tmp_path / 'out' / 'checkpoint-1'} has " in reason
    assert all(part in reason for part in said) and "another --output_dir." in reason


def test_a_checkpoint_of_another_model_is_refused(options, tmp_path, killed, failed, checkpoint_folder, edit_json):
    words = options("--max_steps", 2, *EACH_STEP)
    killed(words)
    edit_json(checkpoint_folder / "config.json", n_layer=3, num_hidden_layers=3)
    said = failed([*words, "--resume_from_checkpoint", "True"])
    model = f"--model_name_or_path {checkpoint_folder}"
    assert f"checkpoint-1 has a model with num_hidden_layers 2, but {model} has 3: name the model that" in said


@pytest.mark.parametrize(
    "begun, then, refused", [("adamw_torch", "sgd", True), ("adamw_torch", "adamw_torch_fused", False)]
)
def test_a_checkpoint_of_another_optimizer_is_refused(options, tmp_path, killed, failed, begun, then, refused):
    words = options("--max_steps", 2, *EACH_STEP)
    killed([*words, "--optim", begun])
    resumed = [*words, "--optim", then, "--resume_from_checkpoint", "True"]
    if not refused:
        assert run(parse_arguments(resumed)).state.global_step == 2
        return
    said = failed(resumed)
    assert f"{tmp_path / 'out' / 'checkpoint-1'} has the state of --optim {begun}, of which --optim {then} can" in said
    assert f"go on with --optim {begun}, or begin from the checkpoint's weights" in said


PARTS = ("attn.c_attn", "attn.c_proj", "mlp.w1", "mlp.w2", "mlp.c_proj")
SAME_LAYERS = {
    "twice": ["c_attn", "c_attn"],
    "many": [f"{path}{block}.{part}" for path in ("transformer.h.", "h.", "") for block in (0, 1) for part in PARTS],
}


@pytest.mark.parametrize("layers", SAME_LAYERS.values(), ids=SAME_LAYERS)
def test_layers_that_peft_writes_down_otherwise_are_the_same(options, killed, layers):
    words = ["--max_steps", 2, *EACH_STEP, "--use_lora", "--lora_target_modules", *layers]
    killed(options(*words))
    assert run(parse_arguments(options(*words, "--resume_from_checkpoint", "True"))).state.global_step == 2


def test_a_checkpoint_of_a_further_trained_adapter_is_held_against_that_adapter(options, tmp_path, killed, failed):
    for rank in (4, 8):
        main(options("--max_steps", 1, "--use_lora", "--lora_r", rank, output=f"rank-{rank}"))
    words = ["--max_steps", 2, *EACH_STEP, "--use_lora", "--lora_weight_path"]
    killed(options(*words, tmp_path / "rank-4"))
    resumed = ["--resume_from_checkpoint", "True"]
    said = failed(options(*words, tmp_path / "rank-8", *resumed))
    assert f"with --lora_r 4, but the adapter {tmp_path / 'rank-8'} has --lora_r 8: go on with the options" in said
    assert run(parse_arguments(options(*words, tmp_path / "rank-4", *resumed))).state.global_step == 2


def test_published_words_still_work(options, data):
    model, arguments, *_ = parse_arguments(options("--eval_data_path", data, "--lazy_preprocess", "True"))
    assert arguments.data_path == [str(data)] == arguments.eval_data_path and arguments.data_weights is None
