"""What a static cache and `torch.compile` gain, and how many graphs they need."""

from __future__ import annotations

from typing import Any

import torch
from generating import Decoder, random_cache
from measuring import RESULTS, Dtype, Results, Rounds, compare, report, seconds_of
from models import VOCABULARY, build
from torch._dynamo.utils import counters
from transformers.cache_utils import StaticCache

from qwen1.cache_qwen import new_cache

CONTEXT, ROOM = 512, 1024


@torch.inference_mode()
def compiled(rounds: Rounds = 20, dtype: Dtype = "bfloat16", results: Results = RESULTS) -> None:
    """Tokens at 512 tokens of context: a compiled model with a static cache against the default, and against Qwen2."""
    models = build(getattr(torch, dtype))
    decoders: list[Any] = []
    for model in models:
        cache = random_cache(StaticCache(config=model.config, max_cache_len=ROOM), 1, CONTEXT, model.dtype)
        decoders.append(Decoder(torch.compile(model, dynamic=True), cache, 1, 4))
    ours, theirs = models
    print(
        f"compiling one step took {seconds_of(decoders[0]):.0f} s for ours, {seconds_of(decoders[1]):.0f} s for theirs"
    )
    growing = Decoder(ours, random_cache(new_cache(ours.transformer), 1, CONTEXT, ours.dtype), 1, 4)
    report(compare(f"4 tokens, compiled / not, batch 1, {ours.dtype}", decoders[0], growing, rounds), results)
    report(compare(f"4 tokens, both compiled, batch 1, {ours.dtype}", *decoders, rounds), results)
    torch._dynamo.reset()
    counters.clear()
    model = torch.compile(ours, dynamic=True, fullgraph=True)
    for length in (100, 300, 700):
        cache = StaticCache(config=ours.config, max_cache_len=ROOM)
        model(torch.randint(0, VOCABULARY, (1, length)), past_key_values=cache, logits_to_keep=1)
    print(f"graphs for prompts of 3 lengths: {counters['stats']['unique_graphs']}")
