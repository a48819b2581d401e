"""Which attention implementations and quantisations are usable here: tried where it is cheap, else said why not."""

from __future__ import annotations

import copy
import importlib
import shutil
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import BitsAndBytesConfig
from transformers.utils import is_flash_attn_2_available

from ..arguments_qwen import CACHE_NAME
from ..attention_qwen import FLASH_IMPLEMENTATION
from ..cache_qwen import QWenCache
from ..modeling_qwen import QWenLMHeadModel
from ..programs.shipped import TINY_CHAT
from .environment import version_of
from .findings import Check, Outcome, State
from .model_checks import SHORT, bounded
from .patient import Patient

EIGHT_BITS, FOUR_BITS = 0.1, 0.5
"""Error of a quantised model's logits relative to their norm: about five times what bitsandbytes makes of the shipped
model in 8 bits (0.019), and four times in nf4 (0.14). Weights in a wrong order make more than 1."""


def backend_checks(patient: Patient, slow: bool = False) -> list[Check]:
    """The checks of back ends, in the order in which they are reported.

    Args:
        slow: also those that compile, which takes half a minute.
    """
    attention = {
        "eager": partial(check_attention, patient, "eager"),
        "sdpa": partial(check_attention, patient, "sdpa"),
        "flex_attention": partial(check_flex, patient, slow),
        FLASH_IMPLEMENTATION: partial(check_flash, patient, FLASH_IMPLEMENTATION),
        "flash_attention_2": partial(check_flash, patient, "flash_attention_2"),
    }
    quantisation: dict[str, Callable[[], Outcome]] = {
        "bitsandbytes, 8 bits": partial(check_quantised, "bitsandbytes", _bitsandbytes_8, EIGHT_BITS),
        "bitsandbytes, 4 bits": partial(check_quantised, "bitsandbytes", _bitsandbytes_4, FOUR_BITS),
        "torchao, int8": partial(check_quantised, "torchao", _torchao, EIGHT_BITS),
        "quanto, int8": partial(check_quantised, "optimum-quanto", _quanto, EIGHT_BITS),
        "hqq, 8 bits": partial(check_quantised, "hqq", _hqq, EIGHT_BITS),
        "gptqmodel": partial(check_importable, "gptqmodel", "gptqmodel", "GPTQ"),
        "autoawq": partial(check_importable, "autoawq", "awq", "AWQ"),
        "compressed-tensors": partial(check_importable, "compressed-tensors", "compressed_tensors", "its format"),
    }
    return [
        *(Check("attention", name, check) for name, check in attention.items()),
        *(Check("quantisation", name, check) for name, check in quantisation.items()),
    ]


# --- attention ---


def check_attention(patient: Patient, implementation: str, model: Any = None, step: bool = True) -> Outcome:
    """An implementation gives the logits of eager: two rows with padding, then a step on their cache.

    Args:
        model: in place of the patient's own.
        step: False leaves the step out.
    """
    patient = patient if model is None else Patient(patient.folder, model)
    with patient.attending_by("eager"):
        expected = _two_rows(patient, step)
    with patient.attending_by(implementation):
        got = _two_rows(patient, step)
    dtype = str(patient.model.dtype).removeprefix("torch.")
    return patient.ruler.outcome(
        got, expected, f"{dtype} on {patient.model.device.type}, two rows{' and a step' if step else ''}"
    )


@torch.inference_mode()
def _two_rows(patient: Patient, step: bool) -> torch.Tensor:
    """Logits of the tokens of two rows, the first padded on the left by 9, and of a token more, (N, V) float32."""
    model, padding = patient.model, 9
    ids = patient.ids(2 * SHORT).view(2, SHORT)
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    cache = QWenCache(config=model.config)
    pieces = [
        model(input_ids=piece, attention_mask=mask[:, :end], **{CACHE_NAME: cache}).logits.float()
        for piece, end in ((ids[:, :-1], SHORT - 1), (ids[:, -1:], SHORT))[: 1 + step]
    ]
    logits = torch.cat(pieces, dim=1)
    return torch.cat([logits[0, padding:], logits[1]])


def check_flex(patient: Patient, slow: bool) -> Outcome:
    """FlexAttention, which is compiled for each shape."""
    if patient.model.device.type == "cpu" and shutil.which("g++") is None and shutil.which("clang++") is None:
        return Outcome(State.ABSENT, "needs a C++ compiler on a CPU: install g++")
    if not slow:
        return Outcome(State.ABSENT, "not tried, since it has to be compiled, which takes half a minute: add --slow")
    # torch compiles no single query under padding for a CPU.
    return check_attention(patient, "flex_attention", step=patient.model.device.type != "cpu")


def check_flash(patient: Patient, implementation: str) -> Outcome:
    """Kernels for half precision on CUDA."""
    if implementation == "flash_attention_2" and version_of("flash-attn") is None:
        return Outcome(State.ABSENT, "not installed: pip install flash-attn (needs CUDA)")
    if patient.model.device.type != "cuda":
        return Outcome(State.ABSENT, f"needs a CUDA device, the model is on {patient.model.device.type}")
    if implementation == "flash_attention_2" and not is_flash_attn_2_available():
        return Outcome(
            State.FAILED, f"flash-attn {version_of('flash-attn')} is installed, but transformers can't use it"
        )
    if patient.is_half:
        return check_attention(patient, implementation)
    half: Any = copy.deepcopy(patient.model)
    return check_attention(patient, implementation, half.to(torch.bfloat16))


# --- quantisation ---


def check_quantised(distribution: str, configure: Callable[[], Any], bound: float) -> Outcome:
    """The shipped model, quantised while it is loaded, gives about its own logits."""
    if (version := version_of(distribution)) is None:
        return not_installed(distribution)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ids = torch.randint(1800, (1, SHORT), generator=torch.Generator().manual_seed(0)).to(device)
    arguments: dict[str, Any] = {"dtype": torch.bfloat16, "local_files_only": True, "device_map": device}
    with torch.inference_mode():
        whole = QWenLMHeadModel.from_pretrained(TINY_CHAT, **arguments).eval()
        expected = whole(input_ids=ids, use_cache=False).logits.float()
        try:
            quantised = QWenLMHeadModel.from_pretrained(TINY_CHAT, quantization_config=configure(), **arguments).eval()
        except NotImplementedError as error:  # releases of transformers 5 lack some that 4 had
            return Outcome(State.ABSENT, f"{distribution} {version} is installed, but transformers says: {error}")
        got = quantised(input_ids=ids, use_cache=False).logits.float()
    return bounded(got, expected, bound, f"{distribution} {version} on {device}, the shipped model")


def not_installed(distribution: str) -> Outcome:
    """A package that isn't there, and how to get it."""
    return Outcome(State.ABSENT, f"not installed: pip install {distribution}")


def _bitsandbytes_8() -> Any:
    return BitsAndBytesConfig(load_in_8bit=True)


def _bitsandbytes_4() -> Any:
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)


def _torchao() -> Any:
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def _quanto() -> Any:
    from transformers import QuantoConfig

    return QuantoConfig(weights="int8")


def _hqq() -> Any:
    from transformers import HqqConfig

    return HqqConfig(nbits=8)


def check_importable(distribution: str, module: str, weights: str) -> Outcome:
    """A package for weights that were quantised before can be imported."""
    if (version := version_of(distribution)) is None:
        return not_installed(distribution)
    importlib.import_module(module)
    return Outcome(State.OK, f"{version} can be imported; not run, as it takes weights in {weights}")
