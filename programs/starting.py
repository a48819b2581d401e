"""What makes a program start sooner: nothing else is done while torch and transformers are imported."""

from __future__ import annotations

import ctypes
import gc
import importlib.util
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

INTERRUPTED = 130
"""The exit status of a program that Ctrl-C has ended."""


@contextmanager
def heavy_imports() -> Iterator[None]:
    """For the imports of a program that has just begun; does nothing where torch is there already.

    Imports make hundreds of thousands of objects and next to no garbage, among which Python's collector would look for
    some again and again, for a sixth of the time. What was imported is left out of later collections too.

    Ctrl-C ends the process with 130 at once: as an exception it would be lost in torch's imports, which pass over all
    that is raised in some places and end with SIGABRT in others.
    """
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    library = threading.Thread(target=_load_torch_library, daemon=True)
    gc.disable()
    try:
        with _ended_by_ctrl_c():
            library.start()
            yield
    finally:
        if library.is_alive():
            library.join()  # a process that ends while a library is being loaded crashes
        gc.freeze()
        gc.enable()


@contextmanager
def _ended_by_ctrl_c() -> Iterator[None]:
    """Let Ctrl-C end the process, which has begun nothing, unless it means something else here."""
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    before = signal.signal(signal.SIGINT, lambda *_: os._exit(INTERRUPTED))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _load_torch_library() -> None:
    """Let the system load torch's largest library, which takes 0.2 s and no interpreter, while Python imports the rest.

    Only where torch is built for CPUs: in other builds it looks for libraries that go with it first. Whatever goes
    wrong here goes wrong again, and is said, when torch is imported.
    """
    spec = importlib.util.find_spec("torch")
    if sys.platform != "linux" or spec is None or not spec.origin:
        return
    folder = Path(spec.origin).parent / "lib"
    library = folder / "libtorch_cpu.so"
    if not library.exists() or any((folder / f"libtorch_{kind}.so").exists() for kind in ("cuda", "hip", "xpu")):
        return
    load = ctypes.CDLL(None).dlopen  # called like this it runs without the interpreter's lock
    load.restype = ctypes.c_void_p
    load(bytes(library), os.RTLD_LAZY)
