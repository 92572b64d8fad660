"""Asking a daemon how its mount is doing, over a unix socket.

A client sends one line with a JSON object, what it wants beyond the usual, and receives one JSON document and
the end of the stream. A client that sends nothing is answered as well, half a second later. Both sides check
by SO_PEERCRED whom they talk to (unix(7)): a daemon answers its own user and root; a client reads the answer
of a process of its own user, or of the very process that it expects. An answer has a deadline and a largest
size.
"""

from __future__ import annotations

import json
import os
import select
import socket
import struct
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import trio

ANSWER_SECONDS: Final = 2.0
_LONGEST_ANSWER: Final = 16 << 20
_LONGEST_OF_OTHERS: Final = 256 << 10
_MOST_LEVELS: Final = 8
_CREDENTIALS: Final = struct.Struct("3i")  # struct ucred: pid, uid, gid


@dataclass(frozen=True, slots=True)
class Peer:
    """The process at the other end of a unix socket when it called connect(2) or listen(2)."""

    pid: int
    uid: int


def peer_of(connection: socket.socket | trio.socket.SocketType) -> Peer:
    """Who the other end is; SO_PEERCRED, unix(7)."""
    pid, uid, _ = _CREDENTIALS.unpack(
        connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    )
    return Peer(pid, uid)


def ask(
    address: str,
    timeout: float = ANSWER_SECONDS,
    *,
    question: dict[str, Any] | None = None,
    pid: int | None = None,
) -> dict[str, Any] | None:
    """The daemon's answer, None when there is none within `timeout` seconds.

    `address` is a path of at most 107 bytes, or a zero byte and an abstract name. The daemon must be process
    `pid`, or any process of this user. A daemon that does not know what the question asks for leaves it out.
    """
    return ask_all({address: pid}, timeout, question=question).get(address)


def ask_all(
    addresses: Mapping[str, int | None],
    timeout: float,
    *,
    question: dict[str, Any] | None = None,
) -> dict[str, dict[str, Any]]:
    """The answers of many daemons, asked at once, by their addresses; those within `timeout` seconds.

    `addresses` says which process each must be (None: any of this user). The answer of a named process, which
    may be another user's, is `printable`; one that is too long counts as none.
    """
    deadline = time.monotonic() + timeout
    line = json.dumps(question or {}).encode("ascii") + b"\n"
    found: dict[str, dict[str, Any]] = {}
    with ExitStack() as sockets:
        waiting: dict[int, tuple[str, socket.socket, bytearray]] = {}
        poll = select.poll()
        for address, pid in addresses.items():
            connection = sockets.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            connection.setblocking(False)
            try:
                connection.connect(address)
                if not _is_expected(peer_of(connection), pid):
                    continue
                connection.send(line)
            except OSError:
                continue  # nobody listens, or too many wait to be heard
            waiting[connection.fileno()] = address, connection, bytearray()
            poll.register(connection, select.POLLIN)
        while waiting and (left := deadline - time.monotonic()) > 0:
            for fd, _ in poll.poll(left * 1000):
                if time.monotonic() > deadline:
                    break
                address, connection, data = waiting[fd]
                longest = _LONGEST_ANSWER if addresses[address] is None else _LONGEST_OF_OTHERS
                if not _receive(connection, data, longest):
                    continue
                poll.unregister(connection)
                del waiting[fd]
                answer = None if len(data) > longest else _parsed(data)
                if answer is not None:
                    found[address] = answer if addresses[address] is None else _harmless(answer)
    return found


def _is_expected(peer: Peer, pid: int | None) -> bool:
    return peer.uid == os.geteuid() if pid is None else peer.pid == pid


def _receive(connection: socket.socket, data: bytearray, longest: int) -> bool:
    """Take what has come; whether that was all."""
    try:
        piece = connection.recv(1 << 16)
    except BlockingIOError:
        return False
    except OSError:
        return True  # a daemon that does not read its question resets the connection (net/unix/af_unix.c)
    data += piece
    return not piece or len(data) > longest


def _parsed(data: bytearray) -> dict[str, Any] | None:
    try:
        answer = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return answer if isinstance(answer, dict) else None


def _harmless(value: Any, levels: int = _MOST_LEVELS) -> Any:
    """What another user's daemon says, safe to be shown: no text in it can control a terminal."""
    if levels == 0:
        return None
    match value:
        case str():
            return value if value.isprintable() else repr(value)
        case dict():
            return {str(_harmless(key)): _harmless(item, levels - 1) for key, item in value.items()}
        case list():
            return [_harmless(item, levels - 1) for item in value]
    return value
