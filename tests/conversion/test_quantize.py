"""`quantize`: texts, a library in the place of gptqmodel, what is put together of its result, and perplexity."""

import importlib.machinery
import json
import shutil
import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from qwen1 import QWenTokenizer
from qwen1.conversion.commands import app
from qwen1.conversion.errors import CheckpointError
from qwen1.conversion.inspecting.inspection import inspect
from qwen1.conversion.quantising.calibration import OWN_TEXTS, make_rows, read_calibration
from qwen1.conversion.quantising.perplexity import perplexity

TINY_CHAT = Path(__file__).parents[2] / "qwen-tiny-chat"
PUBLISHED = {"damp_percent": 0.01, "desc_act": False, "sym": True, "true_sequential": True, "quant_method": "gptq"}


@pytest.fixture(scope="module")
def tokenizer():
    return QWenTokenizer.from_pretrained(TINY_CHAT)


@pytest.fixture
def library(monkeypatch, round_to_nearest):
    """A module in the place of gptqmodel that rounds to the nearest; `calls` are what it was given."""
    calls = []

    class Model:
        def __init__(self, folder, config):
            self.folder, self.config = Path(folder), config

        @classmethod
        def load(cls, folder, config, trust_remote_code, device):
            calls.append(
                types.SimpleNamespace(
                    config=config, device=device, files=set(path.name for path in Path(folder).iterdir())
                )
            )
            return cls(folder, config)

        def quantize(self, samples, batch_size):
            print("a library that talks")
            Path("logs").mkdir()  # and writes where it stands
            calls[-1].samples = samples
            if library.failure:
                raise library.failure

        def save(self, folder):
            Path(folder).mkdir()
            settings = {**self.config, "quant_method": "gptq"}
            packed = {}
            for name, tensor in load_file(self.folder / "model.safetensors").items():
                if tensor.ndim == 2 and name.startswith("transformer.h."):
                    rounded = round_to_nearest(tensor, settings)
                    packed |= {name.removesuffix("weight") + part: values for part, values in rounded.parts.items()}
                else:
                    packed[name] = torch.zeros_like(tensor)  # what the library makes of these isn't wanted
            save_file(packed, Path(folder) / "model.safetensors")

    library = types.ModuleType("gptqmodel")
    library.__spec__ = importlib.machinery.ModuleSpec("gptqmodel", None)
    library.GPTQModel, library.QuantizeConfig = Model, lambda **settings: settings
    library.calls, library.failure = calls, None
    monkeypatch.setitem(sys.modules, "gptqmodel", library)
    return library


def run(*arguments):
    return CliRunner().invoke(app, ["quantize", *map(str, arguments)])


# --- the command ---


@pytest.mark.parametrize("bits", [4, 8])
def test_the_result_is_in_the_published_layout(library, tmp_path, bits):
    result = run(TINY_CHAT, tmp_path / "new", "--bits", bits, "--group-size", 64)
    assert result.exit_code == 0, result.output
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    assert config["quantization_config"] == {"bits": bits, "group_size": 64, **PUBLISHED}
    assert inspect(tmp_path / "new", scan=True).problems == []
    before, after = load_file(TINY_CHAT / "model.safetensors"), load_file(tmp_path / "new" / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before.keys() & after.keys())
    assert {name.rpartition(".")[2] for name in after.keys() - before.keys()} == {
        "qweight",
        "qzeros",
        "scales",
        "g_idx",
    }
    files = {path.name for path in (tmp_path / "new").iterdir()}
    assert {"modeling_qwen.py", "qwen.tiktoken", "generation_config.json", "chat_template.jinja"} <= files
    assert [path.name for path in tmp_path.iterdir()] == ["new"] and not Path("logs").exists()
    assert result.stdout.count("\n") == 2 and "Perplexity on" in result.stdout
    assert "our own, and few" in result.stderr and "a library that talks" in result.stderr


def test_the_library_is_told_what_was_asked_for(library, tmp_path):
    (tmp_path / "texts.txt").write_text(
        "\n\n".join(f"The cat number {i} sat on mat number {i * 7}." for i in range(200))
    )
    options = (
        "--calibration",
        tmp_path / "texts.txt",
        "--samples",
        5,
        "--length",
        32,
        "--desc-act",
        "--group-size",
        -1,
    )
    assert run(TINY_CHAT, tmp_path / "new", "--bits", 8, *options).exit_code == 0
    (call,) = library.calls
    assert {name: call.config[name] for name in ("bits", "group_size", "desc_act", "sym", "damp_percent")} == {
        "bits": 8,
        "group_size": -1,
        "desc_act": True,
        "sym": True,
        "damp_percent": 0.01,
    }
    assert call.config["offload_to_disk"] is False and call.device == "cpu"
    assert [sample["input_ids"].shape for sample in call.samples] == [(1, 32)] * 5
    assert "modeling_qwen.py" in call.files and "model.safetensors" in call.files


