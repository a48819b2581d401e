"""The command `qwen1-browser`, which is also that of `app.py`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from ..programs.failures import is_of_machine, told
from ..programs.few_bits import BITS_HELP, LESS_MEMORY, in_bits
from ..programs.models import open_model
from ..programs.options import version_option
from ..programs.packages import explain, require
from ..programs.shipped import TINY_CHAT
from ..programs.starting import heavy_imports

app = typer.Typer(name="qwen1-browser", add_completion=False, pretty_exceptions_enable=False)

CHECKPOINT = Annotated[
    str,
    typer.Option(
        *("--checkpoint", "--checkpoint-path", "-c"),
        envvar="QWEN_CHECKPOINT",
        show_default="the qwen-tiny-chat that ships",
        help="Folder or Hub id.",
    ),
]
TOOLS = Annotated[
    list[str] | None,
    typer.Option(
        "--tool",
        metavar="TOOL",
        show_default="none",
        help="A function that the model may call, for every visitor: calculator, clock, or FILE.py:FUNCTION; "
        "repeat it for several.",
    ),
]


@app.command(epilog="Example: qwen1-browser ./Qwen-7B-Chat --inbrowser")
def serve(
    folder: Annotated[
        str | None, typer.Argument(metavar="[CHECKPOINT]", help="Folder or Hub id; the same as --checkpoint.")
    ] = None,
    checkpoint: CHECKPOINT = str(TINY_CHAT),
    cpu_only: Annotated[bool, typer.Option("--cpu-only", help="Leave accelerators alone.")] = False,
    share: Annotated[bool, typer.Option("--share", help="Also open a public address, by Gradio's servers.")] = False,
    inbrowser: Annotated[bool, typer.Option("--inbrowser", help="Open the page in the browser here.")] = False,
    server_name: Annotated[
        str | None, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.", show_default="127.0.0.1")
    ] = None,
    server_port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Port.", show_default="the first free one from 7860")
    ] = None,
    concurrency_limit: Annotated[int, typer.Option(min=1, help="Replies that are written at a time.")] = 1,
    queue_size: Annotated[int, typer.Option(min=1, help="Visitors that may wait for theirs.")] = 16,
    carried: Annotated[
        int, typer.Option(min=0, help="Conversations whose keys and values stay in memory for the next turn.")
    ] = 4,
    bits: Annotated[int | None, typer.Option(help=BITS_HELP, show_default="as stored")] = None,
    tools: TOOLS = None,
    version: Annotated[bool, version_option("qwen1-browser")] = False,
) -> None:
    """Chat with a QWen (Qwen-1) model in the browser; Ctrl-C ends it."""
    if folder is not None and checkpoint not in (str(TINY_CHAT), os.environ.get("QWEN_CHECKPOINT")):
        raise typer.BadParameter(f"two checkpoints, {folder} and {checkpoint}: leave one out.")
    try:
        require("gradio", "the page")
        with heavy_imports():  # here, for --help needs none of them
            from ..programs.tools import find_tools
            from .conversation import Chat
            from .page import ChatPage
            from .serving import SESSIONS, check_address, launch

        check_address(server_name, server_port)  # before the model, which may take minutes
        named = find_tools(tools or [])
        checkpoint = checkpoint if folder is None else folder
        chat = Chat(*open_model(checkpoint, **in_bits(bits, cpu_only)), carried, named)
        page = ChatPage(chat, Path(checkpoint).name, concurrency_limit, queue_size)
        address: dict[str, Any] = {"server_name": server_name, "server_port": server_port}
        launch(page.blocks(), sessions=max(SESSIONS, carried), share=share, inbrowser=inbrowser, **address)
    except Exception as error:
        if not isinstance(error, (ImportError, OSError, ValueError)) and not is_of_machine(error):
            raise
        said = explain(error) if isinstance(error, ImportError) else told(error, LESS_MEMORY)
        typer.echo(f"qwen1-browser: {said}", err=True)
        raise typer.Exit(1) from error


def main() -> None:
    """Run the command; ends the process with its exit status."""
    app()
