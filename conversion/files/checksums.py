"""Whether a file holds what it should: published checksums, and another file."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from ..errors import CheckpointError
from .access import BLOCK
from .containers import container_of


def known_checksum(path: Path) -> tuple[str, str] | None:
    """(hash algorithm, hex digest) that the origin published for a file, where a record of it is at hand.

    Such records are the blob that a file of the Hub's cache points to, the metadata that `hf download --local-dir`
    leaves behind (unless the file was written later), `SHA256SUMS`, and LLaMA's `checklist.chk`.
    """
    blob = path.resolve().name
    if path.is_symlink() and re.fullmatch(r"[0-9a-f]{64}", blob):
        return "sha256", blob
    record = path.parent / ".cache" / "huggingface" / "download" / f"{path.name}.metadata"
    if record.is_file():
        found = re.fullmatch(r"\S+\s+([0-9a-f]{64})\s+(\d+(?:\.\d+)?)\s*", record.read_text(errors="replace"))
        if found and path.stat().st_mtime <= float(found[2]) + 1:
            return "sha256", found[1]
    for algorithm, listing in (("sha256", "SHA256SUMS"), ("md5", "checklist.chk")):
        if (path.parent / listing).is_file():
            for line in (path.parent / listing).read_text(errors="replace").splitlines():
                digest, _, name = line.partition(" ")
                if name.strip().removeprefix("*").removeprefix("./") == path.name:
                    return algorithm, digest.lower()
    return None


def check_file(path: Path) -> None:
    """Read a whole file and compare the checksums that are known for it.

    Raises:
        CheckpointError: one differs; the message names the file.
    """
    container_of(path).check(path)
    known = known_checksum(path)
    if known is not None:
        digest = hashlib.new(known[0])
        with open(path, "rb") as file:
            while block := file.read(BLOCK):
                digest.update(block)
        found = digest.hexdigest()
        if found != known[1]:
            raise CheckpointError(
                f"{path} is damaged: its {known[0]} is {found}, published was {known[1]}. Download it again."
            )


def same_bytes(first: Path, second: Path) -> bool:
    """Whether two files hold the same."""
    if first.stat().st_size != second.stat().st_size:
        return False
    if first.samefile(second):
        return True
    with open(first, "rb") as a, open(second, "rb") as b:
        while block := a.read(BLOCK):
            if block != b.read(BLOCK):
                return False
    return True
