"""Trainings that can't go on or have nothing to do: NaN, finished runs, half-written checkpoints, full disks, rows."""

import errno
import functools
import json
import os
import shutil
import subprocess

import pytest
import torch
import transformers.modeling_utils
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback, TrainerState

from qwen1 import QWenLMHeadModel
from qwen1.training import finetuning
from qwen1.training.checkpoints import what_is_missing
from qwen1.training.finetuning import main, parse_arguments, run
from qwen1.training.loop import QWenTrainer, all_finite

EACH_STEP = ["--save_strategy", "steps", "--save_steps", 1]


class At(TrainerCallback):
    """Does something to the model before, or behind, a step."""

    def __init__(self, step, do, behind=False):
        self.step, self.do, self.behind = step, do, behind

    def on_step_begin(self, args, state, control, model, **kwargs):
        if state.global_step + 1 == self.step and not self.behind:
            self.do(model)

    def on_step_end(self, args, state, control, model, **kwargs):
        if state.global_step == self.step and self.behind:
            self.do(model)


@pytest.fixture
def during(monkeypatch):
    """Let callbacks take part in the program's training."""

    def take_part(*callbacks):
        monkeypatch.setattr(finetuning, "train", functools.partial(finetuning.train, callbacks=callbacks))

    return take_part


def spoil(model):
    next(weight for weight in model.parameters() if weight.requires_grad).data[0, 0] = float("nan")


def spoil_all(model):
    model.transformer.ln_f.weight.data[:] = float("nan")


def spoil_gradient(model):
    model.lm_head.weight.register_hook(lambda gradient: gradient * float("inf"))


def names(folder):
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


# --- NaN ---


def test_a_loss_that_is_nan(options, tmp_path, failed, during):
    during(At(4, spoil_all))
    said = failed(options("--max_steps", 6, *EACH_STEP))
    good = tmp_path / "out" / "checkpoint-2"  # the weights of step 3 gave that loss, as far as anybody can tell
    assert "qwen1-finetune: The loss is nan at step 4" in said and f"The last good checkpoint is {good}." in said
    assert f"--model_name_or_path {good}" in said and "a lower --learning_rate than 0.001" in said
    assert names(tmp_path / "out") == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    main(options("--max_steps", 1, "--model_name_or_path", good, output="again"))


def test_a_learning_rate_that_is_far_too_high(options, tmp_path, failed):
    said = failed(options("--max_steps", 6, *EACH_STEP, "--learning_rate", 1e35, "--warmup_steps", 0))
    assert "at step 2" in said and "There is no good checkpoint" in said
    assert "model.safetensors" not in names(tmp_path / "out")


@pytest.mark.parametrize("more", [[], ["--eval_strategy", "steps", "--eval_steps", 1]], ids=["end", "steps"])
def test_an_evaluation_that_is_nan(options, tmp_path, failed, more):
    words = ["--max_steps", 1, *EACH_STEP, "--learning_rate", 1e35, "--warmup_steps", 0, "--eval_fraction", 0.2]
    said = failed(options(*words, *more))
    assert "The loss of the evaluation is nan after step 1" in said and "There is no good checkpoint" in said
    assert "model.safetensors" not in names(tmp_path / "out")


def test_gradients_that_are_not_finite(options, tmp_path, failed, during):
    during(At(3, spoil_gradient))
    said = failed(options("--max_steps", 6, *EACH_STEP, "--max_grad_norm", 0))
    assert "The gradients are not finite (NaN or infinity) at step 3" in said
    assert f"The last good checkpoint is {tmp_path / 'out' / 'checkpoint-2'}." in said and "--max_grad_norm 1" in said
    assert names(tmp_path / "out") == ["checkpoint-1", "checkpoint-2"]


def test_weights_that_are_nan_are_not_saved(options, tmp_path, failed, during):
    during(At(2, spoil, behind=True))
    said = failed(options("--max_steps", 6, *EACH_STEP))
    assert "The weights are not finite (transformer.wte.weight) after step 2" in said
    assert names(tmp_path / "out") == ["checkpoint-1"]


@pytest.mark.slow
def test_a_good_model_stays(options, tmp_path, failed, during):
    main(options("--max_steps", 1))
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    during(At(2, spoil, behind=True))
    said = failed(options("--max_steps", 2, "--overwrite_output_dir"))
    assert "after step 2" in said and "There is no good checkpoint" in said
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


