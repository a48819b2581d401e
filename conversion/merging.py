"""`merge-lora`: the weights of a QWen checkpoint with an adapter of peft merged into them.

peft builds the adapter around our own model and merges it, but a layer at a time: each layer is copied with its weights
in float32, merged, rounded once to the dtype of the result, written and forgotten. So the result is the rounded float32
merge bit for bit.

Memory holds the adapter in float32 and, in float32 too, about four times the weight of the largest layer that it adds
to: for a 7B model less than 1 GB, or 10 GB where that is the embedding. Modules that were trained as a whole
(`modules_to_save`) only pass through. Methods other than LoRA, and those that start a LoRA from the base's weights, get
to see the whole base, mapped from its files.
"""

from __future__ import annotations

import copy
import importlib
import re
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import nn

from ..configuration_qwen import QWenConfig
from ..modeling_qwen import QWenLMHeadModel
from ..peft_qwen import settings_of_adapter
from ..tokenization_qwen import load_vocabulary
from .errors import CheckpointError
from .files.access import check_exists, check_readable, is_present, read_json
from .files.links import check_links, resolved
from .files.tensors import TensorInfo, is_finite
from .files.weights import ADAPTER_CONFIG, ADAPTERS, SAFETENSORS, Weights
from .formats.companions import (
    EXTRA_VOCABULARY,
    GENERATION_CONFIG,
    TEMPLATE,
    TOKENIZER_CONFIG,
    TOKENIZER_JSON,
    VOCABULARY,
    optional_json,
)
from .formats.configurations import quantization_method
from .formats.endings import end_ids, qwen_generation
from .formats.expected import NOT_GATHERED, is_left_empty
from .formats.recipes import Recipe, keep
from .opening.sources import Source, open_source
from .planning.companions import template_files
from .planning.qwen_tokenizer import qwen_tokenizer, upgraded_tokenizer_config
from .planning.upgrade import plan_upgrade, upgraded_config
from .planning.weights import plan_shards
from .writing.files import CopiedFile, PlannedFile, json_file
from .writing.folders import describe_files
from .writing.plans import Plan, write_plan
from .writing.progress import Progress
from .writing.tensors import Output

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

_PREFIX = "base_model.model."
_EMBEDDING_WEIGHT, _HEAD_WEIGHT = "transformer.wte.weight", "lm_head.weight"
_SPARE = re.compile(
    r"base_model\.model\.(transformer\.wte|lm_head)\.(original_module|modules_to_save(\.default)?)\.weight"
)
"""What peft saves of embeddings that were trained as a whole, beside the result."""

_PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")
"""Ways to start a LoRA that leave the base alone; PiSSA and its like subtract from it what the adapter starts with."""

_FLAGS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_VOCABULARY_FILES = (VOCABULARY, EXTRA_VOCABULARY, TOKENIZER_JSON, "added_tokens.json", "special_tokens_map.json")


# --- the adapter ---


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
        return any(f".{module}".endswith(f".{part}") for module in _modules_of(name) for part in saved)


def _modules_of(name: str) -> Iterator[str]:
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


# --- the base ---


