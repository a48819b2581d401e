"""A program that torch.jit traced computes, and holds nothing that kernels gave, which torch doesn't see."""

import pytest
import torch
import transformers
from packaging.version import Version
from torch import nn

from qwen1.native_qwen import wait

pytestmark = [
    pytest.mark.skipif(wait() is None, reason="needs g++ or clang++ on Linux"),
    pytest.mark.skipif(
        Version(transformers.__version__) < Version("5.6"),
        reason="this release of transformers makes no masks while a program is traced",
    ),
]


@pytest.mark.parametrize("tokens", [1, 3, 40])
@torch.no_grad()
def test_a_traced_program_computes(tiny_model, tokens):
    model = tiny_model("sdpa")
    ids = torch.randint(0, model.config.vocab_size, (2, 1, tokens), generator=torch.Generator().manual_seed(6))

    class Logits(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, ids):
            return self.model(ids, use_cache=False).logits

    program = torch.jit.trace(Logits(), ids[0], check_trace=False)
    torch.testing.assert_close(program(ids[1]), model(ids[1], use_cache=False).logits, atol=3e-5, rtol=3e-5)
