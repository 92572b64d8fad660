"""The daemon's side of `control`: answers questions."""

from __future__ import annotations

import json
import logging
import os
import socket
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any, Final

import trio

from unionfs.sys.peers import peer_of

_SEND_SECONDS: Final = 5.0
_QUESTION_SECONDS: Final = 0.5
_LONGEST_QUESTION: Final = 4096

log = logging.getLogger(__name__)


def listen(address: str) -> socket.socket:
    """Return a socket that listens at `address` (see `ask`). Raises OSError."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if not address.startswith("\0"):
            with suppress(FileNotFoundError):
                os.unlink(address)
        listener.bind(address)
        listener.listen(16)
    except OSError:
        listener.close()
        raise
    return listener


async def serve_control(
    listeners: Sequence[socket.socket], answer: Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]
) -> None:
    """Send `await answer(question)` to each client that is root or this user, until cancelled."""
    async def handle(stream: trio.SocketStream) -> None:
        peer = peer_of(stream.socket)
        if not peer.is_own:
            log.debug("process %d of uid %d may not ask", peer.pid, peer.uid)
            return
        try:
            data = json.dumps(await answer(await _question(stream))).encode("ascii")
            with trio.move_on_after(_SEND_SECONDS):
                await stream.send_all(data)
        except trio.BrokenResourceError:
            pass
        except Exception:
            # A question must never end a mount.
            log.exception("a question for the figures could not be answered")

    await trio.serve_listeners(
        handle, [trio.SocketListener(trio.socket.from_stdlib_socket(listener)) for listener in listeners]
    )


async def _question(stream: trio.SocketStream) -> dict[str, Any]:
    """Read a client's question. Returns {} if it sends nothing or something other than a JSON object."""
    line = b""
    with trio.move_on_after(_QUESTION_SECONDS):
        while b"\n" not in line and len(line) < _LONGEST_QUESTION:
            piece = await stream.receive_some(_LONGEST_QUESTION)
            if not piece:
                break
            line += piece
    try:
        question = json.loads(line.partition(b"\n")[0])
    except (ValueError, RecursionError):
        return {}
    return question if isinstance(question, dict) else {}
