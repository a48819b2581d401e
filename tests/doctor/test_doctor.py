"""`qwen1-checkpoint doctor`: what it prints, how it ends, which folders it takes, and what it leaves alone."""

import importlib.metadata
import json
import os
import re
import shutil
import socket

import pytest
import torch
from packaging.requirements import Requirement
from packaging.version import Version
from typer.testing import CliRunner

import qwen1.modeling_qwen as modeling
from qwen1 import QWenLMHeadModel
from qwen1.conversion import commands
from qwen1.doctor import backend_checks, environment, examination, findings
from qwen1.doctor.environment import TESTED, check_requirements, check_tested
from qwen1.doctor.examination import examine
from qwen1.doctor.findings import Check, Outcome, State, perform
from qwen1.doctor.patient import open_patient


@pytest.fixture
def run():
    """Run the command in this process: (*arguments) -> result with exit_code, stdout and stderr."""

    def invoke(*arguments):
        arguments = ["doctor", *(str(argument) for argument in arguments)]
        result = CliRunner().invoke(commands.app, arguments, env={"COLUMNS": "160"})
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return invoke


@pytest.fixture
def no_back_ends(monkeypatch):
    """Leave out what takes longest, and has tests of its own."""
    monkeypatch.setattr(backend_checks, "version_of", lambda name: None)


def tell(folder, name, **changes):
    """Change a JSON file of a folder."""
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# --- what is printed ---


def test_a_table_for_people_and_0_where_nothing_is_wrong(run, no_back_ends):
    result = run()
    assert result.exit_code == 0
    assert "Nothing is wrong." in result.stdout and "FAILED" not in result.stdout
    for word in ("transformers", "torch", "plain arithmetic", "cache, token by token", "pip install torchao", "你好"):
        assert word in result.stdout
    assert "\x1b" not in result.stdout


def test_json_alone_on_standard_output(run, no_back_ends, monkeypatch):
    chat = QWenLMHeadModel.chat
    monkeypatch.setattr(QWenLMHeadModel, "chat", lambda *a, **k: print("a library talks") or chat(*a, **k))
    result = run("--json")
    report = json.loads(result.stdout)
    assert result.exit_code == 0 and report["passed"] is True and report["refusal"] is None
    assert report["versions"]["transformers"] == importlib.metadata.version("transformers")
    assert {"python", "qwen1", "torch", "accelerate", "tokenizers", "safetensors", "tiktoken"} <= set(
        report["versions"]
    )
    assert {check["state"] for check in report["checks"]} <= {"ok", "note", "absent"}
    (check,) = (check for check in report["checks"] if check["name"] == "plain arithmetic")
    assert 0 < check["figures"]["largest"] <= check["figures"]["tolerance"] < 3e-4
    assert "a library talks" in result.stderr


def test_1_where_something_is_wrong_and_the_other_checks_go_on(run, no_back_ends, monkeypatch):
    scale = modeling.logn_scale
    monkeypatch.setattr(modeling, "logn_scale", lambda positions, length: scale(positions, length) * torch.nan)
    monkeypatch.setattr(QWenLMHeadModel, "chat_stream", lambda *args, **kwargs: 1 / 0)
    table, report = run(), run("--json")
    assert table.exit_code == report.exit_code == 1
    assert "Something is wrong" in table.stdout and "ZeroDivisionError: division by zero" in table.stdout
    states = {check["name"]: check["state"] for check in json.loads(report.stdout)["checks"]}
    assert states["stream against chat"] == "FAILED" and states["chat template is the prompt"] == "ok"
    assert len(states) == len(json.loads(report.stdout)["checks"])


def test_the_report_of_a_bug_names_no_path(run, folder, no_back_ends):
    result = run(folder, "--json")
    assert result.exit_code == 0 and json.loads(result.stdout)["folder"] == folder.name
    assert str(folder.parent) not in result.stdout


def test_a_device_that_is_not_there_is_refused(run):
    result = run("--device", "cuda:99")
    assert result.exit_code == 1 and "cuda:99" in result.stderr


def test_a_check_that_raises_has_failed_with_one_line():
    def broken():
        raise RuntimeError("first line\n  second line " + "x" * 1000)

    finding = perform(Check("group", "name", broken))
    assert finding.failed and finding.outcome.detail.startswith("RuntimeError: first line second line")
    assert len(finding.outcome.detail) < 310


