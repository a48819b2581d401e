"""The program qwen1-finetune: full training, adapters, checkpoints, what is refused, several processes."""

import functools
import importlib
import importlib.util
import json
import os
import re
import socket
import subprocess
import sys

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoTokenizer

from qwen1 import QWenConfig, QWenLMHeadModel
from qwen1.conversion.command_line.merge_lora import merge_lora
from qwen1.conversion.writing.progress import Progress
from qwen1.training import checks, finetuning, models
from qwen1.training.checkpoints import last_checkpoint
from qwen1.training.errors import TrainingError
from qwen1.training.finetuning import main, parse_arguments, run

from .conftest import KillAfterSaving, Killed

IDS = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(3))
DROPOUT = {
    "resid_pdrop": 0.2,
    **dict.fromkeys(["attn_pdrop", "attn_dropout_prob", "embd_pdrop", "emb_dropout_prob"], 0.1),
}
STEPS = ["--max_steps", "3"]
ADAPTER = {"base_model_name_or_path": "base", "peft_type": "LORA"}


@pytest.fixture
def without(monkeypatch):
    """Hide packages."""

    def hide(*names):
        find = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name in names else find(name, *a))

    return hide


def weights(folder, name="model.safetensors"):
    return load_file(folder / name)


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def history(folder):
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


# --- all weights ---


def test_full_training_with_evaluation(options, tmp_path, checkpoint_folder, capsys):
    main(options(*STEPS, "--eval_fraction", 0.2, "--eval_strategy", "steps", "--eval_steps", 2, "--packing"))
    log = history(tmp_path / "out")
    losses = [line["loss"] for line in log if "loss" in line]
    assert len(losses) == 3 and losses[-1] < losses[0]
    evaluated = [line for line in log if "eval_loss" in line]
    assert evaluated
    for line in evaluated:
        assert line["eval_perplexity"] == pytest.approx(torch.tensor(line["eval_loss"]).exp().item(), rel=1e-4)
    said = capsys.readouterr().err
    assert "data.jsonl: 12 conversations, " in said and "Held out for evaluation: 2 of 12 examples" in said
    before, after = weights(checkpoint_folder), weights(tmp_path / "out")
    assert before.keys() == after.keys() and not same(before, after)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "use_cache" not in config or config["use_cache"] is True
    model = QWenLMHeadModel.from_pretrained(tmp_path / "out")
    assert model.generation_config.chat_format == "chatml"
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) <= 464
    assert not (tmp_path / "out" / ".partial").exists()


def test_evaluation_at_the_end(options, data):
    trainer = run(parse_arguments(options(*STEPS, "--eval_data_path", data)))
    assert trainer.state.log_history[-1]["eval_perplexity"] > 1


@pytest.mark.parametrize("more", [[], ["--use_lora"]], ids=["whole", "adapter"])
@pytest.mark.parametrize("option", ["--bf16_full_eval", "--fp16_full_eval"])
def test_an_evaluation_in_half_precision_leaves_what_is_saved_as_it_was_trained(options, tmp_path, data, option, more):
    name = "adapter_model.safetensors" if more else "model.safetensors"
    words = ["--max_steps", 1, "--eval_data_path", data, *more]
    main(options(*words, output="plain"))
    trainer = run(parse_arguments(options(*words, option)))
    assert same(weights(tmp_path / "plain", name), weights(tmp_path / "out", name))
    assert {tensor.dtype for tensor in trainer.model.state_dict().values()} == {torch.float32}
    losses = [line["eval_loss"] for o in ("plain", "out") for line in history(tmp_path / o) if "eval_loss" in line]
    assert losses[0] != losses[1] == pytest.approx(losses[0], rel=0.05)
    assert f"| {losses[1]:.4g} |" in (tmp_path / "out" / "README.md").read_text()


def test_plain_texts(options, tmp_path, checkpoint_folder, edit_json):
    edit_json(checkpoint_folder / "generation_config.json", chat_format="raw")
    (tmp_path / "texts.txt").write_text("one text\n\nanother\n\n" + "long " * 40)
    main(options(*STEPS, "--plain_texts", "--packing", "--attn_implementation", "eager", data=tmp_path / "texts.txt"))
    assert not same(weights(checkpoint_folder), weights(tmp_path / "out"))
    assert QWenLMHeadModel.from_pretrained(tmp_path / "out").generation_config.chat_format == "raw"


