"""A page reaches the browser with the script that names its Chinese; nothing else that is served changes."""

import asyncio

import pytest

from qwen1.browser.naming import SCRIPT, NamedLanguage

PAGE = b"<!doctype html><html><head><script>first</script></head></html>"


def served(parts: list[bytes], headers: dict[str, str], method: str = "GET", kind: str = "http") -> list[dict]:
    """What is sent where an application answers with these parts."""

    async def app(scope, receive, send):
        named = [(name.encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": 200, "headers": named})
        for i, part in enumerate(parts):
            await send({"type": "http.response.body", "body": part, "more_body": i < len(parts) - 1})

    sent = []

    async def send(message):
        sent.append(message)

    asyncio.run(NamedLanguage(app)({"type": kind, "method": method}, None, send))
    return sent


@pytest.mark.parametrize("cuts", [(), (3,), (20, 24), range(1, len(PAGE))], ids=["whole", "in 2", "in 3", "by bytes"])
def test_a_page_gets_the_script_before_its_own(cuts):
    edges = [0, *cuts, len(PAGE)]
    parts = [PAGE[start:end] for start, end in zip(edges, edges[1:], strict=False)]
    start, body = served(parts, {"content-type": "text/html; charset=utf-8", "content-length": str(len(PAGE))})
    page = body["body"].decode()
    assert page.replace(f"<script>{SCRIPT}</script>", "").encode() == PAGE
    assert page.index(SCRIPT) < page.index("first")
    assert (b"content-length", str(len(body["body"])).encode()) in start["headers"]


@pytest.mark.parametrize(
    "headers, method, kind",
    [
        ({"content-type": "text/event-stream"}, "GET", "http"),
        ({"content-type": "application/json"}, "GET", "http"),
        ({"content-type": "text/html", "content-encoding": "br"}, "GET", "http"),
        ({"content-type": "text/html"}, "POST", "http"),
        ({}, "GET", "http"),
        ({"content-type": "text/html"}, "GET", "websocket"),
    ],
)
def test_all_else_goes_through_as_it_is_and_at_once(headers, method, kind):
    parts = [b"<head>1", b"2", b"3"]
    start, *bodies = served(parts, headers, method, kind)
    assert [body["body"] for body in bodies] == parts
    assert dict(start["headers"]) == {name.encode(): value.encode() for name, value in headers.items()}