class Base:
    """The base: its weights, and a model for peft to put the adapter around.

    What the adapter holds whole is taken from there: modules that were trained so, biases, and embeddings that were
    resized or saved along.

    Attributes:
        model: with values, mapped from the files, only if peft may read or change them.
        config: `config.json`, with the number of rows that the embedding has now.
        tied: whether the head is the embedding.
        taken: names in the adapter's file of what is taken from there.

    Raises:
        CheckpointError: weights of the adapter that don't fit, or a damaged file.
    """

    def __init__(self, source: Source, adapter: Adapter):
        replaced = _replacements(source, adapter)
        self._places = {name: (source.weights, name) for name in source.shapes}
        self._places |= {name: (adapter.weights, info.name) for name, info in replaced.items()}
        self.taken = {info.name for info in replaced.values()}
        rows = self.info(_EMBEDDING_WEIGHT).shape[0]
        self.config = source.config if rows == source.architecture.rows else _resized(source.config, rows)
        self.tied = source.architecture.tied and self._tie(source, adapter)
        self._is_hollow = adapter.leaves_base_alone
        self.model = self._build({name for name in replaced if not self.tied and adapter.replaces(name)})
        self._parameters = dict(self.model.named_parameters(remove_duplicate=False))
        self._names = {id(parameter): name for name, parameter in reversed(self._parameters.items())}
        self._addresses = {id(parameter): parameter.data_ptr() for parameter in self._parameters.values()}

    def _tie(self, source: Source, adapter: Adapter) -> bool:
        """Decide where the head is, which has no place of its own yet; returns whether it is the embedding."""
        embedding = self._places[_EMBEDDING_WEIGHT]
        untrained = (source.weights, _EMBEDDING_WEIGHT) if adapter.replaces(_EMBEDDING_WEIGHT) else embedding
        head = self._places.setdefault(_HEAD_WEIGHT, untrained)
        return head == embedding or torch.equal(self.read(_HEAD_WEIGHT), self.read(_EMBEDDING_WEIGHT))

    def _build(self, copied: Collection[str]) -> QWenLMHeadModel:
        """The model for peft; weights that it would make a copy of stay without memory."""
        with torch.device("meta"):
            model = QWenLMHeadModel(QWenConfig.from_dict({**self.config, "tie_word_embeddings": self.tied}))
        # Where a tensor of one number stands for a weight, peft can neither read nor write it unnoticed.
        read = self._stand_in if self._is_hollow else self.read
        state = {name: read(name) for name in self._places if name not in copied}
        model.load_state_dict(state, strict=False, assign=True)
        model.tie_weights()
        return model.requires_grad_(False)

    def info(self, name: str) -> TensorInfo:
        """What is known of a weight, in the file that it is taken from."""
        weights, stored = self._places[name]
        return weights.infos[stored]

    def read(self, name: str) -> torch.Tensor:
        """A weight without what the adapter adds to it."""
        weights, stored = self._places[name]
        return weights.read(stored)

    def _stand_in(self, name: str) -> torch.Tensor:
        return torch.zeros(()).expand(self.info(name).shape)

    def holds(self, parameter: torch.Tensor) -> bool:
        """Whether a parameter is one of the base, and not of the adapter around it."""
        return id(parameter) in self._names

    def value(self, parameter: nn.Parameter) -> torch.Tensor:
        """What the adapter is to be merged into.

        Raises:
            CheckpointError: the file is damaged or holds NaN or infinity, or peft has changed the weight unexpectedly.
        """
        name = self._names[id(parameter)]
        if self._is_hollow and self._addresses[id(parameter)] != parameter.data_ptr():
            raise CheckpointError(f"peft changes {name!r} before it merges, which is unknown here: use peft alone.")
        value = self.read(name) if self._is_hollow else parameter.data
        if not is_finite(value):
            raise CheckpointError(f"{self.info(name)} holds NaN or infinity: download it again.")
        return value


def _replacements(source: Source, adapter: Adapter) -> dict[str, TensorInfo]:
    """Weights that the adapter holds whole, under their names in the base.

    Raises:
        CheckpointError: a shape that doesn't fit.
    """
    shapes = dict(source.shapes)
    shapes.setdefault(_HEAD_WEIGHT, shapes[_EMBEDDING_WEIGHT])
    found = {}
    for name, shape in shapes.items():
        module, _, kind = name.rpartition(".")
        stored = (f"{_PREFIX}{module}.base_layer.{kind}", _PREFIX + name)
        info = next((adapter.weights.infos[key] for key in stored if key in adapter.weights.infos), None)
        if info is None:
            continue
        kept = 1 if name in (_EMBEDDING_WEIGHT, _HEAD_WEIGHT) else 0  # the number of rows may be another
        if len(info.shape) != len(shape) or info.shape[kept:] != shape[kept:]:
            raise CheckpointError(
                f"{info} has shape {info.shape}, the base {shape}: the adapter belongs to another base."
            )
        found[name] = info
    _check_rows(source, adapter, found)
    return found


