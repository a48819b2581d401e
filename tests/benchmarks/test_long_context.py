"""`benchmarks/long_context.py` from end to end: one step of training, one text."""

import json
import subprocess

import pytest


@pytest.mark.slow
def test_lengths_are_measured_and_drawn(repository, warm, tmp_path):
    script, results, picture = (
        repository / "benchmarks" / "long_context.py",
        tmp_path / "found.json",
        tmp_path / "found.png",
    )
    small = ("--steps", "1", "--rows", "1", "--texts", "1", "--longest", "1024")
    for arguments in (("run", *small), ("plot", "--output", picture), ("table",)):
        command = [*warm, script, *arguments, "--results", results]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    found = json.loads(results.read_text())
    none, ntk, both = (found["perplexity"][name] for name in ("none", "NTK", "NTK and LogN"))
    assert list(none) == ["64", "128", "256", "512", "1024"]
    within = ("64", "128", "256", "512")
    assert (
        [none[length] for length in within] == [ntk[length] for length in within] == [both[length] for length in within]
    )
    assert none["1024"] != ntk["1024"] != both["1024"]
    assert found["machine"]["torch"] and found["training"]["length"] == 512
    assert "| 8 |  |  |  | 2645.09 | 5.71 | 4.62 |" in done.stdout
    assert picture.stat().st_size > 10_000
