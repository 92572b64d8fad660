"""The handling of /dev/fuse read errors in the loop of the direct session."""

from __future__ import annotations

import errno
import os
import struct
from collections import Counter
from collections.abc import Callable, Sequence

import pytest
import trio

from tests.support.patience import patient
from tests.unit.union_support import OpenUnion, open_union
from unionfs.fuse.direct import loop as loops
from unionfs.fuse.direct.device import Device
from unionfs.fuse.direct.loop import Loop
from unionfs.fuse.inline import in_thread, may_wait
from unionfs.fuse.latency import Histogram, Latencies
from unionfs.fuse.protocol import (
    Decision,
    Init,
    Opcode,
    Privileges,
    Reply,
    Request,
    Settings,
    encode,
    negotiate,
)
from unionfs.fuse.protocol.requests import InitRequest

__all__ = ["open_union"]


def _decision() -> Decision:
    offered = InitRequest.of(major=7, minor=45, max_readahead=1 << 17, flags=int(sum(Init)))
    return negotiate(offered, Settings(), Privileges(initial_user_namespace=True, sys_admin=True))


def _loop(open_union: OpenUnion) -> Loop:
    return Loop(Device(-1), _decision(), open_union(), Counter(), {}, {})


def _reads(monkeypatch: pytest.MonkeyPatch, *errors: int) -> None:
    """Reading the device fails with these errors, in order."""
    rest = list(errors)

    def readv(fd: int, buffers: Sequence[bytearray]) -> int:
        number = rest.pop(0)
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "readv", readv)


