"""Requests that the loop of the direct session puts aside, as they need a slow layer; without a mount."""

from __future__ import annotations

import errno
import os
import threading
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest
import trio

import unionfs.fuse.asides
import unionfs.fuse.direct.loop
from tests.support.patience import patient
from tests.unit.loop_support import message, new_loop
from tests.unit.union_support import OpenUnion, open_union
from unionfs.core import layercalls, marks
from unionfs.core.places import Layer
from unionfs.fuse.asides import Asides
from unionfs.fuse.direct.device import Device
from unionfs.fuse.inline import may_wait
from unionfs.fuse.protocol import Opcode, Reply, Request, encode

__all__ = ["open_union"]


@pytest.mark.parametrize("patience", [0, 60])
async def test_requests_that_need_a_slow_layer(
    open_union: OpenUnion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, patience: int
) -> None:
    """In line or in a task, each is answered once, and what was opened for it is closed."""
    monkeypatch.setattr(unionfs.fuse.asides, "_PATIENCE_SECONDS", patience)
    union = open_union()
    (tmp_path / "file").write_bytes(b"content")
    top, (reader, writer) = os.open(tmp_path, os.O_PATH), os.pipe2(os.O_NONBLOCK)
    layer = Layer(0, str(tmp_path), top, is_upper=False)
    layer.is_slow()
    device = Device(writer)
    before = _fds()
    requests: Counter[str] = Counter()
    answers: list[bytes] = []
    threads: list[int] = []

    def note(fd: int, unique: int) -> None:
        threads.append(threading.get_ident())

    def answer(request: Request) -> Reply:
        layercalls.call(note, top, request.unique)
        fd = layercalls.call(os.open, b"file", os.O_RDONLY | os.O_CLOEXEC, dir_fd=top)
        try:
            return encode.data(request.unique, os.read(fd, 100))
        finally:
            marks.close_fd(fd)

    async def waits(request: Request) -> Reply:
        await may_wait()
        return answer(request)

    def answered() -> int | None:
        with suppress(BlockingIOError):
            while True:
                answers.append(os.read(reader, 16 + len(b"content")))
        return -errno.ENODEV if len(answers) == 4 else None

    loop = new_loop(
        union, *(message(opcode, unique) for unique, opcode in enumerate((Opcode.STATX, Opcode.FSYNC) * 2)),
        answered, device=device, answers={Opcode.STATX: answer}, waiting={Opcode.FSYNC: waits},
        requests=requests, asides=Asides([layer]),
    )  # fmt: skip
    try:
        with trio.fail_after(patient(20)):
            await loop.run()
            while _fds() != before:  # noqa: ASYNC110 - a thread closes slow files
                await trio.sleep(0.01)
    finally:
        marks.close_with(None)
        for fd in (top, reader, writer):
            os.close(fd)
    assert sorted(answers) == [encode.data(unique, b"content")[0] + b"content" for unique in range(4)]
    assert requests == {"statx": 2, "fsync": 2}
    assert len(threads) == 4
    assert threading.get_ident() not in threads


def _fds() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("slow", [False, True])
async def test_how_long_requests_in_progress_are_waited_for(
    open_union: OpenUnion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slow: bool
) -> None:
    """Before the mount is held: as long as is said, but only a short time where layers are slow."""
    monkeypatch.setattr(unionfs.fuse.direct.loop, "_HELD_BY_SERVER_SECONDS", 0.01)
    top = os.open(tmp_path, os.O_PATH)
    layer = Layer(0, str(tmp_path), top, is_upper=False)
    if slow:
        layer.is_slow()
    begun, goes_on, over = trio.Event(), trio.Event(), False

    async def waits(request: Request) -> Reply:
        await may_wait()
        begun.set()
        await goes_on.wait()
        return encode.ok(request.unique)

    device = Device(os.open(os.devnull, os.O_WRONLY))
    loop = new_loop(
        open_union(), message(Opcode.FSYNC, 2), lambda: -errno.ENODEV if over else None, device=device,
        waiting={Opcode.FSYNC: waits}, asides=Asides([layer]),
    )  # fmt: skip

    async def later() -> None:
        await trio.sleep(0.1)
        goes_on.set()

    with trio.fail_after(patient(20)):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(loop.run)
            await begun.wait()
            if slow:
                with pytest.raises(TimeoutError, match="1 requests are in progress"):
                    async with loop.held(patient(30)):
                        pass
                monkeypatch.setattr(unionfs.fuse.direct.loop, "_HELD_BY_SERVER_SECONDS", patient(20))
            nursery.start_soon(later)
            async with loop.held(patient(20)):
                assert goes_on.is_set()
            over = True
    marks.close_with(None)
    device.close()
    os.close(top)


async def test_held_while_a_request_is_aside(open_union: OpenUnion, tmp_path: Path) -> None:
    """It is not waited for, and goes on afterwards, as when the layers were changed meanwhile."""
    top, answers = os.open(tmp_path, os.O_PATH), threading.Event()
    layer = Layer(0, str(tmp_path), top, is_upper=False)
    layer.is_slow()
    asides = Asides([layer])
    answered: list[int] = []

    def answer(request: Request) -> Reply:
        layercalls.call(hang, top)
        answered.append(request.unique)
        return encode.ok(request.unique)

    def hang(fd: int) -> None:
        assert answers.wait(patient(60))

    device = Device(os.open(os.devnull, os.O_WRONLY))
    loop = new_loop(
        open_union(), message(Opcode.STATX, 2), lambda: -errno.ENODEV if answered else None, device=device,
        answers={Opcode.STATX: answer}, asides=asides,
    )  # fmt: skip
    with trio.fail_after(patient(20)):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(loop.run)
            while not asides.figures({})["requests_aside"]:  # noqa: ASYNC110 - nothing tells it
                await trio.sleep(0.01)
            async with loop.held(patient(10)):
                answers.set()
                while asides.figures({})["requests_aside"]:  # noqa: ASYNC110
                    await trio.sleep(0.01)
                await trio.sleep(0.05)
                assert answered == []
    assert answered == [2]
    marks.close_with(None)
    device.close()
    os.close(top)