@pytest.mark.slow
def test_a_kill_while_a_new_model_takes_the_place_of_an_old_one_leaves_none_of_both(options, tmp_path, monkeypatch):
    """The weights of one with the configuration of the other would load."""
    main(options("--max_steps", 1))
    replace = os.replace

    def replace_and_be_killed(source, target):
        replace(source, target)
        if target == tmp_path / "out" / "model.safetensors":
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", replace_and_be_killed)
    with pytest.raises(SystemExit):
        main(options("--max_steps", 2, "--overwrite_output_dir"))
    assert "model.safetensors" in names(tmp_path / "out") and "config.json" not in names(tmp_path / "out")
    monkeypatch.undo()
    main(options("--max_steps", 2, "--overwrite_output_dir"))
    assert "config.json" in names(tmp_path / "out")


@pytest.mark.slow
def test_an_adapter_that_is_nan(options, tmp_path, failed, during):
    during(At(3, spoil, behind=True))
    said = failed(options("--max_steps", 4, *EACH_STEP, "--use_lora", "--lora_r", 2))
    good = tmp_path / "out" / "checkpoint-2"
    assert "lora_A" in said and f"--lora_weight_path {good}" in said
    main(options("--max_steps", 1, "--use_lora", "--lora_weight_path", good, output="again"))


def test_nan_from_the_start(options, tmp_path, failed, checkpoint_folder):
    weights = load_file(checkpoint_folder / "model.safetensors")
    weights["transformer.h.1.mlp.w1.weight"][3, 5] = float("inf")
    save_file(weights, checkpoint_folder / "model.safetensors", metadata={"format": "pt"})
    said = failed(options("--max_steps", 2))
    assert "hold NaN or infinity before the first step (transformer.h.1.mlp.w1.weight): take another copy" in said


def test_a_step_that_fp16_skips_is_none_of_these(options, during, monkeypatch, tmp_path):
    during(At(2, lambda model: model.zero_grad()))
    arguments = parse_arguments(options("--max_steps", 2))
    losses = iter([float("nan")])
    step = QWenTrainer.training_step

    def training_step(self, *args, **kwargs):
        self.accelerator.scaler = torch.amp.GradScaler("cpu")  # as accelerate has one with --fp16 on a GPU
        loss = step(self, *args, **kwargs)
        self.losses[-1] = loss * next(losses, 1.0)
        return loss

    monkeypatch.setattr(QWenTrainer, "training_step", training_step)
    assert run(arguments).state.global_step == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_all_finite(dtype):
    largest = torch.finfo(dtype).max
    assert all_finite([torch.full((3, 3), largest, dtype=dtype), torch.tensor([-largest], dtype=dtype)])
    assert all_finite([torch.empty(0, dtype=dtype), torch.ones(2, dtype=torch.int8), torch.empty(2, device="meta")])
    for bad in ("nan", "inf", "-inf"):
        assert not all_finite([torch.ones(2, dtype=dtype), torch.tensor([0, float(bad), 1], dtype=dtype)])


# --- finished runs ---


@pytest.mark.slow
@pytest.mark.parametrize("length", [["--max_steps", 2], ["--num_train_epochs", 1, "--gradient_accumulation_steps", 3]])
def test_a_finished_run_is_not_trained_on(options, tmp_path, capsys, length):
    words = options(*length, *EACH_STEP)
    main(words)
    expected = load_file(tmp_path / "out" / "model.safetensors")
    (tmp_path / "out" / "model.safetensors").unlink()  # as if killed before the result was there
    capsys.readouterr()
    for _ in range(2):
        trainer = run(parse_arguments([*words, "--resume_from_checkpoint", "True"]))
        said = capsys.readouterr().err
        assert "The run is finished: the checkpoint has 2 steps of 2, nothing is trained." in said
        assert trainer.state.global_step == 2
        found = load_file(tmp_path / "out" / "model.safetensors")
        assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert names(tmp_path / "out") == sorted({*names(tmp_path / "out")} - {"checkpoint-3"})


