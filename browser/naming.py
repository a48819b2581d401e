"""Calls the visitor's Chinese by a name that Gradio has texts for.

Gradio's own script chooses the language from what the browser calls it, and knows Chinese as `zh-CN` and `zh-TW` alone:
`zh`, `zh-HK` or `zh-Hans-CN` would get English. It chooses before any script runs that a page can bring through
Gradio, so one is put before all others, while the page is on its way to the browser.
"""

from __future__ import annotations

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

SCRIPT = """
(() => {
  const named = name => {
    if (!/^zh(-|$)/i.test(name)) return name;
    return /^zh-(.*-)?(hant|tw|hk|mo)(-|$)/i.test(name) ? "zh-TW" : "zh-CN";
  };
  const languages = Object.freeze((navigator.languages || [navigator.language]).map(named));
  Object.defineProperty(navigator, "languages", { get: () => languages });
  Object.defineProperty(navigator, "language", { get: () => languages[0] });
})();
"""
_START = b"<head>"


class NamedLanguage:
    """An ASGI middleware that puts `SCRIPT` into every HTML page, before the scripts that it has.

    Args:
        app: whose pages they are; all else goes through it as it is.
    """

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http" or scope["method"] != "GET":
            await self.app(scope, receive, send)
            return
        start: Message | None = None
        body = b""

        async def sent(message: Message) -> None:
            nonlocal start, body
            if message["type"] == "http.response.start" and _is_page(message):
                start = message  # its length is known when all of the page is
            elif start is None:
                await send(message)
            else:
                body += message.get("body", b"")
                if not message.get("more_body", False):
                    page = body.replace(_START, b"%s<script>%s</script>" % (_START, SCRIPT.encode()), 1)
                    MutableHeaders(scope=start)["content-length"] = str(len(page))
                    await send(start)
                    await send({"type": "http.response.body", "body": page})

        await self.app(scope, receive, sent)


def _is_page(message: Message) -> bool:
    headers = MutableHeaders(scope=message)
    return headers.get("content-type", "").startswith("text/html") and "content-encoding" not in headers
