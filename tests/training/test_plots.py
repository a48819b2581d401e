"""The curves of a training as a picture: what is in it, and that it is there however the training ends."""

import struct

import pytest
from transformers import TrainerCallback

pytest.importorskip("matplotlib", reason="matplotlib isn't installed")

from matplotlib.figure import Figure  # noqa: E402

from qwen1.training import finetuning  # noqa: E402
from qwen1.training.finetuning import main, parse_arguments  # noqa: E402
from qwen1.training.plots import draw_curves  # noqa: E402

PNG = ["--report_to", "png", "--max_steps", "4"]
LOG = [
    {"step": 1, "loss": 3.0, "learning_rate": 0.1},
    {"step": 2, "loss": 2.0, "learning_rate": 0.2},
    {"step": 2, "eval_loss": 2.5, "eval_perplexity": 12.0},
    {"step": 2, "train_runtime": 1.0},
]
PREFERENCES = [{"step": 1, "rewards/margins": 0.1, "rewards/accuracies": 0.5, "eval_rewards/margins": 0.2}]


class EndAt(TrainerCallback):
    """Raises an error behind a step."""

    def __init__(self, step, error):
        self.step, self.error = step, error

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise self.error


@pytest.fixture
def panels(monkeypatch):
    """What is drawn from now on: a list of pictures, each {title: {curve: points}}."""
    drawn, save = [], Figure.savefig

    def savefig(figure, *args, **kwargs):
        curves = {
            a.get_title(): {line.get_label(): line.get_xydata().tolist() for line in a.lines} for a in figure.axes
        }
        drawn.append({title: lines for title, lines in curves.items() if title})
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return drawn


def size(path):
    """(width, height) of a PNG."""
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n") and content.endswith(b"IEND\xaeB`\x82")
    return struct.unpack(">II", content[16:24])


def test_loss_and_learning_rate(tmp_path, panels):
    draw_curves(LOG, tmp_path / "new" / "training.png")
    (drawn,) = panels
    assert set(drawn) == {"loss", "learning rate"}
    assert drawn["loss"] == {"training": [[1, 3], [2, 2]], "evaluation": [[2, 2.5]]}
    assert [*drawn["learning rate"].values()] == [[[1, 0.1], [2, 0.2]]]
    assert min(size(tmp_path / "new" / "training.png")) > 300
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["training.png"]


def test_margins_and_accuracies(tmp_path, panels):
    draw_curves([*LOG, *PREFERENCES], tmp_path / "training.png")
    (drawn,) = panels
    assert drawn["margin of chosen over rejected"] == {"training": [[1, 0.1]], "evaluation": [[1, 0.2]]}
    assert drawn["share of pairs in the right order"] == {"training": [[1, 0.5]]}


def test_nothing_is_drawn_of_nothing(tmp_path):
    draw_curves([{"step": 1, "train_runtime": 3.0}], tmp_path / "training.png")
    assert list(tmp_path.iterdir()) == []


def test_a_run_leaves_its_picture_and_shows_it(options, tmp_path, panels, data):
    main(options(*PNG, "--eval_data_path", data))
    assert size(tmp_path / "out" / "training.png")
    assert len(panels[-1]["loss"]["training"]) == 4 and len(panels[-1]["loss"]["evaluation"]) == 1
    assert "![curves](training.png)" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("error, status", [(KeyboardInterrupt(), 130), (OSError("lost"), 1)])
def test_a_run_that_ends_early_leaves_its_picture(options, tmp_path, failed, monkeypatch, panels, error, status):
    monkeypatch.setattr(
        finetuning.QWenTrainer,
        "__init__",
        lambda self, callbacks=(), *, __init__=finetuning.QWenTrainer.__init__, **k: __init__(
            self, callbacks=[*callbacks, EndAt(2, error)], **k
        ),
    )
    failed(options(*PNG), status)
    assert size(tmp_path / "out" / "training.png") and panels
    assert not (tmp_path / "out" / "config.json").exists()


def test_a_resumed_run_shows_all_of_it(options, tmp_path, panels):
    words = [*PNG, "--save_strategy", "steps", "--save_steps", "2"]
    main(options(*words[:3], 2, *words[4:]))
    main(options(*words, "--resume_from_checkpoint", "True"))
    assert [step for step, _ in panels[-1]["loss"]["training"]] == [1, 2, 3, 4]


def test_a_picture_that_cannot_be_written_is_said_once(options, tmp_path, capsys):
    (tmp_path / "out" / "training.partial").mkdir(parents=True)
    main(options(*PNG, "--save_strategy", "steps", "--save_steps", "1"))
    assert capsys.readouterr().err.count("Warning: training.png can't be written (") == 1
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_what_hinders_the_picture_is_not_why_a_training_ends(options, failed, capsys, monkeypatch):
    """An interruption within matplotlib's import left it half loaded, and its error stood in place of the reason."""

    def interrupt(*given, **more):
        raise KeyboardInterrupt

    def half_loaded(*given, **more):
        raise AttributeError("module 'matplotlib' has no attribute 'get_data_path'")

    monkeypatch.setattr("qwen1.training.plots.draw_curves", half_loaded)
    monkeypatch.setattr("qwen1.training.loop.QWenTrainer.train", interrupt)
    said = failed(options(*PNG), 130)
    assert "training.png can't be written (AttributeError: module 'matplotlib'" in said
    assert "Interrupted. --resume_from_checkpoint True goes on" in said


def test_beside_others(options):
    *_, training = parse_arguments(options("--report_to", "png", "tensorboard"))
    assert training.plots and training.report_to == ["tensorboard"]
    *_, training = parse_arguments(options("--report_to", "tensorboard"))
    assert not training.plots and training.report_to == ["tensorboard"]
    *_, training = parse_arguments(options())
    assert not training.plots and training.report_to == []
