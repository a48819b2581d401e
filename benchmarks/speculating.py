"""Several tokens for one reading of the weights: prompt lookup, a small assistant, continuous batching.

What speculation gains depends on how often its guesses are right, so the 0.5 B model with random weights is made to
write given texts: its forward pass takes the time that it takes, and its logits are replaced by those of the text.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from generating import TINY_CHAT
from measuring import RESULTS, Dtype, Results, Rounds, compare, report
from models import build
from transformers import AutoModelForCausalLM, AutoTokenizer, ContinuousBatchingManager, GenerationConfig

from qwen1 import make_context
from qwen1.qwen_generation_utils import DEFAULT_SYSTEM
from qwen1.training.tiny.dialogues import examination_dialogues

PROSE = (
    "A river is older than any map of it. Rain falls on the hills, finds the lowest way, and carries a little of each "
    "stone along, so that after ten thousand winters there is a valley where nobody planned one. Towns came late: a "
    "mill, a bridge, a market on Fridays. Whoever lives there knows the sound of high water at night."
)
TASK = "Write this once more, with a town in place of a valley: "
TOKENS = 96


class Reciter:
    """Stands before a model's `forward`: the greedy token behind each position is that of a given text."""

    def __init__(self, model: Any):
        self.forward, self.text = model.forward, torch.empty(0)
        model.forward = self

    def __call__(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        (cache,) = (kwargs[name] for name in ("past_key_values", "cache") if kwargs.get(name) is not None)
        start = cache.get_seq_length()
        output = self.forward(input_ids, **kwargs)
        kept = output.logits.shape[1]
        positions = torch.arange(start + input_ids.shape[1] - kept, start + input_ids.shape[1])
        wanted = self.text[(positions + 1).clamp(max=len(self.text) - 1)]
        output.logits.scatter_(-1, wanted[None, :, None], 1e4)
        return output


def run_speculation(model: Any, reciter: Reciter, texts: list[tuple[list[int], list[int]]], **settings: Any) -> None:
    """Have a model write the replies, one after the other."""
    # In none of the texts, so that it ends none; with None the prompt lookup of transformers 5.4 fails.
    settings["eos_token_id"] = model.config.vocab_size - 1
    for prompt, reply in texts:
        reciter.text = torch.tensor(prompt + reply)
        output = model.generate(torch.tensor([prompt]), max_new_tokens=len(reply), do_sample=False, **settings)
        if output[0].tolist() != prompt + reply:
            raise RuntimeError(f"{settings} has changed the text that is written")


def texts_to_write(tokenizer: Any) -> dict[str, list[tuple[list[int], list[int]]]]:
    """Prompts and replies: one that repeats its prompt, one that doesn't, and what the assistant has learnt."""

    def ids(query: str, reply: str) -> tuple[list[int], list[int]]:
        return make_context(tokenizer, query, [], DEFAULT_SYSTEM)[1], tokenizer.encode(reply)[:TOKENS]

    dialogues = examination_dialogues(1, seed=5, seen=set())
    said = [
        (make_context(tokenizer, d.turns[0][0], [], d.system)[1], tokenizer.encode(d.turns[0][1])) for d in dialogues
    ]
    return {
        "repetitive text": [ids(TASK + PROSE, PROSE.replace("valley", "town"))],
        "plain text": [ids("Write a few lines about a river.", PROSE)],
        "small talk": said,
    }


@torch.inference_mode()
def speculation(rounds: Rounds = 5, dtype: Dtype = "bfloat16", results: Results = RESULTS) -> None:
    """Greedy replies with prompt lookup and with qwen-tiny-chat as the assistant, against one token at a time."""
    tokenizer = AutoTokenizer.from_pretrained(TINY_CHAT)
    assistant = AutoModelForCausalLM.from_pretrained(TINY_CHAT, dtype=getattr(torch, dtype))
    model, _ = build(getattr(torch, dtype), vocab_size=assistant.config.vocab_size)
    reciter = Reciter(model)
    ways = {
        "prompt lookup": dict(prompt_lookup_num_tokens=8),
        "a small assistant": dict(assistant_model=assistant),
    }
    for text, replies in texts_to_write(tokenizer).items():
        for way, settings in ways.items():
            runs = [partial(run_speculation, model, reciter, replies, **kind) for kind in (settings, {})]
            report(compare(f"{text}, {way} / a token at a time, {model.dtype}", *runs, rounds), results)


def run_continuously(manager: ContinuousBatchingManager, prompts: list[list[int]], lengths: list[int]) -> None:
    """Write as many tokens as asked for behind each prompt, with requests that come and go."""
    for prompt, length in zip(prompts, lengths, strict=True):
        manager.add_request(prompt, max_new_tokens=length)
    done = [manager.get_result(timeout=60) for _ in prompts]
    written = sorted(len(result.generated_tokens) for result in done if result is not None)
    if written != sorted(lengths):
        raise RuntimeError(f"{written} tokens were written for the requests instead of {sorted(lengths)}")


@torch.no_grad()  # not inference mode, which the thread of continuous batching doesn't share
def continuous(rounds: Rounds = 3, dtype: Dtype = "bfloat16", results: Results = RESULTS) -> None:
    """16 requests of 8 to 64 tokens behind 10 to 310: continuous batching, against a padded batch and one by one."""
    model, _ = build(getattr(torch, dtype))
    generator = torch.Generator().manual_seed(4)
    prompts = [torch.randint(0, 1000, (10 + 20 * row,), generator=generator).tolist() for row in range(16)]
    lengths = [8 * (1 + row % 8) for row in range(16)]
    longest = max(map(len, prompts))
    padded = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    settings = dict(do_sample=False, eos_token_id=None, pad_token_id=0)
    together = partial(model.generate, padded, attention_mask=mask, max_new_tokens=max(lengths), **settings)

    def one_by_one() -> None:
        for prompt, length in zip(prompts, lengths, strict=True):
            model.generate(torch.tensor([prompt]), max_new_tokens=length, **settings)

    # As a server does, started once: that takes seconds, for all the memory that the machine has is filled with zeros.
    room = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=max(lengths))
    with model.continuous_batching_context_manager(generation_config=room) as manager:
        run = partial(run_continuously, manager, prompts, lengths)
        report(compare(f"16 requests, continuous / padded, {model.dtype}", run, together, rounds), results)
        report(compare(f"16 requests, continuous / one by one, {model.dtype}", run, one_by_one, rounds), results)
