"""What is stored, compared with the index and the configuration."""

from __future__ import annotations

from ..formats.expected import NOT_GATHERED, is_left_empty
from ..formats.kinds import Kind, hidden_weights
from ..formats.names import IGNORED, TABLE
from ..opening.sources import LLAMA_PARAMS
from .subject import Subject
from .words import are, first_of, plural, quoted


def check_weights(subject: Subject) -> None:
    """Compare what is stored with the index and the configuration."""
    misplaced = _check_index(subject)
    if subject.stored.disguises and subject.kind is not Kind.LLAMA_ORIGINAL:
        subject.findings.problems.append(hidden_weights(subject.kind, *next(iter(subject.stored.disguises.items()))))
    if subject.expected.required:
        _check_names(subject, misplaced)
        _check_dtypes(subject)
    surplus = [name for name in subject.stored.infos if name not in subject.weights]
    tables = [name for name in surplus if IGNORED.fullmatch(name)]
    if tables:
        subject.findings.remarks.append(
            f"{plural(len(tables), 'stored tensor')} {are(tables)} part of a table that every implementation "
            f"computes anew: {quoted(tables)}."
        )
    if subject.tied_head is not None:
        subject.findings.remarks.append(
            f"{TABLE[-1].hf!r} is stored, although tie_word_embeddings takes the embedding."
        )
    if any(part.path.suffix == ".bin" for part in subject.stored.parts):
        remedy = "upgrade" if subject.is_qwen else "save_pretrained"
        subject.findings.remarks.append(f"The weights are pickles, which may hold code: {remedy} writes safetensors.")


def _check_index(subject: Subject) -> set[str]:
    """Compare files with their index; gives the names that the index places where they aren't."""
    if subject.stored.places is None:
        return set()
    problems, unreadable, nbytes = subject.findings.problems, subject.stored.unreadable, subject.stored.nbytes
    found = {name: info.file.name for name, info in subject.stored.infos.items()}
    readable = {name: file for name, file in subject.stored.places.items() if file not in unreadable}
    misplaced = [name for name, file in readable.items() if found.get(name) != file]
    unnamed = [name for name in found if name not in subject.stored.places]
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
    counted = (nbytes, sum(info.nbytes for info in subject.stored.infos.values()))
    if not unreadable and subject.stored.total_size is not None and subject.stored.total_size not in counted:
        subject.findings.remarks.append(
            f"The index says total_size={subject.stored.total_size!r}, but {nbytes:,} bytes are stored."
        )
    return set(misplaced)


def _check_names(subject: Subject, misplaced: set[str]) -> None:
    problems, found, shapes = subject.findings.problems, subject.weights, subject.expected.shapes
    unknown = [name for name in found if name not in shapes]
    missing = [name for name in subject.expected.required if name not in found and name not in misplaced]
    missing = [name for name in missing if _should_be_there(subject, name)]
    wrong = [name for name, shape in shapes.items() if name in found and found[name].shape != shape]
    file = LLAMA_PARAMS if subject.kind is Kind.LLAMA_ORIGINAL else "config.json"
    if unknown:
        problems.append(
            f"{plural(len(unknown), 'tensor')} {are(unknown)} not part of this architecture: "
            f"{quoted(unknown)}. Mend {file}, or download the files again."
        )
    if missing:
        wanted = plural(len(subject.expected.required), "tensor")
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


def _should_be_there(subject: Subject, name: str) -> bool:
    """Whether a tensor's absence is not explained by a file that can't be read."""
    if not subject.stored.parts:
        return False
    if subject.stored.places is not None:
        return subject.stored.places.get(name) not in subject.stored.unreadable
    if subject.stored.is_llama_original and name[:2].isdigit():  # not where config.json is of another model
        return subject.stored.parts[int(name[:2])].weights is not None
    return not subject.stored.unreadable


def _check_dtypes(subject: Subject) -> None:
    odd = {
        name: info.dtype for name, info in subject.weights.items() if not subject.expected.has_dtype(name, info.dtype)
    }
    integers = [name for name, dtype in odd.items() if not dtype.is_floating_point]
    if subject.packing is not None and odd:
        details = [
            f"{name!r} is {dtype}, not {subject.expected.words.get(name, 'floating')}" for name, dtype in odd.items()
        ]
        subject.findings.problems.append(
            f"{plural(len(odd), 'tensor')} {'has' if len(odd) == 1 else 'have'} a dtype that the quantisation "
            f"doesn't ask for: {first_of(details, '; ')}. Download the files again."
        )
    elif integers:
        subject.findings.problems.append(
            f"{plural(len(integers), 'tensor')} {are(integers)} whole numbers: {quoted(integers)}. If they are "
            "quantised weights, config.json lacks its quantization_config."
        )
    counts = subject.dtypes
    if len(counts) > 1 and subject.packing is None:
        listed = ", ".join(f"{count:,} parameters in {name}" for name, count in counts.items())
        subject.findings.remarks.append(f"Mixed dtypes: {listed}.")
    announced = subject.config.get("dtype") or subject.config.get("torch_dtype")
    if counts and isinstance(announced, str) and announced.removeprefix("torch.") not in (*counts, "auto"):
        subject.findings.remarks.append(f"config.json announces {announced}, stored is {next(iter(counts))}.")
