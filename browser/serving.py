"""Serving the page, with what is in the way told in a sentence."""

from __future__ import annotations

import errno
import os
import socket
from typing import Any

import gradio as gr
from starlette.middleware import Middleware

from .look import look
from .naming import NamedLanguage
from .words import TRANSLATIONS

SESSIONS = 64
"""Visitors of whom Gradio keeps something, which it does without end up to a number; of ours keys and values alone."""
FIRST_FREE = "leave --server-port out for the first free one from 7860"


def check_address(name: str | None, port: int | None) -> None:
    """See that the page can be served there; Gradio tries a hundred ports for seconds each, and tells none of this.

    Args:
        name: of the host, None for what the variable `GRADIO_SERVER_NAME` says, or this machine alone.
        port: None for any.

    Raises:
        OSError: it can't; the message says why, and which option helps.
    """
    host = (name or os.environ.get("GRADIO_SERVER_NAME") or "127.0.0.1").strip("[]")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port or 0, type=socket.SOCK_STREAM)[0]
    except (socket.gaierror, UnicodeError) as error:
        raise OSError(
            f"The host {host} is unknown: --server-name takes an address of this machine, 127.0.0.1 for this machine "
            "alone or 0.0.0.0 for others too."
        ) from error
    with socket.socket(family, kind, protocol) as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind(address)
        except OSError as error:
            raise OSError(_why(error, host, port)) from error


def _why(error: OSError, host: str, port: int | None) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"Port {port} is taken: name another one by --server-port, or {FIRST_FREE}."
    if error.errno == errno.EACCES:
        return f"No permission for port {port}: name one from 1024 on by --server-port, or {FIRST_FREE}."
    if error.errno == errno.EADDRNOTAVAIL:
        return f"{host} is no address of this machine: --server-name takes one that is, or 0.0.0.0 for all of them."
    return f"Nothing can be served at {host}, port {port}: {error.strerror}."


def launch(page: gr.Blocks, wait: bool = True, sessions: int = SESSIONS, **options: Any) -> None:
    """Serve a page until Ctrl-C, with options of Gradio's `launch`.

    Args:
        page: as `ChatPage.blocks` makes it.
        wait: until Ctrl-C; otherwise the page is served by a thread.
        sessions: visitors of whom something is kept; the next turn of others reads their conversation anew.
        options: `server_name`, `server_port`, `share` and `inbrowser` are those of the command.

    Raises:
        OSError: there is no such address, or it is taken.
        ValueError: the page is served, and can't be reached from here.
    """
    check_address(options.get("server_name"), options.get("server_port"))
    try:
        page.launch(
            **look(),
            i18n=TRANSLATIONS,
            app_kwargs={"middleware": [Middleware(NamedLanguage)]},
            ssr_mode=False,  # the same with and without Node
            state_session_capacity=sessions,
            max_file_size=1,  # nothing takes files, and Gradio's own address for them is open to everyone
            footer_links=[],
            quiet=True,
            prevent_thread_lock=True,
            **options,
        )
    except Exception as error:
        if (sentence := _of_gradio(error, page)) is None:
            raise
        raise sentence from error
    if wait:
        _tell(page, bool(options.get("share")))
        page.block_thread()


def _of_gradio(error: Exception, page: gr.Blocks) -> Exception | None:
    """An error of Gradio's that speaks of its own functions, in terms of the command; None for others."""
    told = str(error)
    if told.startswith("Cannot find empty port"):
        return OSError("None of the ports from 7860 on is free: name another one by --server-port.")
    if "localhost is not accessible" in told or "localhost is accessible" in told:
        return ValueError(
            f"{page.local_url} can't be reached from this machine: where HTTP_PROXY names a proxy, set "
            "NO_PROXY=localhost,127.0.0.1."
        )
    return None


def _tell(page: gr.Blocks, share: bool) -> None:
    print(f"The page is at {page.local_url}; Ctrl-C ends it.", flush=True)
    if share and page.share_url is None:
        print(
            "There is no public address, for Gradio's servers give none: see the lines above, or leave --share out "
            "and let others in by --server-name 0.0.0.0.",
            flush=True,
        )
