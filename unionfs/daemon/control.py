"""Asks a daemon about its mount over a unix socket.

A client sends one line with a JSON object that requests extra information, and receives one JSON document
until end of file. A client that sends nothing is answered after half a second. Both sides check the peer by
SO_PEERCRED (unix(7)): a daemon answers its own user and root; a client accepts an answer from a process of
its own user, or from the one expected process. Answers are limited in time and size.
"""

from __future__ import annotations

import json
import os
import select
import socket
import time
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, Final

from unionfs.sys.peers import peer_of

ANSWER_SECONDS: Final = 2.0
_LONGEST_ANSWER: Final = 16 << 20
_LONGEST_OF_OTHERS: Final = 256 << 10
_MOST_LEVELS: Final = 8


def listens(address: str) -> bool:
    """Return whether a daemon listens at a path, whatever PID namespace it is in."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.setblocking(False)
        try:
            connection.connect(address)
        except BlockingIOError:  # its queue is full
            return True
        except OSError:
            return False
    return True


def ask(
    address: str,
    timeout: float = ANSWER_SECONDS,
    *,
    question: dict[str, Any] | None = None,
    pid: int | None = None,
) -> dict[str, Any] | None:
    """Return the daemon's answer, or None if none arrives within `timeout` seconds.

    `address` is a path of at most 107 bytes, or a zero byte and an abstract name. The daemon must be process
    `pid`, or any process of this user if None. It ignores unknown parts of a question.
    """
    return ask_all({address: pid}, timeout, question=question).get(address)


def ask_all(
    addresses: Mapping[str, int | None],
    timeout: float,
    *,
    question: dict[str, Any] | None = None,
) -> dict[str, dict[str, Any]]:
    """Ask many daemons at once; return the answers within `timeout` seconds, by address.

    `addresses` maps each address to the required pid (None: any process of this user). Answers of named
    processes, which may be another user's, are made printable; too long answers are dropped.
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
                peer = peer_of(connection)
                if peer.uid != os.geteuid() if pid is None else peer.pid != pid:
                    continue
                connection.send(line)
            except OSError:
                continue  # no listener, or a full backlog
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


def _receive(connection: socket.socket, data: bytearray, longest: int) -> bool:
    """Append received data; return whether the answer is complete."""
    try:
        piece = connection.recv(1 << 16)
    except BlockingIOError:
        return False
    except OSError:
        return True  # a daemon that closes without reading resets the connection (net/unix/af_unix.c)
    data += piece
    return not piece or len(data) > longest


def _parsed(data: bytearray) -> dict[str, Any] | None:
    try:
        answer = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return answer if isinstance(answer, dict) else None


def _harmless(value: Any, levels: int = _MOST_LEVELS) -> Any:
    """Make another user's answer safe to print: its text cannot control a terminal."""
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