def test_figures_that_json_has_no_words_for_become_none():
    outcome = Outcome(State.FAILED, "", {"largest": float("nan"), "tolerance": float("inf"), "pieces": 3})
    figures = findings.Finding("group", "name", outcome, 0.1).to_json()["figures"]
    assert figures == {"largest": None, "tolerance": None, "pieces": 3}


def test_deprecations_are_told_once(no_back_ends, monkeypatch):
    import warnings

    chat = QWenLMHeadModel.chat

    def old(*args, **kwargs):
        warnings.warn("`something` goes in 9.9", FutureWarning, stacklevel=1)
        return chat(*args, **kwargs)

    monkeypatch.setattr(QWenLMHeadModel, "chat", old)
    assert [w for w in examine().warnings if "something" in w] == ["FutureWarning: `something` goes in 9.9"]


# --- what is left alone ---


def test_nothing_is_downloaded_and_nothing_is_written(folder, monkeypatch):
    """Every check, also those that load a quantised model, with the network cut off and the folder watched."""

    def cut(*args, **kwargs):
        calls.append(args)
        raise OSError("no network")

    calls: list = []
    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, cut)
    monkeypatch.setattr(socket, "getaddrinfo", cut)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    diagnosis = examine(folder)
    assert diagnosis.passed and calls == []
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_threads_and_logging_are_as_before(no_back_ends, monkeypatch):
    import logging

    torch.set_num_threads(2)
    monkeypatch.setattr(examination, "model_checks", lambda patient: [Check("a", "b", threads)])
    monkeypatch.setattr(examination, "tokenizer_checks", lambda patient: [])
    seen = []

    def threads():
        seen.append(torch.get_num_threads())
        return Outcome(State.OK, "")

    examine()
    assert seen == [1] and torch.get_num_threads() == 2 and logging.root.manager.disable == logging.NOTSET


# --- folders ---


def test_another_folder_shows_its_reply(run, folder, no_back_ends):
    result = run(folder, "--json")
    checks = {check["name"]: check for check in json.loads(result.stdout)["checks"]}
    assert result.exit_code == 0
    assert (
        "你好！有什么可以帮你？" in checks["greedy replies"]["detail"]
        and "repeatable" in checks["greedy replies"]["detail"]
    )


def test_a_reply_that_changes_is_found(folder, no_back_ends, monkeypatch):
    replies = iter("abcdefgh")
    monkeypatch.setattr(QWenLMHeadModel, "chat", lambda *args, **kwargs: (next(replies), []))
    (finding,) = (f for f in examine(folder).findings if f.name == "greedy replies")
    assert finding.failed and "'a', and then by 'b'" in finding.outcome.detail


def test_a_base_model_is_examined_but_for_chatting(folder, no_back_ends):
    tell(folder, "generation_config.json", chat_format="raw")
    diagnosis = examine(folder)
    assert diagnosis.passed
    absent = {f.name: f.outcome.detail for f in diagnosis.findings if f.outcome.state is State.ABSENT}
    for name in ("stream against chat", "chat template is the prompt"):
        assert "base model (chat_format='raw')" in absent[name] and "chat model of its family" in absent[name]


def test_half_precision_is_measured_against_its_own_error(folder, no_back_ends, monkeypatch):
    monkeypatch.setattr("qwen1.doctor.patient._FLOAT32_SHARE", 0)
    diagnosis = examine(folder)
    assert "bfloat16" in diagnosis.model and [f.outcome.detail for f in diagnosis.findings if f.failed] == []
    scale = modeling.logn_scale
    monkeypatch.setattr(modeling, "logn_scale", lambda positions, length: scale(positions, length) * 3)
    assert "plain arithmetic" in {f.name for f in examine(folder).findings if f.failed}


def test_what_does_not_stretch_texts_is_not_asked_to(folder, no_back_ends):
    tell(folder, "config.json", use_dynamic_ntk=False, use_logn_attn=False)
    diagnosis = examine(folder)
    absent = {f.name for f in diagnosis.findings if f.outcome.state is State.ABSENT}
    assert diagnosis.passed and {"long texts (NTK, LogN)", "generate beyond the length"} <= absent


def remove(name):
    return lambda folder: (folder / name).unlink()


def become(name):
    """Another folder in the place of this one."""

    def change(folder, golden):
        shutil.rmtree(folder)
        shutil.copytree(golden / name, folder)

    return change


