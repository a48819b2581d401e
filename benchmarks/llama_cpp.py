"""The rival on a CPU: llama.cpp on the same weights, measured by its own `llama-bench`."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from generating import Generation, random_cache
from measuring import RESULTS, Comparison, Results, Rounds, compare, report, seconds_of
from models import VOCABULARY, build
from transformers import AutoModelForCausalLM, GenerationConfig

from qwen1 import QWenBitsConfig
from qwen1.cache_qwen import new_cache
from qwen1.native_qwen import wait

PROMPT, TOKENS = 512, 16

KINDS: dict[str, tuple[str, int | None, tuple[float, float]]] = {
    "torch.bfloat16": ("bf16", None, (0.8, 1.1)),
    "8 bits": ("q8_0", 8, (1.0, 1.0)),
    "4 bits": ("q4_0", 4, (1.0, 1.15)),
}
"""Ours -> llama.cpp's name for it, our bits, and the aims for prompt and token."""

BenchProgram = Annotated[
    Path | None,
    typer.Option("--bench", envvar="QWEN_LLAMA_BENCH", help="llama-bench, with llama-quantize beside it."),
]


def write_vocabulary(file: Path) -> None:
    """A vocabulary of as many words as the published one has: single bytes, then numbers."""
    words = [bytes([byte]) for byte in range(256)] + [b"w%d" % number for number in range(VOCABULARY - 293 - 256)]
    lines = (f"{base64.b64encode(word).decode()} {rank}\n" for rank, word in enumerate(words))
    file.write_text("".join(lines), encoding="utf-8")


def write_gguf(model: torch.nn.Module, folder: Path, program: Path) -> dict[str, Path]:
    """The model in llama.cpp's form, in bf16, Q8_0 and Q4_0."""
    model.save_pretrained(folder / "model")
    write_vocabulary(folder / "model" / "qwen.tiktoken")
    files = {kind: folder / f"{kind}.gguf" for kind in ("bf16", "q8_0", "q4_0")}
    for kind in ("bf16", "q8_0"):
        convert = ["convert", str(folder / "model"), str(files[kind]), "--to", "gguf", "--outtype", kind]
        subprocess.run([sys.executable, "-m", "qwen1.convert_checkpoint", *convert], check=True, capture_output=True)
    quantize = [str(program.with_name("llama-quantize")), str(files["bf16"]), str(files["q4_0"]), "q4_0"]
    subprocess.run(quantize, check=True, capture_output=True)
    return files


def bench(program: Path, file: Path, prompt: int, tokens: int, behind: int) -> float:
    """Seconds that llama.cpp takes for a prompt, or for so many tokens behind some, after one run for warming up."""
    what = ["-p", str(prompt), "-n", str(tokens), "-d", str(behind), "-r", "1", "-t", str(torch.get_num_threads())]
    command = [str(program), "-m", str(file), *what, "-o", "json"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    (result,) = json.loads(done.stdout)
    return result["avg_ns"] / 1e9


def compare_kind(
    model: Any, kind: str, program: Path, file: Path, rounds: int, aims: tuple[float, float]
) -> Iterator[Comparison]:
    """A prompt of 512 tokens and a token behind 512, both sides with weights of the same kind."""
    ids = torch.randint(0, VOCABULARY, (1, PROMPT), generator=torch.Generator().manual_seed(2))
    token = Generation(model, random_cache(new_cache(model.transformer), 1, PROMPT, model.dtype), 1, PROMPT, TOKENS)
    pairs = {
        "prefill, 512 tokens": (
            partial(seconds_of, partial(model.generate, ids, max_new_tokens=1)),
            partial(bench, program, file, PROMPT, 0, 0),
        ),
        "a token behind 512": (token.seconds, lambda: bench(program, file, 0, TOKENS, PROMPT) / TOKENS),
    }
    for (what, (ours, theirs)), aim in zip(pairs.items(), aims, strict=True):
        yield compare(f"{what}, {kind} / llama.cpp {file.stem}", ours, theirs, rounds, aim=aim, measured=True)


@torch.inference_mode()
def llama_cpp(program: BenchProgram = None, rounds: Rounds = 8, results: Results = RESULTS) -> None:
    """A prompt of 512 tokens and a token behind 512, in bf16, 8 and 4 bits, against llama.cpp on the same weights."""
    if program is None or not program.is_file():
        print("llama.cpp is left out: name its llama-bench by --bench or QWEN_LLAMA_BENCH.")
        return
    wait()
    model: Any = build(torch.bfloat16)[0]
    with tempfile.TemporaryDirectory() as folder:
        files = write_gguf(model, Path(folder), program)
        for kind, (name, bits, aims) in KINDS.items():
            if bits is not None:
                del model
                settings = dict(quantization_config=QWenBitsConfig(bits=bits), dtype=torch.bfloat16)
                model = AutoModelForCausalLM.from_pretrained(f"{folder}/model", **settings)
                model.generation_config = GenerationConfig(pad_token_id=0, do_sample=False)
            for found in compare_kind(model, kind, program, files[name], rounds, aims):
                report(found, results)
