"""`inspect` with a question: from config.json alone, for people and for programs, with errors that say what to do."""

import json
import shutil

import pytest
from typer.testing import CliRunner

from qwen1.conversion import commands

ASKED = ("--device-memory", "24GB", "--context", "8192", "--batch", "4")


@pytest.fixture
def inspect():
    """Run the command: (*arguments) -> result with exit_code, stdout and stderr."""

    def invoke(*arguments):
        result = CliRunner().invoke(commands.app, ["inspect", *map(str, arguments)], env={"COLUMNS": "120"})
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return invoke


@pytest.fixture
def config(golden, tmp_path):
    """The published configuration of the 7B, alone in a folder."""
    folder = tmp_path / "alone"
    folder.mkdir()
    return shutil.copyfile(golden / "published_configs" / "2023-12-base.config.json", folder / "config.json")


def change(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize("folder", [False, True])
def test_a_configuration_alone_is_enough(inspect, config, folder):
    result = inspect(config.parent if folder else config, *ASKED, "--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert (report["problems"], report["files"], report["kind"]) == ([], [], "qwen-2023-12")
    sizing = report["sizing"]
    assert (sizing["device_memory"], sizing["context"], sizing["batch"]) == (24 * 10**9, 8192, 4)
    assert sizing["parameters"] == report["parameters"]["total"] == 7_721_324_544
    serving = {way["name"]: way for way in sizing["serving"]}
    assert serving["bfloat16"]["devices"] == 2 and serving["float32"]["devices"] == 4
    assert sizing["cache_per_token"]["bfloat16"] == 2 * 32 * 4096 * 2
    assert sizing["lora_parameters"] == 32 * 64 * ((4096 + 12288) + (4096 + 4096) + 3 * (4096 + 11008))
    for way in (*sizing["serving"], *sizing["training"]):
        assert way["total"] == sum(way["bytes_per_device"].values()) > 0
        assert (way["devices"] is None) == (way["reason"] is not None) == (way["total"] > 24 * 10**9)
    lora = [way for way in sizing["training"] if way["name"] == "LoRA, bfloat16"]
    assert [way["gradient_checkpointing"] for way in lora] == [False, True]


def test_people_read_tables(inspect, config):
    result = inspect(config, *ASKED)
    assert result.exit_code == 0
    for words in (
        "none here",
        "Serving 4 texts of 8,192 tokens, devices of 24.0 GB (growing cache)",
        "Training on 4 texts of 8,192 tokens a step",
        "QLoRA, nf4",
        "none: the model is whole on each device",
        "Not counted: what CUDA and NCCL take",
        "No problems (no weights).",
    ):
        assert words in result.stdout
    assert "Memory for inference" not in result.stdout


def test_nothing_is_said_of_devices_unless_it_is_asked(inspect, config):
    plain = inspect(config, "--json")
    assert plain.exit_code == 0 and "sizing" not in json.loads(plain.stdout)
    missing = inspect(config.parent)
    assert missing.exit_code == 3 and "No weights are in" in missing.stdout


@pytest.mark.parametrize(
    "option", [("--cache", "int8"), ("--prefill-chunk", "512"), ("--lora-rank", "8"), ("--reserve", "1GB")]
)
def test_what_only_a_question_makes_use_of_is_refused_without_one(inspect, config, option):
    result = inspect(config, *option)
    assert result.exit_code == 1
    assert all(word in " ".join(result.stderr.split()) for word in (option[0], "--device-memory", "leave it out"))


def test_defaults_are_one_text_of_the_trained_length(inspect, config):
    sizing = json.loads(inspect(config, "--device-memory", "80GB", "--json").stdout)["sizing"]
    assert (sizing["context"], sizing["batch"], sizing["cache"], sizing["lora_rank"]) == (8192, 1, "growing", 64)
    without = json.loads(inspect(config, "--batch", "2", "--json").stdout)["sizing"]
    assert without["device_memory"] is None and {way["devices"] for way in without["training"]} == {1}


def test_more_than_the_positions_is_remarked_on(inspect, config):
    inside = json.loads(inspect(config, "--context", "32768", "--json").stdout)["remarks"]
    beyond = json.loads(inspect(config, "--context", "32769", "--json").stdout)["remarks"]
    (only,) = [remark for remark in beyond if remark not in inside]
    assert "--context 32,769" in only and "32,768" in only


def test_a_checkpoint_is_checked_too(inspect, golden):
    result = inspect(golden / "native" / "qwen2_mha_untied", "--device-memory", "100MB", "--json")
    report = json.loads(result.stdout)
    assert result.exit_code == 0 and report["files"] and report["sizing"]["serving"][0]["devices"] == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--device-memory", "lots"), "--device-memory 'lots' is no size: write it like 24GB"),
        (("--device-memory", "0GB"), "--device-memory '0GB'"),
        (("--device-memory", "-24GB"), "--device-memory '-24GB'"),
        (("--device-memory", "24GB", "--context", "0"), "--context 0 can't be"),
        (("--device-memory", "24GB", "--context", "-1"), "--context -1 can't be"),
        (("--batch", "0"), "--batch 0 can't be"),
        (("--batch", "99999999999999999999"), "--batch 99,999,999,999,999,999,999 can't be"),
        (("--batch", "1", "--cache", "huge"), "--cache 'huge' is none of growing, static, int8"),
        (("--batch", "1", "--prefill-chunk", "0"), "--prefill-chunk 0 can't be"),
        (("--device-memory", "1GB", "--reserve", "2GB"), "--reserve"),
    ],
)
def test_impossible_questions(inspect, config, arguments, words):
    result = inspect(config, *arguments)
    assert result.exit_code == 1 and result.stdout == ""
    assert words in result.stderr


@pytest.mark.parametrize(
    "values", [{"num_hidden_layers": 0}, {"hidden_size": -4096}, {"vocab_size": 10**30}, {"kv_channels": "x"}], ids=str
)
def test_impossible_configurations_give_no_number(inspect, config, values):
    change(config, **values)
    result = inspect(config, *ASKED)
    assert result.exit_code == 1 and result.stdout == ""
    assert "can't be said" in result.stderr


def test_a_file_that_is_no_configuration(inspect, tmp_path):
    (tmp_path / "other.json").write_text('{"a": 1}')
    result = inspect(tmp_path / "other.json", *ASKED)
    assert result.exit_code == 1 and "can't be said" in result.stderr
    (tmp_path / "config.json").write_text("{")
    assert inspect(tmp_path / "config.json", *ASKED).exit_code == 1
    assert inspect(tmp_path / "config.json").exit_code == 3
