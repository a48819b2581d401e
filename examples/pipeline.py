"""Train and run a model whose blocks are spread over several processes: `torch.distributed.pipelining`.

    torchrun --nproc_per_node 2 examples/pipeline.py qwen-tiny-chat

Each process computes with its part of the blocks alone; activations go from one to the next, gradients back. The batch
is cut into pieces, so that no process waits for long.
"""

from __future__ import annotations

import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from transformers import AutoModelForCausalLM

PIECES = 4
"""A batch is cut into so many; at least as many as there are processes."""


class Part(nn.Module):
    """The blocks of one process, with the embedding in the first and the head in the last.

    Args:
        model: a whole language model, of which this part is taken; its `lm_head` and embedding must not be tied.
        index, count: of the part.
    """

    def __init__(self, model: nn.Module, index: int, count: int):
        super().__init__()
        blocks = model.transformer.h
        if model.config.tie_word_embeddings:
            raise ValueError("Embedding and head are one weight here, and would be in two processes: untie them first.")
        if count > len(blocks):
            raise ValueError(f"{len(blocks)} blocks don't fill {count} processes: start fewer.")
        bounds = [len(blocks) * part // count for part in (index, index + 1)]
        self.given = "inputs_embeds" if index else "input_ids"
        self.transformer = model.transformer
        self.transformer.h = blocks[slice(*bounds)]
        self.lm_head = nn.Identity()
        if index:
            self.transformer.wte = nn.Identity()
        if index + 1 < count:
            self.transformer.ln_f = nn.Identity()
        else:
            self.lm_head = model.lm_head

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        """(B, T) ids or (B, T, E) states -> (B, T, E) states or (B, T, V) logits."""
        return self.lm_head(self.transformer(**{self.given: given}, use_cache=False).last_hidden_state)


def next_token_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy of each next token, (B, T, V) and (B, T)."""
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())


def main(folder: str) -> None:
    """A few steps on made-up texts."""
    index, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    dist.init_process_group("nccl" if cuda else "gloo")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=True)
    part = Part(model, index, count).to(device).train()
    schedule = Schedule1F1B(PipelineStage(part, index, count, device), PIECES, loss_fn=next_token_loss)
    optimizer = torch.optim.AdamW(part.parameters(), lr=1e-4)
    ids = torch.arange(8 * 32, device=device).view(8, 32)
    for step in range(3):
        losses: list[torch.Tensor] = []
        given = () if index else (ids,)
        schedule.step(*given, **({"target": ids, "losses": losses} if index + 1 == count else {}))
        optimizer.step()
        optimizer.zero_grad()
        if losses:
            print(f"step {step + 1}: loss {torch.stack(losses).mean().item():.4f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
