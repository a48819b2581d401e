"""What is in the way of serving the page is told in a sentence, with the option that helps."""

import errno
import socket
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from qwen1.browser import commands, serving
from qwen1.browser.conversation import Chat
from qwen1.browser.page import ChatPage

from .conftest import Client


@pytest.fixture
def taken():
    """A port on which another program listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
    for name in ("GRADIO_SERVER_NAME", "GRADIO_SERVER_PORT", "QWEN_CHECKPOINT"):
        monkeypatch.delenv(name, raising=False)


def test_a_free_address_is_fine(taken):
    serving.check_address(None, None)
    serving.check_address("0.0.0.0", None)
    serving.check_address("127.0.0.1", 0)


def test_a_port_that_is_taken(taken):
    with pytest.raises(OSError) as error:
        serving.check_address(None, taken)
    assert str(error.value) == (
        f"Port {taken} is taken: name another one by --server-port, or leave --server-port out for the first free one "
        "from 7860."
    )


def test_the_command_says_so(taken):
    failed = CliRunner().invoke(commands.app, ["--server-port", str(taken)])
    assert failed.exit_code == 1
    assert failed.stderr.startswith(f"qwen1-browser: Port {taken} is taken") and failed.stderr.count("\n") == 1


def test_a_port_without_permission(monkeypatch):
    def refuse(self, address):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(socket.socket, "bind", refuse)
    with pytest.raises(OSError, match="^No permission for port 80: name one from 1024 on by --server-port"):
        serving.check_address(None, 80)


def test_another_failure_names_the_address(monkeypatch):
    def refuse(self, address):
        raise OSError(errno.ENOBUFS, "No buffer space available")

    monkeypatch.setattr(socket.socket, "bind", refuse)
    with pytest.raises(OSError, match="^Nothing can be served at 127.0.0.1, port 80: No buffer space available"):
        serving.check_address(None, 80)


def test_a_host_that_is_unknown():
    with pytest.raises(OSError, match="^The host no-such-host.invalid is unknown: --server-name takes"):
        serving.check_address("no-such-host.invalid", None)


def test_a_host_that_is_another_machine(monkeypatch):
    with pytest.raises(OSError, match="^192.0.2.1 is no address of this machine: --server-name"):
        serving.check_address("192.0.2.1", None)
    monkeypatch.setenv("GRADIO_SERVER_NAME", "192.0.2.1")
    with pytest.raises(OSError, match="^192.0.2.1 is no address"):
        serving.check_address(None, None)


@pytest.fixture
def page():
    """A page whose `launch` fails as `failure` says."""

    def launch(**options):
        page.options = options
        if page.failure is not None:
            raise page.failure

    page = SimpleNamespace(
        launch=launch, failure=None, local_url="http://127.0.0.1:7860/", share_url=None, block_thread=lambda: None
    )
    return page


@pytest.mark.parametrize(
    "failure, kind, sentence",
    [
        (OSError("Cannot find empty port in range: 7860-7959. You can"), OSError, "None of the ports from 7860 on is"),
        (ValueError("When localhost is not accessible, a shareable"), ValueError, "NO_PROXY=localhost,127.0.0.1"),
        (Exception("Couldn't start: ensure localhost is accessible."), ValueError, "NO_PROXY=localhost,127.0.0.1"),
    ],
)
def test_what_gradio_says_of_its_functions_is_said_of_the_command(page, failure, kind, sentence):
    page.failure = failure
    with pytest.raises(kind, match=sentence) as error:
        serving.launch(page)
    assert "launch" not in str(error.value) and "share=" not in str(error.value)


def test_other_failures_stay(page):
    page.failure = RuntimeError("a bug")
    with pytest.raises(RuntimeError, match="^a bug$"):
        serving.launch(page)


def test_the_address_is_told_and_gradio_is_quiet(page, capsys):
    serving.launch(page)
    assert capsys.readouterr().out == "The page is at http://127.0.0.1:7860/; Ctrl-C ends it.\n"
    assert page.options["quiet"] and page.options["prevent_thread_lock"]


def test_a_public_address_that_there_is_not(page, capsys):
    serving.launch(page, share=True)
    assert "no public address" in capsys.readouterr().out
    page.share_url = "https://x.gradio.live"
    serving.launch(page, share=True)
    assert "no public address" not in capsys.readouterr().out


def test_of_visitors_beyond_a_number_nothing_is_kept_and_their_conversation_goes_on(stub_model):
    blocks = ChatPage(Chat(stub_model, None), "stub").blocks()
    serving.launch(blocks, wait=False, sessions=2)
    try:
        visitors = [Client(blocks.local_url) for _ in range(3)]
        for visitor in (*visitors, visitors[0]):
            visitor.ask("hello")
        assert len(blocks.app.state_holder.session_data) == 2
    finally:
        blocks.close()
    assert stub_model.asked[-1][1] == [("hello", "This is reply 1")]
