"""Loading a checkpoint, its time and memory, and what importing the package adds."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from measuring import (
    RESULTS,
    Comparison,
    Dtype,
    Results,
    Rounds,
    alone,
    forget_peak,
    peak,
    report,
    resident,
    seconds_of,
)
from models import build
from transformers import Qwen2ForCausalLM

from qwen1 import QWenBitsConfig, QWenLMHeadModel

CLASSES = {"ours": QWenLMHeadModel, "theirs": Qwen2ForCausalLM}
FEW_BITS = {8: 0.55, 4: 0.33}
"""Bits -> what the weights should at most take, as a share of those in bf16."""
PROGRAM = """
import sys, torch
from transformers import AutoModelForCausalLM
with torch.inference_mode():
    for weight in AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).parameters():
        weight.max()
"""
"""What users write, with the classes that come in the folder."""
BASE_IMPORT = "import torch, transformers; from transformers import PreTrainedModel, GenerationMixin"


def seconds_of_program(code: str, *arguments: str) -> float:
    """Seconds that a Python of its own takes to run some code, from its start to its end."""
    return seconds_of(lambda: subprocess.run([sys.executable, "-c", code, *arguments], check=True))


def load_one(side: str, folder: str, bits: int | None) -> None:
    """Print seconds, peak memory and size of the weights of a load in this process; of numbers, seconds of another, and
    of `from_pretrained` alone.
    """
    loaded: list[Any] = []
    settings = {} if bits is None else {"quantization_config": QWenBitsConfig(bits=bits)}

    def load_alone() -> None:
        loaded[:] = [CLASSES[side].from_pretrained(folder, **settings)]

    def load_and_read() -> None:
        load_alone()
        # Mapped files are read when they are used first. Looking for the largest weight touches all of them without
        # another copy, which a sum of whole numbers would make, in eight bytes each.
        with torch.inference_mode():
            for weight in loaded[0].parameters():
                weight.max()

    before = resident()
    forget_peak()
    seconds, grown = seconds_of(load_and_read), peak() - before
    weights = sum(weight.nbytes for weight in loaded[0].parameters())
    found = {"seconds": seconds, "peak": grown, "weights": weights}
    for name, way in (("again", load_and_read), ("unread", load_alone)) if bits is None else ():
        loaded.clear()  # which takes its time, too
        found[name] = seconds_of(way)
    print(json.dumps(found))


def load(
    rounds: Rounds = 7,
    dtype: Dtype = "bfloat16",
    results: Results = RESULTS,
    side: Annotated[str, typer.Option(hidden=True)] = "",
    folder: Annotated[str, typer.Option(hidden=True)] = "",
    bits: Annotated[int | None, typer.Option(hidden=True)] = None,
) -> None:
    """`from_pretrained` of a checkpoint of 1 GB, until each weight has been read: time, and peak memory.

    The first load of a process has transformers build a table of what all of its models call their weights; so a second
    one is measured, too, and one until `from_pretrained` returns, when the file is mapped and no weight has been read;
    and a whole program, which imports torch, transformers and the classes of the folder, loads, and ends.
    """
    if side:
        load_one(side, folder, bits)
        return
    with tempfile.TemporaryDirectory() as parent:
        for name, model in zip(CLASSES, build(getattr(torch, dtype)), strict=True):
            model.save_pretrained(Path(parent, name))
        model = None
        time = Comparison(f"load 0.5 B parameters, torch.{dtype}", aim=0.89)
        again = Comparison(f"load 0.5 B parameters again, torch.{dtype}")
        unread = Comparison(f"load 0.5 B parameters again, until from_pretrained returns, torch.{dtype}")
        memory = Comparison(f"peak memory of loading / the weights, torch.{dtype}", aim=1.1, unit="B")
        program = Comparison(f"a program that loads 0.5 B parameters through AutoModelForCausalLM, torch.{dtype}")
        for number in range(rounds + 1):
            for name in sorted(CLASSES, reverse=bool(number % 2)):
                where = str(Path(parent, name))
                run = alone(Path(sys.argv[0]), "load", "--side", name, "--folder", where)
                whole = seconds_of_program(PROGRAM, where)
                for found, what in ((time, "seconds"), (again, "again"), (unread, "unread")) if number else ():
                    getattr(found, name).append(run[what])
                if number:
                    getattr(program, name).append(whole)
                if number and name == "ours":
                    memory.ours.append(run["peak"])
                    memory.theirs.append(run["weights"])
        few = [found for form in FEW_BITS for found in load_in_few_bits(Path(parent, "ours"), form, rounds)]
    for found in (time, again, unread, program, memory, *few):
        report(found, results)


def load_in_few_bits(folder: Path, bits: int, rounds: int) -> tuple[Comparison, Comparison]:
    """The weights of a folder of numbers that is loaded in few bits, and the most that loading them takes."""
    weights = Comparison(f"weights in {bits} bits / in the file", aim=FEW_BITS[bits], unit="B")
    memory = Comparison(f"peak memory of loading in {bits} bits / the weights in the file", unit="B")
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    for _ in range(rounds):
        run = alone(Path(sys.argv[0]), "load", "--side", "ours", "--folder", str(folder), "--bits", str(bits))
        weights.ours.append(run["weights"])
        memory.ours.append(run["peak"])
    weights.theirs, memory.theirs = [[size] * rounds for _ in range(2)]
    return weights, memory


def imports(rounds: Rounds = 10, results: Results = RESULTS) -> None:
    """Seconds of a Python that imports the package, against one that imports torch and transformers only."""
    found = Comparison("import of qwen1 / of torch and transformers alone")
    for number in range(rounds + 1):
        mine, other = seconds_of_program(BASE_IMPORT + "; import qwen1"), seconds_of_program(BASE_IMPORT)
        if number:
            found.ours.append(mine)
            found.theirs.append(other)
    report(found, results)
    added = sorted(mine - other for mine, other in zip(found.ours, found.theirs, strict=True))
    print(f"  added: {added[len(added) // 2]:.3f} s ({added[0]:.3f} to {added[-1]:.3f}); demanded: below 0.3 s")