@pytest.mark.slow
def test_a_finished_adapter_is_evaluated_and_saved(options, tmp_path):
    words = options("--max_steps", 1, *EACH_STEP, "--use_lora", "--lora_r", 2, "--eval_fraction", 0.2)
    main(words)
    expected = load_file(tmp_path / "out" / "adapter_model.safetensors")
    trainer = run(parse_arguments([*words, "--resume_from_checkpoint", "True"]))
    assert "eval_loss" in trainer.state.log_history[-1] and trainer.state.global_step == 1
    found = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_run_without_a_batch(options, tmp_path, failed):
    said = failed(options("--max_steps", 1, "--dataloader_drop_last", "--per_device_train_batch_size", 16))
    assert "The 12 rows are fewer than a batch (16), which --dataloader_drop_last leaves out" in said
    assert names(tmp_path / "out") == []
    assert "--num_train_epochs 0.0 must be above 0" in failed(options("--num_train_epochs", 0), status=2)


@pytest.mark.slow
def test_fewer_steps_than_the_checkpoint_has(options, tmp_path, capsys):
    main(options("--max_steps", 3, *EACH_STEP))
    trainer = run(parse_arguments(options("--max_steps", 2, *EACH_STEP, "--resume_from_checkpoint", "True")))
    assert "the checkpoint has 3 steps of 2, nothing is trained" in capsys.readouterr().err
    assert trainer.state.global_step == 3


@pytest.mark.slow
def test_more_steps_go_on(options, tmp_path):
    main(options("--max_steps", 1, *EACH_STEP))
    trainer = run(parse_arguments(options("--max_steps", 2, *EACH_STEP, "--resume_from_checkpoint", "True")))
    assert trainer.state.global_step == 2


# --- half-written checkpoints ---


def cut(name):
    def shorten(checkpoint):
        path = checkpoint / name
        path.write_bytes(path.read_bytes()[:-20])

    return shorten


def without(*lost):
    def take_away(checkpoint):
        for name in lost:
            (checkpoint / name).unlink()

    return take_away


def of_missing_parts(checkpoint):
    (checkpoint / "model.safetensors").rename(checkpoint / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))


