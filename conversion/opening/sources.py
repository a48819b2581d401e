"""What a folder holds: its format, its architecture, its weights, all checked against one another."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError
from ..files.access import check_exists, is_present, read_json
from ..files.links import check_links
from ..files.weights import Weights, open_weights
from ..formats.architecture import Architecture
from ..formats.companions import GENERATION_CONFIG, optional_json
from ..formats.dequantised import dequantising
from ..formats.endings import end_ids
from ..formats.expected import Expected, check_stored
from ..formats.kinds import Kind, detect_kind, hidden_weights
from ..formats.packed_values import check_groups, contradictions
from ..formats.quantised import Packing, expect_packed, read_packing, settings_beside
from ..formats.recipes import Recipe, compose, keep
from ..formats.registry import FORMATS, Format
from ..formats.relatives import refuse_relative

LLAMA_PARAMS = "params.json"
WORK_FOLDER, MOVES_FILE = ".upgrade.partial", "moves.json"
"""Where an upgrade in place keeps what is not yet in its place, and the list of what is to be moved."""


@dataclass(frozen=True)
class Contents:
    """What a conversion starts from.

    Attributes:
        way: from the stored tensors to the names of transformers' Qwen2 and LLaMA classes; packed weights become full.
        packing: how weights are packed whose bits are to be kept; None where all are full, or become so.
        dtype: of most weights.
        generation: `generation_config.json`; None where there is none.
        ends: ids of `<|endoftext|>` and `<|im_end|>` of QWen's tokenizer; None where there are none.
    """

    architecture: Architecture
    way: list[Recipe]
    packing: Packing | None
    dtype: torch.dtype
    generation: dict[str, Any] | None
    ends: tuple[int, int] | None


@dataclass
class Source:
    """A checkpoint to read from.

    Attributes:
        path: what the user named, a folder or a single file.
        config: `config.json`, or `params.json` (or what a training checkpoint holds in its place).
        settings_file: where its `quantization_config` was found, if not in the file itself.
    """

    path: Path
    kind: Kind
    config: dict[str, Any]
    weights: Weights
    settings_file: str | None = None

    @property
    def folder(self) -> Path:
        """Where configuration and tokenizer are."""
        return self.path if self.path.is_dir() else self.path.parent

    @property
    def format(self) -> Format:
        """What it is read by."""
        return FORMATS[self.kind]

    @cached_property
    def architecture(self) -> Architecture:
        """Shape of the model.

        Raises:
            CheckpointError: impossible values, or something that can't be represented.
        """
        config = self.config if self.packing is None else self.plain_config
        return self.format.read(config, self.weights.infos, len(self.weights.files))

    @property
    def plain_config(self) -> dict[str, Any]:
        """The configuration of the same model with full weights."""
        return {name: value for name, value in self.config.items() if name != "quantization_config"}

    @cached_property
    def packing(self) -> Packing | None:
        """How weights are packed; None where they are not, or in a way that is unknown here.

        Raises:
            CheckpointError: settings of the quantisation that can't be used.
        """
        return read_packing(self.config.get("quantization_config"))

    @cached_property
    def expected(self) -> Expected:
        """What is to be stored.

        Raises:
            CheckpointError: see `architecture`.
        """
        return Expected(self.shapes) if self.packing is None else expect_packed(self.shapes, self.packing)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every weight that the configuration asks for, as a full one."""
        return self.format.shapes(self.architecture, self.weights.infos, len(self.weights.files))

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of most weights that are not packed."""
        dtypes = list(self.weights.dtypes)
        floating = [dtype for dtype in dtypes if dtype.is_floating_point] if self.packing else []
        return next(iter(floating or dtypes))

    @cached_property
    def generation(self) -> dict[str, Any] | None:
        """`generation_config.json`; None where there is none.

        Raises:
            CheckpointError: a damaged file.
        """
        return optional_json(self.folder / GENERATION_CONFIG)

    @cached_property
    def ends(self) -> tuple[int, int] | None:
        """Ids of `<|endoftext|>` and `<|im_end|>`; None where the tokenizer has no such tokens.

        Raises:
            CheckpointError: a damaged vocabulary or tokenizer.
        """
        return end_ids(self.config, self.folder)

    @property
    def hidden_from_transformers(self) -> str | None:
        """Why transformers doesn't find the weights, though this program does; None where it does.

        It looks for no weights in LLaMA's original format.
        """
        if self.kind is Kind.LLAMA_ORIGINAL or not self.weights.disguises:
            return None
        file, disguise = next(iter(self.weights.disguises.items()))
        return hidden_weights(self.kind, file.name, disguise)

    def to_hf(self) -> list[Recipe]:
        """How to come from these tensors to the names of transformers' Qwen2 and LLaMA classes."""
        return self.format.to_hf(self.architecture, self.weights.infos, len(self.weights.files))

    def full_weights(self, dtype: torch.dtype) -> list[Recipe]:
        """How to come from these tensors to full ones under the same names; packed ones get this dtype.

        Raises:
            CheckpointError: packed in a way of which no values are known here.
        """
        if self.packing is None:
            return [Recipe(name, (name,), keep) for name in self.shapes]
        return dequantising(self.shapes, self.packing, dtype)

    def contents(self, full: torch.dtype | None = None) -> Contents:
        """All that becomes of a conversion's source, checked.

        Args:
            full: make packed weights full ones of this dtype; None to keep their bits.

        Raises:
            CheckpointError: see `check`; damaged settings or, in QWen, a damaged vocabulary; weights that are packed in
                a way that is unknown here.
        """
        self.check()
        self.check_packed_values()
        ends = self.ends if self.kind.is_qwen else None
        way, packing = self.to_hf(), self.packing
        if packing is not None and full is not None:
            way, packing = compose(self.full_weights(full), way), None
        return Contents(self.architecture, way, packing, full or self.dtype, self.generation, ends)

    def check(self) -> None:
        """Compare names and shapes with the configuration; a tied head that is stored all the same must be equal.

        Raises:
            CheckpointError: the first difference.
        """
        packed = [info for name, info in self.weights.infos.items() if name.endswith(".qweight")]
        if packed and not self.config.get("quantization_config"):
            raise CheckpointError(
                f"{packed[0]} is a quantised weight, but config.json has no quantization_config, and no file beside it "
                "tells the settings (quantize_config.json, quant_config.json): download it."
            )
        if self.packing is not None and not packed:
            raise CheckpointError(
                f"The weights are quantised ({self.packing.method}) according to config.json, but none of them is "
                "stored so: take its quantization_config away, or download the weights that belong to it."
            )
        infos = dict(self.weights.infos)
        if self.architecture.tied:
            self._check_tied(infos)
        check_stored(infos, self.expected)

    def check_packed_values(self) -> None:
        """Look at what of packed weights can be wrong though names and shapes are right.

        Raises:
            CheckpointError: an input in a group that isn't there, or a bias that is not zero and has no place.
        """
        if self.packing is None:
            return
        for name in self.expected.required:
            if name.endswith(".g_idx"):
                groups = self.expected.required[f"{name.removesuffix('g_idx')}scales"][0]
                check_groups(self.weights.infos[name], self.weights.read(name), groups)
        for name in self.expected.optional:
            if name in self.weights.infos and self.weights.read(name).any():
                raise CheckpointError(
                    f"{self.weights.infos[name]} is not zero, and the configuration leaves it out: engines differ in "
                    "what they make of it. Mend the configuration if it belongs to the model, or delete the tensor."
                )

    def contradictions(self) -> list[str]:
        """Settings of the quantisation that the tensors contradict, in sentences for the user."""
        return [] if self.packing is None else contradictions(self.shapes, self.packing, self.weights.read)

    def _check_tied(self, infos: dict[str, Any]) -> None:
        for embedding, head in _TIED:
            stored = infos.pop(head, None) if embedding in infos else None
            if stored is None or stored.memory == infos[embedding].memory:
                continue
            if not torch.equal(self.weights.read(embedding), self.weights.read(head)):
                raise CheckpointError(
                    f"{stored} differs from {embedding!r}, although the configuration ties them: set "
                    "tie_word_embeddings to false, or delete the tensor."
                )


