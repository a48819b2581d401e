"""What the calculator of `inspect` says, beside what processes of their own take.

    python benchmarks/memory.py measure [--quick]
    python benchmarks/memory.py table
    python benchmarks/memory.py models

Each way of serving and training runs in a process of its own, on a CPU. Counted is the most that the process has held
(VmHWM) beyond what it held when the libraries were loaded. `table` prints what was measured, `models` the memory of the
published models as the calculator has it; docs/memory.md shows both.

glibc keeps much of what is freed for itself. The processes run with MALLOC_ARENA_MAX=1 and a fixed
MALLOC_MMAP_THRESHOLD_, above which it gives everything back.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from measuring import forget_peak, machine, peak, resident

from qwen1 import QWenConfig, QWenLMHeadModel
from qwen1.conversion.formats.qwen import read_qwen
from qwen1.conversion.inspecting.words import size_text
from qwen1.conversion.sizing.devices import Answer, answer
from qwen1.conversion.sizing.question import Question
from qwen1.conversion.sizing.serving import PRECISIONS, cache_per_token, serving_need, weight_bytes
from qwen1.conversion.sizing.shape import Load, Shape
from qwen1.conversion.sizing.training import WAYS, Adapter, TrainingStep
from qwen1.conversion.sizing.units import read_size

RESULTS = Path(__file__).with_name("memory.json")
ALONE = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": str(2**16), "MALLOC_TRIM_THRESHOLD_": str(2**16)}

Results = Annotated[Path, typer.Option(help="JSON file.")]

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)


@dataclass(frozen=True)
class Case:
    """Something that is measured.

    Attributes:
        way: name of a precision (serving) or of a way of training.
        cache: for serving.
        checkpointing, processes: for training.
    """

    way: str
    width: int = 1024
    layers: int = 8
    heads: int = 16
    gate: int = 2816
    rows: int = 32_000
    context: int = 1024
    batch: int = 1
    cache: str = "growing"
    checkpointing: bool = False
    processes: int = 1

    @property
    def serving(self) -> bool:
        """Whether the model answers, and isn't trained."""
        return self.way in {precision.name for precision in PRECISIONS}

    @property
    def name(self) -> str:
        """In tables."""
        load = f"{self.batch} x {self.context:,} tokens, {self.width} x {self.layers}, {self.rows:,} words"
        if self.serving:
            return f"serving in {self.way}, {self.cache} cache, {load}"
        how = ", gradient checkpointing" if self.checkpointing else ""
        processes = f", {self.processes} processes" if self.processes > 1 else ""
        return f"{self.way}{how}{processes}, {load}"

    @property
    def configuration(self) -> dict[str, Any]:
        """Of the model."""
        return dict(
            vocab_size=self.rows,
            n_embd=self.width,
            n_layer=self.layers,
            n_head=self.heads,
            kv_channels=self.width // self.heads,
            ffn_hidden_size=2 * self.gate,
            seq_length=8192,
            n_positions=8192,
            use_flash_attn=False,
            eos_token_id=None,
            bos_token_id=None,
            pad_token_id=None,
        )

    def calculated(self) -> int:
        """What the calculator says, on a CPU."""
        shape, load = (
            Shape(read_qwen({"model_type": "qwen", **self.configuration}), True),
            Load(self.context, self.batch),
        )
        if self.serving:
            precision = next(precision for precision in PRECISIONS if precision.name == self.way)
            return serving_need(shape, precision, self.cache, load).total
        way = next(way for way in WAYS if way.name == self.way)
        return TrainingStep(shape, way, load, self.checkpointing, self.processes, Adapter(RANK, 4)).need.total


RANK = 16

_MIDDLE: dict[str, Any] = dict(width=768, layers=6, heads=12, gate=2048, rows=16_000, context=512)
_SMALL: dict[str, Any] = dict(width=512, layers=6, heads=8, gate=1408, rows=16_000)

CASES = (
    Case("float32", batch=2),
    Case("bfloat16", batch=4, context=2048),
    Case("bfloat16", batch=4, context=2048, cache="static"),
    Case("bfloat16", batch=4, context=2048, cache="int8"),
    Case("bfloat16", rows=151_936, context=4096),
    *(Case("full, float32", checkpointing=on) for on in (False, True)),
    *(
        Case(way, **_MIDDLE, checkpointing=on)
        for way in ("LoRA, bfloat16", "full, mixed", "full, bfloat16", "QLoRA, nf4")
        for on in (False, True)
    ),
    *(Case("FSDP2, float32", **_MIDDLE, checkpointing=on, batch=2, processes=2) for on in (False, True)),
)

