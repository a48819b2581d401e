"""Packages that aren't there, said in one sentence with the command that helps."""

from __future__ import annotations

from importlib.util import find_spec

from .failures import is_of_machine, told

_DISTRIBUTIONS = {
    "compressed_tensors": "compressed-tensors",
    "markdown_it": "markdown-it-py",
    "yaml": "pyyaml",
}
"""What pip calls packages whose modules have another name."""


class MissingPackage(ImportError):
    """A package that what was asked for needs isn't installed; the message has the command."""


def is_installed(module: str) -> bool:
    """Whether a module can be found, without importing it."""
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def require(module: str, wanted: str) -> None:
    """Refuse what needs a package, before work is begun that would be lost.

    Args:
        wanted: what needs it, as the subject of the sentence.

    Raises:
        MissingPackage: it isn't installed.
    """
    if not is_installed(module):
        name = _distribution(module)
        raise MissingPackage(f"{wanted} needs {name}: pip install {name}", name=module)


def explain(error: ImportError) -> str:
    """What to do about an import that failed, in one line."""
    said = " ".join(str(error).split())
    if isinstance(error, MissingPackage):
        return said
    if is_of_machine(error):  # a library for which there is no memory
        return told(error)
    cause: BaseException | None = error
    while cause is not None:  # transformers hides the import that failed behind one of its own
        top = ((cause.name if isinstance(cause, ImportError) else None) or "").partition(".")[0]
        if top and not is_installed(top):
            return f"this needs {_distribution(top)}, which isn't installed: pip install {_distribution(top)}"
        cause = cause.__cause__ or cause.__context__
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"{said}: pip install --upgrade {_distribution(error.name.partition('.')[0])}"
    return said


def _distribution(module: str) -> str:
    return _DISTRIBUTIONS.get(module, module)
