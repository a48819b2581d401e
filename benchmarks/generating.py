"""Reading prompts and writing tokens: prefill, decoding, long contexts, conversations, batches."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy
import torch
from measuring import RESULTS, Comparison, Dtype, Results, Rounds, compare, report, seconds_of
from models import HEADS, LAYERS, VOCABULARY, WIDTH, build
from peak import matrix_rate
from transformers import AutoTokenizer, LogitsProcessor, StoppingCriteria
from transformers.cache_utils import DynamicCache

from qwen1 import QWenLMHeadModel, make_context
from qwen1.cache_qwen import new_cache
from qwen1.fingerprint_qwen import fingerprint
from qwen1.qwen_generation_utils import DEFAULT_SYSTEM

AIMS = {torch.bfloat16: (0.85, None), torch.float32: (0.97, 0.85), torch.float16: (None, None)}
"""dtype -> what a prompt and a token should at most take, as a share of Qwen2's time."""

TINY_CHAT = Path(__file__).parent.parent / "qwen-tiny-chat"


def random_cache(cache: DynamicCache, rows: int, length: int, dtype: torch.dtype) -> DynamicCache:
    """Fill an empty cache with random keys and values."""
    generator = torch.Generator().manual_seed(1)
    for layer in range(LAYERS):
        states = torch.randn((rows, HEADS, length, WIDTH // HEADS), generator=generator).to(dtype)
        cache.update(states, states, layer)
    return cache


class Decoder:
    """Writes a token at a time behind a filled cache, by the model itself."""

    def __init__(self, model: Any, cache: DynamicCache, rows: int, tokens: int):
        self.model, self.cache, self.tokens = model, cache, tokens
        self.ids = torch.full((rows, 1), 11)

    def __call__(self) -> None:
        for _ in range(self.tokens):
            self.ids = self.model(self.ids, past_key_values=self.cache, use_cache=True).logits[:, -1:].argmax(-1)


class Clock(StoppingCriteria):
    """Tells when each token of `generate` was there; the rows go on."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor, **kwargs: Any) -> torch.BoolTensor:
        self.times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


class Generation:
    """`generate` behind a cache that is filled, of which it writes the tokens after the first in `seconds` each."""

    def __init__(self, model: Any, cache: DynamicCache, rows: int, length: int, tokens: int):
        self.model, self.cache, self.length, self.tokens = model, cache, length, tokens
        self.ids = torch.full((rows, length + 1), 11)

    def seconds(self) -> float:
        """Of a token, without the first, with which `generate` begins."""
        clock = Clock()
        count = dict(max_new_tokens=self.tokens + 1, min_new_tokens=self.tokens + 1)
        self.model.generate(self.ids, past_key_values=self.cache, stopping_criteria=[clock], **count)
        self.cache.crop(self.length - self.cache.get_seq_length())
        return (clock.times[-1] - clock.times[0]) / self.tokens


def compare_decoding(models: tuple, rows: int, length: int, tokens: int, rounds: int) -> Comparison:
    """Seconds of a token of `generate` for the whole batch, each with the cache that it makes by itself."""
    ours, theirs = models
    mine = Generation(ours, random_cache(new_cache(ours.transformer), rows, length, ours.dtype), rows, length, tokens)
    empty = DynamicCache(config=theirs.config)
    other = Generation(theirs, random_cache(empty, rows, length, theirs.dtype), rows, length, tokens)
    name = f"decode, batch {rows}, {length} tokens of context, {ours.dtype}"
    return compare(name, mine.seconds, other.seconds, rounds, measured=True)


@lru_cache(maxsize=1)
def _array() -> numpy.ndarray:
    return numpy.ones(2**27, dtype=numpy.int64)


def reading_seconds(size: int) -> float:
    """Seconds in which threads of numpy read so many bytes, far beyond the processor's caches: the best of nine."""
    array = _array()[: size // 8]
    parts = numpy.array_split(array, torch.get_num_threads())
    ways = (numpy.max, numpy.sum, numpy.bitwise_or.reduce)
    with ThreadPoolExecutor(len(parts)) as pool:
        seconds = min(seconds_of(lambda way=way: list(pool.map(way, parts))) for way in ways for _ in range(3))
    return seconds * size / array.nbytes


def work(model: QWenLMHeadModel, length: int) -> float:
    """Multiplications and additions of the matrices for a prompt, causal attention included, the head once."""
    layers = sum(weight.numel() for weight in model.transformer.h.parameters())
    return 2 * length * layers + 2 * VOCABULARY * WIDTH + 2 * length**2 * WIDTH * LAYERS


def read_bytes(model: QWenLMHeadModel) -> int:
    """Bytes that a token needs: all weights but the embedding, of which it reads one row, and 512 keys and values."""
    weights = sum(weight.nbytes for weight in model.parameters()) - model.get_input_embeddings().weight.nbytes
    return weights + 2 * 512 * WIDTH * LAYERS * model.dtype.itemsize


@torch.inference_mode()
def prefill(rounds: Rounds = 8, dtype: Dtype = "bfloat16", results: Results = RESULTS) -> None:
    """Read a prompt of 512 and of 2048 tokens, and write one, by `generate`."""
    ours, theirs = build(getattr(torch, dtype))
    for length in (512, 2048):
        ids = torch.randint(0, VOCABULARY, (1, length), generator=torch.Generator().manual_seed(2))
        runs = [partial(model.generate, ids, max_new_tokens=1) for model in (ours, theirs)]
        found = compare(f"prefill, {length} tokens, {ours.dtype}", *runs, rounds, aim=AIMS[ours.dtype][0])
        if ours.dtype != torch.float16:  # in which the processor here multiplies nothing
            found.limit = work(ours, length) / matrix_rate(ours.dtype, length, WIDTH)
        report(found, results)


@torch.inference_mode()
def decode(rounds: Rounds = 20, dtype: Dtype = "bfloat16", results: Results = RESULTS) -> None:
    """Write tokens at 512 tokens of context, in one row and in eight; then beside reading the weights and keys."""
    models = build(getattr(torch, dtype))
    for rows in (1, 8):
        found = compare_decoding(models, rows, 512, 8, rounds)
        found.aim = AIMS[models[0].dtype][1] if rows == 1 else 0.5
        report(found, results)
    ours = models[0]
    token = Generation(ours, random_cache(new_cache(ours.transformer), 1, 512, ours.dtype), 1, 512, 8)
    name = f"decode, batch 1, 512 tokens of context, {ours.dtype} / reading the weights and keys"
    reading = partial(reading_seconds, read_bytes(ours))
    report(compare(name, token.seconds, reading, rounds, aim=1.35, measured=True), results)


@torch.inference_mode()
def adapter(rounds: Rounds = 8, dtype: Dtype = "bfloat16", results: Results = RESULTS) -> None:
    """Tokens at 512 tokens of context and a prompt of 512, with a LoRA as published fine-tunes have, not merged."""
    import peft

    layers = (["c_attn", "attn.c_proj", "w1", "w2"], ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"])
    models = build(getattr(torch, dtype))
    for model, names in zip(models, layers, strict=True):
        peft.get_peft_model(model, peft.LoraConfig(r=64, lora_alpha=16, target_modules=names)).eval()
    found = compare_decoding(models, 1, 512, 8, rounds)
    found.name = f"{found.name}, with a LoRA"
    report(found, results)
    ids = torch.randint(0, VOCABULARY, (1, 512), generator=torch.Generator().manual_seed(2))
    runs = [partial(model.generate, ids, max_new_tokens=1) for model in models]
    report(compare(f"prefill, 512 tokens, torch.{dtype}, with a LoRA", *runs, rounds), results)


@torch.inference_mode()
def long_decode(rounds: Rounds = 20, dtype: Dtype = "bfloat16", results: Results = RESULTS) -> None:
    """Write tokens at 8192 tokens of context, where copying the cache for each token would be most of the work."""
    found = compare_decoding(build(getattr(torch, dtype)), 1, 8192, 4, rounds)
    found.aim = 0.3
    report(found, results)


class ForcedReply(LogitsProcessor):
    """Makes `generate` write given tokens."""

    def __init__(self, reply: list[int], prompt_length: int):
        self.reply, self.prompt_length = reply, prompt_length

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor) -> torch.Tensor:
        token = self.reply[input_ids.shape[1] - self.prompt_length]
        return torch.full_like(scores, -torch.inf).index_fill(-1, torch.tensor([token]), 0.0)


@torch.inference_mode()
def conversation(rounds: Rounds = 8, dtype: Dtype = "bfloat16", results: Results = RESULTS) -> None:
    """The first token of turn 10, of 200 tokens a turn, which theirs reads all of again; knowing the model again."""
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
    report(
        compare(f"first token of turn 10, {ids.shape[1]} tokens in all, {ours.dtype}", *runs, rounds, aim=0.08), results
    )
    token = Decoder(ours, random_cache(new_cache(ours.transformer), 1, 512, ours.dtype), 1, 1)
    looking = partial(fingerprint, ours)
    report(
        compare(f"what a turn knows the model by / a token behind 512, {ours.dtype}", looking, token, rounds), results
    )


def stretched(dtype: str) -> list[QWenLMHeadModel]:
    """The same model twice, trained on 2048 tokens: with NTK and LogN, and without."""
    trained = dict(seq_length=2048, n_positions=8192)
    switches = (dict(use_dynamic_ntk=True, use_logn_attn=True), {})
    return [build(getattr(torch, dtype), **trained, **on)[0] for on in switches]


@torch.inference_mode()
def long_text(rounds: Rounds = 3, dtype: Dtype = "bfloat16", results: Results = RESULTS) -> None:
    """A prompt of 8192 tokens, with NTK and LogN against the same model with both off."""
    ids = torch.randint(0, VOCABULARY, (1, 8192), generator=torch.Generator().manual_seed(2))
    runs = [partial(model, ids, use_cache=True, logits_to_keep=1) for model in stretched(dtype)]
    report(compare(f"prefill of 8192 tokens, NTK and LogN on / off, torch.{dtype}", *runs, rounds, aim=1.03), results)


@torch.inference_mode()
def long_text_decode(rounds: Rounds = 20, dtype: Dtype = "bfloat16", results: Results = RESULTS) -> None:
    """Tokens behind 8192 tokens, with NTK and LogN against the same model with both off."""
    runs = [
        Decoder(model, random_cache(new_cache(model.transformer), 1, 8192, model.dtype), 1, 4)
        for model in stretched(dtype)
    ]
    report(compare(f"4 tokens behind 8192, NTK and LogN on / off, torch.{dtype}", *runs, rounds, aim=1.03), results)


@torch.inference_mode()
def batch(rounds: Rounds = 3, dtype: Dtype = "bfloat16", results: Results = RESULTS) -> None:
    """`batch_chat` of 16 prompts of mixed lengths against `chat` one at a time, 32 tokens each."""
    model, _ = build(getattr(torch, dtype))
    model.generation_config.update(chat_format="chatml", do_sample=False, allow_custom_entries=True)
    tokenizer = AutoTokenizer.from_pretrained(TINY_CHAT)
    queries = ["The capital of France is Paris. " * (1 + number % 8) for number in range(16)]
    settings = dict(max_new_tokens=32, min_new_tokens=32)
    runs = [
        partial(model.batch_chat, tokenizer, queries, **settings),
        lambda: [model.chat(tokenizer, query, **settings) for query in queries],
    ]
    report(compare(f"batch_chat of 16 prompts / one at a time, {model.dtype}", *runs, rounds, aim=0.21), results)
