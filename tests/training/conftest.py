"""A small checkpoint, data and the words of a command line, for whatever trains."""

import json

import pytest
from transformers import TrainerCallback

from qwen1.training.finetuning import main


class Killed(Exception):
    """Stands for SIGKILL."""


class KillAfterSaving(TrainerCallback):
    """Ends a training behind the checkpoint of a step, or behind its first, as a crash does."""

    def __init__(self, step=None, error=Killed):
        self.step, self.error = step, error

    def on_save(self, args, state, control, **kwargs):
        if self.step in (None, state.global_step):
            raise self.error


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.jsonl"
    turns = [[{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": "a" * (i + 1)}] for i in range(12)]
    path.write_text("\n".join(json.dumps({"messages": messages}) for messages in turns))
    return path


@pytest.fixture
def edit_json():
    """Change values of a JSON file: (path, **values) -> None; a value of None takes the key away."""

    def edit(path, **changes):
        values = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))

    return edit


@pytest.fixture
def checkpoint_folder(checkpoint_folder, edit_json):
    edit_json(checkpoint_folder / "generation_config.json", _from_model_config=None)  # as in the published files
    return checkpoint_folder


@pytest.fixture
def options(checkpoint_folder, data, tmp_path):
    """Make the words of a command line: (*options, where the output goes) -> list."""

    def make(*more, output="out", data=data):
        words = ["--model_name_or_path", checkpoint_folder, "--data_path", data, "--output_dir", tmp_path / output]
        words += ["--model_max_length", 128, "--per_device_train_batch_size", 2, "--logging_steps", 1]
        words += ["--learning_rate", 1e-3, "--use_cpu", "--disable_tqdm", "True", "--save_strategy", "no"]
        return [str(word) for word in (*words, *more)]

    return make


@pytest.fixture
def failed(capsys):
    """What the program says about why it ends with this status: (words, status, program) -> standard error."""

    def fail(words, status=1, program=main):
        with pytest.raises(SystemExit) as end:
            program(words)
        assert end.value.code == status
        return capsys.readouterr().err

    return fail
