"""The command line: what is printed where, exit codes, and the program run by its path."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from rich.console import Console
from rich.filesize import decimal
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from qwen1.conversion import commands
from qwen1.conversion.command_line import terminal
from qwen1.conversion.inspecting import inspection
from qwen1.conversion.publishing import upload
from qwen1.conversion.writing import plans

COMMANDS = ["inspect", "upgrade", "convert", "verify", "merge-lora", "push", "doctor"]


@pytest.fixture
def run(monkeypatch):
    """Run the program in this process: (*arguments) -> result with exit_code, stdout and stderr."""

    def invoke(*arguments):
        # Consoles look for their stream when they print, so that the runner sees what is printed.
        result = CliRunner().invoke(commands.app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return invoke


@pytest.fixture
def qwen2_folder(golden, tmp_path):
    """A golden Qwen2 checkpoint that may be changed."""
    folder = tmp_path / "qwen2"
    shutil.copytree(golden / "native" / "qwen2_gqa_tied", folder)
    return folder


def change_weight(folder):
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("ln_1.weight") or name.endswith("input_layernorm.weight"))
    (folder / "model.safetensors").unlink()
    save_file({**tensors, name: tensors[name] * 1.5}, folder / "model.safetensors", metadata={"format": "pt"})


def test_help_lists_every_command_and_exit_code(run):
    result = run("--help")
    assert result.exit_code == 0
    assert [name for name in COMMANDS if name not in result.stdout] == []
    assert "Exit codes" in result.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each_command_has_an_example_that_parses(run, command):
    result = run(command, "--help")
    assert result.exit_code == 0
    (example,) = re.findall(r"qwen1-checkpoint (.*\S)", " ".join(result.stdout.split("Example:")[1].split("\n")[:1]))
    assert example.split()[0] == command
    missing = run(*example.split())
    assert missing.exit_code == 1 and "doesn't exist" in missing.stderr  # parsed, but there is no such folder


@pytest.mark.parametrize(
    "arguments",
    [[], ["convert", "a", "b"], ["convert", "a", "b", "--to", "onnx"], ["upgrade", "a"], ["inspect", "--no-such"]],
)
def test_wrong_usage_ends_with_2(run, arguments):
    assert run(*arguments).exit_code == 2


def test_upgrade_in_place_and_to_a_folder_exclude_each_other(run, tmp_path):
    result = run("upgrade", tmp_path, tmp_path / "new", "--in-place")
    assert result.exit_code == 2 and "--in-place" in result.stderr


def test_a_copy_is_not_made_in_place(run, tmp_path):
    result = run("upgrade", tmp_path, "--in-place", "--copy")
    assert result.exit_code == 2 and "--copy is for a new folder" in result.stderr


def test_a_shard_size_that_nothing_is_cut_by_is_noted(run, checkpoint_folder, tmp_path):
    result = run("upgrade", checkpoint_folder, tmp_path / "new", "--max-shard-size", "1KB")
    assert result.exit_code == 0 and "--max-shard-size is for pickles" in result.stderr
    assert "--max-shard-size" not in run("upgrade", checkpoint_folder, tmp_path / "new").stderr


def test_refusals_end_with_1_and_name_the_value_on_stderr(run, golden, tmp_path):
    result = run("convert", golden / "model" / "aug_partial_rotary", tmp_path / "new", "--to", "qwen2")
    assert result.exit_code == 1 and result.stdout == ""
    assert "rotary_pct=0.5" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_operating_system_errors_end_with_1(run, golden, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError("No space left on device")

    monkeypatch.setattr(plans, "write_plan", full)
    result = run("convert", golden / "native" / "llama_gqa", tmp_path / "new", "--to", "qwen")
    assert result.exit_code == 1 and "No space left on device" in result.stderr


def test_interruption_ends_with_130(run, golden, tmp_path, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(plans, "write_plan", interrupted)
    result = run("convert", golden / "native" / "llama_gqa", tmp_path / "new", "--to", "qwen")
    assert result.exit_code == 130 and "takes up what is unfinished" in result.stderr


@pytest.mark.parametrize("words", [["inspect", ""], ["upgrade", "", "--in-place"], ["verify", "a", ""], ["doctor", ""]])
def test_an_empty_word_is_not_the_current_folder(run, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(*words)
    assert result.exit_code == 2 and "an empty word" in result.stderr


def test_nothing_is_to_be_taken_up_of_a_command_that_only_reads(run, golden, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(inspection, "inspect", interrupted)
    result = run("inspect", golden / "native" / "llama_gqa")
    assert result.exit_code == 130 and result.stderr == "Interrupted.\n"


def test_errors_in_the_program_are_not_dressed_up(run, golden, monkeypatch):
    def broken(*arguments, **options):
        raise ZeroDivisionError

    monkeypatch.setattr(inspection, "inspect", broken)
    with pytest.raises(ZeroDivisionError):
        run("inspect", golden / "native" / "llama_gqa")


def test_inspect_prints_a_table_or_json(run, golden):
    table = run("inspect", golden / "native" / "llama_gqa")
    assert table.exit_code == 0 and "LLaMA in Hugging Face format" in table.stdout
    report = run("inspect", golden / "native" / "llama_gqa", "--json")
    assert report.exit_code == 0 and json.loads(report.stdout)["kind"] == "llama"


def test_inspect_ends_with_3_if_the_checkpoint_cannot_be_used(run, qwen2_folder):
    assert run("inspect", qwen2_folder).exit_code == 0
    tensors = load_file(qwen2_folder / "model.safetensors")
    (qwen2_folder / "model.safetensors").unlink()
    tensors["model.norm.weight"][3] = torch.nan
    save_file(tensors, qwen2_folder / "model.safetensors")
    assert run("inspect", qwen2_folder).exit_code == 0  # headers only
    result = run("inspect", qwen2_folder, "--scan", "--json")
    assert result.exit_code == 3 and "model.norm.weight" in " ".join(json.loads(result.stdout)["problems"])


def test_upgrade_says_what_it_did_and_that_nothing_is_left_to_do(run, golden, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(golden / "model" / "aug_plain", source)
    for _, expected in (("first", "files written"), ("again", "up to date")):
        result = run("upgrade", source, tmp_path / "new")
        assert result.exit_code == 0 and expected in result.stdout
    assert "qwen.tiktoken" in result.stderr  # a note: nothing can chat without it
    for expected in ("files written", "up to date"):
        result = run("upgrade", source, "--in-place")
        assert result.exit_code == 0 and expected in result.stdout
    assert (source / "config.json.bak").read_bytes() == (golden / "model" / "aug_plain" / "config.json").read_bytes()


def test_upgrade_copies_if_asked_to(run, golden, tmp_path):
    source = golden / "model" / "aug_plain" / "model.safetensors"
    run("upgrade", source.parent, tmp_path / "copied", "--copy")
    assert not (tmp_path / "copied" / "model.safetensors").samefile(source)


def test_convert_verifies_what_it_wrote(run, golden, tmp_path):
    source = golden / "model" / "aug_ntk_logn"
    result = run("convert", source, tmp_path / "new", "--to", "qwen2", "--dtype", "bfloat16", "--verify")
    assert result.exit_code == 0 and "Passed." in result.stdout
    assert "NTK and LogN" in result.stderr
    change_weight(tmp_path / "new")
    result = run("verify", source, tmp_path / "new", "--round-to", "bfloat16", "--json")
    report = json.loads(result.stdout)
    assert result.exit_code == 3 and report["passed"] is False and report["largest"] > report["tolerance"]


def test_convert_from_a_single_file_takes_every_option(run, golden, tmp_path):
    source = golden / "llama_meta" / "mp1"
    shutil.copy(source / "consolidated.00.pth", tmp_path / "model.pth")
    options = ["--params", source / "params.json", "--seq-length", 128, "--max-shard-size", "100KB", "--verify"]
    result = run("convert", tmp_path / "model.pth", tmp_path / "new", "--to", "qwen", *options)
    assert result.exit_code == 0 and "Passed." in result.stdout
    assert json.loads((tmp_path / "new" / "config.json").read_text())["seq_length"] == 128
    assert len(list((tmp_path / "new").glob("model-*.safetensors"))) > 1


def test_rope_scaling_is_read_from_the_command_line(run, golden, tmp_path):
    source = golden / "model" / "aug_ntk_logn"
    result = run("convert", source, tmp_path / "new", "--to", "qwen2", "--rope-scaling", "yarn:4")
    assert result.exit_code == 0 and "factor 4" in result.stderr
    assert json.loads((tmp_path / "new" / "config.json").read_text())["max_position_embeddings"] == 128
    assert run("convert", source, tmp_path / "other", "--to", "qwen2", "--rope-scaling", "ntk").exit_code == 1


def test_verifying_what_must_differ_is_wrong_usage(run, golden, tmp_path):
    source = golden / "model" / "aug_plain"
    result = run("convert", source, tmp_path / "new", "--to", "qwen2", "--rope-scaling", "yarn:4", "--verify")
    assert result.exit_code == 2 and "YaRN" in result.stderr and not (tmp_path / "new").exists()


def test_verify_takes_given_ids(run, golden, tmp_path):
    source = golden / "model" / "aug_plain"
    result = run("verify", source, source, "--ids", "1,2,3", "--tolerance", 0, "--json")
    report = json.loads(result.stdout)
    assert result.exit_code == 0 and report["largest"] == 0 and report["tokens"] == 3 and report["agreement"] == 1
    assert run("verify", source, source, "--ids", "1,320").exit_code == 1


@pytest.mark.parametrize("option", ["--tokens", "--seed"])
def test_options_of_random_ids_are_refused_beside_given_ones(run, golden, option):
    source = golden / "model" / "aug_plain"
    result = run("verify", source, source, "--ids", "1,2,3", option, 0 if option == "--seed" else 3)
    assert result.exit_code == 2 and f"{option} is for random tokens" in result.stderr


@pytest.mark.parametrize("device", ["nonsense", "cuda:99", "meta"])
def test_a_device_that_is_not_there_is_refused(run, golden, device):
    source = golden / "model" / "aug_plain"
    result = run("verify", source, source, "--device", device)
    assert result.exit_code == 1 and device in result.stderr


def test_params_are_refused_where_there_is_a_configuration(run, golden, tmp_path):
    params = golden / "llama_meta" / "mp1" / "params.json"
    result = run("convert", golden / "model" / "aug_plain", tmp_path / "new", "--to", "qwen2", "--params", params)
    assert result.exit_code == 1 and "--params is for LLaMA" in result.stderr


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_params_are_refused_by_commands_that_only_read(run, golden, command):
    source = golden / "model" / "aug_plain"
    folders = [source, source] if command == "verify" else [source]
    result = run(command, *folders, "--params", golden / "llama_meta" / "mp1" / "params.json")
    assert result.exit_code == 1 and "--params is for LLaMA" in result.stderr


def test_a_trained_length_is_for_qwen_only(run, golden, tmp_path):
    result = run("convert", golden / "model" / "aug_plain", tmp_path / "new", "--to", "qwen2", "--seq-length", 64)
    assert result.exit_code == 1 and "--seq-length is for --to qwen only" in result.stderr


def test_push_lists_files_and_card_without_a_network(run, checkpoint_folder):
    result = run("push", checkpoint_folder, "somebody/tiny", "--dry-run")
    assert result.exit_code == 0
    for path in checkpoint_folder.iterdir():
        assert path.name in result.stdout
    assert "library_name: transformers" in result.stdout


def test_push_passes_its_options_on(run, checkpoint_folder, monkeypatch):
    calls = []
    monkeypatch.setattr(upload, "push", lambda *arguments, **options: calls.append((arguments, options)) or "url")
    options = ["--private", "--revision", "test", "--token", "secret", "--message", "First"]
    result = run("push", checkpoint_folder, "somebody/tiny", *options)
    expected = dict(private=True, revision="test", token="secret", message="First")
    assert calls == [((checkpoint_folder, "somebody/tiny"), expected)]
    assert result.stdout == "url\n"


def test_progress_is_counted_per_tensor_and_per_byte(golden, tmp_path, monkeypatch, capsys):
    """On a terminal the bars are drawn; they end at all tensors and all bytes."""
    monkeypatch.setattr(terminal, "err", Console(file=sys.stdout, force_terminal=True, width=120))
    result = CliRunner().invoke(
        commands.app, ["convert", str(golden / "native" / "llama_gqa"), str(tmp_path / "new"), "--to", "qwen"]
    )
    assert result.exit_code == 0
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", result.stdout + capsys.readouterr().out)
    written = decimal(sum(tensor.nbytes for tensor in load_file(tmp_path / "new" / "model.safetensors").values()))
    assert "19 of 19" in shown and f"{written} of {written}" in shown


@pytest.mark.slow
def test_the_program_runs_by_its_path(repository, golden, tmp_path):
    """In a folder that has another name than the package, whatever other package of that name is installed."""
    folder = tmp_path / "somewhere"
    folder.mkdir()
    for path in (*repository.glob("*.py"), *repository.glob("*.json"), *repository.glob("*.jinja")):
        shutil.copy(path, folder)
    for room in ("conversion", "programs", "qwen1_commands"):
        shutil.copytree(repository / room, folder / room, ignore=shutil.ignore_patterns("__pycache__"))
    other = tmp_path / "installed" / "qwen1.py"
    other.parent.mkdir()
    other.write_text("raise ImportError('the installed one')")
    command = [sys.executable, folder / "convert_checkpoint.py", "inspect", golden / "model" / "aug_plain", "--json"]
    environment = {**os.environ, "PYTHONPATH": str(other.parent)}
    done = subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["kind"] == "qwen-2023-08"