QUICK = (
    Case("bfloat16", **_SMALL, batch=4, context=1024),
    Case("full, float32", **_SMALL, context=512),
    Case("full, bfloat16", **_SMALL, context=128, checkpointing=True),  # slow where torch has no such products
)


# --- in a process of its own ---


def new_model(case: Case, dtype: torch.dtype) -> QWenLMHeadModel:
    """A model of random weights, made in its dtype."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return QWenLMHeadModel(QWenConfig(**case.configuration))
    finally:
        torch.set_default_dtype(default)


def serve(case: Case) -> None:
    """Read a prompt and write two tokens; the context counts both."""
    model = new_model(case, getattr(torch, case.way)).eval()
    ids = torch.randint(1, case.rows, (case.batch, case.context - 2))
    how: dict[str, Any] = {"growing": {}, "static": {"cache_implementation": "static"}}.get(case.cache, {})
    if case.cache == "int8":
        how = {"cache_implementation": "quantized", "cache_config": {"backend": "qwen_int8"}}
    model.generate(ids, max_new_tokens=2, do_sample=False, **how)


def with_adapter(case: Case) -> torch.nn.Module:
    """The model with LoRA, held in bfloat16 or in four bits."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import BitsAndBytesConfig

    model = new_model(case, torch.bfloat16)
    if case.way.startswith("QLoRA"):
        bits = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            del model
            model = QWenLMHeadModel.from_pretrained(folder, quantization_config=bits)
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=case.checkpointing)
    if case.checkpointing:
        model.enable_input_require_grads()
    modules = ["c_attn", "c_proj", "w1", "w2"]
    return get_peft_model(model, LoraConfig(r=RANK, lora_dropout=0.05, target_modules=modules, task_type="CAUSAL_LM"))