def test_a_failure_leaves_nothing(library, tmp_path):
    library.failure = RuntimeError("no memory\nat all")
    result = run(TINY_CHAT, tmp_path / "new", "--bits", 4, "--group-size", 64)
    assert result.exit_code == 1 and "gptqmodel failed: no memory at all (RuntimeError)." in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def rounded(library, tmp_path, monkeypatch):
    """The words of a command that was interrupted between the library's work and the result."""
    from qwen1.conversion.writing import plans

    def stop(target, *arguments):
        if target.name == "new":
            raise KeyboardInterrupt
        return write(target, *arguments)

    write = plans.write_folder
    arguments = (TINY_CHAT, tmp_path / "new", "--bits", 4, "--group-size", 64)
    with monkeypatch.context() as patch:
        patch.setattr(plans, "write_folder", stop)
        assert run(*arguments).exit_code == 130 and len(library.calls) == 1
    assert not (tmp_path / "new").exists() and (tmp_path / "new.quantising" / "result").is_dir()
    return arguments


def test_what_the_library_had_finished_is_taken_up(library, rounded, tmp_path):
    """If the same is asked for."""
    result = run(*rounded)
    assert result.exit_code == 0 and len(library.calls) == 1 and "Going on with what" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


@pytest.mark.parametrize("last", ["replace_text", "empty", "remove_work_folder", "rmdir"])
@pytest.mark.no_cover
def test_a_run_killed_when_it_clears_up_is_finished(library, tmp_path, monkeypatch, last):
    """The result is there, and so was the work folder, without end: the same command refused to run."""
    from qwen1.conversion.writing import work_folder

    work, target = tmp_path / "new.quantising", tmp_path / "new"

    def stop(path, *arguments):
        if target.exists() and path in (work, work / "rounded.json"):
            raise KeyboardInterrupt
        return do(path, *arguments)

    owner = type(work) if last == "rmdir" else work_folder
    do = getattr(owner, last)
    arguments = (TINY_CHAT, target, "--bits", 4, "--group-size", 64)
    with monkeypatch.context() as patch:
        patch.setattr(owner, last, stop)
        assert run(*arguments).exit_code == 130
    written = {path.name: path.read_bytes() for path in target.iterdir()}
    assert "model.safetensors" in written and work.is_dir()
    result = run(*arguments)
    if last == "rmdir":  # nothing is left that tells who wrote it
        assert result.exit_code == 1 and "exists: remove it" in result.stderr
    else:
        assert result.exit_code == 0 and "Perplexity on" in result.stdout
        assert ("files written" if last == "replace_text" else "written by an interrupted run") in result.stdout
    assert len(library.calls) == 1 and list(tmp_path.iterdir()) == [target]
    assert {path.name: path.read_bytes() for path in target.iterdir()} == written


def test_what_was_rounded_stays_where_something_else_is_in_the_way(library, rounded, tmp_path):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "mine").touch()
    result = run(*rounded)
    assert result.exit_code == 1 and "holds something else" in result.stderr
    shutil.rmtree(tmp_path / "new")
    assert run(*rounded).exit_code == 0 and len(library.calls) == 1


def test_a_result_of_other_settings_is_not_taken_for_that_of_a_killed_run(library, tmp_path, monkeypatch):
    from qwen1.conversion.writing import work_folder

    def stop(folder):
        if folder.name == "new.quantising":
            raise KeyboardInterrupt
        remove(folder)

    remove = work_folder.remove_work_folder
    with monkeypatch.context() as patch:
        patch.setattr(work_folder, "remove_work_folder", stop)
        assert run(TINY_CHAT, tmp_path / "new", "--bits", 4, "--group-size", 64).exit_code == 130
    result = run(TINY_CHAT, tmp_path / "new", "--bits", 8, "--group-size", 64)
    assert result.exit_code == 1 and "exists: remove it" in result.stderr
    assert len(library.calls) == 1 and [path.name for path in tmp_path.iterdir()] == ["new"]


@pytest.mark.no_cover
def test_what_another_run_had_finished_is_not(library, tmp_path):
    work = tmp_path / "new.quantising"
    work.mkdir()
    (work / ".qwen1.lock").touch()
    (work / "rounded.json").write_text("[]")
    (work / "result").mkdir()
    assert run(TINY_CHAT, tmp_path / "new", "--bits", 4, "--group-size", 64).exit_code == 0
    assert len(library.calls) == 1


@pytest.mark.parametrize(
    ("changes", "options", "named"),
    [
        ({}, ("--group-size", 128), "'transformer.h.0.attn.c_attn.weight' has 192 inputs"),
        ({}, ("--calibration", "no-such-file.txt"), "no-such-file.txt doesn't exist"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, (), "quantised already (gptq)"),
        ({"model_type": "qwen2"}, (), "only QWen is quantised here"),
        ({"n_layer": 5, "num_hidden_layers": 5}, ("--group-size", 64), "is not a weight of this architecture"),
    ],
)
def test_what_cannot_be_quantised_is_refused_before_the_library_starts(library, tmp_path, changes, options, named):
    folder = tmp_path / "source"
    folder.mkdir()
    for name in ("model.safetensors", "qwen.tiktoken"):
        (folder / name).write_bytes((TINY_CHAT / name).read_bytes())
    (folder / "config.json").write_text(json.dumps({**json.loads((TINY_CHAT / "config.json").read_text()), **changes}))
    result = run(folder, tmp_path / "new", "--bits", 4, *options)
    assert result.exit_code == 1 and named in result.stderr and library.calls == []


