"""The control socket: with a question, without one, and with an invalid one."""

from __future__ import annotations

import functools
import json
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from unionfs.daemon import answering
from unionfs.daemon.answering import listen, serve_control
from unionfs.daemon.control import ask, ask_all, listens


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


async def test_a_question_without_an_end(area: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that sends more than any question has is answered without waiting for the rest."""
    monkeypatch.setattr(answering, "_QUESTION_SECONDS", 60)
    path = area / "s"
    assert await _asked(path, functools.partial(_raw, path, b" " * 4096, ends=False)) == {"asked": {}}


async def test_a_client_that_sends_nothing_more(area: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is answered without waiting for a question."""
    monkeypatch.setattr(answering, "_QUESTION_SECONDS", 60)
    path = area / "s"
    for sent in (None, b"", b"{", b'{"a": 1}'):
        asked = {"a": 1} if sent == b'{"a": 1}' else {}
        path.unlink(missing_ok=True)
        assert await _asked(path, functools.partial(_raw, path, sent, ends=True)) == {"asked": asked}


async def test_a_question_in_pieces(area: Path) -> None:
    path = area / "s"

    def client() -> dict[str, Any]:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(10)
            connection.connect(str(path))
            for piece in (b'{"a"', b': 1}\n{"b": 2}\n'):
                connection.sendall(piece)
                time.sleep(0.02)
            found: dict[str, Any] = json.loads(connection.makefile("rb").read())
            return found

    assert await _asked(path, client) == {"asked": {"a": 1}}


async def test_a_client_that_goes_away(area: Path, caplog: pytest.LogCaptureFixture) -> None:
    """That is no failure, and the next one is answered."""
    path = area / "s"
    asked = threading.Event()

    async def answer(_: dict[str, Any]) -> dict[str, Any]:
        await trio.to_thread.run_sync(asked.wait)
        return {"long": "x" * 1_000_000}

    def client() -> Any:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.connect(str(path))
            connection.sendall(b"{}\n")
        asked.set()
        return ask(str(path))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve_control, [listen(str(path))], answer)
        found = await trio.to_thread.run_sync(client)
        nursery.cancel_scope.cancel()
    assert len(found["long"]) == 1_000_000
    assert caplog.records == []


