"""What `speed.py gpu` measures, a function for each section; each gives its rows one by one, as they are measured.

`main` runs the sections that it is told in a process of its own, and writes what they give as lines of JSON.
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accuracy import CASES, golden_error
from gpu_measuring import (
    Bench,
    Reply,
    Row,
    attempt,
    one_line,
    prompt_work,
    replies,
    reply,
    stamped,
    token_bytes,
    written_in,
)
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoTokenizer
from transformers.generation.streamers import BaseStreamer
from transformers.utils import is_flash_attn_2_available, logging

from qwen1 import FlashSelfAttention, QWenLMHeadModel
from qwen1.arguments_qwen import CACHE_NAME
from qwen1.attention_qwen import FLASH_IMPLEMENTATION
from qwen1.doctor.examination import examine
from qwen1.doctor.findings import State
from qwen1.doctor.model_checks import KNOWN_REPLIES
from qwen1.programs.shipped import TINY_CHAT

ROOT = Path(__file__).parent.parent
QWEN2 = "Qwen2"
PUBLISHED = {"tokens/s": 40.9, "GB": 17.0}
"""Of the published table for Qwen-7B in bf16: writing 2048 tokens, and the memory in which 2048 are read."""
PUBLISHED_BY = "as published, A100"
GOLDEN_BOUND = 5e-5
SAME_WEIGHTS = 0.1
"""Relative difference that both models may have in bf16; other weights make more than 1."""

_NEEDS_CUDA = "needs a CUDA device"


# --- the machine ---


def limits(bench: Bench) -> Iterator[Row]:
    """What the card does at best, by torch's own copy, sum and product."""
    for name, rate in bench.bandwidth.items():
        yield Row(f"memory, {name}", rate / 1e9, unit="GB/s")
    side = bench.sizes.matrix
    yield Row(f"product of {side} x {side} matrices, bf16", bench.matrix_rate / 1e12, unit="TFLOP/s")


# --- attention alone ---


def attention(bench: Bench) -> Iterator[Row]:
    """`FlashSelfAttention` against torch's fastest kernel, causal, one row."""
    with contextlib.suppress(ImportError):
        from torch.nn.attention.varlen import varlen_attn

        yield Row("torch's varlen_attn", note=f"takes {', '.join(inspect.signature(varlen_attn).parameters)}")
    for length in bench.sizes.lengths:
        q, k, v = torch.randn(
            (3, 1, length, bench.sizes.heads, bench.sizes.head_dim), device=bench.device, dtype=bench.dtype
        )
        yield from _attention_rows(bench, q, k, v)


