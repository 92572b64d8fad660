"""Asking a daemon how its mount is doing, over a unix socket.

Whoever connects may send one line with a JSON object, what he wants beyond the usual, and is sent one JSON
document and the end of the stream. Who says nothing is answered as well, half a second later. The socket is
in a directory that only the daemon's user may enter.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import trio

_ANSWER_SECONDS = 2.0
_SEND_SECONDS = 5.0
_LONGEST_ANSWER = 16 << 20
_QUESTION_SECONDS = 0.5
_LONGEST_QUESTION = 4096

log = logging.getLogger(__name__)


def ask(
    path: str, timeout: float = _ANSWER_SECONDS, *, question: dict[str, Any] | None = None
) -> dict[str, Any] | None:
    """The daemon's answer, None when there is none within `timeout` seconds.

    One that knows nothing of what the question asks for leaves it out.
    """
    deadline = time.monotonic() + timeout
    pieces, size = [], 0
    try:
        directory = os.open(os.path.dirname(path), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
                connection.settimeout(timeout)
                connection.connect(_short_name(directory, path))
                connection.sendall(json.dumps(question or {}).encode("ascii") + b"\n")
                while size < _LONGEST_ANSWER:
                    connection.settimeout(max(0.01, deadline - time.monotonic()))
                    try:
                        piece = connection.recv(1 << 16)
                    except ConnectionResetError:
                        break  # an older daemon, which reads no question (net/unix/af_unix.c)
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


async def serve_control(
    listener: socket.socket, answer: Callable[[dict[str, Any]], dict[str, Any]]
) -> None:
    """Send `answer(question)` to everyone who connects, until cancelled."""
    import trio

    async def handle(stream: trio.SocketStream) -> None:
        try:
            data = json.dumps(answer(await _question(stream))).encode("ascii")
            with trio.move_on_after(_SEND_SECONDS):
                await stream.send_all(data)
        except trio.BrokenResourceError:
            pass
        except Exception:
            # A question must never end a mount.
            log.exception("a question for the figures could not be answered")

    await trio.serve_listeners(handle, [trio.SocketListener(trio.socket.from_stdlib_socket(listener))])


async def _question(stream: trio.SocketStream) -> dict[str, Any]:
    """What a client wants; nothing in particular when he says nothing, or what makes no sense."""
    import trio

    line = b""
    with trio.move_on_after(_QUESTION_SECONDS):
        while b"\n" not in line and len(line) < _LONGEST_QUESTION:
            piece = await stream.receive_some(_LONGEST_QUESTION)
            if not piece:
                break
            line += piece
    try:
        question = json.loads(line.partition(b"\n")[0])
    except ValueError:
        return {}
    return question if isinstance(question, dict) else {}
