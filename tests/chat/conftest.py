"""Fixtures of the chat tests: a small chat model, replies put into its mouth, and a watch over threads."""

import logging
import threading

import pytest
import torch
from transformers import GenerationConfig, LogitsProcessor
from transformers.utils import logging as transformers_logging

from qwen1 import QWenTokenizer, QWenTokenizerFast

EOD, IM_START, IM_END = 256, 257, 258  # of the byte vocabulary


class ForcedReply(LogitsProcessor):
    """Makes `generate` write given tokens, one list for each row, and end the reply where a list is over.

    Attributes:
        prompts: the ids of each row before the reply.
        steps: number of calls so far.
    """

    def __init__(self, replies):
        self.replies = [list(reply.encode() if isinstance(reply, str) else reply) for reply in replies]
        self.prompts = None
        self.steps = 0

    def __call__(self, input_ids, scores):
        if self.prompts is None:
            self.prompts = input_ids.tolist()
        self.steps += 1
        step = input_ids.shape[1] - len(self.prompts[0])
        tokens = [reply[step] if step < len(reply) else IM_END for reply in self.replies]
        return torch.full_like(scores, -torch.inf).scatter(-1, torch.tensor(tokens)[:, None], 0.0)


@pytest.fixture
def forced():
    """Make a `logits_processor` argument from the replies of the rows: texts, bytes or token ids."""
    return lambda *replies: [ForcedReply(replies)]


@pytest.fixture
def chat_model(tiny_model):
    """A random chat model for the byte vocabulary that answers greedily, with NTK and LogN from 32 tokens on."""
    model = tiny_model("sdpa")
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=24,
        eos_token_id=[IM_END, EOD],
        pad_token_id=EOD,
        chat_format="chatml",
        max_window_size=6144,
        stop_words_ids=[[EOD]],
    )
    return model


@pytest.fixture(scope="session", params=[QWenTokenizer, QWenTokenizerFast])
def either_tokenizer(request, byte_vocabulary):
    """Each class with the byte vocabulary."""
    return request.param(str(byte_vocabulary))


@pytest.fixture(scope="session", params=[QWenTokenizer, QWenTokenizerFast])
def published_tokenizer(request, published_vocabulary):
    """Each class with the published vocabulary."""
    return request.param(str(published_vocabulary))


@pytest.fixture
def control_ids():
    """The special tokens in a list of ids, in order: (tokenizer, ids) -> ids."""
    return lambda tokenizer, ids: [i for i in ids if i in tokenizer.special_tokens.values()]


@pytest.fixture
def stream_threads():
    """The threads of unfinished streams."""
    return lambda: [thread for thread in threading.enumerate() if thread.name == "qwen-chat-stream"]


@pytest.fixture(autouse=True)
def _no_thread_left(stream_threads):
    yield
    assert stream_threads() == []


@pytest.fixture
def transformers_log(caplog):
    """The log of transformers: its `messages`, also those given once per process."""
    transformers_logging.warning_once.cache_clear()
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)
