"""How close the model comes to the published logits, and to exact arithmetic in bf16.

    python benchmarks/accuracy.py

Reads the golden checkpoints in tests/golden and prints the machine, the versions and one line for each comparison.
"""

from __future__ import annotations

import platform
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file
from transformers import Qwen2Config, Qwen2ForCausalLM, StaticCache
from transformers.utils import logging

from qwen1 import QWenConfig, QWenLMHeadModel
from qwen1.conversion.formats.hugging_face import read_hf
from qwen1.conversion.formats.qwen import hf_to_qwen
from qwen1.conversion.formats.recipes import convert_tensors

GOLDEN = Path(__file__).parent.parent / "tests" / "golden" / "model"
CASES = [
    "aug_plain",
    "aug_ntk_logn",
    "aug_partial_rotary",
    "aug_residual_post_ln",
    "aug_rotary_base",
    "dec_ntk_logn",
    "dec_ntk_padded",
]
SHAPE = dict(vocab_size=320, hidden_size=256, num_hidden_layers=4, num_attention_heads=4)


def golden_error(case: str, implementation: str, static: bool, device: str = "cpu") -> tuple[float, float]:
    """Largest difference of any golden logit of the case, prompts and decoding; and the logits' standard deviation."""
    model = QWenLMHeadModel.from_pretrained(GOLDEN / case, attn_implementation=implementation).eval().to(device)
    golden = load_file(GOLDEN / case / "expected.safetensors", device=device)
    worst, spread = 0.0, 0.0
    for name, ids in golden.items():
        if not name.startswith("ids_"):
            continue
        length = int(name.removeprefix("ids_"))
        cache = StaticCache(config=model.config, max_cache_len=ids.shape[1]) if static else None
        output = model(ids[:, :length], past_key_values=cache, use_cache=True)
        logits = [output.logits]
        for index in range(length, ids.shape[1]):
            logits.append(model(ids[:, index : index + 1], past_key_values=output.past_key_values).logits)
        expected = torch.cat([golden[f"prefill_{length}"], golden[f"decode_{length}"]], dim=1)
        worst = max(worst, (torch.cat(logits, dim=1) - expected).abs().max().item())
        spread = max(spread, expected.std().item())
    return worst, spread


def bfloat16_errors(implementation: str, seed: int) -> tuple[float, float]:
    """Mean error of transformers' Qwen2 and of ours in bf16 against float32, on the same weights."""
    torch.manual_seed(seed)
    theirs = Qwen2ForCausalLM(
        Qwen2Config(
            **SHAPE,
            num_key_value_heads=4,
            intermediate_size=688,
            initializer_range=0.06,
            rms_norm_eps=1e-6,
            attn_implementation=implementation,
        )
    ).eval()
    ours = QWenLMHeadModel(
        QWenConfig(
            **SHAPE,
            kv_channels=64,
            ffn_hidden_size=1376,
            layer_norm_epsilon=1e-6,
            use_flash_attn=False,
            attn_implementation=implementation,
        )
    ).eval()
    recipes = hf_to_qwen(read_hf(theirs.config.to_dict()), torch.float32)
    ours.load_state_dict(convert_tensors(recipes, theirs.state_dict()))
    ids = torch.randint(0, 320, (4, 256))
    exact = theirs(ids).logits
    errors = [(model.bfloat16()(ids).logits.float() - exact).abs().mean().item() for model in (theirs, ours)]
    return errors[0], errors[1]


@torch.no_grad()
def main() -> None:
    """Print every comparison."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, ", end="")
    print(f"transformers {transformers.__version__}, {torch.get_num_threads()} threads, float32")
    print(f"{'golden case':24}{'implementation':18}{'cache':10}{'largest error':>14}{'logits std':>12}")
    for case in CASES:
        for implementation, static in (("eager", False), ("sdpa", False), ("sdpa", True)):
            error, spread = golden_error(case, implementation, static)
            cache = "static" if static else "dynamic"
            print(f"{case:24}{implementation:18}{cache:10}{error:14.1e}{spread:12.2f}")
    print(f"\n{'bf16 mean error':24}{'implementation':18}{'Qwen2':>10}{'ours':>14}{'ratio':>12}")
    for implementation in ("eager", "sdpa"):
        errors = [bfloat16_errors(implementation, seed) for seed in range(5)]
        for theirs, ours in sorted(errors, key=lambda pair: pair[1] / pair[0])[2:3]:
            print(f"{'median of 5 weights':24}{implementation:18}{theirs:10.4f}{ours:14.4f}{ours / theirs:12.2f}")


if __name__ == "__main__":
    main()
