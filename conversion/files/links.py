"""Symbolic links of a checkpoint, none of which may lead out of it to a file that doesn't belong there.

What a folder of strangers links to, as `README.md -> ~/.ssh/id_rsa`, would else be copied into the result and published
with it. Lawful are the Hub's cache, where each file of a snapshot is a link to a blob of the same repository, and
weights anywhere that are links into such a cache.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from ..errors import CheckpointError
from .access import unreadable
from .checksums import same_bytes

CODE_FOLDER = Path(__file__).parent.parent.parent
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")


def resolved(path: Path) -> Path:
    """Where a path leads in the end, whether or not anything is there.

    Raises:
        CheckpointError: a link that leads back to itself, which releases of Python treat in different ways.
    """
    try:
        path.stat()
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise unreadable(path, error) from error
    return path.resolve()


def check_links(folder: Path, names: Iterable[str] | None = None) -> None:
    """Refuse links that lead out of a folder, are broken, or lead to themselves.

    Args:
        names: of files, where only these belong to the checkpoint; all that are not hidden without it.

    Raises:
        CheckpointError: the first such link, with its target.
    """
    if (found := next(stray_links(folder, names), None)) is not None:
        raise CheckpointError(found)


def stray_links(folder: Path, names: Iterable[str] | None = None) -> Iterator[str]:
    """What is wrong with each link that `check_links` refuses."""
    root = resolved(folder)
    links = _links(folder) if names is None else (path for name in names if (path := folder / name).is_symlink())
    for link in links:
        try:
            target = resolved(link)
        except CheckpointError as error:
            yield str(error)
            continue
        if not _is_lawful(link, target, root):
            if _is_code_of_clone(target):
                yield (
                    f"{link} is a link to {target}, which differs from the code of the package in {CODE_FOLDER}: clone "
                    f"and package are of different versions. Install the clone again (pip install {target.parent})."
                )
                continue
            yield (
                f"{link} is a link to {target}, which is outside of the checkpoint, so it isn't followed: if that is a "
                "part of the checkpoint, put a copy in the place of the link; if not, remove the link."
            )
        elif not target.exists():
            yield f"{link} leads to no file: mend the link, or remove it. It points to {target}."


def _links(folder: Path) -> Iterator[Path]:
    """All links in a folder and its folders but those that are hidden, which nothing takes along."""
    for parent, folders, names in os.walk(folder, onerror=_refuse):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in (*folders, *sorted(names)):
            path = Path(parent, name)
            if path.is_symlink() and (not name.startswith(".") or name == ".gitattributes"):
                yield path


def _refuse(error: OSError) -> None:
    """A folder that can't be listed would else be left out without a word."""
    raise unreadable(Path(error.filename), error) from error


def _is_lawful(link: Path, target: Path, root: Path) -> bool:
    if target.is_relative_to(root) or _is_own_code(target):
        return True
    snapshots = next((parent for parent in root.parents if parent.name == "snapshots"), None)
    if snapshots is not None and target.parent == snapshots.parent / "blobs":
        return True
    return link.suffix in _WEIGHTS and _is_in_hub_cache(target)


def _is_own_code(target: Path) -> bool:
    """Whether it is the code of this package, to which the folder of the tiny model links."""
    own = CODE_FOLDER / target.name
    return target.suffix == ".py" and own.is_file() and target.is_file() and same_bytes(own, target)


def _is_code_of_clone(target: Path) -> bool:
    """Whether it is a file of this project's code, in a clone beside the package that runs, though not as here."""
    is_clone = (target.parent / "qwen1_commands" / "__init__.py").is_file()
    return target.suffix == ".py" and is_clone and target.is_file()


def _is_in_hub_cache(target: Path) -> bool:
    """Whether a file is a blob, or a part of a snapshot, of a repository in a cache of the Hub."""
    for parent in target.parents:
        if parent.name in ("blobs", "snapshots"):
            repository = parent.parent
            return repository.name.startswith("models--") or all(
                (repository / name).is_dir() for name in ("blobs", "snapshots")
            )
    return False