@pytest.mark.parametrize("settings", [{"chat_format": "raw"}, {"chat_format": None, "_from_model_config": True}])
def test_a_base_model_becomes_a_chat_model(options, tmp_path, checkpoint_folder, settings, edit_json):
    edit_json(checkpoint_folder / "generation_config.json", **settings)
    main(options("--max_steps", 1))
    assert QWenLMHeadModel.from_pretrained(tmp_path / "out").generation_config.chat_format == "chatml"


# --- adapters ---


@pytest.mark.parametrize("base", [False, True], ids=["chat", "base"])
def test_lora_with_gradient_checkpointing_can_be_merged(options, tmp_path, checkpoint_folder, base, edit_json):
    if base:
        edit_json(checkpoint_folder / "generation_config.json", chat_format=None)
    main(options(*STEPS, "--use_lora", "--lora_r", 4, "--gradient_checkpointing"))
    losses = [line["loss"] for line in history(tmp_path / "out") if "loss" in line]
    assert len(losses) == 3
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == (["wte", "lm_head"] if base else None)
    adapter = weights(tmp_path / "out", "adapter_model.safetensors")
    assert all(value.any() for name, value in adapter.items() if "lora_B" in name)
    assert merge_lora(checkpoint_folder, tmp_path / "out", tmp_path / "merged", progress=Progress())
    untouched = QWenLMHeadModel.from_pretrained(checkpoint_folder)
    before = logits(untouched)
    expected = logits(PeftModel.from_pretrained(untouched, tmp_path / "out"))
    found = logits(QWenLMHeadModel.from_pretrained(tmp_path / "merged"))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (found - before).abs().max() > 1e-3


def test_lora_is_repeatable(options, tmp_path):
    for output in ("first", "second"):
        main(options("--max_steps", 2, "--use_lora", output=output))
        torch.rand(3)  # somebody else's use of the global generator
    adapters = [weights(tmp_path / output, "adapter_model.safetensors") for output in ("first", "second")]
    assert same(*adapters)


def test_an_adapter_is_trained_on(options, tmp_path):
    main(options("--max_steps", 1, "--use_lora", "--lora_r", 4, output="first"))
    main(options("--max_steps", 2, "--use_lora", "--lora_weight_path", tmp_path / "first"))
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 4
    assert not same(*(weights(tmp_path / name, "adapter_model.safetensors") for name in ("first", "out")))


def test_layers_that_do_not_exist(options, failed):
    said = failed(options(*STEPS, "--use_lora", "--lora_target_modules", "q_proj"))
    assert "qwen1-finetune: --lora_target_modules q_proj is no layer of" in said and "c_attn, c_proj, lm_head" in said


def test_missing_packages(options, failed, without):
    without("peft", "bitsandbytes")
    assert "--use_lora needs peft: pip install peft" in failed(options(*STEPS, "--use_lora"))


def test_bitsandbytes_is_missing(options, failed, without):
    without("bitsandbytes")
    said = failed(options(*STEPS, "--use_lora", "--q_lora"))
    assert "--q_lora needs bitsandbytes: pip install bitsandbytes" in said


def test_q_lora_asks_for_four_bits(options, tmp_path, monkeypatch, checkpoint_folder, edit_json):
    edit_json(checkpoint_folder / "generation_config.json", chat_format=None)
    load, asked = transformers.AutoModelForCausalLM.from_pretrained, {}

    def from_pretrained(name, quantization_config, device_map, **kwargs):
        asked.update(settings=quantization_config, device_map=device_map)
        return load(name, **kwargs)

    monkeypatch.setattr(checks, "_require", lambda *names: None)
    monkeypatch.setattr(models, "BitsAndBytesConfig", dict)  # the real one asks for the package's version
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    main(options(*STEPS, "--use_lora", "--q_lora", "--gradient_checkpointing"))
    assert asked["settings"] == {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.float32,
    }
    assert asked["device_map"] == {"": torch.device("cpu")}
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["modules_to_save"] is None


def test_q_lora(options, tmp_path):
    main(options(*STEPS, "--use_lora", "--q_lora", "--gradient_checkpointing"))
    adapter = weights(tmp_path / "out", "adapter_model.safetensors")
    assert adapter and all(value.any() for name, value in adapter.items() if "lora_B" in name)