def _check_rows(source: Source, adapter: Adapter, found: Mapping[str, TensorInfo]) -> None:
    """Embedding and head must have equal numbers of rows, wherever they come from."""
    rows = source.architecture.rows
    held = {name: found[name].shape[0] for name in (_EMBEDDING_WEIGHT, _HEAD_WEIGHT) if name in found}
    follows = source.architecture.tied and not adapter.replaces(_EMBEDDING_WEIGHT) and _HEAD_WEIGHT not in held
    for name in (_EMBEDDING_WEIGHT,) if follows else (_EMBEDDING_WEIGHT, _HEAD_WEIGHT):
        others = [other for other, count in held.items() if count != held.get(name, rows)]
        if others:
            raise CheckpointError(
                f"{found[others[0]]} has {held[others[0]]} rows, but {name!r} has {held.get(name, rows)}: save the "
                "adapter with save_embedding_layers=True, or name the base that it was trained on."
            )


def _resized(config: Mapping[str, Any], rows: int) -> dict[str, Any]:
    padded = {} if config.get("padded_vocab_size") is None else {"padded_vocab_size": rows}
    return {**config, "vocab_size": rows, **padded}


def _with_dtype(config: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The configuration for weights of a dtype; a precision flag, where one is set, would win over the name."""
    spellings = [key for key in ("torch_dtype", "dtype") if key in config] or ["dtype"]
    flagged = any(config.get(flag) for flag in _FLAGS)
    flags = {flag: _FLAGS[flag] == dtype for flag in _FLAGS} if flagged else {}
    return {**config, **dict.fromkeys(spellings, str(dtype).removeprefix("torch.")), **flags}


# --- both together ---


def put_on(adapter: Adapter, base: Base, progress: Progress) -> nn.Module:
    """The base's model with the adapter around its layers, the latter in float32 and with the trained values.

    Raises:
        CheckpointError: peft is missing or too old, or the adapter belongs to another base.
    """
    peft = _import_peft()
    if adapter.kind not in peft.PeftType.__members__:
        raise CheckpointError(f"peft {peft.__version__} doesn't know {adapter.kind} adapters: pip install -U peft")
    with _peft_errors(f"{adapter.folder} doesn't fit the base"), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        config = peft.PeftConfig.from_pretrained(str(adapter.folder))
    for warning in caught:  # of options that this version of peft doesn't know
        progress.note(f"peft: {' '.join(str(warning.message).split())}")
    config.inference_mode = True
    with _peft_errors(f"{adapter.folder} doesn't fit the base"):
        wrapped = peft.PeftModel(base.model, config)
        expected = peft.get_peft_model_state_dict(wrapped, save_embedding_layers=False)
        _check_tensors(adapter, expected, base.taken)
        for name, module in list(base.model.named_modules()):
            if isinstance(module, peft.utils.ModulesToSaveWrapper):  # the trained copies stay in their file
                base.model.set_submodule(name, module.original_module)
        for tensor in (*wrapped.parameters(), *wrapped.buffers()):  # made in the dtype of the base
            if tensor.is_floating_point() and not base.holds(tensor):
                tensor.data = tensor.data.float()
        added = {name: adapter.weights.read(name) for name in expected if name not in base.taken}
        peft.set_peft_model_state_dict(wrapped, added)
    adapter.weights.close()
    return wrapped.get_base_model()


def _import_peft() -> Any:
    try:
        return importlib.import_module("peft")
    except ImportError as error:
        raise CheckpointError(f"merge-lora needs peft ({error}): pip install peft") from error


@contextmanager
def _peft_errors(what: str) -> Iterator[None]:
    """Turn what peft raises, which is anything, into an error that names the adapter; its warnings are for training."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"{what}: {' '.join(str(error).split()) or type(error).__name__}") from error


def _check_tensors(adapter: Adapter, expected: Mapping[str, torch.Tensor], taken: Collection[str]) -> None:
    """Compare the names and shapes in the file with those that the adapter would have on this base.

    Raises:
        CheckpointError: the first difference.
    """
    found = adapter.weights.infos
    unknown = [name for name in found if name not in expected and name not in taken and not _SPARE.fullmatch(name)]
    missing = [name for name in expected if name not in found]
    if unknown:
        raise CheckpointError(
            f"{found[unknown[0]]} has no place in the base ({len(unknown)} such tensors): the adapter belongs to "
            "another base."
        )
    if missing:
        raise CheckpointError(
            f"{missing[0]!r} is missing in {adapter.file} ({len(missing)} of {len(expected)} tensors are): the adapter "
            "is incomplete, or belongs to another base."
        )
    for name, tensor in expected.items():
        if found[name].shape != tuple(tensor.shape):
            raise CheckpointError(
                f"{found[name]} has shape {found[name].shape}, but on this base it would be {tuple(tensor.shape)}: the "
                "adapter belongs to another base."
            )


class MergedWeights(Weights):
    """The weights of a base with an adapter merged into them, each computed when it is read.

    Args:
        source: where the base comes from.
        adapter: where the adapter comes from.
        base: the base as a model.
        wrapped: that model with the adapter around its layers.
    """

    def __init__(self, source: Source, adapter: Adapter, base: Base, wrapped: nn.Module):
        super().__init__(())
        self._base = base
        self._layers = dict(_adapted_layers(wrapped))
        self._merged: tuple[str, dict[str, torch.Tensor]] = ("", {})
        for name in dict.fromkeys((*source.shapes, _HEAD_WEIGHT)):
            info = base.info(name)
            stored = source.weights.infos.get(name, source.weights.infos[_EMBEDDING_WEIGHT])
            file = info.file if self._layer_of(name) is None else adapter.file
            self.infos[name] = TensorInfo(name, file, stored.dtype, info.shape)
        if source.architecture.tied and self._is_tied():
            del self.infos[_HEAD_WEIGHT]

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding."""
        return _HEAD_WEIGHT not in self.infos

    def _is_tied(self) -> bool:
        if self._layer_of(_EMBEDDING_WEIGHT) is None and self._layer_of(_HEAD_WEIGHT) is None:
            return self._base.tied
        return torch.equal(self.read(_EMBEDDING_WEIGHT), self.read(_HEAD_WEIGHT))

    def _layer_of(self, name: str) -> str | None:
        return next((module for module in _modules_of(name) if module in self._layers), None)

    def read(self, name: str) -> torch.Tensor:
        """One weight: float32 where the adapter changes it, as it was elsewhere.

        Raises:
            CheckpointError: a damaged file, or a layer that peft can't merge.
        """
        layer = self._layer_of(name)
        if layer is None:
            return self._base.read(name)
        if layer != self._merged[0]:
            self._merged = ("", {})  # so that two are never held
            self._merged = (layer, self._merge(layer))
        return self._merged[1][name]

    def close(self) -> None:
        """Let go of the layer that was merged last."""
        self._merged = ("", {})

    def _merge(self, name: str) -> dict[str, torch.Tensor]:
        layer = self._layers[name]
        weights = [parameter for parameter in layer.parameters() if self._base.holds(parameter)]
        copied = {
            id(parameter): nn.Parameter(self._base.value(parameter).to(torch.float32, copy=True), requires_grad=False)
            for parameter in weights
        }
        with _peft_errors(f"{name!r} can't be merged"), torch.no_grad():
            merged: Any = copy.deepcopy(layer, copied).float()
            # Without a check for NaN, which writing makes and which would cost a copy.
            if hasattr(merged, "unload_and_optionally_merge_module"):
                merged = merged.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
            else:
                merged.merge()
                merged = merged.get_base_layer()
        return {f"{name}.{key}": tensor for key, tensor in merged.state_dict().items()}


def _adapted_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Name and module of each outermost layer of peft."""
    outer = None
    for name, module in model.named_modules():
        if outer is not None and name.startswith(f"{outer}."):
            continue
        if hasattr(module, "unload_and_optionally_merge_module") or hasattr(module, "base_layer"):
            outer = name
            yield name, module


# --- the files ---


def merge_lora(
    base: Path,
    adapter: Path,
    target: Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: str = "5GB",
    progress: Progress,
) -> bool:
    """Write the folder of a base with an adapter merged into its weights.

    Beside the weights there is what `upgrade` would write for the base; where the adapter's folder has a vocabulary,
    tokenizer settings or a chat template of its own, these take its place.

    Args:
        base: QWen folder of any release, with its full weights.
        adapter: folder that peft's `save_pretrained` wrote.
        target: folder to write.
        dtype: of the new weights; None for that of the base's.
        max_shard_size: of the safetensors, "5GB" or "500MB".
        progress: told of each tensor.

    Returns:
        False if the target was there already, equal in every file.

    Raises:
        CheckpointError: a damaged file, an adapter that can't be merged here, or values that would not be finite.
        CheckpointError, OSError: see `write_folder`.
    """
    given, source = open_adapter(adapter), _open_base(base)
    if resolved(target).is_relative_to(resolved(base)):
        raise CheckpointError(f"{target} is in the folder of the base: name a folder elsewhere.")
    details = {"adapter": describe_files([adapter / ADAPTER_CONFIG, given.file]), "dtype": str(dtype)}
    plan = Plan("merge-lora", source, details=details)
    plan.files = _plan_files(source, given, dtype, max_shard_size, progress)
    return write_plan(plan, target, progress)


def _plan_files(
    source: Source, adapter: Adapter, dtype: torch.dtype | None, max_shard_size: str, progress: Progress
) -> list[PlannedFile]:
    files, notes = _companions(source, adapter)
    base = Base(source, adapter)
    weights = MergedWeights(source, adapter, base, put_on(adapter, base, progress))
    _check_vocabulary(source, adapter, weights.infos[_EMBEDDING_WEIGHT].shape[0])
    config = upgraded_config(base.config if dtype is None else _with_dtype(base.config, dtype))
    if source.architecture.tied and not weights.tied:
        config["tie_word_embeddings"] = False
        notes.append("Embedding and head differ now, so they are no longer tied.")
    for note in notes:
        progress.note(note)
    shards = plan_shards(list(_outputs(weights, dtype)), weights, max_shard_size)
    return [*shards, json_file("config.json", config), *files]


def _open_base(folder: Path) -> Source:
    source = open_source(folder)
    if not source.kind.is_qwen:
        raise CheckpointError(f"{folder} is {source.kind.value}: only adapters of QWen can be merged here.")
    if method := quantization_method(source.config):
        raise CheckpointError(
            f"The weights of {folder} are quantised ({method}): merge into the full weights "
            "that they were made from, then quantise."
        )
    return source


def _outputs(weights: Weights, dtype: torch.dtype | None) -> Iterator[Output]:
    for name, info in weights.infos.items():
        yield Output(Recipe(name, (name,), keep), dtype or info.dtype, info.shape)


def _companions(source: Source, adapter: Adapter) -> tuple[list[PlannedFile], list[str]]:
    """All files but weights and configuration, and notes for the user."""
    plan = plan_upgrade(source)
    files = {file.name: file for file in plan.files if not file.tensors}
    # With the last, transformers would look for an adapter beside the merged weights.
    for name in ("config.json", f"{SAFETENSORS}.index.json", ADAPTER_CONFIG):
        files.pop(name, None)
    inside = adapter.folder.resolve()
    if inside != source.folder.resolve():
        files = {name: file for name, file in files.items() if inside not in (source.folder / name).resolve().parents}
        _take_tokenizer(files, source.folder, adapter.folder)
        _take_settings(files, source, adapter)
    return list(files.values()), plan.notes


def _take_settings(files: dict[str, PlannedFile], source: Source, adapter: Adapter) -> None:
    """Put an adapter's generation settings over the base's: the base may not have been taught to chat."""
    settings = optional_json(adapter.folder / GENERATION_CONFIG)
    if settings is None:
        settings = settings_of_adapter(adapter.config.get("auto_mapping"))
    ends = end_ids(source.config, source.folder)
    if settings and ends is not None:
        whole = {**(optional_json(source.folder / GENERATION_CONFIG) or {}), **settings}
        whole.pop("_from_model_config", None)  # else transformers may make them anew when the model is loaded
        files[GENERATION_CONFIG] = json_file(GENERATION_CONFIG, qwen_generation(whole, *ends))


def _take_tokenizer(files: dict[str, PlannedFile], base: Path, folder: Path) -> None:
    """Put what an adapter's folder has of a tokenizer into the place of the base's."""
    taken: dict[str, PlannedFile] = {
        name: CopiedFile(name, folder / name) for name in _VOCABULARY_FILES if (folder / name).is_file()
    }
    if TOKENIZER_JSON in taken and VOCABULARY not in taken:
        names = (VOCABULARY, EXTRA_VOCABULARY)
        taken |= {file.name: file for file in qwen_tokenizer(folder)[0] if file.name in names}
    if TOKENIZER_JSON in taken or VOCABULARY in taken:
        for name in _VOCABULARY_FILES:
            files.pop(name, None)
    elif EXTRA_VOCABULARY in taken:
        files.pop(TOKENIZER_JSON, None)  # which lacks these tokens
    settings = optional_json(folder / TOKENIZER_CONFIG)
    if (folder / TEMPLATE).is_file() or "chat_template" in (settings or {}):
        files.pop(TEMPLATE, None)
        taken |= {file.name: file for file in template_files(folder)}
    elif settings is not None and TEMPLATE not in files:
        settings["chat_template"] = read_json(base / TOKENIZER_CONFIG)["chat_template"]
    if settings is not None:
        taken[TOKENIZER_CONFIG] = json_file(TOKENIZER_CONFIG, upgraded_tokenizer_config(settings))
    files |= taken


def _check_vocabulary(source: Source, adapter: Adapter, rows: int) -> None:
    """Compare a vocabulary that the adapter brings along with the rows of the embedding.

    Raises:
        CheckpointError: it has more tokens, or is damaged.
    """
    vocabulary, extra, backend = (adapter.folder / name for name in _VOCABULARY_FILES[:3])
    for path in (vocabulary, extra, backend):
        if is_present(path):
            check_readable(path)
    try:
        if vocabulary.is_file() or extra.is_file():
            ranks = vocabulary if vocabulary.is_file() else source.folder / VOCABULARY
            tables: tuple[Mapping[Any, int], ...] = load_vocabulary(ranks, extra if extra.is_file() else None)
        elif backend.is_file():
            tables = (Tokenizer.from_file(str(backend)).get_vocab(),)
        else:
            return
    except Exception as error:  # that of the tokenizers library is a bare Exception
        raise CheckpointError(f"The tokenizer in {adapter.folder} can't be read: {error}") from error
    tokens = 1 + max(token_id for table in tables for token_id in table.values())
    if tokens > rows:
        raise CheckpointError(
            f"The tokenizer in {adapter.folder} has {tokens} tokens, the embedding only {rows} rows: train with "
            "model.resize_token_embeddings and save the adapter with save_embedding_layers=True, or take the tokenizer "
            "files away."
        )