REFUSED = {
    "missing": (shutil.rmtree, "doesn't exist", "name the folder"),
    "no configuration": (remove("config.json"), "no config.json", "download it"),
    "no weights": (remove("model.safetensors"), "model.safetensors", ""),
    "quantised": (
        lambda f: tell(f, "config.json", quantization_config={"quant_method": "gptq"}),
        "quantised",
        "full weights",
    ),
    "adapter": (lambda f: (f / "adapter_config.json").write_text("{}"), "adapter", "merge-lora"),
    "other model": (lambda f: tell(f, "config.json", model_type="gpt2"), "gpt2", ""),
    "damaged": (lambda f: os.truncate(f / "model.safetensors", 100_000), "model.safetensors", ""),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_folder_that_cannot_be_examined_gets_a_sentence(run, folder, case):
    change, reason, remedy = REFUSED[case]
    change(folder)
    table, report = run(folder), run(folder, "--json")
    assert table.exit_code == report.exit_code == 1
    refusal = json.loads(report.stdout)["refusal"]
    assert reason in refusal and remedy in refusal and "\n" not in refusal and "Traceback" not in table.output
    assert json.loads(report.stdout)["versions"]["torch"] == importlib.metadata.version("torch")
    assert refusal in table.stderr and refusal in report.stderr and "not loaded" in table.stdout


@pytest.mark.parametrize(
    "case, reason, remedy", [("native/qwen2_gqa_tied", "Qwen2", "convert"), ("model/aug_plain", "2023-08", "upgrade")]
)
def test_folders_of_other_formats_are_sent_where_they_belong(run, folder, golden, case, reason, remedy):
    become(case)(folder, golden)
    result = run(folder, "--json")
    refusal = json.loads(result.stdout)["refusal"]
    assert result.exit_code == 1 and reason in refusal and f"qwen1-checkpoint {remedy}" in refusal


def test_a_folder_without_vocabulary_is_refused(run, folder):
    for name in ("qwen.tiktoken", "tokenizer.json"):
        (folder / name).unlink()
    result = run(folder, "--json")
    refusal = json.loads(result.stdout)["refusal"]
    assert result.exit_code == 1 and "no qwen.tiktoken" in refusal and "download" in refusal


def test_an_error_of_loading_is_one_line(folder, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("many\nlines")

    monkeypatch.setattr(QWenLMHeadModel, "from_pretrained", broken)
    with pytest.raises(ValueError, match="RuntimeError: many lines.*inspect"):
        open_patient(folder, "cpu")


# --- versions ---


@pytest.mark.parametrize(
    "version, state",
    [
        ("5.3.0", State.NOTE),
        ("5.4.0", State.OK),
        ("5.23.9+cpu", State.OK),
        ("5.99.0", State.NOTE),
        ("6.0.0.dev0", State.NOTE),
    ],
)
def test_versions_outside_the_tested_range_are_named(version, state):
    outcome = check_tested("transformers", version)
    assert outcome.state is state and version in outcome.detail
    assert state is State.OK or TESTED["transformers"][1] in outcome.detail


def test_the_tested_range_is_that_of_the_project(repository, pyproject):
    project = pyproject["project"]
    needs = {need.name: need for need in map(Requirement, project["dependencies"])}
    pins = dict(re.findall(r"^([\w-]+)==([^;\s]+)", (repository / "constraints.txt").read_text(), re.MULTILINE))
    for name in ("torch", "transformers"):
        assert {str(s) for s in needs[name].specifier} == {f">={TESTED[name][0]}"}
        assert check_tested(name, pins[name]).state is State.OK
    assert project["requires-python"] == f">={TESTED['python'][0]}"


def test_a_missing_or_old_requirement_is_wrong(monkeypatch):
    real = environment.version_of
    monkeypatch.setattr(environment, "version_of", lambda name: {"tiktoken": None, "rich": "1.0"}.get(name, real(name)))
    outcome = check_requirements()
    assert outcome.state is State.FAILED
    assert "tiktoken" in outcome.detail and "rich>=13.7 is needed, 1.0 installed" in outcome.detail
    monkeypatch.undo()
    assert check_requirements().state is State.OK


def test_accelerators_are_named(monkeypatch):
    properties = type("Properties", (), {"name": "H100", "total_memory": 80e9})
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    assert "cuda:0 H100, 80.0 GB, capability 9.0" in environment.survey().machine["accelerators"]


def test_versions_compare_as_numbers():
    assert Version(TESTED["transformers"][0]) < Version(TESTED["transformers"][1])
