"""Serves requests over HTTP/1.1 on a unix socket, one for each connection, with limits.

h11 implements the protocol, trio the connections. A request must arrive completely within its time, and has a
largest size; an answer closes its connection, so there are no idle ones. Only processes of root and of this
user are answered. The work is done in threads: a storage that hangs delays no other request.
"""

from __future__ import annotations

import logging
import signal
import socket
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Final

import h11
import trio

from unionfs.daemon import watchdog
from unionfs.errors import UserError
from unionfs.plugin.requests import Answer, failure
from unionfs.sys.manager import Manager
from unionfs.sys.peers import Peer, peer_of

Ask = Callable[[str, bytes, int], Answer]
"""`Requests.answer`: request, body, caller's pid."""

_REQUEST_SECONDS: Final = 30.0
_ANSWER_SECONDS: Final = 30.0
_LAST_SECONDS: Final = 20.0
"""For the requests that are being answered when the server is told to end."""
_DRAIN_SECONDS: Final = 5.0
_MOST_BYTES: Final = 1 << 20
"""The maximum size of a request's body; real ones have a few hundred bytes."""
_MOST_HEADER_BYTES: Final = 1 << 14
_MOST_THREADS: Final = 256
_TYPE: Final = "application/vnd.docker.plugins.v1.2+json"

_log = logging.getLogger(__name__)


class _RefusedError(Exception):
    def __init__(self, answer: Answer) -> None:
        self.answer = answer


def serve(listener: socket.socket, ask: Ask, manager: Manager) -> None:
    """Serve until SIGTERM or SIGINT. Tells the manager as soon as such a signal ends it in order."""
    trio.run(_serve, listener, ask, manager)


async def _serve(listener: socket.socket, ask: Ask, manager: Manager) -> None:
    threads = trio.CapacityLimiter(_MOST_THREADS)

    async def connected(stream: trio.SocketStream) -> None:
        peer = peer_of(stream.socket)
        if not peer.is_own:
            _log.warning("process %d of uid %d may not use the plugin", peer.pid, peer.uid)
            return
        try:
            await converse(stream, peer, ask, threads)
        except Exception:  # one connection must not end the others
            _log.exception("the connection of process %d failed", peer.pid)

    listeners = [trio.SocketListener(trio.socket.from_stdlib_socket(listener))]
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with trio.open_nursery() as connections:
            async with trio.open_nursery() as accepting:
                accepting.start_soon(
                    partial(trio.serve_listeners, connected, listeners, handler_nursery=connections)
                )
                manager.tell("READY=1")
                accepting.start_soon(watchdog.watch, manager)
                async for _ in signals:
                    break
                manager.tell("STOPPING=1")
                accepting.cancel_scope.cancel()
            connections.cancel_scope.deadline = trio.current_time() + _LAST_SECONDS


async def converse(stream: trio.abc.Stream, peer: Peer, ask: Ask, threads: trio.CapacityLimiter) -> None:
    """Answer the one request of a connection, and close it."""
    connection = h11.Connection(h11.SERVER, max_incomplete_event_size=_MOST_HEADER_BYTES)
    answer = None
    try:
        async with stream:
            try:
                with trio.fail_after(_REQUEST_SECONDS):
                    request, body = await _received(connection, stream)
            except _RefusedError as error:
                await _refuse(connection, stream, error.answer)
                return
            except trio.TooSlowError:
                text = f"the request has not arrived within {_REQUEST_SECONDS:.0f} s; send it again."
                await _refuse(connection, stream, failure(text, 408))
                return
            answer = await trio.to_thread.run_sync(
                ask, request, body, peer.pid, abandon_on_cancel=True, limiter=threads
            )
            await _send(connection, stream, answer)
    except (trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError):
        if answer is not None and answer.undo is not None:
            _log.warning("the engine (pid %d) has gone before its mount was made, which is undone", peer.pid)
            await trio.to_thread.run_sync(_undone, answer.undo, limiter=threads)


def _undone(undo: Callable[[], object]) -> None:
    try:
        undo()
    except (UserError, OSError) as error:
        _log.warning("%s", error)


async def _received(connection: h11.Connection, stream: trio.abc.Stream) -> tuple[str, bytes]:
    """The name and the body of a request. Raises _RefusedError."""
    name, body = "", bytearray()
    while True:
        try:
            event = connection.next_event()
        except h11.RemoteProtocolError as error:
            raise _RefusedError(
                failure(f"invalid HTTP request ({error}); correct it.", error.error_status_hint)
            ) from error
        if event is h11.NEED_DATA:
            if connection.they_are_waiting_for_100_continue:
                await stream.send_all(
                    _bytes(connection, h11.InformationalResponse(status_code=100, headers=[]))
                )
            connection.receive_data(bytes(await stream.receive_some(1 << 16)))
        elif isinstance(event, h11.Request):
            if event.method != b"POST":
                raise _RefusedError(failure("the plugin protocol has only POST requests; send one.", 405))
            name = event.target.decode("ascii", "replace").partition("?")[0].strip("/")
        elif isinstance(event, h11.Data):
            body += event.data
            if len(body) > _MOST_BYTES:
                raise _RefusedError(
                    failure(f"the request has more than {_MOST_BYTES} bytes; send less.", 413)
                )
        elif isinstance(event, h11.EndOfMessage):
            return name, bytes(body)
        else:  # the end of the connection
            raise trio.BrokenResourceError


async def _refuse(connection: h11.Connection, stream: trio.abc.Stream, answer: Answer) -> None:
    """Answer a request that is not read to its end."""
    if connection.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
        return
    await _send(connection, stream, answer)
    # A socket that is closed with unread data loses the answer, too: read what is underway.
    with trio.move_on_after(_DRAIN_SECONDS), suppress(trio.BrokenResourceError):
        if isinstance(stream, trio.abc.HalfCloseableStream):
            await stream.send_eof()
        for _ in range(64):
            if not await stream.receive_some(1 << 16):
                break


async def _send(connection: h11.Connection, stream: trio.abc.Stream, answer: Answer) -> None:
    head = h11.Response(
        status_code=answer.status,
        headers=[
            ("Content-Type", _TYPE),
            ("Content-Length", str(len(answer.content))),
            ("Connection", "close"),
        ],
    )
    parts = (head, h11.Data(answer.content), h11.EndOfMessage())
    with trio.fail_after(_ANSWER_SECONDS):
        await stream.send_all(b"".join(_bytes(connection, part) for part in parts))


def _bytes(connection: h11.Connection, event: h11.Event) -> bytes:
    return connection.send(event) or b""
