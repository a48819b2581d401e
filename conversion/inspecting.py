"""What a checkpoint is, what it needs, and what is missing or odd about it: the command `inspect`.

Only headers are read, unless a scan of every value is asked for. Nothing stops at the first fault: what can't be read
becomes a problem in the report, and everything else is looked at all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any

from .companion_checks import CompanionChecks, tokenizer_files
from .files.access import check_exists, is_pointer, is_present, read_json
from .files.links import stray_links
from .files.tensors import TensorInfo, is_finite
from .files.weights import ADAPTER_CONFIG, Weights
from .formats.architecture import Architecture
from .formats.expected import NOT_GATHERED, Expected, is_left_empty
from .formats.kinds import Kind, detect_kind, hidden_weights
from .formats.lenient import kind_name, read_architecture, read_leniently
from .formats.llama_original import own_shapes, read_llama
from .formats.names import IGNORED, TABLE, hf_shapes
from .formats.quantised import Packing, expect_packed, read_packing, settings_beside
from .formats.registry import FORMATS
from .opening.sources import LLAMA_PARAMS
from .reports import NAMED, Findings, Report, are, first_of, int8_cache_per_token, memory_needs, numel, plural, quoted
from .stored import StoredWeights

ADAPTER = "adapter"
"""What `Report.kind` says of a folder that holds no model but an adapter of one."""

_MOST_FILES = 100  # numbered with two digits
_PARAMS = ("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "norm_eps", "rope_theta", "max_seq_len")


def inspect(
    path: Path,
    params: Path | None = None,
    scan: bool = False,
    progress: Callable[[str, int], None] = lambda name, nbytes: None,
) -> Report:
    """Find out what a checkpoint is and what is wrong with it.

    Args:
        path: a folder, or the single file of a LLaMA training.
        params: `params.json` of a LLaMA checkpoint, where it isn't in the same folder.
        scan: read every value: compare the checksums that are known, and look for NaN and infinite values.
        progress: while scanning, called after each tensor with its name and size; the sizes add up to `weights_bytes`.

    Raises:
        CheckpointError: nothing is at this path. A checkpoint that is broken is reported on instead.
    """
    check_exists(path)
    inspection = _Inspection(path, params)
    inspection.read_configuration()
    inspection.check_configuration()
    inspection.check_weights()
    inspection.check_companions()
    if scan:
        inspection.scan(progress)
    return inspection.report(scan)


def _share_memory(infos: Mapping[str, TensorInfo], first: str, second: str) -> bool:
    return first in infos and second in infos and infos[first].memory == infos[second].memory


class _Inspection:
    """What is known so far of one checkpoint."""

    def __init__(self, path: Path, params: Path | None):
        self.path = path
        self.folder = path if path.is_dir() else path.parent
        self.params = params
        self.findings = Findings()
        self.stored = StoredWeights(path, self.findings)
        self.kind: Kind | None = None
        self.config: dict[str, Any] = {}
        self.architecture: Architecture | None = None

    @property
    def is_qwen(self) -> bool:
        return self.kind is not None and self.kind.is_qwen

    # --- configuration ---

    def read_configuration(self) -> None:
        """Find out the format, and the architecture where it has one."""
        config = self.folder / "config.json"
        if self.path.is_dir() and self.params is None and is_present(config):
            self._read_config(config)
        elif self.stored.is_llama_original or self.params is not None:
            self._read_params()
        elif self.path.is_file():
            self.findings.problems.append(f"{self.path} is one file of a checkpoint: inspect its folder.")
        elif not (self.folder / ADAPTER_CONFIG).is_file():
            self.findings.problems.append("config.json is missing, which says what the weights are. Download it.")

    def _read_config(self, path: Path) -> None:
        self.config = {} if is_pointer(path) else self.findings.attempt(read_json, path) or {}
        if self.config:
            self.kind = self.findings.attempt(detect_kind, self.config, self.stored.infos)
        if self.kind is None:
            return
        self._take(self.findings.attempt(read_architecture, self.kind, self.config))

    def _take(self, found: tuple[Architecture, str | None] | None) -> None:
        if found is not None:
            self.architecture, reason = found
            if reason is not None:
                self.findings.remarks.append(f"Can't be converted to QWen: {reason}")

    def _read_params(self) -> None:
        self.kind = Kind.LLAMA_ORIGINAL
        weights = self.stored.first
        training = weights.extras.get("model_args") if weights and self.params is None else None
        if isinstance(training, dict):
            self.config = training
        else:
            self.config = self.findings.attempt(read_json, self.params or self.folder / LLAMA_PARAMS) or {}
        if self.config and weights is not None:
            shapes = own_shapes(weights.infos)
            self._expect_files(shapes)
            read = partial(read_llama, shapes=shapes, files=len(self.stored.parts))
            plain = {name: self.config[name] for name in _PARAMS if name in self.config}
            self._take(self.findings.attempt(read_leniently, read, self.config, plain))

    def _expect_files(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """The last model-parallel files leave no gap when they are missing, but the others' shapes tell of them."""
        there = len(self.stored.parts)
        heads, head_dim = self.config.get("n_heads"), self.config.get("head_dim")
        queries = heads * head_dim if isinstance(heads, int) and isinstance(head_dim, int) else self.config.get("dim")
        rows = (shapes.get("layers.0.attention.wq.weight") or (0,))[0]
        if self.path.is_file() or not isinstance(queries, int) or not rows or queries % rows:
            return
        if not there < queries // rows <= _MOST_FILES:
            return
        self.stored.expect(queries // rows)
        missing = [part.path.name for part in self.stored.parts[there:]]
        self.findings.problems.append(
            f"The shapes are those of {queries // rows} model-parallel files: {first_of(missing)} {are(missing)} "
            f"missing. Download {'it' if len(missing) == 1 else 'them'}, or mend {LLAMA_PARAMS}."
        )

    @cached_property
    def quantization(self) -> str | None:
        """How the weights are quantised."""
        found = self.config.get("quantization_config")
        if not isinstance(found, dict):
            return None if found is None else str(found)
        bits = found.get("bits")
        return f"{found.get('quant_method', 'unknown')}{f', {bits} bits' if bits else ''}"

    @cached_property
    def packing(self) -> Packing | None:
        """How quantised weights are packed; None where it isn't known here."""
        return self.findings.attempt(read_packing, self.config.get("quantization_config"))

    def take_quantization(self) -> None:
        """Settings of the quantisation may be in a file of their own, which transformers doesn't read."""
        if self.kind is None or self.kind is Kind.LLAMA_ORIGINAL:
            return
        found = self.findings.attempt(settings_beside, self.folder, self.config, self.stored.infos)
        if found is not None:
            self.config = {**self.config, "quantization_config": found[1]}
            remedy = "upgrade copies it" if self.is_qwen else "copy it"
            self.findings.problems.append(
                f"config.json has no quantization_config, which is in {found[0]}: without it transformers takes the "
                f"weights for full ones and fills them at random. Here {remedy} into config.json."
            )

    def check_configuration(self) -> None:
        """Remark on what the configuration switches on, on adapters and on links."""
        if self.path.is_dir():
            self.findings.attempt(self._remark_on_links)
        self.take_quantization()
        if (self.folder / ADAPTER_CONFIG).is_file():
            self._remark_on_adapter()
        if self.quantization is not None:
            checked = "" if self.packing else "their names and shapes are not checked, and "
            self.findings.remarks.append(
                f"The weights are quantised ({self.quantization}): {checked}they can't be converted."
            )
        stretch = [word for word, on in self._stretch.items() if on]
        if self.architecture is not None and stretch:
            self.findings.remarks.append(
                f"{' and '.join(stretch)} {'is' if len(stretch) == 1 else 'are'} on: texts longer than "
                f"{self.architecture.length:,} tokens need QWen's own code, as other programs leave this out."
            )

    def _remark_on_links(self) -> None:
        refused = "upgrade, convert, merge-lora and push refuse the folder for that"
        self.findings.remarks += [f"{text} ({refused})" for text in islice(stray_links(self.folder), NAMED)]

    @property
    def _stretch(self) -> dict[str, bool]:
        names = {"NTK": "use_dynamic_ntk", "LogN": "use_logn_attn"}
        return {word: self.is_qwen and bool(self.config.get(name)) for word, name in names.items()}

    def _remark_on_adapter(self) -> None:
        adapter = self.findings.attempt(read_json, self.folder / ADAPTER_CONFIG) or {}
        empty = [name for name, info in self.stored.infos.items() if is_left_empty(info.shape)]
        if self.kind is None and empty:
            self.findings.problems.append(
                f"{plural(len(empty), 'tensor')} {are(empty)} empty: {quoted(empty)}. {NOT_GATHERED}"
            )
        base, method = adapter.get("base_model_name_or_path"), adapter.get("peft_type")
        if self.kind is None:
            self.findings.remarks.append(
                f"This is an adapter ({method}) of {base!r}, not a model of its own: merge-lora joins the two."
            )
        else:
            self.findings.remarks.append(
                f"{ADAPTER_CONFIG} lies beside a model, so transformers loads {base!r} and the adapter in its place. "
                "Move the adapter into another folder."
            )

    # --- weights ---

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every tensor that the configuration asks for."""
        if self.architecture is None or self.kind is None:
            return {}
        return FORMATS[self.kind].shapes(self.architecture, self.stored.infos, len(self.stored.parts))

    @cached_property
    def expected(self) -> Expected:
        """What is to be stored, quantised or not; nothing where that can't be known."""
        if self.quantization is None:
            return Expected(self.shapes)
        return expect_packed(self.shapes, self.packing) if self.packing else Expected({})

    @cached_property
    def weights(self) -> dict[str, TensorInfo]:
        """Stored tensors but those that can be left out: tables, and the head where it is tied to the embedding."""
        heads = {"output.weight", "lm_head.weight"} if self.architecture and self.architecture.tied else set()
        return {
            name: info
            for name, info in self.stored.infos.items()
            if not IGNORED.fullmatch(name) and name.split("/")[-1] not in heads
        }

    @property
    def dtypes(self) -> dict[str, int]:
        """dtype -> stored parameters, most first."""
        counts: dict[str, int] = {}
        memories = set()
        for name, info in self.weights.items():
            repeated = self.stored.is_llama_original and len(info.shape) == 1 and not name.startswith("00/")
            if info.memory not in memories and not repeated:
                memories.add(info.memory)
                dtype = str(info.dtype).removeprefix("torch.")
                counts[dtype] = counts.get(dtype, 0) + numel(info.shape)
        return dict(sorted(counts.items(), key=lambda item: -item[1]))

    def check_weights(self) -> None:
        """Compare what is stored with the index and the configuration."""
        misplaced = self._check_index()
        if self.stored.disguises and self.kind is not Kind.LLAMA_ORIGINAL:
            self.findings.problems.append(hidden_weights(self.kind, *next(iter(self.stored.disguises.items()))))
        if self.expected.required:
            self._check_names(misplaced)
            self._check_dtypes()
        surplus = [name for name in self.stored.infos if name not in self.weights]
        tables = [name for name in surplus if IGNORED.fullmatch(name)]
        if tables:
            self.findings.remarks.append(
                f"{plural(len(tables), 'stored tensor')} {are(tables)} part of a table that every implementation "
                f"computes anew: {quoted(tables)}."
            )
        if self._tied_head is not None:
            self.findings.remarks.append(
                f"{TABLE[-1].hf!r} is stored, although tie_word_embeddings takes the embedding."
            )
        if any(part.path.suffix == ".bin" for part in self.stored.parts):
            remedy = "upgrade" if self.is_qwen else "save_pretrained"
            self.findings.remarks.append(f"The weights are pickles, which may hold code: {remedy} writes safetensors.")

    def _check_index(self) -> set[str]:
        """Compare files with their index; gives the names that the index places where they aren't."""
        if self.stored.places is None:
            return set()
        problems, unreadable, nbytes = self.findings.problems, self.stored.unreadable, self.stored.nbytes
        found = {name: info.file.name for name, info in self.stored.infos.items()}
        readable = {name: file for name, file in self.stored.places.items() if file not in unreadable}
        misplaced = [name for name, file in readable.items() if found.get(name) != file]
        unnamed = [name for name in found if name not in self.stored.places]
        if misplaced:
            problems.append(
                f"{plural(len(misplaced), 'tensor')} {are(misplaced)} not in the file that the index names: "
                f"{quoted(misplaced)}. Download index and files again."
            )
        if unnamed:
            problems.append(
                f"{plural(len(unnamed), 'tensor')} {are(unnamed)} stored, but not in the index: {quoted(unnamed)}. A "
                "file is stale: download index and files again."
            )
        counted = {nbytes, sum(info.nbytes for info in self.stored.infos.values())}
        if not unreadable and self.stored.total_size is not None and self.stored.total_size not in counted:
            self.findings.remarks.append(
                f"The index says total_size={self.stored.total_size!r}, but {nbytes:,} bytes are stored."
            )
        return set(misplaced)

    def _check_names(self, misplaced: set[str]) -> None:
        problems, found, shapes = self.findings.problems, self.weights, self.expected.shapes
        unknown = [name for name in found if name not in shapes]
        missing = [name for name in self.expected.required if name not in found and name not in misplaced]
        missing = [name for name in missing if self._should_be_there(name)]
        wrong = [name for name, shape in shapes.items() if name in found and found[name].shape != shape]
        file = LLAMA_PARAMS if self.kind is Kind.LLAMA_ORIGINAL else "config.json"
        if unknown:
            problems.append(
                f"{plural(len(unknown), 'tensor')} {are(unknown)} not part of this architecture: "
                f"{quoted(unknown)}. Mend {file}, or download the files again."
            )
        if missing:
            wanted = plural(len(self.expected.required), "tensor")
            problems.append(
                f"{len(missing):,} of {wanted} {are(missing)} missing: {quoted(missing)}. "
                f"Mend {file} (number of layers, tied embeddings, biases), or download the files again."
            )
        empty = [name for name in wrong if is_left_empty(found[name].shape)]
        if empty:
            problems.append(f"{plural(len(empty), 'tensor')} {are(empty)} empty: {quoted(empty)}. {NOT_GATHERED}")
            wrong = [name for name in wrong if name not in empty]
        if wrong:
            details = [f"{name!r} is {found[name].shape}, not {shapes[name]}" for name in wrong]
            problems.append(
                f"{plural(len(wrong), 'tensor')} {'has' if len(wrong) == 1 else 'have'} a shape that the configuration "
                f"doesn't ask for: {first_of(details, '; ')}. Mend {file}, or download the files again."
            )

    def _should_be_there(self, name: str) -> bool:
        """Whether a tensor's absence is not explained by a file that can't be read."""
        if not self.stored.parts:
            return False
        if self.stored.places is not None:
            return self.stored.places.get(name) not in self.stored.unreadable
        if self.stored.is_llama_original:
            return self.stored.parts[int(name[:2])].weights is not None
        return not self.stored.unreadable

    def _check_dtypes(self) -> None:
        odd = {name: info.dtype for name, info in self.weights.items() if not self.expected.has_dtype(name, info.dtype)}
        integers = [name for name, dtype in odd.items() if not dtype.is_floating_point]
        if self.packing is not None and odd:
            details = [
                f"{name!r} is {dtype}, not {self.expected.words.get(name, 'floating')}" for name, dtype in odd.items()
            ]
            self.findings.problems.append(
                f"{plural(len(odd), 'tensor')} {'has' if len(odd) == 1 else 'have'} a dtype that the quantisation "
                f"doesn't ask for: {first_of(details, '; ')}. Download the files again."
            )
        elif integers:
            self.findings.problems.append(
                f"{plural(len(integers), 'tensor')} {are(integers)} whole numbers: {quoted(integers)}. If they are "
                "quantised weights, config.json lacks its quantization_config."
            )
        counts = self.dtypes
        if len(counts) > 1 and self.packing is None:
            listed = ", ".join(f"{count:,} parameters in {name}" for name, count in counts.items())
            self.findings.remarks.append(f"Mixed dtypes: {listed}.")
        announced = self.config.get("dtype") or self.config.get("torch_dtype")
        if counts and isinstance(announced, str) and announced.removeprefix("torch.") not in (*counts, "auto"):
            self.findings.remarks.append(f"config.json announces {announced}, stored is {next(iter(counts))}.")

    def check_companions(self) -> None:
        """Look at the files beside the weights."""
        if self.path.is_dir() and self.kind is not None:
            CompanionChecks(self.folder, self.kind, self.config, self.architecture, self.findings).check()

    # --- values ---

    def scan(self, progress: Callable[[str, int], None]) -> None:
        """Read every value, a tensor at a time."""
        bad: list[str] = []
        for number, part in enumerate(self.stored.parts):
            if part.weights is not None:
                bad += self._scan_file(part.weights, self.stored.prefix(number), progress)
        lost = [name for name in self.expected.optional if self._is_lost(name)]
        if lost:
            self.findings.problems.append(
                f"{plural(len(lost), 'bias')} {are(lost)} stored that no_bias leaves out, and not zero: {quoted(lost)}."
            )
        if bad:
            self.findings.problems.append(
                f"{plural(len(bad), 'tensor')} {'has' if len(bad) == 1 else 'have'} NaN or infinite values: "
                f"{first_of(bad)}."
            )
        self._compare_tied_head()

    def _is_lost(self, name: str) -> bool:
        """Whether a stored bias that the model has no place for changes what is computed."""
        info = self.stored.infos.get(name)
        part = next((part for part in self.stored.parts if info is not None and part.path == info.file), None)
        tensor = self.findings.attempt(part.weights.read, name) if part is not None and part.weights else None
        return tensor is not None and bool(tensor.any())

    def _scan_file(self, weights: Weights, prefix: str, progress: Callable[[str, int], None]) -> list[str]:
        bad = []
        damaged = False
        for info in weights.infos.values():
            if info.same_as is not None:
                continue
            if not damaged:
                tensor = self.findings.attempt(weights.read, info.name)
                damaged = tensor is None
                if tensor is not None and not is_finite(tensor):
                    bad.append(str(info))
            progress(prefix + info.name, info.nbytes)
        weights.close()
        return bad

    @property
    def _tied_head(self) -> tuple[str, str] | None:
        """Names of embedding and head, if they are stored apart although the configuration ties them."""
        pair = TABLE[0].qwen if self.is_qwen else TABLE[0].hf, TABLE[-1].hf
        infos = self.stored.infos
        stored = pair[0] in infos and pair[1] in infos and pair[1] not in self.weights
        return pair if stored and not _share_memory(infos, *pair) else None

    def _compare_tied_head(self) -> None:
        if self._tied_head is not None and self.stored.equal(*self._tied_head) is False:
            self.findings.problems.append(
                f"{self._tied_head[1]!r} differs from {self._tied_head[0]!r}, although tie_word_embeddings makes them "
                "one: set it to false, or delete the tensor."
            )

    # --- the report ---

    def report(self, scanned: bool) -> Report:
        """What was found out."""
        return Report(
            path=str(self.path),
            kind=self._kind_name,
            description=self._description,
            architecture=self._describe_architecture(),
            quantization=self.quantization,
            parameters=self._count_parameters(),
            dtypes=self.dtypes,
            files=self.stored.file_reports(),
            weights_bytes=self.stored.nbytes,
            memory=memory_needs(self.architecture, self.is_qwen) if self.architecture else {},
            int8_cache_per_token=self._int8_cache(),
            tokenizer=tokenizer_files(self.folder),
            problems=self.findings.problems,
            remarks=self.findings.remarks,
            scanned=scanned,
        )

    @property
    def _kind_name(self) -> str | None:
        if self.kind is not None:
            return kind_name(self.kind)
        return ADAPTER if not self.config and (self.folder / ADAPTER_CONFIG).is_file() else None

    @property
    def _description(self) -> str:
        if self.kind is not None:
            return self.kind.value
        return "adapter of a model" if self._kind_name == ADAPTER else "unknown"

    def _describe_architecture(self) -> dict[str, Any] | None:
        if self.architecture is None:
            return None
        values = {name: value for name, value in asdict(self.architecture).items() if name != "settings"}
        return {**values, "ntk": self._stretch["NTK"], "logn": self._stretch["LogN"]}

    def _int8_cache(self) -> int | None:
        return int8_cache_per_token(self.architecture) if self.architecture and self.is_qwen else None

    def _count_parameters(self) -> dict[str, int | None]:
        if self.architecture is None:
            return {"total": sum(self.dtypes.values()), "without_embeddings": None}
        shapes = hf_shapes(self.architecture)
        outside = {TABLE[0].hf, TABLE[-1].hf}
        sizes = {name: numel(shape) for name, shape in shapes.items()}
        inner = sum(size for name, size in sizes.items() if name not in outside)
        return {"total": sum(sizes.values()), "without_embeddings": inner}
