"""Versions and hardware: what a bug report has to say first."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from packaging.requirements import Requirement
from packaging.version import Version

from ..arguments_qwen import TESTED_RELEASES
from .findings import Check, Outcome, State

PACKAGE = "qwen1"
TESTED = {
    "python": ("3.10", "3.13"),
    "torch": ("2.7", "2.13"),
    "transformers": tuple(release.removesuffix(".0") for release in (TESTED_RELEASES[0], TESTED_RELEASES[-1])),
}
"""Oldest and newest release that is known to run; a newest one without its last number stands for its series."""

REQUIRED = (
    "transformers",
    "torch",
    "accelerate",
    "tokenizers",
    "safetensors",
    "tiktoken",
    "huggingface_hub",
    "numpy",
)
OPTIONAL = (
    "peft",
    "bitsandbytes",
    "torchao",
    "optimum-quanto",
    "hqq",
    "gptqmodel",
    "autoawq",
    "compressed-tensors",
    "flash-attn",
    "kernels",
    "triton",
    "gradio",
    "datasets",
    "vllm",
)


@dataclass(frozen=True)
class Environment:
    """Where the examination takes place.

    Attributes:
        versions: name -> version of Python, this package and what it is built on; None where it isn't installed.
        optional: name -> version of what else is installed that has a part in running models.
        machine: system, processor, memory and accelerators, in words.
    """

    versions: dict[str, str | None]
    optional: dict[str, str]
    machine: dict[str, Any]


def survey() -> Environment:
    """Look at the environment of this process."""
    optional = {name: version for name in OPTIONAL if (version := version_of(name)) is not None}
    versions = {"python": platform.python_version(), PACKAGE: version_of(PACKAGE)}
    return Environment({**versions, **{name: version_of(name) for name in REQUIRED}}, optional, _machine())


def version_of(distribution: str) -> str | None:
    """Version of an installed distribution, None if there is none."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _machine() -> dict[str, Any]:
    memory = psutil.virtual_memory()
    return {
        "system": platform.platform(),
        "processor": platform.machine(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads of torch": torch.get_num_threads(),
        "memory": f"{memory.total / 1e9:.1f} GB, {memory.available / 1e9:.1f} GB of it free",
        "accelerators": _accelerators(),
        "CUDA of torch": torch.version.cuda,
        "ROCm of torch": torch.version.hip,
    }


def _accelerators() -> list[str]:
    """Each accelerator that torch finds, in words."""
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        major, minor = torch.cuda.get_device_capability(index)
        found.append(
            f"cuda:{index} {properties.name}, {properties.total_memory / 1e9:.1f} GB, capability {major}.{minor}"
        )
    if torch.backends.mps.is_available():
        found.append("mps")
    if hasattr(torch, "xpu"):
        found += [f"xpu:{index} {torch.xpu.get_device_name(index)}" for index in range(torch.xpu.device_count())]
    return found


# --- checks ---


def environment_checks() -> list[Check]:
    """Checks of versions."""
    tested = [Check("environment", f"{name} version", _bind(name)) for name in TESTED]
    return [*tested, Check("environment", "requirements", check_requirements)]


def _bind(name: str) -> Any:
    return lambda: check_tested(name, sys.version.split()[0] if name == "python" else version_of(name))


def check_tested(name: str, version: str | None) -> Outcome:
    """Whether a version lies in the range that is tested; outside of it nothing need be wrong."""
    oldest, newest = TESTED[name]
    span = f"{oldest} to {newest}"
    if version is None:
        return Outcome(State.FAILED, f"{name} is imported, but not installed as a package: its version is unknown.")
    series = ".".join(version.split("+")[0].split(".")[: newest.count(".") + 1])
    if Version(series) > Version(newest):
        return Outcome(State.NOTE, f"{version} is newer than what was tested, {span}: the checks below count.")
    if Version(version.split("+")[0]) < Version(oldest):
        return Outcome(State.NOTE, f"{version} is older than what was tested, {span}: update it.")
    return Outcome(State.OK, f"{version}, tested are {span}")


def check_requirements() -> Outcome:
    """Whether what the package says that it needs is there."""
    try:
        declared = importlib.metadata.requires(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        return Outcome(State.NOTE, f"{PACKAGE} runs without being installed, so nobody has checked its requirements.")
    needs = [need for need in map(Requirement, declared) if need.marker is None or need.marker.evaluate({"extra": ""})]
    wrong = []
    for need in needs:
        version = version_of(need.name)
        if version is None or not need.specifier.contains(version, prereleases=True):
            wrong.append(f"{need.name}{need.specifier} is needed, {version or 'nothing'} installed")
    if wrong:
        return Outcome(State.FAILED, f"{'; '.join(wrong)}: pip install -U {PACKAGE}")
    return Outcome(State.OK, f"all {len(needs)} are there")
