"""How fast the model is beside transformers' Qwen2ForCausalLM on the same weights, and beside the hardware's limit.

    python benchmarks/speed.py prefill
    python benchmarks/speed.py decode
    python benchmarks/speed.py long-decode
    python benchmarks/speed.py conversation
    python benchmarks/speed.py tokenizer
    python benchmarks/speed.py plot

Both sides run in one process, in the same dtype and with the same attention implementation, in turn: many short rounds,
of which each gives a ratio. Reported is the median of these ratios, with its quartiles. Every sub-command adds what it
measured to a JSON file, with machine and versions.
"""

from __future__ import annotations

import json
import time
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from measuring import RESULTS, Comparison, Dtype, Results, Rounds, compare, report
from tokenizing import tokenizer
from transformers import AutoTokenizer, LogitsProcessor, Qwen2Config, Qwen2ForCausalLM
from transformers.cache_utils import DynamicCache

from qwen1 import QWenConfig, QWenLMHeadModel, make_context
from qwen1.conversion.configurations import read_hf
from qwen1.conversion.names import convert_tensors, hf_to_qwen
from qwen1.qwen_generation_utils import DEFAULT_SYSTEM

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)

PLOT = RESULTS.with_suffix(".png")
TINY_CHAT = Path(__file__).parent.parent / "qwen-tiny-chat"
WIDTH, LAYERS, HEADS, INTERMEDIATE, VOCABULARY = 1024, 16, 8, 2752, 151_936
LONGEST = 16_384


