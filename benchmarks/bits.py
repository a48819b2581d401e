"""What few bits cost and save: weights by every library, and every quantised cache.

    python benchmarks/bits.py weights
    python benchmarks/bits.py caches

Prints the machine, the versions, and the tables of docs/low-bits.md. What isn't installed is left out with a line that
says so. Other programs on the machine show in the times.
"""

from __future__ import annotations

import argparse
import copy
import logging
import os
import platform
import statistics
import tempfile
import time
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from few_bits import WAYS, Way, bytes_of
from transformers import QuantizedCache, Qwen2ForCausalLM
from transformers.cache_utils import Cache
from transformers.utils import logging as transformers_logging

from qwen1 import QWenCache, QWenConfig, QWenGroupedInt8Cache, QWenInt8Cache, QWenLMHeadModel, QWenTokenizer
from qwen1.conversion.commands import app
from qwen1.training.tiny.examination import examine, held_out_dialogues

TINY = Path(__file__).parent.parent / "qwen-tiny-chat"
PACKAGES = ("torch", "transformers", "bitsandbytes", "torchao", "compressed-tensors", "optimum-quanto", "hqq")
STEPS, GREEDY, BEGINNING = 16, 64, 128

CACHES: dict[str, dict[str, Any] | None] = {
    "growing (QWenCache)": None,
    "published int8 (QWenInt8Cache)": {"backend": "qwen_int8"},
    "grouped int8 (QWenGroupedInt8Cache), 32": {"backend": "qwen_int8_grouped"},
    "grouped int8 (QWenGroupedInt8Cache), 16": {"backend": "qwen_int8_grouped", "q_group_size": 16},
    "hqq, 8 bits": {"backend": "hqq", "nbits": 8},
    "hqq, 4 bits": {"backend": "hqq", "nbits": 4},
    "quanto, 4 bits": {"backend": "quanto", "nbits": 4, "q_group_size": 32},
    "quanto, 2 bits": {"backend": "quanto", "nbits": 2, "q_group_size": 32},
    "fp8": {"backend": "fp8"},
}


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference as a share of the norm."""
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


# --- weights ---


def text_ids(tokenizer: Any, per_kind: int) -> torch.Tensor:
    """256 tokens of conversations that the model that ships was never shown, (1, 256)."""
    dialogues = held_out_dialogues(TINY, per_kind, seed=2)
    text = "".join(f"{query}\n{reply}\n" for dialogue in dialogues for query, reply in dialogue.turns)
    return torch.tensor([tokenizer(text).input_ids[:256]])


@torch.no_grad()
def logits_error(model: Any, ids: torch.Tensor, exact: torch.Tensor) -> float:
    """Relative error of the logits of a whole text."""
    return relative_error(model(input_ids=ids, use_cache=False).logits, exact)


def file_bytes(folder: Path) -> int:
    """Size of the weights on the disk."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def weights_row(
    name: str,
    way: Way | None,
    sides: dict[Any, Path],
    work: Path,
    ids: torch.Tensor,
    exact: torch.Tensor,
    per_kind: int,
) -> None:
    """Print one line: memory, file, both errors, examination."""
    models, folders = [], []
    for cls, folder in sides.items():
        made = work / f"{name}-{cls.__name__}".replace(" ", "-")
        made.mkdir()
        arguments: dict[str, Any] = {"dtype": torch.bfloat16, "device_map": "cpu"}
        model = cls.from_pretrained(folder, **arguments) if way is None else way.load(cls, folder, made, **arguments)
        models.append(model.eval())
        folders.append(made)
    ours, theirs = models
    errors = [logits_error(model, ids, exact) for model in (ours, theirs)]
    size = bytes_of([ours, dict(ours.named_parameters()), dict(ours.named_buffers())])
    file = "not saved"
    if way is not None and way.scheme is not None:  # what it saves again are whole weights
        file = f"{file_bytes(folders[0]) / 1e6:.2f} MB"
    elif way is None or way.saves:
        saved = work / f"{name}-saved".replace(" ", "-")
        ours.save_pretrained(saved)
        file = f"{file_bytes(saved) / 1e6:.2f} MB"
    began = time.perf_counter()
    result = examine(ours, QWenTokenizer.from_pretrained(TINY), held_out_dialogues(TINY, per_kind, seed=1))
    print(
        f"| {name} | {size / 1e6:.2f} MB | {file} | {errors[0]:.4f} | {errors[1]:.4f} | {100 * result.share:.1f}% "
        f"| {result.perplexity:.3f} | {time.perf_counter() - began:.0f} s |",
        flush=True,
    )