def train(case: Case) -> None:
    """Two steps of AdamW; in the second the optimizer has all that it keeps."""
    if case.way.startswith(("LoRA", "QLoRA")):
        model: Any = with_adapter(case)
    else:
        model = new_model(case, torch.bfloat16 if case.way.endswith("bfloat16") else torch.float32)
    model.train()
    if case.checkpointing:
        model.activation_checkpointing_enable() if hasattr(
            model, "activation_checkpointing_enable"
        ) else model.gradient_checkpointing_enable()
    if case.processes > 1:
        shard(model)
    forget_peak()  # loading, quantising or dividing a model takes memory too, which isn't the step's
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], fused=True)
    ids = torch.randint(0, case.rows, (-(-case.batch // case.processes), case.context))
    mixed = case.way.endswith("mixed") or case.way.startswith(("LoRA", "QLoRA"))
    for _ in range(2):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        del loss
        optimizer.step()
        optimizer.zero_grad()


def shard(model: QWenLMHeadModel) -> None:
    """Divide a model among the processes, a layer at a time."""
    from torch.distributed.fsdp import fully_shard

    for block in model.transformer.h:
        fully_shard(block)
    fully_shard(model)


@app.command(hidden=True)
def one(case: str, rank: int = 0, store: str = "") -> None:
    """Run a case in this process, and print what it took."""
    found = Case(**json.loads(case))
    torch.manual_seed(0)
    import transformers.generation  # noqa: F401  # before the baseline, with what a case imports

    if found.way.startswith(("LoRA", "QLoRA")):
        import bitsandbytes  # noqa: F401
        import peft  # noqa: F401
    if found.processes > 1:
        torch.distributed.init_process_group("gloo", f"file://{store}", rank=rank, world_size=found.processes)
    warm = replace(found, width=64, layers=1, heads=2, gate=64, rows=512, context=16, batch=found.processes)
    (serve if found.serving else train)(warm)  # libraries that are loaded when they are used first
    before = resident()
    forget_peak()
    (serve if found.serving else train)(found)
    print(json.dumps({"measured": peak() - before}))
    if found.processes > 1:
        torch.distributed.destroy_process_group()


# --- the programs ---


def measure_case(case: Case) -> int:
    """Bytes that the first of the case's processes took."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "one", json.dumps(asdict(case)), "--store", str(Path(folder, "store"))]
        running = [
            subprocess.Popen(
                [*command, "--rank", str(rank)],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env={**os.environ, **ALONE},
            )
            for rank in range(case.processes)
        ]
        written = [process.communicate() for process in running]
    if any(process.returncode for process in running):
        raise RuntimeError(f"{case.name} failed:\n{written[0][1][-3000:]}")
    return json.loads(written[0][0].splitlines()[-1])["measured"]


@app.command()
def measure(
    quick: Annotated[bool, typer.Option("--quick", help="A few small cases.")] = False,
    only: Annotated[str, typer.Option(help="Cases whose name holds this.")] = "",
    results: Results = RESULTS,
) -> None:
    """Measure each case beside what the calculator says, and write both."""
    rows = json.loads(results.read_text())["cases"] if results.exists() and only else []
    for case in QUICK if quick else CASES:
        if only not in case.name:
            continue
        row = {"case": asdict(case), "measured": measure_case(case)}
        rows = [*(other for other in rows if Case(**other["case"]) != case), row]
        print(_compared(row), flush=True)
        results.write_text(json.dumps({"machine": machine(), "cases": rows}, indent=2) + "\n")


def _compared(row: dict[str, Any]) -> str:
    case = Case(**row["case"])
    calculated, measured = case.calculated(), row["measured"]
    sizes = f"{size_text(calculated)} | {size_text(measured)} | **{calculated / measured:.2f}**"
    return f"| {case.name} | {sizes} |"


@app.command()
def table(results: Results = RESULTS) -> None:
    """Print what was measured as a table in Markdown, which docs/memory.md shows."""
    lines = ["| | calculated | measured | ratio |", "|---|---|---|---|"]
    lines += map(_compared, json.loads(results.read_text())["cases"])
    print("\n".join(lines))


# --- the published models ---

MODELS = {
    "1.8B": (2048, 24, 16, 11_008, 151_936),
    "7B": (4096, 32, 32, 22_016, 151_936),
    "14B": (5120, 40, 40, 27_392, 152_064),
    "72B": (8192, 80, 64, 49_152, 152_064),
}
"""Name -> width, layers, heads, `intermediate_size`, rows of the embedding."""

LENGTH, DEVICE = 2048, "80GB"


def shape_of(name: str) -> Shape:
    """Of a published model."""
    width, layers, heads, intermediate, rows = MODELS[name]
    values = dict(hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, kv_channels=width // heads)
    values |= dict(intermediate_size=intermediate, vocab_size=rows, seq_length=8192, max_position_embeddings=32_768)
    return Shape(read_qwen({"model_type": "qwen", **values}), True)


def _row(*cells: Any) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _head(*cells: str) -> list[str]:
    return [_row("", *cells), "|---" * (len(cells) + 1) + "|"]


def serving_lines() -> list[str]:
    """Weights and cache of each model."""
    names = [precision.name for precision in PRECISIONS]
    lines = _head(*(f"weights in {name}" for name in names), "a token's keys and values, bfloat16", "int8 cache")
    for name in MODELS:
        shape, half = shape_of(name), PRECISIONS[1]
        weights = (size_text(weight_bytes(shape, precision)) for precision in PRECISIONS)
        token = (size_text(cache_per_token(shape, half, cache)) for cache in ("growing", "int8"))
        lines.append(_row(name, *weights, *token))
    return lines


def device_lines(context: int, batch: int) -> list[str]:
    """Devices for serving each model, and what each holds."""
    question = Question(read_size(DEVICE, "device"), context=context, batch=batch)
    lines = _head(*(precision.name for precision in PRECISIONS))
    for name in MODELS:
        lines.append(_row(name, *map(_devices, answer(question, shape_of(name)).serving)))
    return lines


def training_lines() -> list[str]:
    """Devices for training each model, and what each holds."""
    question = Question(read_size(DEVICE, "device"), context=LENGTH, batch=8)
    answers = {name: answer(question, shape_of(name)).training for name in MODELS}
    lines = _head("gradient checkpointing", *MODELS)
    for place, first in enumerate(answers["7B"]):
        cells = (_devices(answers[name][place]) for name in MODELS)
        lines.append(_row(first.name, "yes" if first.gradient_checkpointing else "no", *cells))
    return lines


def _devices(found: Answer) -> str:
    return f"{found.devices or 'none'} x {size_text(found.total)}"


@app.command()
def models() -> None:
    """Print what the published models need as tables in Markdown, which docs/memory.md shows."""
    print("\n".join(serving_lines()), end="\n\n")
    print(f"Serving on devices of {DEVICE}, 8 texts of 8,192 tokens:", end="\n\n")
    print("\n".join(device_lines(8192, 8)), end="\n\n")
    print(f"Training on devices of {DEVICE}, 8 texts of {LENGTH:,} tokens a step:", end="\n\n")
    print("\n".join(training_lines()))


if __name__ == "__main__":
    app()