DAMAGES = {
    "trainer_state.json is missing or cut short": without("trainer_state.json"),
    "trainer_state.json is missing or cut short ": cut("trainer_state.json"),
    "trainer_state.json has no global_step": lambda folder: (folder / "trainer_state.json").write_text("[]"),
    "it has no weights": without("model.safetensors"),
    "it has no state of the optimizer": without("optimizer.pt"),
    "model.safetensors is cut short, or lacks parts": cut("model.safetensors"),
    "optimizer.pt is cut short, or lacks parts": cut("optimizer.pt"),
    "rng_state.pth is cut short, or lacks parts": cut("rng_state.pth"),
    "model.safetensors.index.json is cut short, or lacks parts": of_missing_parts,
    "trainer_state.json is missing or cut short  ": lambda folder: [path.unlink() for path in folder.iterdir()],
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Make a folder with two checkpoints, trained once: (target, words) -> None."""
    kept = tmp_path_factory.mktemp("trained") / "out"

    def make(target, words):
        if not kept.exists():
            main(words)
            shutil.move(target, kept)
            for path in kept.iterdir():
                if path.is_file():
                    path.unlink()
        shutil.copytree(kept, target)

    return make


@pytest.mark.parametrize("reason", DAMAGES)
def test_what_is_missing(options, tmp_path, trained, reason):
    trained(tmp_path / "out", options("--max_steps", 2, *EACH_STEP))
    assert what_is_missing(tmp_path / "out" / "checkpoint-1") is None
    DAMAGES[reason](tmp_path / "out" / "checkpoint-2")
    assert what_is_missing(tmp_path / "out" / "checkpoint-2") == reason.strip()
    assert what_is_missing(tmp_path / "out" / "checkpoint-3") == "trainer_state.json is missing or cut short"


def test_an_older_checkpoint_is_taken_up(options, tmp_path, trained, caplog):
    words = options("--max_steps", 2, *EACH_STEP)
    trained(tmp_path / "out", words)
    cut("optimizer.pt")(tmp_path / "out" / "checkpoint-2")
    trainer = run(parse_arguments([*words, "--resume_from_checkpoint", "True"]))
    assert f"{tmp_path / 'out' / 'checkpoint-2'} is incomplete and passed over: optimizer.pt is cut" in caplog.text
    assert trainer.state.global_step == 2 and what_is_missing(tmp_path / "out" / "checkpoint-2") is None


def test_killed_while_the_first_checkpoint_is_written(options, tmp_path, failed, caplog):
    words = options("--max_steps", 2, *EACH_STEP)
    (tmp_path / "out" / "checkpoint-1").mkdir(parents=True)
    (tmp_path / "out" / "checkpoint-1" / "model.safetensors").write_bytes(b"half")
    said = failed(words)
    assert "out holds checkpoint-1 of an earlier run" in said and "go on with --resume_from_checkpoint True" in said
    main([*words, "--resume_from_checkpoint", "True"])
    assert "has no complete checkpoint (checkpoint-1): training begins anew" in caplog.text
    assert {"model.safetensors", "checkpoint-2"} <= {*names(tmp_path / "out")}
    assert what_is_missing(tmp_path / "out" / "checkpoint-1") is None


def test_a_result_without_checkpoints_is_not_to_be_taken_up(options, tmp_path, failed):
    main(options("--max_steps", 1))
    said = failed(options("--max_steps", 1, "--resume_from_checkpoint", "True"))
    assert (
        "holds config.json of an earlier run: name another --output_dir, or pass --overwrite_output_dir. It has no"
        in (said)
    )
    main(options("--max_steps", 1, "--resume_from_checkpoint", "True", "--overwrite_output_dir"))


def test_a_result_without_a_checkpoint_is_not_said_to_be_trained_anew(options, failed, caplog):
    """As behind --save_only_model, which leaves checkpoints that nothing can go on from."""
    words = ["--max_steps", 1, "--save_strategy", "steps", "--save_steps", 1, "--save_only_model"]
    main(options(*words))
    said = failed(options("--max_steps", 2, "--resume_from_checkpoint", "True"))
    assert "It has no complete checkpoint to go on from." in said and "begins anew" not in caplog.text + said


def test_a_checkpoint_that_is_written_again_is_not_complete_before_its_end(options, tmp_path, trained, monkeypatch):
    trained(tmp_path / "out", options("--max_steps", 2, *EACH_STEP))

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    words = ["--max_steps", 2, *EACH_STEP, "--resume_from_checkpoint", tmp_path / "out" / "checkpoint-1"]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(QWenTrainer, "_save_optimizer_and_scheduler", killed)
        run(parse_arguments(options(*words)))
    assert what_is_missing(tmp_path / "out" / "checkpoint-2") is not None


# --- no space left ---


ERRORS = {
    "OSError": OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    "torch": RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534\nframe #0: ..."),
    "torch, too": RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"),
    "safetensors": SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    "quota": OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
}


def fail_in(part, function, error):
    """Let a function fail whose arguments name this folder."""

    def fail(*args, **kwargs):
        if any(part in str(argument) for argument in args):
            raise error
        return function(*args, **kwargs)

    return fail


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("where", ["weights", "optimizer", "state"])
def test_no_space_for_a_checkpoint(options, tmp_path, failed, monkeypatch, error, where):
    owner, name = {
        "weights": (transformers.modeling_utils, "safe_save_file"),
        "optimizer": (torch, "save"),
        "state": (TrainerState, "save_to_json"),
    }[where]
    monkeypatch.setattr(owner, name, fail_in("checkpoint-3", getattr(owner, name), ERRORS[error]))
    said = failed(options("--max_steps", 4, *EACH_STEP)).strip()
    bad, good = tmp_path / "out" / "checkpoint-3", tmp_path / "out" / "checkpoint-2"
    last = said.splitlines()[-1]
    assert last.startswith(f"qwen1-finetune: {bad} can't be written: ") and "Traceback" not in said
    assert f"the last good checkpoint is {good}. Make room, then go on with --resume_from_checkpoint True." in last
    assert "frame" not in last and (error.startswith("torch") or "no space left on its disk" in last)
    assert names(tmp_path / "out") == ["checkpoint-1", "checkpoint-2"]


@pytest.mark.slow
def test_no_space_for_the_first_checkpoint_or_the_result(options, tmp_path, failed, monkeypatch):
    save = transformers.modeling_utils.safe_save_file
    with monkeypatch.context() as patch:
        patch.setattr(transformers.modeling_utils, "safe_save_file", fail_in("out", save, ERRORS["safetensors"]))
        said = failed(options("--max_steps", 1, *EACH_STEP))
        assert "checkpoint-1 can't be written" in said and "there is no complete checkpoint" in said
        assert names(tmp_path / "out") == []
    with monkeypatch.context() as patch:
        patch.setattr(transformers.modeling_utils, "safe_save_file", fail_in(".partial", save, ERRORS["safetensors"]))
        said = failed(options("--max_steps", 1, *EACH_STEP))
        assert f"the last good checkpoint is {tmp_path / 'out' / 'checkpoint-1'}" in said
        assert names(tmp_path / "out") == ["checkpoint-1"]
    main(options("--max_steps", 1, *EACH_STEP, "--resume_from_checkpoint", "True"))
    assert QWenLMHeadModel.from_pretrained(tmp_path / "out")


def test_other_errors_stay_what_they_are(options, monkeypatch):
    monkeypatch.setattr(torch, "save", fail_in("checkpoint-1", torch.save, RuntimeError("something else")))
    with pytest.raises(RuntimeError, match="^something else$"):
        main(options("--max_steps", 1, *EACH_STEP))


# --- packing ---


def test_packing_says_what_it_leaves(options, capsys):
    main(options("--packing", "--model_max_length", 2048, "--num_train_epochs", 3))
    said = capsys.readouterr().err
    assert "Training: 1 rows of 12 packed examples, 2 a step, 3 steps." in said
    assert (
        "Warning: packing leaves fewer rows (1) than a step takes (2)" in said and "leave --packing out" in said.lower()
    )


@pytest.mark.slow
def test_enough_rows_are_no_reason_to_warn(options, capsys):
    main(options("--packing", "--num_train_epochs", 1))
    said = capsys.readouterr().err
    assert "of 12 packed examples, 2 a step, " in said and "Warning" not in said
    main(options("--max_steps", 1, output="plain"))
    said = capsys.readouterr().err
    assert "Training: 12 rows, 2 a step, 1 steps." in said and "Warning" not in said


@pytest.mark.parametrize(("option", "dtype"), [("--bf16", torch.bfloat16), ("--fp16", torch.float16)])
def test_numbers_that_the_processor_does_not_multiply_are_named(options, capsys, monkeypatch, option, dtype):
    asked = []
    monkeypatch.setattr("qwen1.training.loop.multiplies", lambda dtype: asked.append(dtype) or False)
    main(options("--max_steps", 1, option, "--use_cpu", True))
    said = capsys.readouterr().err
    assert asked == [dtype] and f"Warning: this processor can't multiply what {option} asks for" in said
    assert f"Leave {option} out" in said


# --- shards ---


def test_fsdp_in_one_process_is_refused(options, failed):
    said = failed(options("--max_steps", 1, "--fsdp", "full_shard"), status=2)
    assert "--fsdp shards over several processes: start the program with accelerate launch" in said


SHARDED = """
import sys
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from qwen1.training import finetuning

arguments = finetuning.parse_arguments(sys.argv[1:])
arguments[-1].device
PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU  # accelerate shards nothing over CPUs
finetuning.parse_arguments = lambda argv: arguments
finetuning.main([])
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["FULL_STATE_DICT", "SHARDED_STATE_DICT"])
def test_checkpoints_of_fsdp_end_in_a_whole_model(options, warm, tmp_path, repository, kind):
    (tmp_path / "train.py").write_text(SHARDED)
    config = {"version": 2, "transformer_layer_cls_to_wrap": ["QWenBlock"], "state_dict_type": kind}
    (tmp_path / "fsdp.json").write_text(json.dumps(config))
    words = options("--max_steps", 2, *EACH_STEP, "--fsdp", "full_shard", "--fsdp_config", tmp_path / "fsdp.json")
    command = [*warm, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--no-python"]
    command += [*warm, "train.py"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "FSDP_STATE_DICT_TYPE": kind}
    for more in ([], ["--resume_from_checkpoint", "True", "--max_steps", "3"]):
        done = subprocess.run(
            [*command, *words, *more], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "out" / "checkpoint-3" / "pytorch_model_fsdp_0").is_dir() == (kind == "SHARDED_STATE_DICT")
    assert QWenLMHeadModel.from_pretrained(tmp_path / "out").config.architectures == ["QWenLMHeadModel"]
    code = {path.name: path.read_text() for path in (tmp_path / "out").glob("*.py")}
    assert "modeling_qwen.py" in code
    assert all(text == (repository / name).read_text() for name, text in code.items())
