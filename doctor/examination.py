"""The outline of `qwen1-checkpoint doctor`: survey the environment, load a model, run every check.

None of them ends the others. Nothing is downloaded, and nothing is written into the folder.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from huggingface_hub import constants

from ..conversion.errors import CheckpointError
from ..programs.shipped import TINY_CHAT
from .backend_checks import backend_checks
from .environment import Environment, environment_checks, survey
from .findings import Check, Finding, perform
from .model_checks import model_checks
from .patient import Patient, is_shipped, open_patient
from .tokenizer_checks import tokenizer_checks


@dataclass(frozen=True)
class Diagnosis:
    """What an examination has found.

    Attributes:
        folder: name of the folder; without the path to it, as this is to be shown to others.
        model: what was loaded, in words; None where nothing could be.
        refusal: why the folder can't be examined, and the remedy.
        warnings: deprecations that were raised meanwhile, each once.
    """

    environment: Environment
    folder: str
    model: str | None
    refusal: str | None
    findings: list[Finding]
    warnings: list[str]

    @property
    def passed(self) -> bool:
        """Whether nothing is wrong."""
        return self.refusal is None and not any(finding.failed for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        """The same as plain values."""
        return {
            "passed": self.passed,
            "folder": self.folder,
            "model": self.model,
            "refusal": self.refusal,
            "versions": self.environment.versions,
            "optional": self.environment.optional,
            "machine": self.environment.machine,
            "checks": [finding.to_json() for finding in self.findings],
            "warnings": self.warnings,
        }


def examine(
    folder: Path = TINY_CHAT,
    device: str | None = None,
    slow: bool = False,
    progress: Callable[[str], None] = lambda step: None,
) -> Diagnosis:
    """Examine the environment with the model of a folder, the one that ships where none is named.

    Args:
        device: to compute on; a CUDA device where there is one, else the CPU.
        slow: also check what has to be compiled.
        progress: told what is done next.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    with _undisturbed() as heard, _threads(1 if is_shipped(folder) else torch.get_num_threads()):
        findings = _run(environment_checks(), progress)
        patient = refusal = None
        try:
            progress(f"Loading {folder}")
            patient = open_patient(folder, device)
        except CheckpointError as error:
            refusal = str(error)
        if patient is not None:
            checks = [*model_checks(patient), *tokenizer_checks(patient), *backend_checks(patient, slow)]
            findings += _run(checks, progress)
    described = None if patient is None else _describe(patient)
    return Diagnosis(survey(), folder.resolve().name, described, refusal, findings, _deprecations(heard))


def _run(checks: list[Check], progress: Callable[[str], None]) -> list[Finding]:
    findings = []
    for check in checks:
        progress(f"{check.group}: {check.name}")
        findings.append(perform(check))
    return findings


def _describe(patient: Patient) -> str:
    config, dtype = patient.model.config, str(patient.model.dtype).removeprefix("torch.")
    parameters = sum(parameter.numel() for parameter in patient.model.parameters())
    return (
        f"{parameters:,} parameters, {config.n_layer} layers of width {config.n_embd}, {dtype} on "
        f"{patient.model.device}, attention by {config._attn_implementation}"
    )


@contextmanager
def _undisturbed() -> Iterator[list[warnings.WarningMessage]]:
    """Keep libraries from the network, from standard output and from the log; gives the warnings that they raise."""
    before = logging.root.manager.disable
    with (
        mock.patch.object(constants, "HF_HUB_OFFLINE", True),  # bitsandbytes looks for kernels on the Hub
        warnings.catch_warnings(record=True) as heard,
        redirect_stdout(sys.stderr),
    ):
        logging.disable(logging.WARNING)
        try:
            yield heard
        finally:
            logging.disable(before)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Compute in so many threads: the shipped model is so small that several only wait for one another."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(count)
        yield
    finally:
        torch.set_num_threads(before)


def _deprecations(heard: list[warnings.WarningMessage]) -> list[str]:
    kinds = (FutureWarning, DeprecationWarning)
    texts = (" ".join(f"{w.category.__name__}: {w.message}".split()) for w in heard if issubclass(w.category, kinds))
    return list(dict.fromkeys(text[:300] for text in texts))
