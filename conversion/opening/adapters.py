"""Opening an adapter of peft, as far as it can become part of a language model, and its base."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..files.access import check_exists, is_present, read_json
from ..files.links import check_links
from ..files.weights import ADAPTER_CONFIG, ADAPTERS, Weights
from ..formats.configurations import quantization_method
from ..formats.expected import NOT_GATHERED, is_left_empty
from .sources import Source, open_source

MERGEABLE = (
    "LORA",
    "ADALORA",
    "BOFT",
    "C3A",
    "DELORA",
    "FOURIERFT",
    "GRALORA",
    "HIRA",
    "HRA",
    "IA3",
    "LN_TUNING",
    "LOHA",
    "LOKR",
    "MISS",
    "OFT",
    "RANDLORA",
    "ROAD",
    "SHIRA",
    "TRAINABLE_TOKENS",
    "VBLORA",
    "VERA",
    "WAVEFT",
)
"""Methods of peft that change weights and nothing else; the tests compare each with peft's own merge."""

_PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")
"""Ways to start a LoRA that leave the base alone; PiSSA and its like subtract from it what the adapter starts with."""


@dataclass(frozen=True)
class Adapter:
    """A folder that peft has written.

    Attributes:
        config: `adapter_config.json`.
        weights: what was trained.
    """

    folder: Path
    config: dict[str, Any]
    weights: Weights

    @property
    def kind(self) -> str:
        """Name of the method, as peft spells it."""
        return str(self.config["peft_type"])

    @property
    def file(self) -> Path:
        """Where the weights are."""
        return self.weights.files[0]

    @property
    def leaves_base_alone(self) -> bool:
        """Whether peft is known not to change the base when it puts the adapter around it."""
        plain = self.config.get("init_lora_weights", True) in _PLAIN_STARTS and not self.config.get("kasa_config")
        return self.kind == "LORA" and plain

    def replaces(self, name: str) -> bool:
        """Whether a weight belongs to a module that was trained as a whole."""
        saved = self.config.get("modules_to_save") or ()
        return any(f".{module}".endswith(f".{part}") for module in modules_of(name) for part in saved)


def modules_of(name: str) -> Iterator[str]:
    """The modules that a weight is in, from the outermost."""
    parts = name.split(".")
    return (".".join(parts[:count]) for count in range(1, len(parts)))


def open_adapter(folder: Path) -> Adapter:
    """Open an adapter; pickles may hold tensors only, as everywhere here.

    Raises:
        CheckpointError: nothing is there, it is damaged, or it can't become part of a language model's weights.
    """
    config_file = folder / ADAPTER_CONFIG
    check_exists(folder)
    if not is_present(config_file):
        raise CheckpointError(f"{config_file} doesn't exist: {_elsewhere(folder)}.")
    if folder.is_dir():
        check_links(folder)
    config = read_json(config_file)
    _check_method(folder, config)
    for name in ADAPTERS:
        if is_present(folder / name):
            weights = Weights([folder / name])
            _check_gathered(weights)
            return Adapter(folder, config, weights)
    raise CheckpointError(f"{folder} has no weights: looked for {' and '.join(ADAPTERS)}. Download them.")


def _check_gathered(weights: Weights) -> None:
    empty = [info for info in weights.infos.values() if is_left_empty(info.shape)]
    if empty:
        raise CheckpointError(
            f"{empty[0]} is empty, as are {len(empty)} of {len(weights.infos)} tensors of the adapter: {NOT_GATHERED}"
        )


def _elsewhere(folder: Path) -> str:
    inside = sorted(path.parent.name for path in folder.glob(f"*/{ADAPTER_CONFIG}")) if folder.is_dir() else []
    if inside:
        return f"there are adapters in its folders {', '.join(inside)}, so name one of them"
    return "name the folder that peft's save_pretrained wrote"


def _check_method(folder: Path, config: Mapping[str, Any]) -> None:
    kind, task, saved = config.get("peft_type"), config.get("task_type"), config.get("modules_to_save") or ()
    if kind not in MERGEABLE:
        raise CheckpointError(
            f"{folder} holds a {kind} adapter, which can't be merged; those that can are {', '.join(MERGEABLE)}. Keep "
            "the base, and load the adapter with peft.PeftModel.from_pretrained."
        )
    trained_on = "merge it with peft into the class that it was trained on, as QWenForSequenceClassification"
    if task not in (None, "CAUSAL_LM"):
        raise CheckpointError(f"{folder} was trained for task_type={task}, not for CAUSAL_LM: {trained_on}.")
    if heads := {"score", "classifier"}.intersection(saved):
        raise CheckpointError(f"{folder} holds a classifier ({min(heads)!r} in modules_to_save): {trained_on}.")
    for name in ("layer_replication", "megatron_config"):
        if config.get(name):
            raise CheckpointError(f"{folder} has {name}, which can't be merged here: merge it with peft itself.")


def open_base(folder: Path) -> Source:
    """Open the base of an adapter.

    Raises:
        CheckpointError: see `open_source`; another format, or quantised weights.
    """
    source = open_source(folder)
    if not source.kind.is_qwen:
        raise CheckpointError(f"{folder} is {source.kind.value}: only adapters of QWen can be merged here.")
    if method := quantization_method(source.config):
        raise CheckpointError(
            f"The weights of {folder} are quantised ({method}): merge into the full weights "
            "that they were made from, then quantise."
        )
    return source
