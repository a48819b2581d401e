"""QWen and Qwen2 to a GGUF: one file with weights, tokenizer and settings, for llama.cpp and what is built on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...configuration_qwen import QWenConfig
from ..errors import CheckpointError
from ..formats.companions import is_legal
from ..formats.configurations import parse, quantization_method
from ..formats.gguf import ARCHITECTURE, Encoding, check_gguf, encoding_of, gguf_package, to_gguf
from ..formats.kinds import Kind
from ..formats.qwen2 import RopeScaling, check_qwen2, qwen2_config
from ..opening.sources import Contents, Source
from ..writing.gguf import GgufFile, GgufTensor, gguf_header
from ..writing.plans import Plan
from ..writing.tensors import Output
from .gguf_tokenizer import gguf_tokenizer
from .to_qwen2 import without_zero_biases
from .weights import plan_outputs

_FILE_TYPES = {Encoding.F32: 0, Encoding.F16: 1, Encoding.Q8_0: 7, Encoding.BF16: 32}
_STRETCHES = ("rope_type", "type", "factor", "original_max_position_embeddings", "beta_fast", "beta_slow")
"""Keys of rotary scaling that llama.cpp has as well."""


def plan_gguf(source: Source, encoding: Encoding | None = None, scaling: RopeScaling | None = None) -> Plan:
    """Decide on the file.

    Args:
        encoding: of the weights, None for that of most of the old ones. Norms and biases are stored in float32, as
            everywhere.
        scaling: YaRN, to stretch texts beyond the trained length.

    Raises:
        CheckpointError: something that llama.cpp can't run, by name; a damaged source; no package `gguf`.
    """
    gguf = gguf_package()
    _check_source(source)
    if scaling is not None and scaling.kind != "yarn":
        raise CheckpointError(
            f"--rope-scaling {scaling.kind}: llama.cpp has none; choose yarn:FACTOR, or leave it out."
        )
    contents = source.contents()
    check_gguf(contents.architecture)
    if source.kind.is_qwen:
        check_qwen2(source.config)
    encoding = encoding or Encoding.of(contents.dtype)
    tensors = _tensors(source, contents, encoding)
    config = qwen2_config(contents.architecture, encoding.value, scaling)
    writer = gguf.GGUFWriter(None, ARCHITECTURE)
    for tensor in tensors:
        tensor.tell(writer)
    _tell_general(writer, source, encoding)
    _tell_architecture(writer, contents, config)
    gguf_tokenizer(source, contents).tell(writer)
    plan = Plan("convert", source, is_file=True, notes=_notes(source, config, tensors, encoding))
    plan.files = [
        GgufFile(f"{_name(source)}-{encoding.name}.gguf", gguf_header(writer), tuple(tensors), source.weights)
    ]
    return plan


def _name(source: Source) -> str:
    return source.folder.resolve().name or "model"


def _check_source(source: Source) -> None:
    """Refuse what isn't written as a GGUF here."""
    if method := quantization_method(source.config):
        raise CheckpointError(
            f"The weights are quantised ({method}), which a GGUF holds in other ways: make full ones of them first "
            "(convert --to qwen2 --dequantize), then a GGUF of those."
        )
    if not source.kind.is_qwen and source.kind is not Kind.QWEN2:
        raise CheckpointError(
            f"{source.path} is {source.kind.value}: a GGUF is written of QWen and Qwen2 only. Weights of QWen under "
            "LLaMA's names become QWen by convert --to qwen; for others use llama.cpp's own converter."
        )


def _tensors(source: Source, contents: Contents, encoding: Encoding) -> list[GgufTensor]:
    recipes = without_zero_biases(source, contents.way) if source.kind.is_qwen else contents.way
    tensors = []
    for stored in plan_outputs(to_gguf(recipes), source.weights, None):
        chosen = encoding_of(stored.shape, encoding)
        tensors.append(GgufTensor(Output(stored.recipe, chosen.dtype or stored.dtype, stored.shape), chosen))
    return tensors


def _tell_general(writer: Any, source: Source, encoding: Encoding) -> None:
    """Name, licence, language and settings of sampling, as model card and generation settings have them."""
    gguf, folder = gguf_package(), source.folder.resolve()
    counts = writer.get_total_parameter_count()
    try:
        about: Any = gguf.Metadata.load(None, folder, None, counts[0])
        about.name = about.name or _name(source)
        about.size_label = about.size_label or gguf.size_label(*counts)
        about.set_gguf_meta_model(writer)
    except Exception as error:  # whatever a model card makes the library raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(f"The head of {folder / 'README.md'} can't be used ({reason}): mend it.") from error
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_file_type(_FILE_TYPES[encoding])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _tell_architecture(writer: Any, contents: Contents, config: Mapping[str, Any]) -> None:
    architecture = contents.architecture
    writer.add_block_count(architecture.layers)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(architecture.width)
    writer.add_feed_forward_length(architecture.mlp)
    writer.add_head_count(architecture.heads)
    writer.add_head_count_kv(architecture.kv_heads)
    writer.add_layer_norm_rms_eps(architecture.norm_eps)
    writer.add_rope_freq_base(float(architecture.rope_theta))
    rope = config["rope_scaling"]
    if rope is None or rope["rope_type"] == "dynamic":  # which begins beyond this length
        return
    if unknown := [name for name in rope if name not in _STRETCHES and rope[name] is not None]:
        raise CheckpointError(f"{unknown[0]}={rope[unknown[0]]!r} of the rotary scaling has no counterpart in a GGUF.")
    types: Any = gguf_package().RopeScalingType
    writer.add_rope_scaling_type(types(rope["rope_type"]))
    writer.add_rope_scaling_factor(float(rope["factor"]))
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        for name in ("beta_fast", "beta_slow"):
            if rope.get(name) is not None:
                getattr(writer, f"add_rope_scaling_yarn_{name}")(float(rope[name]))


def _notes(source: Source, config: Mapping[str, Any], tensors: Sequence[GgufTensor], encoding: Encoding) -> list[str]:
    notes = []
    length, rope = config["max_position_embeddings"], config["rope_scaling"]
    lost = _stretches(source) if rope is None else ["dynamic scaling"] if rope["rope_type"] == "dynamic" else []
    if lost:
        notes.append(
            f"llama.cpp has no {' and no '.join(lost)}: keep the context at {length} tokens or below "
            f"(-c {length}, num_ctx {length}), or choose --rope-scaling yarn:FACTOR."
        )
    if odd := [tensor for tensor in tensors if len(tensor.output.shape) > 1 and tensor.encoding is not encoding]:
        notes.append(
            f"{len(odd)} tensors, first {odd[0].output.recipe.name}, are stored as {odd[0].encoding.value}: their rows "
            f"of {odd[0].output.shape[-1]} can't be cut into blocks of 32."
        )
    legal = sorted(path.name for path in source.folder.iterdir() if is_legal(path.name) and path.is_file())
    if legal:
        notes.append(f"{', '.join(legal)} of the source: pass on with the file.")
    return notes


def _stretches(source: Source) -> list[str]:
    """What stretches texts beyond the trained length in QWen and nowhere else."""
    if not source.kind.is_qwen:
        return []
    values = parse(QWenConfig, source.config)
    return [word for word, is_on in (("NTK", values.use_dynamic_ntk), ("LogN", values.use_logn_attn)) if is_on]
