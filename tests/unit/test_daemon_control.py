"""The control socket: with a question, without one, and with an invalid one."""

from __future__ import annotations

import functools
import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from unionfs.daemon import answering
from unionfs.daemon.answering import listen, serve_control
from unionfs.daemon.control import ask


def _raw(path: Path, sent: bytes | None, *, ends: bool) -> dict[str, Any]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(10)
        connection.connect(str(path))
        if sent is not None:
            connection.sendall(sent)
        if ends:
            connection.shutdown(socket.SHUT_WR)
        data = b""
        while piece := connection.recv(65536):
            data += piece
    found: dict[str, Any] = json.loads(data)
    return found


async def _echo(question: dict[str, Any]) -> dict[str, Any]:
    return {"asked": question}


async def _asked(path: Path, client: Callable[[], Any]) -> Any:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve_control, [listen(str(path))], _echo)
        answer = await trio.to_thread.run_sync(client)
        nursery.cancel_scope.cancel()
    return answer


async def test_a_question(area: Path) -> None:
    path = area / "s"
    client = functools.partial(ask, str(path), question={"watch_seconds": 2.5})
    assert await _asked(path, client) == {"asked": {"watch_seconds": 2.5}}


async def test_the_end_of_a_question(area: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is a line feed: a client that keeps its side open is answered at once."""
    monkeypatch.setattr(answering, "_QUESTION_SECONDS", 60)
    path = area / "s"
    client = functools.partial(_raw, path, b'{"watch_seconds": 2.5}\n', ends=False)
    assert await _asked(path, client) == {"asked": {"watch_seconds": 2.5}}


async def test_no_question(area: Path) -> None:
    path = area / "s"
    assert await _asked(path, functools.partial(ask, str(path))) == {"asked": {}}


@pytest.mark.parametrize(
    ("sent", "ends"),
    [
        (None, False),  # as clients did before there were questions
        (None, True),
        (b"{}\n", False),
        (b"no json\n", False),
        (b"[1]\n", False),
        (b"\xff\xfe\n", False),
        (b"{" * 4096, False),
        (b'{"half":', True),
    ],
)
async def test_who_asks_for_nothing(area: Path, sent: bytes | None, ends: bool) -> None:
    path = area / "s"
    assert await _asked(path, functools.partial(_raw, path, sent, ends=ends)) == {"asked": {}}


async def test_an_older_daemon_that_reads_no_question(area: Path) -> None:
    """It answers and closes without reading the question, which resets our connection."""
    listener = listen(str(area / "s"))

    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(1, socket.MSG_PEEK)  # the question has arrived
            connection.sendall(b'{"figures": {}}')

    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.to_thread.run_sync, serve)
        answer = await trio.to_thread.run_sync(
            functools.partial(ask, str(area / "s"), question={"watch_seconds": 1})
        )
    listener.close()
    assert answer == {"figures": {}}
