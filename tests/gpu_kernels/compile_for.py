"""Compile the kernels for a GPU as Triton does on one, without a GPU: `compile_for.py 90` prints what came of each.

Run in a process of its own, in which Triton doesn't interpret.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaDriver
from triton.runtime import JITFunction, driver

from qwen1 import QWenConfig, QWenLMHeadModel, gpu_steps_qwen, modeling_qwen, passes_qwen, preparing_qwen
from qwen1.cache_qwen import QWenCache

SHAPES = {
    "7B": dict(hidden_size=4096, num_attention_heads=32, ffn_hidden_size=22016),
    "odd": dict(hidden_size=60, num_attention_heads=4, kv_channels=12, num_key_value_heads=2, ffn_hidden_size=104),
}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Card(CudaDriver):
    """What Triton asks a GPU for before it compiles, of a card of this capability."""

    def __init__(self, capability: int):
        self.capability = capability

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", self.capability, 32)


def assembled(ptx: str, capability: int) -> dict[str, int]:
    """Registers of a thread, and bytes that it has to put elsewhere, as NVIDIA's assembler tells of a kernel."""
    program = Path(triton.__file__).parent / "backends/nvidia/bin" / ("ptxas" + "-blackwell" * (capability >= 100))
    architecture = re.search(r"\.target (\w+)", ptx)[1]
    command = [program, "-v", f"--gpu-name={architecture}", "-o", "/dev/null", "/dev/stdin"]
    told = subprocess.run(command, input=ptx, capture_output=True, text=True, check=True).stderr
    return {"registers": int(re.search(r"Used (\d+) registers", told)[1])} | {
        f"spilt_{what}": int(re.search(rf"(\d+) bytes spill {what}", told)[1]) for what in ("stores", "loads")
    }


def compile_all(blocks, states, grown):
    """Everything that `preparing_qwen` warms for such a model, and what batches run besides."""
    angles = states.new_zeros((1, 1, 1, blocks[0].attn.head_dim), dtype=torch.float32)
    factors = angles[..., :1] + 1 if grown else None
    preparing_qwen.begin = lambda key, device, warm: list(warm())
    preparing_qwen.prepare(blocks, modeling_qwen._PLAIN, states, (angles, angles, factors))
    rows, cache = states.expand(2, -1, -1).contiguous(), QWenCache()
    token = states.new_zeros((2, blocks[0].attn.num_key_value_heads, 1, blocks[0].attn.head_dim))
    cache.update(token, token, 0)
    seen = states.new_ones((2, 1, 1, 2), dtype=torch.bool)
    both = angles.expand(2, -1, -1, -1).contiguous()
    if gpu_steps_qwen.steps_on_gpu(blocks, modeling_qwen._PLAIN, rows, cache, seen, (both, both, factors)) is None:
        raise SystemExit("a batch didn't go through the kernels")


def main(capability: int) -> None:
    found, start = [], JITFunction.run

    def compile_alone(self, *args, grid, warmup, **options):
        compiled = start(self, *args, grid=grid, warmup=True, **options)
        found.append((self.fn.__name__, compiled.asm["ptx"]))
        return compiled

    JITFunction.run = compile_alone
    driver.set_active(Card(capability))
    passes_qwen.DEVICE = "cpu"
    report = []
    for name, shape in SHAPES.items():
        model = QWenLMHeadModel(QWenConfig(vocab_size=8, num_hidden_layers=1, use_flash_attn=False, **shape)).eval()
        for dtype in DTYPES:
            blocks = list(model.to(dtype).transformer.h)
            with torch.no_grad():
                for grown in (False, True):
                    compile_all(blocks, torch.zeros((1, 1, shape["hidden_size"]), dtype=dtype), grown)
            report += [{"shape": name, "dtype": str(dtype), "kernel": kernel, "ptx": ptx} for kernel, ptx in found]
            found.clear()
    once = {(one["kernel"], one.pop("ptx")): one for one in report}
    print(json.dumps([one | assembled(ptx, capability) for (_, ptx), one in once.items()]))


if __name__ == "__main__":
    main(int(sys.argv[1]))