async def test_an_umount_that_takes_a_request_back(
    open_union: OpenUnion, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fuse_dev_do_read returns ECONNABORTED for a request overtaken by umount(2), and ENODEV afterwards."""
    _reads(monkeypatch, errno.EINTR, errno.ENOENT, errno.ECONNABORTED, errno.ENODEV)
    await _loop(open_union).run()


async def test_a_mount_that_is_cut_off(open_union: OpenUnion, monkeypatch: pytest.MonkeyPatch) -> None:
    _reads(monkeypatch, errno.ECONNABORTED, errno.ECONNABORTED)
    with pytest.raises(BaseExceptionGroup) as raised:
        await _loop(open_union).run()
    assert raised.group_contains(ConnectionAbortedError)


async def test_a_file_that_cannot_be_closed(
    open_union: OpenUnion, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """After the answer an error affects no caller: it is logged, and the next file is closed."""
    union = open_union()
    closed: list[object] = []

    def take_back(node: object, file: object) -> None:
        if node == "bad":
            raise ValueError("a bug")
        closed.append(node)

    def answer(request: Request) -> Reply:
        union.files.take_back_later("bad", None)  # type: ignore[arg-type]
        union.files.take_back_later("good", None)  # type: ignore[arg-type]
        return encode.ok(request.unique)

    device = Device(os.open(os.devnull, os.O_WRONLY))
    loop = Loop(device, _decision(), union, Counter(), {Opcode.GETATTR: answer}, {})
    monkeypatch.setattr(union.files, "take_back", take_back)
    messages = [_request(Opcode.GETATTR, unique) for unique in (2, 4)]

    def readv(fd: int, buffers: Sequence[bytearray]) -> int:
        if not messages:
            raise OSError(errno.ENODEV, "")
        message = messages.pop()
        buffers[0][: len(message)] = message
        return len(message)

    monkeypatch.setattr(os, "readv", readv)
    await loop.run()
    device.close()
    assert closed == ["good", "good"]
    assert caplog.text.count("a file could not be closed") == 2
    caplog.clear()


def _request(opcode: Opcode, unique: int, body: bytes | None = None, *, pid: int = 1) -> bytes:
    if body is None:
        body = bytes(8 if opcode is Opcode.FORGET else 16)
    return struct.pack("=IIQQIIIHH", 40 + len(body), int(opcode), unique, 1, 0, 0, pid, 0, 0) + body


async def test_an_interrupt_right_behind_its_request(
    open_union: OpenUnion, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is read before the request's task runs. The kernel sends it once, so it must not be lost."""

    async def waits(request: Request) -> Reply:
        await may_wait()
        await trio.sleep_forever()
        raise AssertionError

    reader, writer = os.pipe2(os.O_NONBLOCK)
    device = Device(writer)
    loop = Loop(device, _decision(), open_union(), Counter(), {}, {Opcode.FSYNC: waits})
    messages = [
        _request(Opcode.FSYNC, 2, pid=2**22 + 1),  # above PID_MAX_LIMIT: its caller does not exist
        _request(Opcode.INTERRUPT, 3, struct.pack("=Q", 2)),
    ]
    answer = b""

    def readv(fd: int, buffers: Sequence[bytearray]) -> int:
        nonlocal answer
        if messages:
            message = messages.pop(0)
            buffers[0][: len(message)] = message
            return len(message)
        answer = os.read(reader, 100)  # raises BlockingIOError without an answer
        raise OSError(errno.ENODEV, "")

    async def wait_readable(fd: int) -> None:
        await trio.lowlevel.checkpoint()

    monkeypatch.setattr(os, "readv", readv)
    monkeypatch.setattr(trio.lowlevel, "wait_readable", wait_readable)
    with trio.fail_after(patient(5)):
        await loop.run()
    device.close()
    os.close(reader)
    assert struct.unpack("=IiQ", answer) == (16, -errno.EINTR, 2)


async def test_latency_only_while_somebody_watches(
    open_union: OpenUnion, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One request before, one answered in line and one in a task during it, one after its end."""
    now = 0
    latencies = Latencies(lambda: now)
    taken: list[int] = []

    def answer(request: Request) -> Reply:
        nonlocal now
        now += 1000
        taken.append(request.unique)
        return encode.ok(request.unique)

    async def waits(request: Request) -> Reply:
        nonlocal now
        await in_thread(lambda: None)
        now += 1_000_000
        return answer(request)

    device = Device(os.open(os.devnull, os.O_WRONLY))
    requests: Counter[str] = Counter()
    loop = Loop(
        device, _decision(), open_union(), requests,
        {Opcode.GETATTR: answer}, {Opcode.FSYNC: waits}, latencies,
    )  # fmt: skip
    steps: list[Callable[[], bytes | None]] = []

    def step(opcode: Opcode, before: Callable[[], None] = lambda: None) -> None:
        def run() -> bytes:
            before()
            return _request(opcode, len(steps))

        steps.append(run)

    def over() -> None:
        nonlocal now
        now += 10_000_000_000

    step(Opcode.GETATTR)
    step(Opcode.GETATTR, lambda: latencies.watch(5))
    step(Opcode.FSYNC)
    steps.append(lambda: None if len(taken) < 3 else _request(Opcode.FORGET, 9))
    step(Opcode.GETATTR, over)
    rest = list(steps)

    def readv(fd: int, buffers: Sequence[bytearray]) -> int:
        if not rest:
            raise OSError(errno.ENODEV, "")
        message = rest[0]()
        if message is None:
            raise BlockingIOError
        rest.pop(0)
        buffers[0][: len(message)] = message
        return len(message)

    async def wait_readable(fd: int) -> None:
        await trio.lowlevel.checkpoint()

    monkeypatch.setattr(os, "readv", readv)
    monkeypatch.setattr(trio.lowlevel, "wait_readable", wait_readable)
    with trio.fail_after(20):
        await loop.run()
    device.close()
    assert requests == {"getattr": 3, "fsync": 1, "forget": 1}
    found = {kind: Histogram.from_json(values) for kind, values in latencies.to_json().items()}
    assert {kind: (one.count, one.total_ns) for kind, one in found.items()} == {
        "getattr": (1, 1000),
        "fsync": (1, 1_001_000),
    }
    assert not latencies.watched


@pytest.mark.parametrize(("between_us", "waits"), [(14, 10), (80, 10), (1000, 200)])
async def test_how_long_it_asks(
    open_union: OpenUnion, monkeypatch: pytest.MonkeyPatch, between_us: int, waits: int
) -> None:
    """It polls longer if the next request arrives soon, and shorter if it arrives late."""
    now, left, waited, asked = 0, 200, 0, 0
    due = between_us * 1000

    def clock() -> int:
        return now

    def readv(fd: int, buffers: Sequence[bytearray]) -> int:
        nonlocal now, left, due, asked
        now += 1000
        asked += 1
        if not left:
            raise OSError(errno.ENODEV, "")
        if now < due:
            raise BlockingIOError
        left -= 1
        now += 20_000
        due = now + between_us * 1000
        message = _request(Opcode.FORGET, left)
        buffers[0][: len(message)] = message
        return len(message)

    async def wait_readable(fd: int) -> None:
        nonlocal now, waited
        waited += 1
        now = max(now, due) + 10_000

    monkeypatch.setattr(os, "readv", readv)
    monkeypatch.setattr(loops, "perf_counter_ns", clock)
    monkeypatch.setattr(trio.lowlevel, "wait_readable", wait_readable)
    await _loop(open_union).run()
    assert waited <= waits
    if between_us == 1000:
        assert waited >= 190
        assert asked < 10 * 200
