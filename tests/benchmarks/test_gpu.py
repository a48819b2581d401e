"""`benchmarks/speed.py gpu` from end to end, in a tiny shape on a CPU."""

import json
import os
import subprocess

import pytest

SECTIONS = {
    "limits",
    "attention",
    "prefill",
    "decode",
    "ways",
    "memory",
    "static",
    "batch",
    "golden",
    "chat",
    "tests",
    "profile",
    "int4",
    "vllm",
}


@pytest.fixture
def speed(repository, warm):
    """Run the program without a GPU; returns what it did."""

    def run(*arguments):
        without = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "QWEN_VLLM": "", "QWEN_GPTQ": ""}
        command = [*warm, repository / "benchmarks" / "speed.py", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", env={**os.environ, **without})

    return run


@pytest.mark.slow
def test_every_section_gives_figures_or_says_why_not(speed, tmp_path):
    results = tmp_path / "gpu.json"
    done = speed("gpu", "--tiny", "--results", results)
    assert done.returncode == 0, done.stderr
    kept = json.loads(results.read_text())
    assert kept["machine"]["tiny"] and set(kept["sections"]) == SECTIONS
    for name, section in kept["sections"].items():
        assert section["rows"] and "reason" not in section, (name, section)
        for row in section["rows"]:
            assert row.get("skipped") or row.get("note") or row.get("ours", row.get("theirs")) >= 0, row
    measured = {row["name"]: row for section in kept["sections"].values() for row in section["rows"]}
    assert measured["difference of ours and Qwen2 on the same weights"]["ours"] < 0.02
    assert measured["golden logits, aug_plain, largest error"]["ours"] < 5e-5
    assert measured["known replies, torch.float32"]["ours"] == 4
    assert measured["a token behind 16, static cache, batch 1"]["theirs"] > 0
    assert "skipped" in measured["pytest -m gpu"]["note"] and measured["pytest -m gpu"]["ours"] == 0
    assert (tmp_path / "gpu.png").stat().st_size > 10_000

    table = speed("gpu-table", "--results", results).stdout
    assert "| golden | golden logits, aug_plain, largest error |" in table
    assert "- a token, Int4 through gptqmodel: " in table and "no GPU" in table


def test_a_token_that_took_no_time_is_timed_again(repository, monkeypatch):
    """As where other work is in the way of the shorter call, which gave a token of less than no time."""
    monkeypatch.syspath_prepend(repository / "benchmarks")
    import gpu_measuring

    seconds = iter([1.0, 3.0, 2.0, 1.0, 2.0, 5.0])
    monkeypatch.setattr(gpu_measuring, "written_in", lambda *args, **options: next(seconds))
    found = gpu_measuring.reply(None, None, None, 8 + 30)
    assert (found.first, found.whole, found.token) == (1.0, 5.0, 0.1)
    monkeypatch.setattr(gpu_measuring, "written_in", lambda *args, **options: 1.0)
    with pytest.raises(RuntimeError, match="38 tokens took no longer than 8, 5 times"):
        gpu_measuring.reply(None, None, None, 8 + 30)


@pytest.mark.slow
def test_what_there_was_no_time_for_is_said(speed, tmp_path):
    results = tmp_path / "gpu.json"
    done = speed("gpu", "--tiny", "--only", "limits,chat", "--limit", "0.2", "--results", results)
    assert done.returncode == 0, done.stderr
    sections = json.loads(results.read_text())["sections"]
    assert "all that there was for it" in sections["limits"]["reason"]
    assert sections["chat"]["reason"] == "no time was left of the 0.2 s" and (tmp_path / "gpu.png").is_file()


@pytest.mark.slow
def test_without_a_gpu_only_the_tiny_shape_runs(speed, tmp_path):
    done = speed("gpu", "--results", tmp_path / "gpu.json")
    assert done.returncode == 2 and "--tiny" in done.stderr and not list(tmp_path.iterdir())
