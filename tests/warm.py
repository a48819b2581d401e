"""Programs that find torch and transformers loaded, without the five seconds of a core that loading takes each of them.

`python warm.py serve SOCKET WHAT` loads them and waits. `python warm.py run SOCKET WORDS...` is then what `python
WORDS...` would be, in a copy of that process: with its own folder, variables, input, output, signals and exit status.
Not for tests of what is loaded, or when. Where variables differ that libraries read as they are loaded, it starts anew.
"""

import json
import os
import signal
import socket
import sys
import time

PART_OF_TORCH = (
    *("torch._dynamo", "torch._export", "torch.distributed.fsdp", "torch.distributed.tensor", "torch.export"),
    *("torch.fx.experimental.symbolic_shapes", "torch.nn.attention.flex_attention", "torch.utils.data"),
)
"""What transformers loads of torch whenever it loads a model."""
LOADED = {"all": (*PART_OF_TORCH, "qwen1", "transformers.trainer"), "torch": PART_OF_TORCH}
READ_BY_ALL = ("LANG", "LC_", "LD_", "MKL_", "OMP_", "PYTHON")
READ = {"all": (*READ_BY_ALL, "HF_", "QWEN_NATIVE", "TRANSFORMERS_"), "torch": READ_BY_ALL}
"""What is loaded -> how variables begin that it reads then."""
STARTS_WITHIN = 60.0
"""Seconds until the process is there, on a busy machine."""


def read_at_loading(variables, loaded):
    return {name: value for name, value in variables.items() if name.startswith(READ[loaded])}


# --- the process that has them loaded ---


def serve(address, loaded):
    """Wait for commands until standard input ends; returns in each copy that is to run one, with the command."""
    import contextlib
    import gc
    import importlib
    import select

    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)  # who asks early waits, or learns at once that this failed
    for name in LOADED[loaded]:
        importlib.import_module(name)
    if "qwen1" in sys.modules:
        sys.modules["qwen1"].native_qwen.wait()
    gc.freeze()  # a collection would write to all pages, which the copies share
    while True:
        ready, _, _ = select.select([listener, 0], [], [])
        with contextlib.suppress(ChildProcessError):  # none is left
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if 0 in ready:
            os._exit(0)
        connection, _ = listener.accept()
        if not os.fork():
            listener.close()
            return keep(connection, loaded)
        connection.close()


def keep(connection, loaded):
    """Run the command of a connection in a copy of this process, in which this returns, and tell how it ended."""
    import contextlib
    import threading

    size, files, _, _ = socket.recv_fds(connection, 8, 3)
    with connection.makefile("rb") as sent:
        words, variables, folder = json.loads(sent.read(int.from_bytes(size, "big")))
    is_option = not words or words[0].startswith("-") and words[0] not in ("-c", "-m")
    if is_option or read_at_loading(variables, loaded) != read_at_loading(os.environ, loaded):
        connection.sendall(b"anew")
        os._exit(0)
    program = os.fork()
    if not program:
        connection.close()
        become(files, variables, folder)
        return words
    ended = threading.Event()

    def pass_on():
        while number := connection.recv(1):
            os.kill(program, number[0])
        if not ended.is_set():
            os.killpg(program, signal.SIGKILL)

    threading.Thread(target=pass_on, daemon=True).start()
    _, status = os.waitpid(program, 0)
    ended.set()
    with contextlib.suppress(BrokenPipeError):  # who asked was killed
        connection.sendall(str(os.waitstatus_to_exitcode(status)).encode())
    os._exit(0)


def become(files, variables, folder):
    os.setsid()
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    for number, name in enumerate(("stdin", "stdout", "stderr")):  # anew: whether one can seek is asked only then
        old, buffering = getattr(sys, name), 1 if name == "stderr" or os.isatty(number) else -1
        stream = open(number, "r" if name == "stdin" else "w", buffering, old.encoding, old.errors, closefd=False)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(variables)


def execute(words):
    """As `python` does, but for some frames more in a traceback."""
    import types

    if words[0] == "-m":
        import runpy

        sys.argv, sys.path[0] = words[1:], os.getcwd()
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        return
    main = types.ModuleType("__main__")
    if words[0] == "-c":
        name, code = "<string>", words[1]
        sys.argv, sys.path[0] = ["-c", *words[2:]], ""
    else:
        name = main.__file__ = words[0]
        sys.argv, sys.path[0] = words, os.path.dirname(os.path.realpath(name))
        with open(name, "rb") as source:
            code = source.read()
    sys.modules["__main__"] = main
    exec(compile(code, name, "exec"), main.__dict__)


def end(words):
    """Run a command and end as Python does, but for taking apart all that is loaded, which takes a second."""
    import atexit
    import threading

    try:
        status = execute(words)
    except SystemExit as error:
        status = error.code
        if status is not None and not isinstance(status, int):
            print(status, file=sys.stderr)
            status = 1
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        status = 1
        if isinstance(error, KeyboardInterrupt):
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status or 0)


# --- who asks ---


def connect(address):
    end = time.monotonic() + STARTS_WITHIN
    while True:
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(address)
            return connection
        except (FileNotFoundError, ConnectionRefusedError):
            connection.close()
            if time.monotonic() > end:
                raise
            time.sleep(0.05)


def run(address, *words):
    connection = connect(address)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: connection.sendall(bytes([number])))
    request = json.dumps([words, dict(os.environ), os.getcwd()]).encode()
    socket.send_fds(connection, [len(request).to_bytes(8, "big")], [0, 1, 2])
    connection.sendall(request)
    answer = connection.recv(16)
    if answer == b"anew":
        os.execv(sys.executable, [sys.executable, *words])
    status = int(answer)
    if status < 0:
        if -status != signal.SIGKILL:
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


if __name__ == "__main__":
    if sys.argv[1] == "run":
        run(*sys.argv[2:])
    end(serve(*sys.argv[2:]))