@pytest.mark.parametrize("method", ["gptq", "awq"])
@pytest.mark.parametrize("words", [[], ["--q_lora"]])
def test_an_adapter_is_trained_on_the_bits_that_are_there(
    options, monkeypatch, checkpoint_folder, edit_json, method, words
):
    """By kernels that can be trained through, which are not those that are chosen without a word."""
    edit_json(checkpoint_folder / "config.json", quantization_config={"quant_method": method, "bits": 4})
    load, asked = transformers.AutoModelForCausalLM.from_pretrained, {}

    def from_pretrained(name, quantization_config, device_map, **kwargs):
        asked.update(settings=quantization_config, device_map=device_map)
        config = QWenConfig.from_pretrained(name)
        del config.quantization_config
        return load(name, config=config, **kwargs)

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    main(options(*STEPS, "--use_lora", *words))
    settings = asked["settings"].to_dict()
    assert str(getattr(settings["quant_method"], "value", settings["quant_method"])) == method
    assert settings["bits"] == 4 and "auto_trainable" in str(getattr(settings["backend"], "value", settings["backend"]))


@pytest.mark.parametrize(
    ("method", "words", "named"),
    [("gptq", [], "so they can't be trained themselves: .*--use_lora"), ("hqq", ["--use_lora"], r"quantised \(hqq\)")],
)
def test_weights_in_few_bits_that_cannot_be_trained_are_refused(
    options, capsys, checkpoint_folder, edit_json, method, words, named
):
    edit_json(checkpoint_folder / "config.json", quantization_config={"quant_method": method, "bits": 4})
    with pytest.raises(SystemExit):
        main(options(*STEPS, *words))
    assert re.search(named, capsys.readouterr().err)


@pytest.mark.parametrize(
    "words, expected",
    [
        ([], torch.float32),
        (["--bf16"], torch.float32),
        (["--bf16", "--use_lora"], torch.bfloat16),
        (["--use_lora"], torch.float32),
        (["--model_dtype", "float16"], torch.float16),
    ],
)
def test_dtype(options, words, expected):
    model_arguments, _, lora, training = parse_arguments(options(*words))
    assert models.load_model(model_arguments, lora, training)[0].dtype == expected


def test_chat_models_are_told_by_their_name_where_nothing_else_says(tiny_model):
    model = tiny_model()
    assert models.is_chat_model(model, "Qwen/Qwen-7B-Chat")
    assert not models.is_chat_model(model, "Chat/Qwen-7B")
    model.generation_config.update(chat_format="raw", allow_custom_entries=True)
    assert not models.is_chat_model(model, "Qwen-7B-Chat")


# --- checkpoints ---


def kill(monkeypatch, step, error=Killed):
    callbacks = [KillAfterSaving(step, error)]
    monkeypatch.setattr(finetuning, "train", functools.partial(finetuning.train, callbacks=callbacks))


RESUMED = {
    "plain": [],
    "dropout": [],
    "packing": ["--packing", "--gradient_accumulation_steps", 2],
    "lora": ["--use_lora", "--lora_dropout", 0.2],
}


@pytest.mark.parametrize("case", RESUMED)
def test_resumed_training_is_bit_identical(options, tmp_path, checkpoint_folder, monkeypatch, case, edit_json):
    if case == "dropout":
        edit_json(checkpoint_folder / "config.json", **DROPOUT)
    words = [*RESUMED[case], "--max_steps", 5, "--save_strategy", "steps", "--save_steps", 3]
    main(options(*words, output="whole"))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill(patch, 3)
        main(options(*words))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["checkpoint-3"]
    half_written = tmp_path / "out" / "checkpoint-4"
    half_written.mkdir()
    assert last_checkpoint(tmp_path / "out").name == "checkpoint-3"
    trainer = run(parse_arguments(options(*words, "--resume_from_checkpoint", "True")))
    assert trainer.state.global_step == 5
    name = "adapter_model.safetensors" if case == "lora" else "model.safetensors"
    assert same(weights(tmp_path / "whole", name), weights(tmp_path / "out", name))
    losses = [[line["loss"] for line in history(tmp_path / o) if "loss" in line] for o in ("whole", "out")]
    assert losses[0] == losses[1]


def test_dropout_is_on(options, checkpoint_folder, tmp_path, edit_json):
    main(options("--max_steps", 2, output="without"))
    edit_json(checkpoint_folder / "config.json", **DROPOUT)
    main(options("--max_steps", 2, output="with"))
    assert not same(weights(tmp_path / "without"), weights(tmp_path / "with"))


