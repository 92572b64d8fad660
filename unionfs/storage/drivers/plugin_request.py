"""Sends one request to a Docker volume plugin, which may be broken or hostile: HTTP/1.1 with limits.

h11 implements the protocol, this module the limits. Every received byte counts (including headers, interim
answers and chunk sizes), and one deadline covers connecting, sending, headers and body. Nothing is
decompressed; redirects are not followed.
"""

from __future__ import annotations

import os
import ssl
from dataclasses import dataclass

# `plugin` imports this module only for a request: these two take most of a short command's time.
import h11
import trio

from unionfs.errors import reason
from unionfs.storage.drivers import trusted
from unionfs.storage.drivers.plugin_search import SOCKET, Address
from unionfs.sys.peers import peer_of

MOST_BYTES = 1 << 20
"""The maximum length of an answer (bytes); real ones have a few kilobytes."""
_ACCEPT = "application/vnd.docker.plugins.v1.2+json"


class RequestError(Exception):
    """No usable answer; `str(error)` is a sentence fragment: `CAUSE; CURE`."""

    silent = False
    """Whether the deadline expired."""


class _SilentError(RequestError):
    silent = True


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    content: bytes


def post(
    address: Address, tls: ssl.SSLContext | None, request: str, content: bytes, seconds: float
) -> Answer:
    """Send a request and return its answer, within `seconds`. Raises RequestError.

    Blocks. It runs its own event loop, so any thread without one can call it.
    """
    try:
        return trio.run(_post, address, tls, request, content, seconds)
    except trio.TooSlowError as error:
        raise _SilentError(
            f"it has not answered {request} completely within {_shown(seconds)}; restart it, or remove what "
            "describes it"
        ) from error
    except h11.ProtocolError as error:
        raise RequestError(f"it does not speak HTTP ({error}); see its own messages") from error
    except (OSError, ValueError, trio.BrokenResourceError, trio.ClosedResourceError) as error:
        raise RequestError(
            f"it does not answer: {_words(error)}; start it, or remove what describes it"
        ) from error


def _words(error: BaseException) -> str:
    """Return the cause in words. trio wraps errors of TLS, and of all addresses of a host."""
    cause = error.__cause__ or error
    while isinstance(cause, BaseExceptionGroup):
        cause = cause.exceptions[0]
    if isinstance(cause, OSError) and not isinstance(cause, ssl.SSLError):
        # What asyncio and trio write begins with the number in brackets.
        number = cause.errno or 0
        return reason(OSError(number, os.strerror(number)) if number > 0 else cause)
    return str(cause)


def _shown(seconds: float) -> str:
    return f"{max(seconds, 0):.0f} s"


async def _post(
    address: Address, tls: ssl.SSLContext | None, request: str, content: bytes, seconds: float
) -> Answer:
    with trio.fail_after(max(seconds, 0)):
        host = "plugin" if address.socket else address.host_and_port[0]
        stream = await _connected(address, tls)
        try:
            return await _exchange(stream, host, request, content)
        finally:
            await trio.aclose_forcefully(stream)
    raise AssertionError("unreachable")


async def _connected(address: Address, tls: ssl.SSLContext | None) -> trio.abc.Stream:
    if address.socket:
        return await _connected_to_socket(address.socket)
    host, port = address.host_and_port
    stream = await trio.open_tcp_stream(host, port)
    if tls is None:
        return stream
    # Many servers close without TLS's close_notify.
    secured = trio.SSLStream(stream, tls, server_hostname=host, https_compatible=True)
    try:
        await secured.do_handshake()
    except BaseException:
        await trio.aclose_forcefully(stream)
        raise
    return secured


async def _connected_to_socket(path: str) -> trio.SocketStream:
    """Connect to a socket that only root or this user could create or replace, of a process of theirs."""
    with trusted.opened(path, SOCKET) as name:
        stream = await trio.open_unix_socket(name)
    # Of the process that called listen(2) (unix(7)): the owner of a socket may have given it away.
    peer = peer_of(stream.socket)
    if not peer.is_own:
        await trio.aclose_forcefully(stream)
        raise RequestError(
            f"the process that listens there has uid {peer.uid}; run it as root, or remove what describes it"
        )
    return stream


async def _exchange(stream: trio.abc.Stream, host: str, request: str, content: bytes) -> Answer:
    connection = h11.Connection(h11.CLIENT, max_incomplete_event_size=MOST_BYTES)
    head = h11.Request(
        method="POST",
        target=f"/{request}",
        headers=[
            ("Host", host),
            ("Accept", _ACCEPT),
            ("Accept-Encoding", "identity"),
            ("Content-Length", str(len(content))),
            ("Connection", "close"),
        ],
    )
    parts = (connection.send(head), connection.send(h11.Data(content)), connection.send(h11.EndOfMessage()))
    await stream.send_all(b"".join(part or b"" for part in parts))
    status, received, body = 0, 0, bytearray()
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            data = await stream.receive_some(1 << 16)
            received += len(data)
            if received > MOST_BYTES:
                raise RequestError(
                    f"it answers {request} with more than {MOST_BYTES} bytes; see its own messages"
                )
            connection.receive_data(bytes(data))
        elif isinstance(event, h11.Response):
            status = event.status_code
            _check_plain(request, event)
        elif isinstance(event, h11.Data):
            body += event.data
        elif isinstance(event, h11.EndOfMessage):
            return Answer(status, bytes(body))
        elif not isinstance(event, h11.InformationalResponse):
            raise RequestError(f"it ends the connection instead of answering {request}; see its own messages")


def _check_plain(request: str, response: h11.Response) -> None:
    for name, value in response.headers:
        if name == b"content-encoding" and value.strip().lower() not in (b"", b"identity"):
            raise RequestError(
                f"it answers {request} with compressed data, which was not asked for; see its own messages"
            )