def weights(per_kind: int, only: str | None) -> None:
    """The table of weights: the model that ships, and transformers' Qwen2 with the same weights."""
    tokenizer = QWenTokenizer.from_pretrained(TINY)
    ids = text_ids(tokenizer, 5)
    with torch.no_grad():
        exact = QWenLMHeadModel.from_pretrained(TINY, dtype=torch.float32).eval()(ids).logits
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        app(["convert", str(TINY), str(work / "qwen2"), "--to", "qwen2"], standalone_mode=False)
        sides = {QWenLMHeadModel: TINY, Qwen2ForCausalLM: work / "qwen2"}
        print("| | in memory | file | error of logits | Qwen2's | examination | perplexity | its time |")
        print("|---|---|---|---|---|---|---|---|")
        for name, way in {"bf16": None, **WAYS}.items():
            if only is not None and only not in name:
                continue
            if way is not None and way.missing is not None:
                print(f"{name}: left out, {way.missing}")
                continue
            weights_row(name, way, sides, work, ids, exact, per_kind)


# --- caches ---


def make_cache(model: Any, settings: dict[str, Any] | None) -> Cache:
    """An empty cache."""
    values = dict(settings or {})
    backend = values.pop("backend", None)
    if backend is None:
        return QWenCache(config=model.config)
    if backend == "qwen_int8":
        return QWenInt8Cache(model.config)
    if backend == "qwen_int8_grouped":
        return QWenGroupedInt8Cache(model.config, values.get("q_group_size", 32))
    return QuantizedCache(backend=backend, config=model.config, **values)


def fill(cache: Cache, read: QWenCache) -> Cache:
    """Give a cache the keys and values of a prompt, and the stretch that they were rotated by."""
    for index, layer in enumerate(read.layers):
        cache.update(layer.keys.clone(), layer.values.clone(), index)
    if (state := getattr(read, "qwen_ntk", None)) is not None:
        cache.qwen_ntk = copy.deepcopy(state)  # type: ignore[attr-defined]
    return cache


def branch(cache: Cache) -> Cache:
    """Another cache that goes on from there. Layers replace what they hold, and quanto's tensors can't be copied."""
    other = copy.copy(cache)
    other.layers = [copy.copy(layer) for layer in cache.layers]
    return other


def held_error(cache: Cache, read: QWenCache) -> float:
    """Relative error of the keys and values of a prompt, as attention gets them with the next token."""
    errors = []
    for layer, exact in zip(branch(cache).layers, read.layers, strict=True):
        token = exact.keys[:, :, :1], exact.values[:, :, :1]
        for got, held in zip(layer.update(*token), (exact.keys, exact.values), strict=True):
            errors.append(relative_error(got[:, :, :-1], held))
    return statistics.mean(errors)


@torch.no_grad()
def step_logits(model: Any, cache: Cache, ids: torch.Tensor) -> torch.Tensor:
    """Logits of tokens that are read one by one, (1, T, V)."""
    return torch.cat([model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(ids.shape[1])], 1)


@torch.no_grad()
def step_times(model: Any, caches: dict[str, Cache], ids: torch.Tensor, rounds: int) -> dict[str, list[float]]:
    """Seconds of a token with each cache, in turn."""
    times: dict[str, list[float]] = {name: [] for name in caches}
    for index in range(rounds + 2):
        for name, cache in caches.items():
            began = time.perf_counter()
            model(ids[:, index : index + 1], past_key_values=cache)
            if index >= 2:
                times[name].append(time.perf_counter() - began)
    return times


def large_model(layers: int) -> QWenLMHeadModel:
    """Heads of 128 as all published models have them, in bf16, with random weights."""
    torch.manual_seed(0)
    config = QWenConfig(
        vocab_size=32000, n_embd=1024, n_layer=layers, n_head=8, kv_channels=128, ffn_hidden_size=5632,
        seq_length=16384, n_positions=16384, initializer_range=0.05, use_flash_attn=False, eos_token_id=0,
    )  # fmt: skip
    return QWenLMHeadModel(config).eval().bfloat16()


