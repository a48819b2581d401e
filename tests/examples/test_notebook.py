"""examples/chat.ipynb runs without errors and warnings, and its committed outputs are those of its code.

`python tests/examples/test_notebook.py` executes the notebook and writes its outputs.
"""

import os
import re
import shutil
import sys
import tempfile
from pathlib import Path
from unittest import mock

import nbformat
import pytest
from ipykernel.kernelspec import write_kernel_spec
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "examples" / "chat.ipynb"
FIGURE = re.compile(r"-?\d+\.\d+")
METADATA = {
    "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
"""Of the committed notebook: nothing that depends on the machine or on the version of Python."""

SILENCE = 'import logging\nlogging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)\n'
"""peft imports bitsandbytes where it is installed, as the tests have it, which then complains of a missing kernel."""


class Recorder(NotebookClient):
    """Executes a notebook and keeps what each cell displayed, which the notebook itself has in its last state only.

    Attributes:
        displayed: cell id -> (type of the message, Markdown shown), in order.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.displayed: dict[str, list[tuple[str, str]]] = {}

    def process_message(self, msg, cell, cell_index):
        kind = msg["header"]["msg_type"]
        if kind in ("display_data", "update_display_data"):
            shown = msg["content"]["data"].get("text/markdown", "")
            self.displayed.setdefault(cell["id"], []).append((kind, shown))
        return super().process_message(msg, cell, cell_index)


def execute(folder: Path) -> Recorder:
    """Execute a copy of the notebook as in a clone: offline, by this interpreter, without the user's own settings.

    Args:
        folder: an empty one, for the copy.
    """
    (folder / "examples").mkdir()
    (folder / "qwen-tiny-chat").symlink_to(ROOT / "qwen-tiny-chat")
    shutil.copy(NOTEBOOK, folder / "examples")
    notebook = nbformat.read(folder / "examples" / NOTEBOOK.name, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.update(execution_count=None, outputs=[])
    startup = folder / "ipython" / "profile_default" / "startup"
    startup.mkdir(parents=True)
    (startup / "silence.py").write_text(SILENCE)
    write_kernel_spec(folder / "jupyter" / "kernels" / "python3")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("COV_", "HF_", "JUPYTER_"))}
    environment = {
        **kept,
        "HF_HOME": str(folder / "huggingface"),
        "HF_HUB_OFFLINE": "1",
        "IPYTHONDIR": str(folder / "ipython"),
        "JUPYTER_CONFIG_DIR": str(folder / "config"),
        "JUPYTER_PATH": str(folder / "jupyter"),
        "JUPYTER_PLATFORM_DIRS": "1",
    }
    resources = {"metadata": {"path": str(folder / "examples")}}
    settings = dict(kernel_name="python3", timeout=300, coalesce_streams=True, record_timing=False)
    with mock.patch.dict(os.environ, environment, clear=True):
        recorder = Recorder(notebook, resources=resources, **settings)
        recorder.execute()
    notebook.metadata = nbformat.from_dict(METADATA)
    return recorder


def printed(cell) -> str:
    """What a cell printed or displayed, without errors and warnings."""
    texts = []
    for output in cell.outputs:
        if output.output_type == "stream" and output.name == "stdout":
            texts.append(output.text)
        elif output.output_type in ("display_data", "execute_result"):
            texts.append(output.data.get("text/markdown", output.data["text/plain"]))
    return "".join(texts)


def code_cells(notebook) -> dict:
    return {cell.id: cell for cell in notebook.cells if cell.cell_type == "code"}


def figures(text: str) -> list[float]:
    return [float(figure) for figure in FIGURE.findall(text)]


COMMITTED = nbformat.read(NOTEBOOK, as_version=4)
CELLS = list(code_cells(COMMITTED))


@pytest.fixture(scope="module")
def recorder(tmp_path_factory):
    return execute(tmp_path_factory.mktemp("notebook"))


@pytest.fixture(scope="module")
def cells(recorder):
    return code_cells(recorder.nb)


@pytest.mark.slow
@pytest.mark.parametrize("name", CELLS)
def test_committed_output_is_that_of_the_code(name, cells):
    committed, executed = printed(code_cells(COMMITTED)[name]), printed(cells[name])
    if "sampled" in cells[name].metadata.get("tags", ()):  # random numbers differ between kinds of processors
        committed, executed = (len(text.splitlines()) for text in (committed, executed))
        assert committed == executed
    else:
        assert FIGURE.sub("0.0", executed) == FIGURE.sub("0.0", committed)
        assert figures(executed) == pytest.approx(figures(committed), abs=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("name", CELLS)
def test_cell_gives_no_warning(name, cells):
    assert [output for output in cells[name].outputs if output.get("name") == "stderr"] == []


@pytest.mark.slow
def test_the_stream_redraws_one_display(recorder, cells):
    (first, empty), *updates = recorder.displayed["stream"]
    texts = [text for _, text in updates]
    assert (first, empty) == ("display_data", "") and {kind for kind, _ in updates} == {"update_display_data"}
    assert len(texts) > 5 and all(after.startswith(before) for before, after in zip(texts, texts[1:], strict=False))
    assert printed(cells["stream"]) == texts[-1]
    assert len(cells["stream"].outputs) == 1


@pytest.mark.slow
def test_the_loss_falls_and_the_adapter_answers(cells):
    losses = figures(printed(cells["lora"]))
    assert losses[-1] < losses[0] / 10
    before, after = printed(cells["lora-after"]).split("after\n")
    assert "小明的面包\n" in after and "小明" not in before
    assert after in printed(cells["save"])


@pytest.mark.slow
def test_the_same_seed_samples_the_same_reply(cells):
    replies = [line.split(": ", 1)[1] for line in printed(cells["seeds"]).splitlines()]
    assert replies[0] == replies[-1] and len(set(replies)) > 1


@pytest.mark.slow
def test_embeddings_are_unit_vectors_and_know_no_padding(cells):
    *rows, padding = printed(cells["embeddings"]).splitlines()
    table = [figures(row) for row in rows]
    assert [table[i][i] for i in range(len(table))] == [1.0] * len(table)
    assert padding.endswith("True")


def test_the_committed_notebook_is_tidy():
    nbformat.validate(COMMITTED)
    assert COMMITTED.metadata == METADATA
    cells = code_cells(COMMITTED).values()
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert all(cell.metadata.keys() <= {"tags"} for cell in COMMITTED.cells)
    kinds = {(output.output_type, output.get("name")) for cell in cells for output in cell.outputs}
    assert kinds <= {("stream", "stdout"), ("display_data", None)}
    assert nbformat.writes(COMMITTED) + "\n" == NOTEBOOK.read_text(encoding="utf-8")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        nbformat.write(execute(Path(folder)).nb, NOTEBOOK)


if __name__ == "__main__":
    sys.exit(main())
