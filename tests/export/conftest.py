"""What programs are compared by: lengths on both sides of every edge, a text over several bands of NTK."""

import logging

import pytest
import torch

SEQ_LENGTH = 32  # of the tiny models
LENGTHS = (1, 2, 3, SEQ_LENGTH - 1, SEQ_LENGTH, SEQ_LENGTH + 1, 2 * SEQ_LENGTH, 4 * SEQ_LENGTH + 1)
CLOSE = {"atol": 1e-4, "rtol": 0.0}


@pytest.fixture
def text():
    """Token ids, (1, 200), none of which is the padding of these tests, 0."""
    return torch.randint(1, 464, (1, 200), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def warnings_of(caplog):
    """The warnings of the model code so far; its logger doesn't hand them on by itself."""
    logger = logging.getLogger("qwen1")
    logger.addHandler(caplog.handler)
    yield lambda: [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    logger.removeHandler(caplog.handler)