@torch.no_grad()
def caches_at(model: Any, length: int, rounds: int) -> None:
    """The table of caches behind so many tokens."""
    ids = torch.randint(
        0, model.config.vocab_size, (1, length + STEPS + rounds), generator=torch.Generator().manual_seed(0)
    )
    read = QWenCache(config=model.config)
    model(ids[:, :length], past_key_values=read, logits_to_keep=1)
    made: dict[str, Cache] = {}
    for name, settings in CACHES.items():
        try:
            made[name] = fill(make_cache(model, settings), read)
        except (ImportError, ValueError) as error:
            print(f"{name}: left out, {error}")
    steps = ids[:, length : length + STEPS]
    exact = step_logits(model, fill(QWenCache(config=model.config), read), steps)
    found = {}
    for name, cache in made.items():
        held = cache.layers if name != "growing (QWenCache)" else [(layer.keys, layer.values) for layer in cache.layers]
        error = held_error(cache, read)
        found[name] = (bytes_of(held), error, relative_error(step_logits(model, branch(cache), steps), exact))
    times = step_times(model, made, ids[:, length:], rounds)
    plain = times["growing (QWenCache)"]
    print(
        f"\n| {length} tokens | a token | keys and values | logits | time of a token | ratio (quartiles) |\n"
        "|---|---|---|---|---|---|"
    )
    for name, (size, error, of_logits) in found.items():
        low, middle, high = statistics.quantiles([a / b for a, b in zip(times[name], plain, strict=True)], n=4)
        print(
            f"| {name} | {size / length / model.config.n_layer:.0f} B a layer | {error:.4f} | {of_logits:.4f} "
            f"| {1e3 * statistics.median(times[name]):.1f} ms | {middle:.2f} ({low:.2f} to {high:.2f}) |",
            flush=True,
        )


@torch.no_grad()
def caches_of_chat(texts: int) -> None:
    """The table of caches with the model that ships: errors against whole passes without a cache, and how often the
    likeliest next token is the same, GREEDY tokens one by one behind each of several beginnings.
    """
    model = QWenLMHeadModel.from_pretrained(TINY, dtype=torch.float32).eval()
    ids = text_ids(QWenTokenizer.from_pretrained(TINY), 5)
    rows = [ids[:, start : start + BEGINNING + GREEDY] for start in range(0, 4 * texts, 4)]
    exact = [model(row, use_cache=False).logits[:, BEGINNING:] for row in rows]
    print("\n| qwen-tiny-chat, float32 | keys and values | logits | same next token |\n|---|---|---|---|")
    for name, settings in CACHES.items():
        errors, of_logits, same = [], [], []
        try:
            for row, expected in zip(rows, exact, strict=True):
                read = QWenCache(config=model.config)
                model(row[:, :BEGINNING], past_key_values=read)
                cache = fill(make_cache(model, settings), read)
                errors.append(held_error(cache, read))
                logits = step_logits(model, cache, row[:, BEGINNING:])
                of_logits.append(relative_error(logits, expected))
                same.append((logits.argmax(-1) == expected.argmax(-1)).float().mean().item())
        except (ImportError, ValueError) as error:
            print(f"{name}: left out, {error}")
            continue
        means = [statistics.mean(values) for values in (errors, of_logits, same)]
        print(f"| {name} | {means[0]:.4f} | {means[1]:.4f} | {100 * means[2]:.1f}% |", flush=True)


def main() -> None:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("weights", "caches"))
    parser.add_argument("--per-kind", type=int, default=100, help="questions of each kind of the examination")
    parser.add_argument("--only", help="a part of the names of the ways to measure")
    parser.add_argument("--rounds", type=int, default=12, help="tokens that are timed")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 8192], help="tokens in a cache")
    parser.add_argument("--layers", type=int, default=4, help="of the model that caches are timed with")
    parser.add_argument("--texts", type=int, default=16, help="of the model that ships")
    arguments = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.disable(logging.WARNING)  # bitsandbytes says at each product that it casts
    warnings.filterwarnings("ignore")
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        end="",
    )
    for package in PACKAGES:
        try:
            print(f", {package} {version(package)}", end="")
        except PackageNotFoundError:
            print(f", no {package}", end="")
    print(flush=True)
    if arguments.what == "weights":
        weights(arguments.per_kind, arguments.only)
        return
    caches_of_chat(arguments.texts)
    model = large_model(arguments.layers)
    for length in arguments.lengths:
        caches_at(model, length, arguments.rounds)


if __name__ == "__main__":
    main()