def test_resume_from_a_named_checkpoint(options, tmp_path, failed):
    words = ["--max_steps", 2, "--save_strategy", "steps", "--save_steps", 1]
    main(options(*words))
    expected = weights(tmp_path / "out")
    main(options(*words, "--resume_from_checkpoint", tmp_path / "out" / "checkpoint-1"))
    assert same(weights(tmp_path / "out"), expected)
    said = failed(options(*words, "--resume_from_checkpoint", tmp_path / "out" / "checkpoint-9"))
    assert "checkpoint-9 is no complete checkpoint: pass True for the last one" in said


def test_resume_without_a_checkpoint_starts(options, tmp_path):
    main(options("--max_steps", 1, "--resume_from_checkpoint", "True"))
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_interrupted(options, failed, monkeypatch):
    kill(monkeypatch, 1, KeyboardInterrupt)
    said = failed(options(*STEPS, "--save_strategy", "steps", "--save_steps", 1), status=130)
    assert "Interrupted. --resume_from_checkpoint True goes on" in said


# --- refused ---


@pytest.mark.parametrize("held", ["config.json", "adapter_config.json", "model.safetensors", "checkpoint-3"])
def test_a_folder_with_a_model_is_refused(options, tmp_path, failed, held):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / held).mkdir() if held.startswith("checkpoint") else (tmp_path / "out" / held).write_text("{}")
    said = failed(options(*STEPS))
    assert f"{tmp_path / 'out'} holds {held} of an earlier run: name another --output_dir" in said
    assert [path.name for path in (tmp_path / "out").iterdir()] == [held]


def test_packages_that_few_bits_need_are_named(options, checkpoint_folder, failed, monkeypatch):
    config = json.loads((checkpoint_folder / "config.json").read_text())
    quantization = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    (checkpoint_folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    find = importlib.util.find_spec
    absent = ("gptqmodel", "optimum")
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *more: None if name in absent else find(name, *more))
    said = failed(options("--use_lora"))
    assert "pip install gptqmodel optimum" in said


def test_a_model_is_overwritten_on_request(options, tmp_path):
    out = tmp_path / "out"
    (out / "checkpoint-9").mkdir(parents=True)
    (out / "model-00001-of-00002.safetensors").write_text("stale")
    (out / "model.safetensors.index.json").write_text("{}")
    (out / "notes.txt").write_text("kept")
    main(options("--max_steps", 1, "--overwrite_output_dir"))
    assert [path.name for path in out.glob("*.safetensors*")] == ["model.safetensors"]
    assert not (out / "checkpoint-9").exists() and (out / "notes.txt").read_text() == "kept"


@pytest.mark.parametrize(
    "config, reason",
    [
        (None, "doesn't exist"),
        ({"model_type": "qwen2"}, "qwen1-checkpoint convert"),
        ("adapter", "is an adapter: name its base (base) here"),
    ],
)
def test_what_is_no_model_to_train(options, failed, tmp_path, config, reason):
    folder = tmp_path / "model"
    if config is not None:
        folder.mkdir()
        values, name = (config, "config") if isinstance(config, dict) else (ADAPTER, "adapter_config")
        (folder / f"{name}.json").write_text(json.dumps(values))
    said = failed(options("--model_name_or_path", folder))
    assert said.count("\n") == 1 and said.startswith("qwen1-finetune: ") and reason in said


def test_the_folder_of_the_model_is_no_output(options, failed, checkpoint_folder):
    said = failed(options("--output_dir", checkpoint_folder), status=2)
    assert f"--output_dir {checkpoint_folder} is the folder of the model: name another one" in said


def test_help(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    said = capsys.readouterr().out
    assert not end.value.code
    assert said.index("Fine-tune a QWen model") < 200
    assert "--lora_target_modules" in said and "--gradient_checkpointing" in said


def test_published_options_and_defaults(options):
    words = options()
    del words[words.index("--learning_rate") : words.index("--learning_rate") + 2]
    published = ["--evaluation_strategy=no", "--warmup_ratio", "0.01", "--lazy_preprocess", "True"]
    *_, training = parse_arguments([*words, *published])
    assert (training.learning_rate, training.warmup_steps, training.adam_beta2) == (1e-5, 0.01, 0.95)
    *_, lora, training = parse_arguments([*words, "--use_lora", "--learning_rate=1e-4"])
    assert (training.learning_rate, lora.lora_r, lora.lora_alpha) == (1e-4, 64, 16)
    assert parse_arguments([*words, "--use_lora"])[-1].learning_rate == 3e-4


def test_bad_data(options, tmp_path, failed):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"messages": []}\n')
    assert f"qwen1-finetune: {bad}, line 1: 'messages' must be a list" in failed(options(data=bad))
    assert "none.jsonl" in failed(options(data=tmp_path / "none.jsonl"))
    assert not (tmp_path / "out" / "config.json").exists()