def test_a_target_that_exists_is_left_alone(library, tmp_path):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "mine").touch()
    result = run(TINY_CHAT, tmp_path / "new", "--bits", 4, "--group-size", 64)
    assert result.exit_code == 1 and "exists: remove it" in result.stderr and library.calls == []


def test_a_missing_library_is_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "gptqmodel", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None)
    result = run(TINY_CHAT, tmp_path / "new", "--bits", 4, "--group-size", 64)
    assert result.exit_code == 1 and "pip install 'qwen1[gptq]'" in result.stderr and result.stderr.count("\n") == 1


# --- texts ---


def test_our_own_texts_are_of_many_kinds(tokenizer):
    texts = read_calibration(OWN_TEXTS)
    assert len(texts) > 40 and any(isinstance(text, list) for text in texts)
    assert make_rows(texts, tokenizer, 128, 512, 0).seen.shape[0] >= 7


def test_files_of_texts(tmp_path):
    plain = tmp_path / "texts.txt"
    plain.write_text("one\nline\n\n\n two \n")
    assert read_calibration(plain) == ["one\nline", "two"]
    turns = [{"role": "user", "content": "Hi"}]
    lines = tmp_path / "texts.jsonl"
    lines.write_text("\n".join(map(json.dumps, ["one", {"text": "two"}, {"messages": turns}])) + "\n\n")
    assert read_calibration(lines) == ["one", "two", turns]


@pytest.mark.parametrize(
    ("content", "named"),
    [("", "no text"), ('"one"\n{', "line 2 is not JSON"), ('{"texts": "one"}', "line 1 is no text"), ('""', "line 1"),
     ('{"messages": ["Hi"]}', "line 1 is no text"), ("[]", "line 1"), ("7", "line 1"), ("null", "line 1")],
)  # fmt: skip
def test_what_is_no_text_is_named_by_its_line(tmp_path, content, named):
    path = tmp_path / "texts.jsonl"
    path.write_text(content)
    with pytest.raises(CheckpointError, match=named):
        read_calibration(path)


def test_rows_are_whole_and_none_is_measured_on_that_was_seen(tokenizer):
    texts = [f"Number {number} comes before number {number + 1}." for number in range(300)]
    rows = make_rows(texts, tokenizer, 20, 64, seed=3)
    assert rows.seen.shape == (19, 64) and rows.held_out.shape == (3, 64)
    assert not any((held == seen).all() for held in rows.held_out for seen in rows.seen)
    again, other = make_rows(texts, tokenizer, 20, 64, seed=3), make_rows(texts, tokenizer, 20, 64, seed=4)
    assert torch.equal(rows.seen, again.seen) and not torch.equal(rows.seen, other.seen)
    assert texts[0] == "Number 0 comes before number 1."  # the caller's list is left in its order
    short = make_rows(texts[:30], tokenizer, 128, 2048, seed=0)
    assert short.seen.shape[0] + short.held_out.shape[0] >= 8 and short.seen.shape[1] < 2048


def test_conversations_are_read_as_the_model_is_given_them(tokenizer):
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    rows = make_rows([turns] * 40, tokenizer, 8, 32, seed=0)
    assert (rows.seen == tokenizer.im_start_id).any() and (rows.seen == tokenizer.im_end_id).any()
    said = tokenizer.decode(rows.held_out[rows.counted])
    assert set(said.replace("Hello.", "|").replace("<|im_end|>", "").replace("\n", "")) == {"|"}


def test_too_little_text_is_refused(tokenizer):
    with pytest.raises(CheckpointError, match="are the least to calibrate on"):
        make_rows(["A word."], tokenizer, 128, 512, 0)


# --- perplexity ---


def test_perplexity_of_a_model_that_knows_nothing_is_the_size_of_its_vocabulary(tiny_model):
    model = tiny_model()
    model.lm_head.weight.data.zero_()
    rows = torch.randint(464, (2, 12), generator=torch.Generator().manual_seed(0))
    assert perplexity(model, rows) == pytest.approx(464, rel=1e-5)


def test_perplexity_is_that_of_the_loss(tiny_model):
    model = tiny_model(vocab_size=464)
    rows = torch.randint(464, (3, 10), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        loss = model(rows, labels=rows).loss
    assert perplexity(model, rows) == pytest.approx(loss.exp().item(), rel=1e-4)
    counted = torch.zeros_like(rows, dtype=torch.bool)
    counted[0, 5:] = counted[2, 0] = True
    with torch.no_grad():
        loss = model(rows, labels=rows.where(counted, -100)).loss
    assert perplexity(model, rows, counted) == pytest.approx(loss.exp().item(), rel=1e-4)