_TIED = (
    ("transformer.wte.weight", "lm_head.weight"),
    ("model.embed_tokens.weight", "lm_head.weight"),
    ("00/tok_embeddings.weight", "00/output.weight"),
)


def read_source_config(path: Path) -> tuple[Kind, dict[str, Any]] | None:
    """Format and configuration of a folder; None where neither `config.json` nor `params.json` is there.

    Raises:
        CheckpointError: a damaged file, or a model type that nothing here handles.
    """
    if is_present(path / "config.json"):
        config = read_json(path / "config.json")
        return detect_kind(config), config
    if is_present(path / LLAMA_PARAMS):
        return Kind.LLAMA_ORIGINAL, read_json(path / LLAMA_PARAMS)
    return None


def check_params(path: Path, params: Path | None) -> None:
    """Refuse a `params.json` for a checkpoint with a configuration of its own."""
    if params is not None and (path / "config.json").is_file():
        raise CheckpointError(f"--params is for LLaMA's original format, but {path} has a config.json: leave it out.")


def open_source(path: Path, params: Path | None = None, any_links: bool = False) -> Source:
    """Open a checkpoint: a folder, or the single file of a LLaMA training.

    Args:
        path: folder or file.
        params: `params.json` of a LLaMA checkpoint, where it isn't in the same folder.
        any_links: also follow links that lead out of the folder, where nothing is taken along.

    Raises:
        CheckpointError: nothing is there, or nothing that is handled here; a link that leads out of the folder.
    """
    check_exists(path)
    if path.is_dir() and not any_links:
        check_links(path)
    if (path / WORK_FOLDER / MOVES_FILE).is_file():
        raise CheckpointError(f"An upgrade of {path} was interrupted: run upgrade --in-place again, which finishes it.")
    check_params(path, params)
    found = read_source_config(path) if path.is_dir() and params is None else None
    if found is None:
        return _open_llama(path, params)
    kind, config = found
    weights = open_weights(path)
    refuse_relative(config, weights.infos)
    if beside := settings_beside(path, config, weights.infos):
        return Source(path, kind, {**config, "quantization_config": beside[1]}, weights, beside[0])
    return Source(path, kind, config, weights)


def _open_llama(path: Path, params: Path | None) -> Source:
    weights = open_weights(path)
    folder = path if path.is_dir() else path.parent
    if "00/tok_embeddings.weight" not in weights.infos:
        if folder != path and (folder / "config.json").is_file():
            raise CheckpointError(f"{path} is a part of a checkpoint: name its folder, {folder}.")
        raise CheckpointError(f"{path} has no config.json: it isn't a checkpoint that is handled here.")
    config = weights.extras.get("model_args")
    if params is not None or not isinstance(config, dict):
        params = params or folder / LLAMA_PARAMS
        if not is_present(params):
            raise CheckpointError(
                f"{params} doesn't exist, and the weights don't tell the number of heads: write it "
                '({"dim": …, "n_layers": …, "n_heads": …}), or name it with --params.'
            )
        config = read_json(params)
    return Source(path, Kind.LLAMA_ORIGINAL, config, weights)