def test_nothing_left_to_train_on(options, data, failed):
    assert "none of it fits into --model_max_length 8; raise it" in failed(options("--model_max_length", 8))
    data.write_text(data.read_text().splitlines()[0])
    assert "--eval_fraction 0.5 leaves nothing to train on" in failed(options("--eval_fraction", 0.5))
    *_, training = parse_arguments(options())
    with pytest.raises(TrainingError, match="no examples"):
        finetuning.train(None, None, [], None, training, packing=False, max_length=8)


def test_no_qwen_model(options, checkpoint_folder, failed, tmp_path):
    words = options(*STEPS)
    words[words.index(str(checkpoint_folder))] = str(tmp_path / "nowhere")
    assert "nowhere" in failed(words)
    model = QWenLMHeadModel.from_pretrained(checkpoint_folder)
    model.resize_token_embeddings(300)
    model.save_pretrained(checkpoint_folder)
    assert "and 300 rows in its embedding: it must be a QWen model" in failed(options(*STEPS))


# --- reports ---


def test_tensorboard(options, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    main(options("--max_steps", 1, "--report_to", "tensorboard"))
    assert list(tmp_path.rglob("events.out.tfevents*"))


def test_tensorboard_is_missing(options, failed, without):
    without("tensorboard", "tensorboardX")
    said = failed(options("--max_steps", 1, "--report_to", "tensorboard"))
    assert "--report_to tensorboard needs tensorboard: pip install tensorboard" in said


# --- the script ---


@pytest.mark.slow
def test_two_processes_learn_what_one_does(options, tmp_path, repository):
    held_out = tmp_path / "held_out.jsonl"  # of five rows, so that three come again in the last batch of two processes
    turns = [{"instruction": "q", "output": "b" * length} for length in (3, 20, 7, 1, 12)]
    held_out.write_text("\n".join(map(json.dumps, turns)))
    words = ["--max_steps", 3, "--lr_scheduler_type", "constant", "--eval_data_path", held_out]
    words += ["--per_device_eval_batch_size", 2]
    whole = run(
        parse_arguments(
            options(
                *words,
                "--gradient_accumulation_steps",
                1,
                "--train_sampling_strategy",
                "sequential",
                "--per_device_train_batch_size",
                4,
                output="whole",
            )
        )
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Without a GPU, `--multi_gpu` starts processes as it does with several; `--cpu` would want MPI and start one only.
    launch = ["--multi_gpu", "--num_processes", 2, "--num_machines", 1, "--mixed_precision", "no"]
    launch += ["--main_process_port", port, repository / "finetune.py"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *map(str, launch)]
    done = subprocess.run(
        [*command, *options(*words, "--train_sampling_strategy", "sequential", "--ddp_backend", "gloo")],
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert [path.name for path in (tmp_path / "out").glob("*.safetensors")] == ["model.safetensors"]
    assert not (tmp_path / "out" / ".partial").exists()
    for name in ("train_loss", "eval_loss"):
        (loss,) = [line[name] for line in history(tmp_path / "out") if name in line]
        (expected,) = [line[name] for line in whole.state.log_history if name in line]
        assert loss == pytest.approx(expected, rel=1e-4)


LEAVING = """
import sys
from pathlib import Path
import torch.distributed as dist
from qwen1.training import finetuning

def threads():
    return sorted(path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm"))

def destroy(leave=dist.destroy_process_group):
    print("before:", *threads())
    leave()

dist.destroy_process_group = destroy
finetuning.main(sys.argv[1:])
print("after:", *threads())
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="tells threads by /proc")
def test_no_thread_of_the_group_outlives_the_training(options, warm, tmp_path):
    """Found as SIGABRT behind a training that succeeded: such a thread let go of a tensor as the interpreter ended."""
    (tmp_path / "train.py").write_text(LEAVING)
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    done = subprocess.run(
        [*warm, "train.py", *options("--max_steps", 1, "--ddp_backend", "gloo")],
        env={**os.environ, **place},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    seen = {line.split(": ")[0]: line for line in done.stdout.splitlines() if line.startswith(("before", "after"))}
    assert "gloo" in seen["before"] and "gloo" not in seen["after"]
    assert "find_unused_parameters" not in done.stderr  # what torch says where it looked for them in vain