def build(dtype: torch.dtype) -> tuple[QWenLMHeadModel, Qwen2ForCausalLM]:
    """Ours and theirs, about 0.5 B parameters each, with the same random weights."""
    shape = dict(vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS)
    config = Qwen2Config(
        **shape,
        num_key_value_heads=HEADS,
        intermediate_size=INTERMEDIATE,
        rms_norm_eps=1e-6,
        max_position_embeddings=LONGEST,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    theirs = Qwen2ForCausalLM(config).to(dtype).eval()
    ours = QWenLMHeadModel(
        QWenConfig(
            **shape,
            kv_channels=WIDTH // HEADS,
            ffn_hidden_size=2 * INTERMEDIATE,
            seq_length=LONGEST,
            n_positions=LONGEST,
            use_flash_attn=False,
            attn_implementation="sdpa",
        )
    )
    recipes = hf_to_qwen(read_hf(config.to_dict()), dtype)
    ours = ours.to(dtype).eval()
    ours.load_state_dict(convert_tensors(recipes, theirs.state_dict()))
    return ours, theirs


def random_cache(cache: DynamicCache, rows: int, length: int, dtype: torch.dtype) -> DynamicCache:
    """Fill an empty cache with random keys and values."""
    generator = torch.Generator().manual_seed(1)
    for layer in range(LAYERS):
        states = torch.randn((rows, HEADS, length, WIDTH // HEADS), generator=generator).to(dtype)
        cache.update(states, states, layer)
    return cache


class Decoder:
    """Writes a token at a time behind a filled cache."""

    def __init__(self, model: Any, cache: DynamicCache, rows: int, tokens: int):
        self.model, self.cache, self.tokens = model, cache, tokens
        self.ids = torch.full((rows, 1), 11)

    def __call__(self) -> None:
        for _ in range(self.tokens):
            self.ids = self.model(self.ids, past_key_values=self.cache, use_cache=True).logits[:, -1:].argmax(-1)


def compare_decoding(models: tuple, rows: int, length: int, tokens: int, rounds: int) -> Comparison:
    """Seconds of a token for the whole batch, ours with its own cache and theirs with the default of `generate`."""
    ours, theirs = models
    mine = Decoder(ours, random_cache(ours.transformer.new_cache(), rows, length, ours.dtype), rows, tokens)
    other = Decoder(theirs, random_cache(DynamicCache(config=theirs.config), rows, length, theirs.dtype), rows, tokens)
    found = compare(f"decode, batch {rows}, {length} tokens of context, {ours.dtype}", mine, other, rounds)
    found.ours = [seconds / tokens for seconds in found.ours]
    found.theirs = [seconds / tokens for seconds in found.theirs]
    return found


def bandwidth(dtype: torch.dtype) -> float:
    """Bytes per second that a product of a matrix of 622 MB or more and a vector reads: the best of ten."""
    matrix, vector = torch.ones((VOCABULARY, 2048), dtype=dtype), torch.ones(2048, dtype=dtype)
    seconds = []
    for _ in range(10):
        start = time.perf_counter()
        torch.mv(matrix, vector)
        seconds.append(time.perf_counter() - start)
    return matrix.nbytes / min(seconds)


def read_bytes(model: QWenLMHeadModel) -> int:
    """Bytes of the weights that a token needs: all but the embedding, of which it reads one row."""
    return sum(weight.nbytes for weight in model.parameters()) - model.get_input_embeddings().weight.nbytes


@app.command()
@torch.inference_mode()
def prefill(rounds: Rounds = 8, dtype: Dtype = "bfloat16", results: Results = RESULTS) -> None:
    """Read a prompt of 512 and of 2048 tokens, as `generate` does: logits of the last token only."""
    ours, theirs = build(getattr(torch, dtype))
    for length in (512, 2048):
        ids = torch.randint(0, VOCABULARY, (1, length), generator=torch.Generator().manual_seed(2))
        runs = [partial(model, ids, use_cache=True, logits_to_keep=1) for model in (ours, theirs)]
        report(compare(f"prefill, {length} tokens, {ours.dtype}", *runs, rounds), results)


@app.command()
@torch.inference_mode()
def decode(rounds: Rounds = 20, dtype: Dtype = "bfloat16", results: Results = RESULTS) -> None:
    """Write tokens at 512 tokens of context, in one row and in eight; the limit is that of matrix times vector."""
    models = build(getattr(torch, dtype))
    for rows in (1, 8):
        found = compare_decoding(models, rows, 512, 4, rounds)
        if rows == 1:
            found.limit = read_bytes(models[0]) / bandwidth(models[0].dtype)
        report(found, results)


@app.command()
@torch.inference_mode()
def long_decode(rounds: Rounds = 20, dtype: Dtype = "bfloat16", results: Results = RESULTS) -> None:
    """Write tokens at 8192 tokens of context, where copying the cache for each token would be most of the work."""
    report(compare_decoding(build(getattr(torch, dtype)), 1, 8192, 2, rounds), results)


class ForcedReply(LogitsProcessor):
    """Makes `generate` write given tokens."""

    def __init__(self, reply: list[int], prompt_length: int):
        self.reply, self.prompt_length = reply, prompt_length

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor) -> torch.Tensor:
        token = self.reply[input_ids.shape[1] - self.prompt_length]
        return torch.full_like(scores, -torch.inf).index_fill(-1, torch.tensor([token]), 0.0)


@app.command()
@torch.inference_mode()
def conversation(rounds: Rounds = 8, dtype: Dtype = "bfloat16", results: Results = RESULTS) -> None:
    """The first token of turn 10, of 200 tokens a turn; theirs reads everything again."""
    ours, theirs = build(getattr(torch, dtype))
    ours.generation_config.update(chat_format="chatml", do_sample=False, allow_custom_entries=True)
    tokenizer = AutoTokenizer.from_pretrained(TINY_CHAT)
    hundred = tokenizer.decode(tokenizer.encode("The capital of France is Paris. " * 20)[:95])
    turns = [(hundred, hundred)] * 8
    before = make_context(tokenizer, hundred, turns, DEFAULT_SYSTEM)[1]
    reply = [*tokenizer.encode(hundred), tokenizer.im_end_id]
    forced = [ForcedReply(reply, len(before))]
    _, history = ours.chat(tokenizer, hundred, turns, max_new_tokens=len(reply), logits_processor=forced)
    ids = torch.tensor([make_context(tokenizer, hundred, history, DEFAULT_SYSTEM)[1]])
    settings = dict(max_new_tokens=1, do_sample=False, pad_token_id=tokenizer.eod_id)
    runs = [
        partial(ours.chat, tokenizer, hundred, history, max_new_tokens=1),
        partial(theirs.generate, ids, **settings),
    ]
    report(compare(f"first token of turn 10, {ids.shape[1]} tokens in all, {ours.dtype}", *runs, rounds), results)


app.command()(tokenizer)


@app.command()
def plot(results: Results = RESULTS, output: Annotated[Path, typer.Option(help="PNG file.")] = PLOT) -> None:
    """Draw the ratios of all that was measured."""
    from matplotlib.figure import Figure

    rows = json.loads(results.read_text())
    names, ratios = list(rows), [row["ratio"] for row in rows.values()]
    spread = [[r - row["quartiles"][i] for r, row in zip(ratios, rows.values(), strict=True)] for i in (0, 1)]
    figure = Figure(figsize=(8, 1 + 0.5 * len(names)), layout="constrained")
    axes = figure.subplots()
    axes.barh(names, ratios, xerr=[spread[0], [-value for value in spread[1]]], color="tab:blue", alpha=0.8)
    axes.axvline(1, color="black", linewidth=1)
    axes.invert_yaxis()
    axes.set(xlabel="time, ours / theirs (median and quartiles)")
    figure.savefig(output, dpi=110)


if __name__ == "__main__":
    app()
