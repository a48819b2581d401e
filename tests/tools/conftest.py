"""Fixtures of the tool tests: a model that writes given replies, and tools that remember their calls."""

import pytest
import torch
from transformers import GenerationConfig, LogitsProcessor

EOD, IM_END = 256, 258  # of the byte vocabulary


class Script(LogitsProcessor):
    """Makes `generate` write given tokens, the next list in each call, and end the reply where a list is over.

    Attributes:
        prompts: the ids before each reply.
    """

    def __init__(self, replies, end):
        self.replies = replies
        self.end = end
        self.prompts = []
        self._last = None

    def __call__(self, input_ids, scores):
        ids = input_ids[0].tolist()
        if ids[:-1] != self._last:
            self.prompts.append(ids)
        self._last = ids
        reply, step = self.replies[len(self.prompts) - 1], len(ids) - len(self.prompts[-1])
        token = reply[step] if step < len(reply) else self.end
        return torch.full_like(scores, -torch.inf).scatter(-1, torch.tensor([[token]]), 0.0)


@pytest.fixture
def script():
    """Make a `logits_processor` from the replies of successive calls; of the byte vocabulary without a tokenizer."""

    def make(*replies, tokenizer=None):
        encode = tokenizer.encode if tokenizer else lambda text: list(text.encode())
        return [Script([encode(reply) for reply in replies], tokenizer.im_end_id if tokenizer else IM_END)]

    return make


@pytest.fixture
def model(tiny_model):
    """A random chat model for the byte vocabulary, trained on longer texts than any of these tests has."""
    model = tiny_model("sdpa", seq_length=8192)
    settings = {"eos_token_id": [IM_END, EOD], "pad_token_id": EOD, "chat_format": "chatml", "max_window_size": 6144}
    model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=400, **settings)
    return model


@pytest.fixture
def calls():
    """What `multiply` and `fail` were called with, in order."""
    return []


@pytest.fixture
def multiply(calls):
    def multiply(a: int, b: int) -> int:
        """
        Multiply two whole numbers

        Args:
            a: The first one
            b: The second one
        """
        calls.append((a, b))
        return a * b

    return multiply


@pytest.fixture
def fail(calls):
    def fail(reason: str) -> None:
        """
        Raise an error

        Args:
            reason: What it says
        """
        calls.append(reason)
        raise LookupError(reason)

    return fail
