"""`benchmarks/interruptions.py` with few kills and few troubles, in each command."""

import os
import re
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not hasattr(os, "fork"), reason="commands run in forks")]
KILLED = ["upgrade in place", "gguf", "merge-lora", "quantize", "finetune", "finetune lora"]
"""`tests/conversion/test_interrupted.py` kills `upgrade` into another folder and `convert` at more moments."""


def run(repository, command, names, *options):
    words = [word for name in names for word in ("--only", name)]
    done = subprocess.run(
        [sys.executable, repository / "benchmarks" / "interruptions.py", command, *options, *words],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    return done.stdout


def test_a_command_that_was_killed_is_finished_by_the_next_as_if_undisturbed(repository):
    said = run(repository, "kill", KILLED, "--kills", "2", "--seed", "1")
    found = re.findall(r"^(.+): (\d+) kills in (\d+) runs of .*, (\d+) finished as if undisturbed$", said, re.MULTILINE)
    assert [name for name, *_ in found] == KILLED
    assert all(int(kills) >= 2 and runs == finished for _, kills, runs, finished in found)


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root mounts disks and gives up rights"
)
def test_a_command_without_disk_rights_or_memory_says_so_in_a_sentence(repository):
    names = ["upgrade", "merge-lora", "extend-vocabulary over an old file", "chat"]
    said = run(repository, "fail", names, "--steps", "2")
    totals = re.findall(r"^(.+): ((?:\d+ (?:done|refused)(?:, )?)+)$", said, re.MULTILINE)
    assert [name for name, _ in totals] == names
    assert all("refused" in ends for _, ends in totals)
