"""The versions that this code needs. Importing this file checks them, before older ones fail for lack of a name."""

import importlib.metadata
import re

NEEDED = {"transformers": (5, 4), "torch": (2, 7)}


def check_versions() -> None:
    """Compare what is installed with `NEEDED`; what says no version, such as a checkout, is left alone.

    Raises:
        ImportError: a package is too old.
    """
    old = []
    for name, needed in NEEDED.items():
        try:
            installed = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        numbers = re.match(r"(\d+)\.(\d+)", installed)
        if numbers and tuple(map(int, numbers.groups())) < needed:
            old.append((name, ".".join(map(str, needed)), installed))
    if old:
        wanted = " and ".join(f"{name} {needed} or later ({installed} is installed)" for name, needed, installed in old)
        command = " ".join(f"'{name}>={needed}'" for name, needed, _ in old)
        raise ImportError(f"This code of QWen needs {wanted}: run `pip install --upgrade {command}`.")


check_versions()
