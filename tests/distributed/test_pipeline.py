"""Blocks spread over two processes: with torch's pipelining as they are, by transformers when they are converted."""

import inspect
import os
import re
import runpy
import subprocess
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from qwen1 import QWenLMHeadModel

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "pipeline.py"
PIECES = 4
IDS = torch.randint(0, 256, (8, 40), generator=torch.Generator().manual_seed(0))  # beyond seq_length: NTK has its part
SHORT = IDS[:2, :16]
SPREADS_BLOCKS = "pp_size" in inspect.signature(DistributedConfig).parameters  # transformers 5.4 doesn't yet


# --- in each process ---


def with_torch(folder):
    """Losses, logits of the last process, and the gradients of this one."""
    example = runpy.run_path(str(EXAMPLE))
    index, count = dist.get_rank(), dist.get_world_size()
    part = example["Part"](QWenLMHeadModel.from_pretrained(folder), index, count).train()
    stage = PipelineStage(part, index, count, torch.device("cpu"))
    schedule = Schedule1F1B(stage, PIECES, loss_fn=example["next_token_loss"])
    losses = []
    given, last = () if index else (IDS,), index + 1 == count
    logits = schedule.step(*given, **({"target": IDS, "losses": losses} if last else {}))
    gradients = {name: weight.grad for name, weight in part.named_parameters()}
    return losses, logits.detach() if last else None, gradients


def converted(folder):
    """Logits and greedy ids of a converted model, of which each process has a part."""
    model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(pp_size=2)).eval()
    with torch.no_grad():
        logits = model(SHORT).logits
        reply = model.generate(SHORT, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    return logits, reply, sum(weight.numel() for weight in model.parameters())


# --- here ---


@pytest.mark.slow
def test_pipelining_of_torch(in_processes, model_folders):
    model = QWenLMHeadModel.from_pretrained(model_folders["plain"]).train()
    output = model(IDS, labels=IDS, skip_logits=False)
    output.loss.backward()
    first, last = in_processes(with_torch, model_folders["plain"])
    assert not first[0] and len(last[0]) == PIECES
    torch.testing.assert_close(torch.stack(last[0]).mean().detach(), output.loss.detach())
    torch.testing.assert_close(last[1], output.logits.detach())
    blocks = [re.sub(r"h\.(\d+)", lambda found: f"h.{int(found[1]) + 2}", name) for name in last[2]]
    gradients = {**first[2], **dict(zip(blocks, last[2].values(), strict=True))}
    expected = {name: weight.grad for name, weight in model.named_parameters()}
    assert gradients.keys() == expected.keys() and not first[2].keys() & set(blocks)
    size = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    errors = {name: ((gradients[name] - gradient).norm() / size).item() for name, gradient in expected.items()}
    assert max(errors.values()) < 1e-6, errors


@pytest.mark.slow
def test_the_example_runs(model_folders, warm, tmp_path):
    command = [*warm, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--no-python"]
    done = subprocess.run(
        [*command, *warm, EXAMPLE, model_folders["plain"]],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    losses = [float(loss) for loss in re.findall(r"^step \d: loss ([\d.]+)$", done.stdout, re.MULTILINE)]
    assert len(losses) == 3 and losses == sorted(losses, reverse=True)


def test_parts_that_cannot_be(model_folders):
    part = runpy.run_path(str(EXAMPLE))["Part"]
    with pytest.raises(ValueError, match="one weight here"):
        part(QWenLMHeadModel.from_pretrained(model_folders["tied"]), 0, 2)
    with pytest.raises(ValueError, match="4 blocks don't fill 5 processes"):
        part(QWenLMHeadModel.from_pretrained(model_folders["plain"]), 0, 5)


@pytest.mark.skipif(not SPREADS_BLOCKS, reason="this release of transformers spreads no blocks")
def test_transformers_own_is_refused_with_the_remedy(model_folders):
    for given in (DistributedConfig(pp_size=2), {"pp_size": 2}):
        with pytest.raises(ValueError, match="pp_size=2 .*qwen1-checkpoint convert --to qwen2"):
            QWenLMHeadModel.from_pretrained(model_folders["plain"], distributed_config=given)


@pytest.mark.slow
@pytest.mark.skipif(not SPREADS_BLOCKS, reason="this release of transformers spreads no blocks")
def test_transformers_own_of_a_converted_model(in_processes, model_folders, warm, tmp_path):
    command = [*warm, "-m", "qwen1.convert_checkpoint", "convert", model_folders["plain"], tmp_path / "qwen2"]
    done = subprocess.run([*command, "--to", "qwen2"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    model = QWenLMHeadModel.from_pretrained(model_folders["plain"]).eval()
    with torch.no_grad():
        expected = model(SHORT).logits
        reply = model.generate(SHORT, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    whole = sum(weight.numel() for weight in model.parameters())
    for logits, said, held in in_processes(converted, tmp_path / "qwen2"):
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(said, reply) and held < 0.7 * whole
