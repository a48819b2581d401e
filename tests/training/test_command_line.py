"""Words of qwen1-finetune's command line: spellings, and what is refused before anything is read."""

import importlib.util
import json

import pytest
from transformers.training_args import OptimizerNames

from qwen1.training import commands as door
from qwen1.training.finetuning import main, parse_arguments


@pytest.mark.parametrize(
    "words, reason",
    [
        (["--q_lora"], "--q_lora needs --use_lora"),
        (["--lora_weight_path", "x"], "--lora_weight_path needs --use_lora"),
        (["--lora_r", "8"], "--lora_r needs --use_lora: without it all weights are trained"),
        (["--lora-alpha", "8"], "--lora_alpha needs --use_lora"),
        (["--use_lora", "--lora_weight_path", "x", "--lora_r", "8"], "--lora_r has no effect with --lora_weight_path"),
        (["--use_lora", "--lora_r", "0"], "--lora_r 0 must be at least 1"),
        (["--use_lora", "--lora_alpha", "0"], "--lora_alpha 0 must be above 0"),
        (["--use_lora", "--lora_dropout", "1"], "--lora_dropout 1.0 must be from 0 to below 1"),
        (["--dpo", "--use_lora", "--lora-dropout", "0.3"], "--lora_dropout has no effect with --dpo"),
        (["--learning_rate", "-1"], "--learning_rate -1.0 must be a number of at least 0"),
        (["--learning_rate", "nan"], "--learning_rate nan must be a number of at least 0"),
        (["--weight_decay", "-1"], "--weight_decay -1.0 must be a number of at least 0"),
        (["--per_device_train_batch_size", "0"], "--per_device_train_batch_size 0 must be at least 1"),
        (["--gradient_accumulation_steps", "0"], "--gradient_accumulation_steps 0 must be at least 1"),
        (["--adam_beta1", "1.5"], "--adam_beta1 1.5 must be from 0 to below 1"),
        (["--label_smoothing_factor", "-2"], "--label_smoothing_factor -2.0 must be from 0 to below 1"),
        (["--lr_scheduler_type", "cosine_with_min_lr"], "needs the least rate: --lr_scheduler_kwargs"),
        (["--save_strategy", "best"], "--save_strategy best needs --metric_for_best_model"),
        (["--warmup_ratio", "1"], "--warmup_ratio 1 must be below 1"),
        (["--warmup-ratio=3"], "--warmup_ratio 3 must be below 1"),
        (["--include_num_input_tokens_seen", "some"], "invalid choice: 'some'"),
        (["--model_max_length", "1"], "--model_max_length 1 must be at least 2"),
        (["--eval_fraction", "1"], "--eval_fraction 1.0 must be from 0 to below 1"),
        (
            ["--eval_fraction", "0.1", "--eval_data_path", "x"],
            "--eval_data_path and --eval_fraction exclude each other",
        ),
        (["--eval_strategy", "steps", "--eval_steps", "1"], "--eval_strategy steps needs --eval_data_path or"),
        (
            ["--eval_fraction", "0.1", "--bf16_full_eval", "--fsdp", "full_shard"],
            "--bf16_full_eval and --fp16_full_eval round what FSDP and DeepSpeed have in shards: leave them out",
        ),
        (["--no_such_option"], "unrecognized arguments|not used by the HfArgumentParser"),
        (["--eval_strategy", "sometimes"], "sometimes"),
        (["--lora_bias", "some"], "invalid choice: 'some'"),
    ],
)
def test_wrong_usage(options, failed, words, reason):
    said = failed(options(*words), status=2)
    assert any(part in said for part in reason.split("|"))
    assert said.startswith("usage: qwen1-finetune MODEL --data_path FILE")
    assert len(said) < 600


def test_options_may_be_written_with_dashes(options):
    for rate in (["--learning-rate", "0.5"], ["--learning-rate=0.5"], ["--learning_rate", "0.5"]):
        assert parse_arguments(options(*rate, "--dpo"))[-1].learning_rate == 0.5
    found = parse_arguments(options("--warmup-ratio", "0.25", "--evaluation-strategy", "no"))[-1]
    assert (found.warmup_steps, str(found.eval_strategy.value)) == (0.25, "no")


def test_tokens_are_counted_as_asked(options, tmp_path):
    main(options("--max_steps", 1, "--include_num_input_tokens_seen", "non_padding"))
    log = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert any(line.get("num_input_tokens_seen") for line in log)


OPTIMIZERS = {
    "galore_adamw": "galore_torch",
    "adamw_torch_8bit": "torchao",
    "paged_lion_8bit": "bitsandbytes",
    "stable_adamw": "torch-optimi",
}


@pytest.mark.parametrize("name, package", OPTIMIZERS.items())
def test_packages_of_optimizers_are_looked_for_first(options, failed, monkeypatch, name, package):
    if name not in {one.value for one in OptimizerNames}:
        pytest.skip(f"this transformers knows no {name}")
    find = importlib.util.find_spec
    absent = ("galore_torch", "torchao", "bitsandbytes", "optimi")
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *more: None if name in absent else find(name, *more))
    said = failed(options("--optim", name, "--optim_target_modules", "c_attn"))
    assert (
        said
        == f"qwen1-finetune: --optim {name} needs {package.replace('torch-optimi', 'optimi')}: pip install {package}\n"
    )


def test_optimizers_that_want_layers_and_kernels_of_others(options, failed, monkeypatch):
    monkeypatch.setattr("qwen1.training.checks._require", lambda *given: None)
    assert "--optim galore_adamw needs --optim_target_modules" in failed(options("--optim", "galore_adamw"))
    assert "--use_liger_kernel has no kernels for QWen models" in failed(options("--use_liger_kernel", "True"))


def test_the_model_may_come_first(options, failed, checkpoint_folder):
    words = options("--use_lora", "--lora_r", "0")[1:]
    assert words[0] == str(checkpoint_folder)
    assert "--lora_r 0 must be at least 1" in failed(words, status=2, program=door.main)
