"""Room on the disk."""

from __future__ import annotations

import shutil
from pathlib import Path

from rich.filesize import decimal

_SPARE = 2**20  # bytes of disk space for folders and the like


def check_space(folder: Path, wanted: int) -> None:
    free = shutil.disk_usage(folder).free
    if wanted + _SPARE > free:
        raise OSError(  # which leaves what an interrupted run wrote
            f"{decimal(wanted)} are needed in {folder.parent}, but only {decimal(free)} are free: free some space, or "
            "name a folder on another disk."
        )