def _attention_rows(bench: Bench, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Iterator[Row]:
    length = q.shape[1]
    work = 2 * length**2 * q.shape[2] * q.shape[3]
    found = {}
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
        name = f"torch's {backend.name.lower()}, {length} tokens"
        try:
            found[backend] = bench.best(partial(_by_torch, backend, q, k, v))
            share = work / found[backend] / bench.matrix_rate
            yield Row(name, theirs=1e3 * found[backend], unit="ms", other="torch", share=share)
        except Exception as error:  # not each is there on each device
            yield Row(name, skipped=one_line(error))
    if found:
        best = min(found, key=lambda backend: found[backend])
        yield attempt(f"FlashSelfAttention, {length} tokens", partial(_flash_row, bench, (q, k, v), best, work))


def _flash_row(bench: Bench, tensors: Any, backend: SDPBackend, work: int) -> Row:
    module, length = FlashSelfAttention(causal=True).eval(), tensors[0].shape[1]
    expected = _by_torch(SDPBackend.MATH, *(x[:, :512].float() for x in tensors))
    got = module(*tensors)[:, :512].float()
    error = float((got - expected).norm() / expected.norm())
    if not error < 1e-2:
        raise RuntimeError(f"Its relative error against float32 is {error:.1e}.")
    found = bench.compare("attention", partial(module, *tensors), partial(_by_torch, backend, *tensors), times=20)
    row = found.as_json()
    return Row(
        f"FlashSelfAttention, {length} tokens",
        1e3 * row["ours"],
        1e3 * row["theirs"],
        "ms",
        f"torch's {backend.name.lower()}",
        work / row["ours"] / bench.matrix_rate,
        note=f"relative error {error:.1e}",
    )


def _by_torch(backend: SDPBackend, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    with sdpa_kernel(backend):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


# --- prompts ---


@torch.no_grad()
def prefill(bench: Bench) -> Iterator[Row]:
    """A prompt as `generate` reads it: with a cache, logits of the last token."""
    yield _same_weights(bench)
    for length in bench.sizes.lengths:
        ours, theirs = (partial(_read, model, bench.ids(1, length)) for model in bench.models)
        found = bench.compare("prefill", ours, theirs).as_json()
        share = prompt_work(bench.models[0], length) / found["ours"] / bench.matrix_rate
        aim = 0.6 if length == 8192 else None
        yield Row(f"prompt of {length}", 1e3 * found["ours"], 1e3 * found["theirs"], "ms", QWEN2, share, aim)
    for implementation in (FLASH_IMPLEMENTATION, "flash_attention_2"):
        yield attempt(f"prompt of {length}, {implementation}", partial(_prefill_by, bench, implementation, length))


def _same_weights(bench: Bench) -> Row:
    """Refuse to compare two models that don't say the same."""
    ours, theirs = (model(bench.ids(1, min(64, *bench.sizes.lengths))).logits.float() for model in bench.models)
    error = float((ours - theirs).norm() / theirs.norm())
    if not error < SAME_WEIGHTS:
        raise RuntimeError(f"Ours and Qwen2 differ by {error:.2f} of the logits: these aren't the same weights.")
    return Row("difference of ours and Qwen2 on the same weights", error, unit="of the logits")


def _read(model: Any, ids: torch.Tensor) -> Any:
    return model(ids, use_cache=True, logits_to_keep=1)


def _prefill_by(bench: Bench, implementation: str, length: int) -> Row:
    name = f"prompt of {length}, {implementation}"
    if implementation == "flash_attention_2" and not is_flash_attn_2_available():
        return Row(name, skipped="flash-attn is not installed")
    ours, theirs = bench.models
    ours.set_attn_implementation(implementation)
    try:
        seconds = bench.best(partial(_read, ours, bench.ids(1, length)), rounds=bench.sizes.rounds, times=1)
    finally:
        ours.set_attn_implementation("sdpa")
    share = prompt_work(ours, length) / seconds / bench.matrix_rate
    return Row(name, 1e3 * seconds, unit="ms", share=share)


def memory(bench: Bench) -> Iterator[Row]:
    """The most that is allocated while a prompt is read and a token more written; weights included."""
    length = bench.sizes.lengths[0]
    if bench.device.type != "cuda":
        yield Row(f"peak memory, {length} tokens read, one written", skipped=_NEEDS_CUDA)
        return
    held = sum(weight.nbytes for weight in bench.models[0].parameters()) / 1e9
    yield Row("weights", held, unit="GB")
    peaks = [_peak(model, bench.ids(1, length)) / 1e9 for model in bench.models]
    yield Row(f"peak memory, {length} tokens read, one written", *peaks, "GB", QWEN2)
    yield Row("peak memory beside the published table", peaks[0], PUBLISHED["GB"], "GB", PUBLISHED_BY)


def _peak(model: Any, ids: torch.Tensor) -> int:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=1)
    return torch.cuda.max_memory_allocated()


# --- tokens ---


def decode(bench: Bench) -> Iterator[Row]:
    """`generate` with the default cache, batch 1."""
    ours, theirs = replies(bench, 1, bench.sizes.new)
    yield from _decode_rows(bench, "default cache", ours, theirs, aim=0.8)
    rates = [bench.sizes.new / found.whole for found in (ours, theirs)]
    yield Row("default cache, batch 1, whole call", *rates, "tokens/s", QWEN2)
    yield Row("default cache beside the published table", rates[0], PUBLISHED["tokens/s"], "tokens/s", PUBLISHED_BY)


def ways(bench: Bench) -> Iterator[Row]:
    """A token of the default cache where it is sampled, streamed, and asked about at once by a criterion."""
    sampled = {"do_sample": True, "top_p": 0.8, "top_k": 0}
    for name, options in (
        ("sampled with top_p", sampled),
        ("streamed", {"streamer": _Tokens}),
        ("with a criterion of the caller's", {"take": stamped}),
    ):
        ours, theirs = replies(bench, 1, bench.sizes.new, **options)
        share = token_bytes(bench.models[0], bench.sizes.prompt + bench.sizes.new // 2) / ours.token
        share /= bench.fastest_bytes
        yield Row(f"a token, {name}", 1e3 * ours.token, 1e3 * theirs.token, "ms", QWEN2, share)


class _Tokens(BaseStreamer):
    """Does nothing with what it gets."""

    def put(self, value: torch.Tensor) -> None:
        value.tolist()

    def end(self) -> None:
        pass


def _decode_rows(bench: Bench, cache: str, ours: Reply, theirs: Reply, aim: float | None = None) -> Iterator[Row]:
    read = token_bytes(bench.models[0], bench.sizes.prompt + bench.sizes.new // 2)
    share = read / ours.token / bench.fastest_bytes
    name = f"a token behind {bench.sizes.prompt}, {cache}, batch 1"
    note = f"{read / 1e9:.2f} GB a token; Qwen2 {read / theirs.token / bench.fastest_bytes:.2f} of the bandwidth"
    yield Row(name, 1e3 * ours.token, 1e3 * theirs.token, "ms", QWEN2, share, aim, note)
    yield Row(f"first token, {cache}", 1e3 * ours.first, 1e3 * theirs.first, "ms", QWEN2)


def batch(bench: Bench) -> Iterator[Row]:
    """Tokens per second of many rows at once, default cache, without the time of their prompts."""
    for rows in bench.sizes.batches:
        name = f"default cache, batch {rows}"
        yield attempt(name, partial(_batch_row, bench, name, rows))
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()


def _batch_row(bench: Bench, name: str, rows: int) -> Row:
    found = replies(bench, rows, bench.sizes.batch_new, rounds=min(2, bench.sizes.rounds))
    return Row(name, *(rows / side.token for side in found), "tokens/s", QWEN2)


def static(bench: Bench) -> Iterator[Row]:
    """`generate(cache_implementation="static")`, which records CUDA graphs, and compiles Qwen2 for it; batch 1."""
    from torch._dynamo.utils import counters

    options = {"cache_implementation": "static"}
    ids = bench.ids(1, bench.sizes.prompt)
    first = []
    for model, side in zip(bench.models, ("ours", QWEN2), strict=True):
        counters.clear()
        first.append(written_in(bench, model, ids, bench.sizes.new, **options))
        graphs, skips = counters["stats"]["unique_graphs"], counters["inductor"]["cudagraph_skips"]
        yield Row(f"first call, {side}", first[-1], unit="s", note=f"{graphs} compiled graphs, {skips} not recorded")
    ours, theirs = replies(bench, 1, bench.sizes.new, warm=2, take=_whole_or_marked, **options)
    yield from _decode_rows(bench, "static cache", ours, theirs, aim=0.8)
    rates = [bench.sizes.new / found.whole for found in (ours, theirs)]
    yield Row("static cache, batch 1, whole call", *rates, "tokens/s", QWEN2)
    yield Row("static cache beside the published table", rates[0], PUBLISHED["tokens/s"], "tokens/s", PUBLISHED_BY)


def _whole_or_marked(bench: Bench, model: Any, *arguments: Any, **options: Any) -> Reply:
    """Ours by whole calls; the other, which would be compiled anew for each length of a reply, by marks."""
    take = reply if model is bench.models[0] else stamped
    return take(bench, model, *arguments, **options)


@torch.no_grad()
def profile(bench: Bench) -> Iterator[Row]:
    """Where the time of a prompt and of a token goes: the kernels that take most of it."""
    length = bench.sizes.lengths[-1]
    for model, side in zip(bench.models, ("ours", QWEN2), strict=True):
        ids = bench.ids(1, length)
        yield from _profile_rows(bench, f"prompt of {length}, {side}", partial(_read, model, ids))
        cache = getattr(_read(model, bench.ids(1, bench.sizes.prompt)), CACHE_NAME)
        step = partial(model, ids[:, :1], use_cache=True, **{CACHE_NAME: cache})
        step()
        yield from _profile_rows(bench, f"a token, {side}", step)


def _profile_rows(bench: Bench, name: str, run: Callable[[], Any]) -> Iterator[Row]:
    kinds = torch.profiler.ProfilerActivity
    on_gpu = bench.device.type == "cuda"
    with torch.profiler.profile(activities=[kinds.CPU, kinds.CUDA] if on_gpu else [kinds.CPU]) as found:
        bench.waiting(run)()
    attribute = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    kernels = [
        (getattr(event, attribute), event.count, event.key)
        for event in found.key_averages()
        if getattr(event, attribute) > 0 and (not on_gpu or event.device_type == torch.autograd.DeviceType.CUDA)
    ]
    total = sum(time for time, _, _ in kernels)
    yield Row(f"{name}: {sum(count for _, count, _ in kernels)} kernels", total / 1e3, unit="ms")
    for time_of, count, key in sorted(kernels, reverse=True)[:8]:
        yield Row(f"{name}: {count} x {key[:100]}", 100 * time_of / total, unit="%")


# --- what others bring ---


def int4(bench: Bench) -> Iterator[Row]:
    """A published Int4 folder through gptqmodel: its path in the environment variable QWEN_GPTQ."""
    name, folder = "a token, Int4 through gptqmodel", os.environ.get("QWEN_GPTQ", "")
    if importlib.util.find_spec("gptqmodel") is None:
        yield Row(name, skipped="gptqmodel is not installed")
    elif not os.path.isdir(folder):
        yield Row(name, skipped="QWEN_GPTQ names no folder with a GPTQ checkpoint")
    else:
        model = QWenLMHeadModel.from_pretrained(folder, dtype=torch.float16).to(bench.device).eval()
        model.generation_config.update(eos_token_id=None, pad_token_id=0, do_sample=False)
        ids = bench.ids(1, bench.sizes.prompt)
        found = [reply(bench, model, ids, bench.sizes.new) for _ in range(2)][-1]
        yield Row(name, 1e3 * found.token, unit="ms")


VLLM = """
import json, sys, time
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    folder, new, prompts = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
    engine = LLM(folder, skip_tokenizer_init=True, dtype="bfloat16", max_model_len=1024)
    settings = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
    for _ in range(2):
        start = time.perf_counter()
        engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], settings)
        seconds = time.perf_counter() - start
    print(json.dumps(len(prompts) * new / seconds))
"""


def vllm(bench: Bench) -> Iterator[Row]:
    """vLLM's own Qwen2 on the same weights, in an environment of its own: its Python in QWEN_VLLM."""
    python = os.environ.get("QWEN_VLLM") or (sys.executable if importlib.util.find_spec("vllm") else "")
    if not python:
        yield Row("vLLM", skipped="vLLM is not installed, and QWEN_VLLM names no Python that has it")
        return
    ids, new = bench.ids(1, bench.sizes.prompt), bench.sizes.new
    ours = [reply(bench, bench.models[0], ids, new) for _ in range(2)][-1]
    with tempfile.TemporaryDirectory() as folder:
        bench.models[1].save_pretrained(folder)
        del bench.models  # vLLM wants most of the memory for itself
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()
        script = Path(folder) / "replies.py"
        script.write_text(VLLM)
        arguments = [python, str(script), folder, str(new), json.dumps(ids.tolist())]
        done = subprocess.run(arguments, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"vLLM ended with {done.returncode}: {(done.stderr.splitlines() or [''])[-1]}")
    rates = (new / ours.whole, json.loads(done.stdout.splitlines()[-1]))
    yield Row("default cache, batch 1, whole call", *rates, "tokens/s", "vLLM's Qwen2")


# --- whether it is right ---


@torch.no_grad()
def golden(bench: Bench) -> Iterator[Row]:
    """Golden logits in float32, by matrix products without TF32."""
    torch.set_float32_matmul_precision("highest")
    ways = (("eager", False), ("sdpa", False), ("sdpa", True))
    for case in CASES[:1] if bench.tiny else CASES:
        errors = {
            f"{way}{', static' * fixed}": golden_error(case, way, fixed, bench.device.type)[0] for way, fixed in ways
        }
        note = ", ".join(f"{way} {error:.1e}" for way, error in errors.items())
        worst = max(errors.values())
        verdict = "" if worst <= GOLDEN_BOUND else f"; FAILED, allowed {GOLDEN_BOUND:.0e}"
        yield Row(f"golden logits, {case}, largest error", worst, unit="", note=note + verdict)


def chat(bench: Bench) -> Iterator[Row]:
    """Known replies of qwen-tiny-chat in both precisions, and all checks of `qwen1-checkpoint doctor`."""
    tokenizer = AutoTokenizer.from_pretrained(TINY_CHAT)
    for dtype in (torch.float32, torch.bfloat16):
        model = QWenLMHeadModel.from_pretrained(TINY_CHAT, dtype=dtype).eval().to(bench.device)
        replies = {question: model.chat(tokenizer, question)[0] for question, _ in KNOWN_REPLIES}
        wrong = [question for question, expected in KNOWN_REPLIES if replies[question] != expected]
        note = "FAILED: " + ", ".join(f"{question} – {replies[question]}" for question in wrong) if wrong else ""
        right = len(KNOWN_REPLIES) - len(wrong)
        yield Row(f"known replies, {dtype}", right, unit=f"of {len(KNOWN_REPLIES)}", note=note)
    if bench.tiny:
        yield Row("checks of the doctor", skipped="they take too long for a tiny run")
        return
    findings = examine(device=bench.device.type).findings
    failed = [f"{finding.name} ({finding.outcome.detail})" for finding in findings if finding.failed]
    passed = sum(finding.outcome.state is State.OK for finding in findings)
    note = "FAILED: " + "; ".join(failed) if failed else "the others have nothing to check here"
    yield Row("checks of the doctor", passed, unit=f"of {len(findings)} passed", note=note)


def tests(bench: Bench) -> Iterator[Row]:
    """The tests marked `gpu`."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests/model/test_flash.py"]
    command.append("tests/gpu_kernels")
    done = subprocess.run(
        command + ([] if bench.tiny else ["tests/doctor"]), cwd=ROOT, capture_output=True, text=True, encoding="utf-8"
    )
    print(done.stdout, done.stderr, file=sys.stderr)
    summary = (done.stdout.strip().splitlines() or [f"ended with {done.returncode}"])[-1].strip("= ")
    failures = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    yield Row("pytest -m gpu", done.returncode, unit="exit status", note="; ".join([summary, *failures])[:1000])


SECTIONS: dict[str, tuple[Callable[[Bench], Iterator[Row]], int]] = {
    "limits": (limits, 60),
    "attention": (attention, 60),
    "prefill": (prefill, 90),
    "decode": (decode, 90),
    "ways": (ways, 90),
    "memory": (memory, 40),
    "static": (static, 210),
    "batch": (batch, 90),
    "golden": (golden, 60),
    "chat": (chat, 90),
    "tests": (tests, 150),
    "profile": (profile, 60),
    "int4": (int4, 120),
    "vllm": (vllm, 240),
}
"""Name -> what measures it, and the seconds that it may take; in the order in which they run."""


def main(names: list[str], tiny: bool) -> None:
    """Run sections; each line of standard output is an event. Ends with the first that fails, whose remains could make
    the next ones fail as well; all else that is printed goes to standard error.
    """
    events = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()

    def tell(**event: Any) -> None:
        print(json.dumps(event, ensure_ascii=False), file=events, flush=True)

    bench = Bench(tiny)
    for name in names:
        tell(begins=name)
        start, reason = time.perf_counter(), None
        try:
            for row in SECTIONS[name][0](bench):
                tell(row=row.as_json())
        except Exception as error:  # whatever it is, the other sections are still to be run
            traceback.print_exc()
            reason = one_line(error)
        tell(ends=name, seconds=round(time.perf_counter() - start, 1), reason=reason)
        if reason:
            return


if __name__ == "__main__":
    main(sys.argv[2:], tiny=sys.argv[1] == "tiny")