async def test_a_client_that_does_not_read(area: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is given up."""
    monkeypatch.setattr(answering, "_SEND_SECONDS", 0.1)
    path = area / "s"

    async def answer(_: dict[str, Any]) -> dict[str, Any]:
        return {"long": "x" * 10_000_000}

    def client() -> bool:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.connect(str(path))
            connection.sendall(b"{}\n")
            poll = select.poll()
            poll.register(connection, select.POLLRDHUP)
            return bool(poll.poll(20_000))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve_control, [listen(str(path))], answer)
        is_given_up = await trio.to_thread.run_sync(client)
        nursery.cancel_scope.cancel()
    assert is_given_up


@contextmanager
def _speaking(address: str, *answers: bytes) -> Iterator[Sequence[bytes]]:
    """A process of this user that sends an answer to each client; yields the questions."""
    listener, questions = listen(address), list[bytes]()

    def speak() -> None:
        for answer in answers:
            connection, _ = listener.accept()
            with connection:
                questions.append(connection.recv(4096))
                connection.sendall(answer)

    thread = threading.Thread(target=speak, daemon=True)
    thread.start()
    with listener:
        yield questions
        thread.join(10)


def test_who_may_answer(area: Path) -> None:
    """Any process of this user, or a certain one."""
    path = str(area / "s")
    with _speaking(path, b"{}", b"{}") as questions:
        assert ask(path, question={"x": 1}) == {}
        assert ask(path, pid=os.getpid()) == {}
        assert questions == [b'{"x": 1}\n', b"{}\n"]
    with listen(path):  # it is not waited for
        assert ask(path, 1000, pid=os.getpid() + 1) is None


def test_many_are_asked_at_once(area: Path) -> None:
    """The silent ones keep no answer of the others back."""
    silent, one, other = (str(area / name) for name in ("silent", "one", "other"))
    with listen(silent), _speaking(one, b'{"one": 1}'), _speaking(other, b'{"other": 2}'):
        found = ask_all({silent: None, one: None, str(area / "none"): None, other: None}, 0.5)
    assert found == {one: {"one": 1}, other: {"other": 2}}


@pytest.mark.parametrize("sent", [b"", b"[1]", b'"x"', b"1", b"{", b"{}{}", b"\xff", b"[" * 100_000])
def test_what_is_no_answer(area: Path, sent: bytes) -> None:
    path = str(area / "s")
    with _speaking(path, sent):
        assert ask(path) is None


def test_how_long_answers_are(area: Path) -> None:
    """A certain process, which may be another user's, says less than one of this user."""
    path = str(area / "s")
    sent = [b"{}".ljust(length) for length in (256 << 10, (256 << 10) + 1, 16 << 20, (16 << 20) + 1)]
    with _speaking(path, *sent):
        assert ask(path, pid=os.getpid()) == {}
        assert ask(path, pid=os.getpid()) is None
        assert ask(path, 10) == {}
        assert ask(path, 10) is None


def test_an_answer_without_an_end(area: Path) -> None:
    """It is given up when it is too long, whatever may follow."""
    path, heard = str(area / "s"), threading.Event()
    listener = listen(path)

    def speak() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.sendall(b"[" * ((256 << 10) + 1))
            heard.wait(60)

    thread = threading.Thread(target=speak, daemon=True)
    thread.start()
    with listener:
        assert ask(path, 1000, pid=os.getpid()) is None
        heard.set()
        thread.join(10)


def test_waiting_takes_no_processor_time(area: Path) -> None:
    path = str(area / "s")
    with listen(path):
        before = time.process_time()
        assert ask(path, 1.0) is None
        assert time.process_time() - before < 0.5


def test_what_others_say_can_be_printed(area: Path) -> None:
    """Without control characters, also in names, and not nested too deeply; other values are as they are."""
    path, text = str(area / "s"), "\x1b[2J"
    answer = {"plain": "ä b", "text": text, text: [text, 1, None, True, 2.5, {text: text}]}
    with _speaking(path, *(json.dumps(answer).encode(),) * 2):
        assert ask(path, pid=os.getpid()) == {
            "plain": "ä b", "text": repr(text),
            repr(text): [repr(text), 1, None, True, 2.5, {repr(text): repr(text)}],
        }  # fmt: skip
        assert ask(path) == answer

    def nested(levels: int, inner: Any) -> Any:
        for number in reversed(range(levels)):
            inner = [inner] if number % 2 else {"x": inner}
        return inner

    with _speaking(path, *(json.dumps(nested(levels, "in")).encode() for levels in (7, 9))):
        assert ask(path, pid=os.getpid()) == nested(7, "in")
        assert ask(path, pid=os.getpid()) == nested(8, None)


def test_whether_somebody_listens(area: Path) -> None:
    """Also a process that accepts nobody; not one that has ended."""
    path = str(area / "s")
    assert not listens(path)
    with listen(path):
        waiting = []
        for _ in range(100):
            waiting.append(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            waiting[-1].setblocking(False)
            try:
                waiting[-1].connect(path)
            except BlockingIOError:
                break
        assert len(waiting) < 100
        assert listens(path)
        assert ask(path, 0.1) is None
        for connection in waiting:
            connection.close()
    assert not listens(path)
    assert os.path.exists(path)


def test_where_it_listens(area: Path) -> None:
    """At a path that a killed process has left; an abstract name of another process stays that one's."""
    before = len(os.listdir("/proc/self/fd"))
    listen(str(area / "s")).close()
    with listen(str(area / "s")):
        assert listens(str(area / "s"))
    name = f"\0unionfs-test-{os.getpid()}"
    with listen(name):
        assert listens(name)
        with pytest.raises(OSError, match="in use"):
            listen(name)
    with pytest.raises(OSError, match="too long"):
        listen("/" + "x" * 200)
    assert len(os.listdir("/proc/self/fd")) == before
