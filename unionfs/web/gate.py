"""Who may see the pages: the token, the cookie set for it, the Host header, and headers for the browser.

Any process on this host can connect to a port, and so can any web site that runs in the user's browser:

- the pages are below a secret path, and need a secret cookie of that path. A browser sends cookies to every
  port of a host, but one with a path only to those who know it; so a server of another user does not get it.
- a site whose name is made to mean this address (DNS rebinding) sends its name as Host, which is refused.
- SameSite=Strict: requests that another site causes come without the cookie.
"""

from __future__ import annotations

import ipaddress
import re
import secrets
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any, Final
from urllib.parse import parse_qs

from jinja2 import Environment

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_COOKIE: Final = "unionfs"
_HOST: Final = re.compile(rb"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9.-]+)(?::[0-9]{1,5})?")
_HEADERS: Final = (
    (
        b"content-security-policy",
        b"default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; img-src 'self' data:; "
        b"form-action 'none'; frame-ancestors 'none'; base-uri 'none'",
    ),
    (b"x-frame-options", b"DENY"),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
)


class Gate:
    """The ASGI application around another: answers those who may not see it."""

    def __init__(self, app: App, templates: Environment, path: str, token: str) -> None:
        """`path`: below which the application is. Nobody may guess it or the token: see `secret`."""
        self._app = app
        self._templates = templates
        self._path = path
        self._cookie = secret()
        self._token = token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await self._answer(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), *_HEADERS]}
            await send(message)

        headers: Iterable[tuple[bytes, bytes]] = scope["headers"]
        hosts = [value for name, value in headers if name == b"host"]
        if len(hosts) != 1 or not _is_address(hosts[0]):
            await self._reply(sending, 421, "misdirected.html")
        elif scope["method"] not in ("GET", "HEAD"):
            await self._reply(sending, 405, "unchanging.html", (b"allow", b"GET, HEAD"))
        elif scope["path"] == "/" and self._has_token(scope["query_string"]):
            cookie = f"{_COOKIE}={self._cookie}; Path={self._path}; HttpOnly; SameSite=Strict"
            # A page and no redirect: after a link on another site, that would come without the cookie.
            await self._reply(sending, 200, "opened.html", (b"set-cookie", cookie.encode()))
        elif f"{scope['path']}/".startswith(f"{self._path}/") and self._has_cookie(headers):
            await self._app(scope, receive, sending)
        else:
            await self._reply(sending, 403, "closed.html")

    def _has_token(self, query: bytes) -> bool:
        given = parse_qs(query.decode("latin-1"), encoding="latin-1").get("token", [])
        return len(given) == 1 and secrets.compare_digest(given[0].encode("latin-1"), self._token)

    def _has_cookie(self, headers: Iterable[tuple[bytes, bytes]]) -> bool:
        # Not by http.cookies: it takes none if another server of this host has set one that it cannot parse.
        given = (pair.strip() for name, value in headers if name == b"cookie" for pair in value.split(b";"))
        wanted = f"{_COOKIE}={self._cookie}".encode()
        return any(secrets.compare_digest(pair, wanted) for pair in given)

    async def _reply(
        self, send: Send, status: int, template: str, *headers: tuple[bytes, bytes]
    ) -> None:
        """Answer with a page that says why, or with the one that leads to the others."""
        body = self._templates.get_template(template).render(path=self._path).encode()
        length = (b"content-length", str(len(body)).encode())
        kind = (b"content-type", b"text/html; charset=utf-8")
        await send({"type": "http.response.start", "status": status, "headers": [kind, length, *headers]})
        await send({"type": "http.response.body", "body": body})


def secret() -> str:
    """Return a word for a URL that nobody can guess: 256 bits."""
    return secrets.token_urlsafe(32)


def _is_address(host: bytes) -> bool:
    """Return whether a Host header is an IP address or localhost: names can be made to mean any address."""
    found = _HOST.fullmatch(host)
    if found is None:
        return False
    name = found[1].decode("ascii").strip("[]")
    if name == "localhost":
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
