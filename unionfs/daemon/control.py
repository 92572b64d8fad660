"""Asking a daemon how its mount is doing, over a unix socket.

Whoever connects is sent one JSON document and the end of the stream; nothing is read from him. The socket
is in a directory that only the daemon's user may enter.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

_ANSWER_SECONDS = 2.0
_SEND_SECONDS = 5.0
_LONGEST_ANSWER = 16 << 20

log = logging.getLogger(__name__)


def ask(path: str, timeout: float = _ANSWER_SECONDS) -> dict[str, Any] | None:
    """The daemon's answer, None when there is none within `timeout` seconds."""
    deadline = time.monotonic() + timeout
    pieces, size = [], 0
    try:
        directory = os.open(os.path.dirname(path), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
                connection.settimeout(timeout)
                connection.connect(_short_name(directory, path))
                while size < _LONGEST_ANSWER:
                    connection.settimeout(max(0.01, deadline - time.monotonic()))
                    piece = connection.recv(1 << 16)
                    if not piece:
                        break
                    pieces.append(piece)
                    size += len(piece)
        finally:
            os.close(directory)
        answer = json.loads(b"".join(pieces))
    except (OSError, ValueError):
        return None
    return answer if isinstance(answer, dict) else None


def _short_name(directory_fd: int, path: str) -> str:
    """A name for a socket in a directory of any length; unix(7) has room for 108 bytes."""
    return f"/proc/self/fd/{directory_fd}/{os.path.basename(path)}"


def listen(path: str) -> socket.socket:
    """A listening socket at `path`, which must not exist. Raises OSError."""
    directory = os.open(os.path.dirname(path), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with suppress(FileNotFoundError):
            os.unlink(path)
        listener.bind(_short_name(directory, path))
        listener.listen(16)
    except OSError:
        listener.close()
        raise
    finally:
        os.close(directory)
    return listener


async def serve_control(listener: socket.socket, answer: Callable[[], dict[str, Any]]) -> None:
    """Send `answer()` to everyone who connects, until cancelled."""
    import trio

    async def handle(stream: trio.SocketStream) -> None:
        try:
            data = json.dumps(answer()).encode("ascii")
            with trio.move_on_after(_SEND_SECONDS):
                await stream.send_all(data)
        except trio.BrokenResourceError:
            pass
        except Exception:
            # A question must never end a mount.
            log.exception("a question for the figures could not be answered")

    await trio.serve_listeners(handle, [trio.SocketListener(trio.socket.from_stdlib_socket(listener))])
