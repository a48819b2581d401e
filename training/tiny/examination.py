"""Examines a model on conversations that its training never showed: a reply counts if it is right to the letter."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from ...tools_qwen import OBSERVATION, ToolResult
from ..errors import DataError
from ..examples import IGNORED
from ..packing import Collator, ExampleDataset
from . import PER_KIND
from .dialogues import (
    KINDS,
    Dialogue,
    examination_dialogues,
    practice_dialogues,
    refinement_dialogues,
    training_dialogues,
)
from .sharpening import equipping_dialogues, sharpening_dialogues
from .training import encode_dialogues

BATCH = 16
TRAININGS = {
    "dialogues": training_dialogues,
    "practice": practice_dialogues,
    "refinement": refinement_dialogues,
    "sharpening": sharpening_dialogues,
    "equipping": equipping_dialogues,
}
"""What conversations are trained on: their number in the plan, and how they are drawn."""


@dataclass
class Result:
    """What an examination found.

    Attributes:
        asked: kind -> prompts.
        right: kind -> exact replies.
        wrong: kind, the query, the reply expected and the one given.
        perplexity: per token of the expected replies, all turns of a conversation.
    """

    asked: dict[str, int] = field(default_factory=dict)
    right: dict[str, int] = field(default_factory=dict)
    wrong: list[tuple[str, str, str, str]] = field(default_factory=list)
    perplexity: float = math.nan

    @property
    def share(self) -> float:
        """Exact replies of all, 0 to 1."""
        return sum(self.right.values()) / sum(self.asked.values())

    def as_json(self) -> dict[str, Any]:
        """The figures without the wrong replies."""
        return {"asked": self.asked, "right": self.right, "share": self.share, "perplexity": self.perplexity}


def held_out_dialogues(folder: Path, per_kind: int, seed: int) -> list[Dialogue]:
    """Conversations none of which the training of the model in `folder` showed; it is drawn once more to make sure.

    Raises:
        DataError: the folder has no `training_log.json` that tells what the model was trained on.
    """
    log = folder / "training_log.json"
    try:
        plan = json.loads(log.read_text())["plan"]
        counts = [int(plan[part]) for part in TRAININGS]
        trained_seed = int(plan["seed"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{log} does not tell what the model was trained on ({error!r:.80}).") from error
    seen = set()
    for draw, count in zip(TRAININGS.values(), counts, strict=True):
        for dialogue in draw(count, trained_seed):
            seen.update(dialogue.prompts())
    return examination_dialogues(per_kind, seed, seen)


def examine(model: Any, tokenizer: Any, dialogues: Sequence[Dialogue]) -> Result:
    """Ask the last question of each conversation, greedily and in batches, and compare the replies."""
    result = Result(asked=dict.fromkeys(KINDS, 0), right=dict.fromkeys(KINDS, 0))
    plain = [dialogue for dialogue in dialogues if not dialogue.tools]
    plain.sort(key=lambda dialogue: len(dialogue.prompt()))  # batches of like lengths
    batches = [plain[start : start + BATCH] for start in range(0, len(plain), BATCH)]
    batches += [[dialogue] for dialogue in dialogues if dialogue.tools]
    for batch in tqdm(batches, desc="Examination", unit="batch"):
        replies = [with_tools(model, tokenizer, batch[0])] if batch[0].tools else ask(model, tokenizer, batch)
        for dialogue, reply in zip(batch, replies, strict=True):
            query, expected = dialogue.turns[-1]
            result.asked[dialogue.kind] += 1
            result.right[dialogue.kind] += reply == expected
            if reply != expected:
                result.wrong.append((dialogue.kind, query, expected, reply))
    result.perplexity = perplexity(model, tokenizer, dialogues)
    return result


def ask(model: Any, tokenizer: Any, batch: Sequence[Dialogue]) -> list[str]:
    """The replies to the last queries."""
    replies, _ = model.batch_chat(
        tokenizer,
        [dialogue.turns[-1][0] for dialogue in batch],
        [dialogue.turns[:-1] for dialogue in batch],
        [dialogue.system for dialogue in batch],
        do_sample=False,
    )
    return replies


def with_tools(model: Any, tokenizer: Any, dialogue: Dialogue) -> str:
    """The whole exchange of the last turn; a right call is given the result of the conversation, others none."""
    query, expected = dialogue.turns[-1]
    call, called, rest = expected.partition(f"\n{OBSERVATION}")
    settings = {"system": dialogue.system, "tools": dialogue.tools, "do_sample": False}
    reply, history = model.chat(tokenizer, query, dialogue.turns[:-1], **settings)
    if not called or reply != call:
        return str(reply)
    given = ToolResult(rest.partition("\nThought:")[0].strip())
    _, history = model.chat(tokenizer, given, history, **settings)
    return str(history[-1][1])


@torch.no_grad()
def perplexity(model: Any, tokenizer: Any, dialogues: Sequence[Dialogue]) -> float:
    """Perplexity per token of the assistant's replies."""
    examples = encode_dialogues(tokenizer, dialogues, progress=False)
    dataset, collate = ExampleDataset(examples), Collator(tokenizer.pad_token_id, packed=False)
    total, count = 0.0, 0
    for start in range(0, len(dataset), BATCH):
        batch = collate([dataset[i] for i in range(start, min(start + BATCH, len(dataset)))])
        labels = batch["labels"].to(model.device)
        logits = model(**{name: values.to(model.device) for name, values in batch.items() if name != "labels"}).logits
        losses = torch.nn.functional.cross_entropy(
            logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum"
        )
        total += float(losses)
        count += int((labels[:, 1:] != IGNORED).sum())
    return math.exp(total / count)


def examine_folder(folder: Path, per_kind: int = PER_KIND, seed: int = 1) -> Result:
    """Examine the model in a folder.

    Raises:
        DataError: as `held_out_dialogues`.
        OSError: no model there.
    """
    dialogues = held_out_dialogues(folder, per_kind, seed)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map="auto").eval()
    return examine(model, AutoTokenizer.from_pretrained(folder), dialogues)
