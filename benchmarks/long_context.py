"""Perplexity against length, of a small model that knows short texts: as it is, with NTK, with NTK and LogN.

    python benchmarks/long_context.py run
    python benchmarks/long_context.py plot
    python benchmarks/long_context.py table

`qwen-tiny-chat`, which was trained on 512 tokens at once, goes on training on texts of that length in which a few
people like many things, and all of it is told again and again in any order: who remembers more of a text knows more of
what comes. Then it reads texts of other people, up to eight times as long.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from measuring import machine

from qwen1 import QWenLMHeadModel, QWenTokenizerFast
from qwen1.training.tiny.dialogues import Generator
from qwen1.training.tiny.phrases import FAVOURITES

RESULTS = Path(__file__).with_name("long_context.json")
PLOT = RESULTS.with_suffix(".png")
BASE = Path(__file__).parents[1] / "qwen-tiny-chat"

VARIANTS = {
    "none": {"use_dynamic_ntk": False, "use_logn_attn": False},
    "NTK": {"use_dynamic_ntk": True, "use_logn_attn": False},
    "NTK and LogN": {"use_dynamic_ntk": True, "use_logn_attn": True},
}

PUBLISHED_LENGTH = 2048
PUBLISHED = {
    "none": {1024: 4.23, 2048: 3.78, 4096: 39.35, 8192: 469.81, 16384: 2645.09},
    "NTK": {1024: 4.23, 2048: 3.78, 4096: 3.59, 8192: 3.66, 16384: 5.71},
    "NTK and LogN": {1024: 4.23, 2048: 3.78, 4096: 3.58, 8192: 3.56, 16384: 4.62},
}
"""Of the 7B model of 2023-08 on texts from arXiv; source: `what-users-hit.md`, "Long context, exactly"."""

PEOPLE = 16

Results = Annotated[Path, typer.Option(help="JSON file.")]

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)


def sentences(seed: int, examination: bool) -> Iterator[str]:
    """Of one text: its people, what each likes, and any of it again, without an end."""
    world = Generator(seed, examination)
    draw: random.Random = world.random
    people = [world.latin_name() for _ in range(PEOPLE)]
    liked = {(person, thing): world.value(thing, "en") for person in people for thing in FAVOURITES}
    while True:
        person, thing = draw.choice(list(liked))
        yield f"The favourite {thing} of {person} is {liked[person, thing]}."


def token_ids(tokenizer: QWenTokenizerFast, length: int, seed: int, examination: bool) -> torch.Tensor:
    """The first tokens of a text, (length,)."""
    ids: list[int] = []
    for sentence in sentences(seed, examination):
        ids += tokenizer(f"{sentence}\n", add_special_tokens=False).input_ids
        if len(ids) >= length:
            break
    return torch.tensor(ids[:length])


def train(model: QWenLMHeadModel, tokenizer: QWenTokenizerFast, steps: int, rows: int, seed: int) -> list[float]:
    """Train on new texts of the trained length in every step; gives the loss of each."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps + 1, pct_start=0.1)
    model.train()
    losses = []
    for step in range(steps):
        drawn = [seed + 10**6 + step * rows + row for row in range(rows)]
        texts = torch.stack([token_ids(tokenizer, model.config.seq_length, number, False) for number in drawn])
        loss = model(texts, labels=texts, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 10 == 0 or step == steps - 1:
            print(f"step {step}: perplexity {math.exp(losses[-1]):.2f}", flush=True)
    return losses


@torch.inference_mode()
def perplexities(model: QWenLMHeadModel, texts: torch.Tensor, lengths: Sequence[int]) -> dict[str, dict[int, float]]:
    """Of the first so many tokens of texts, (B, T), each read at once, for each way of reading them."""
    model.eval()
    found: dict[str, dict[int, float]] = {}
    for name, settings in VARIANTS.items():
        for setting, value in settings.items():
            setattr(model.config, setting, value)
        found[name] = {}
        for length in lengths:
            losses = [model(text[None], labels=text[None], use_cache=False).loss for text in texts[:, :length]]
            found[name][length] = torch.stack(losses).mean().exp().item()
            print(f"{name}, {length} tokens: perplexity {found[name][length]:.2f}", flush=True)
    return found


@app.command()
def run(
    steps: Annotated[int, typer.Option(min=1)] = 240,
    rows: Annotated[int, typer.Option(min=1, help="Texts of a step.")] = 4,
    texts: Annotated[int, typer.Option(min=1, help="Texts that are measured.")] = 12,
    longest: Annotated[int, typer.Option(min=64, help="Tokens of the longest.")] = 4096,
    seed: int = 0,
    results: Results = RESULTS,
) -> None:
    """Train the model, measure it, and write what was found."""
    torch.manual_seed(seed)
    tokenizer = QWenTokenizerFast.from_pretrained(BASE)
    model = QWenLMHeadModel.from_pretrained(BASE, dtype=torch.float32)
    trained = model.config.seq_length
    start, processor = time.perf_counter(), time.process_time()
    losses = train(model, tokenizer, steps, rows, seed)
    took = {"seconds": time.perf_counter() - start, "processor_seconds": time.process_time() - processor}
    held_out = torch.stack([token_ids(tokenizer, longest, seed + number, True) for number in range(texts)])
    lengths = [length for power in range(-3, 8) if (length := int(trained * 2.0**power)) <= longest]
    found = perplexities(model, held_out, lengths)
    training = {"length": trained, "steps": steps, "rows": rows, "seed": seed, "last_loss": losses[-1], **took}
    written = {"machine": machine(), "training": training, "texts": texts, "perplexity": found}
    results.write_text(json.dumps(written, indent=2) + "\n")
    print(table_of(json.loads(results.read_text())))


def table_of(found: dict[str, Any]) -> str:
    """Ours and the published figures in Markdown, by length as a multiple of the trained one."""
    sides = [
        (found["training"]["length"], found["perplexity"]),
        (
            PUBLISHED_LENGTH,
            {name: {str(length): value for length, value in row.items()} for name, row in PUBLISHED.items()},
        ),
    ]
    shares = sorted({int(length) / trained for trained, rows in sides for length in rows["none"]})
    head = " | ".join([*(f"{name}, tiny" for name in VARIANTS), *(f"{name}, 7B" for name in VARIANTS)])
    lines = [f"| length / trained length | {head} |", "|---" * (1 + 2 * len(VARIANTS)) + "|"]
    for share in shares:
        cells = [rows[name].get(str(int(share * trained))) for trained, rows in sides for name in VARIANTS]
        figures = " | ".join("" if value is None else f"{value:.2f}" for value in cells)
        lines.append(f"| {share:g} | {figures} |")
    return "\n".join(lines) + "\n"


@app.command()
def table(results: Results = RESULTS) -> None:
    """Print what was found beside the published figures as a table in Markdown, which docs/long-context.md shows."""
    print(table_of(json.loads(results.read_text())), end="")


@app.command()
def plot(results: Results = RESULTS, output: Annotated[Path, typer.Option(help="PNG file.")] = PLOT) -> None:
    """Draw both: perplexity against length."""
    from matplotlib.figure import Figure

    found = json.loads(results.read_text())
    trained = found["training"]["length"]
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    sides = [(left, trained, found["perplexity"], f"qwen-tiny-chat, trained on {trained} tokens")]
    sides.append((right, PUBLISHED_LENGTH, PUBLISHED, f"7B of 2023-08 as published, trained on {PUBLISHED_LENGTH}"))
    for axes, length, rows, title in sides:
        for (name, row), marker in zip(rows.items(), "osD", strict=True):
            axes.plot([int(tokens) for tokens in row], list(row.values()), marker=marker, label=name)
        axes.axvline(length, color="gray", linewidth=1, linestyle="--")
        ticks = [int(tokens) for tokens in rows["none"]]
        values = [value for row in rows.values() for value in row.values()]
        scale = "log" if max(values) > 10 * min(values) else "linear"
        axes.set(xscale="log", yscale=scale, title=title, xlabel="tokens", ylabel=f"perplexity ({scale} scale)")
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
        axes.legend()
    figure.savefig(output, dpi=110)


if __name__ == "__main__":
    app()
