"""The handling of /dev/fuse read errors in the loop of the direct session."""

from __future__ import annotations

import errno
import os
import struct
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import trio

import unionfs.fuse.asides
import unionfs.fuse.direct.loop
from tests.support.patience import patient
from tests.unit.union_support import OpenUnion, open_union
from unionfs.core import layercalls, marks
from unionfs.core.loop import FAIR, WAIT
from unionfs.core.memo import Memo
from unionfs.core.places import Layer
from unionfs.fuse.asides import Asides
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
from unionfs.union.tree import Union

__all__ = ["open_union"]


def _decision() -> Decision:
    offered = InitRequest.of(major=7, minor=45, max_readahead=1 << 17, flags=int(sum(Init)))
    return negotiate(offered, Settings(), Privileges(initial_user_namespace=True, sys_admin=True))


Step = bytes | int | Callable[[], bytes | int | None]


class _Channel:
    """Gives a loop requests and errors (by errno, negative), in this order, then ENODEV.

    A function returns one of them, or None to be called again after others ran.
    """

    def __init__(self, *steps: Step) -> None:
        self.steps = list(steps)
        self.buffer = bytearray()
        self.memo: Memo | None = None

    def puts_aside(self) -> None:
        self.memo = Memo()

    renew_memo = puts_aside

    def memo_of_last(self) -> Memo | None:
        return self.memo

    def read_into(self, buffer: bytearray) -> None:
        self.buffer = buffer

    def answer(self, size: int) -> bool:
        return False

    def rested(self) -> None:
        pass

    holds = False

    def next(self) -> int:
        if not self.steps:
            raise OSError(errno.ENODEV, "")
        step = self.steps[0]
        found = step() if callable(step) else step
        if found is None:
            return FAIR
        self.steps.pop(0)
        if isinstance(found, int):
            raise OSError(-found, "")
        self.buffer[: len(found)] = found
        return len(found)


def _loop(
    union: Union,
    *steps: Step,
    device: Device | None = None,
    answers: Mapping[Opcode, Callable[[Any], Reply]] | None = None,
    waiting: Mapping[Opcode, Callable[[Any], Coroutine[Any, Any, Reply]]] | None = None,
    requests: Counter[str] | None = None,
    latencies: Latencies | None = None,
    asides: Asides | None = None,
) -> Loop:
    channel: Any = _Channel(*steps)
    return Loop(
        device or Device(-1), _decision(), union, Counter() if requests is None else requests, answers or {},
        waiting or {}, latencies or Latencies(), channel, asides=asides,
    )  # fmt: skip


async def test_an_umount_that_takes_a_request_back(
    open_union: OpenUnion,
) -> None:
    """fuse_dev_do_read returns ECONNABORTED for a request overtaken by umount(2), and ENODEV afterwards."""
    await _loop(open_union(), -errno.ECONNABORTED, -errno.ENODEV).run()


async def test_a_mount_that_is_cut_off(open_union: OpenUnion) -> None:
    with pytest.raises(BaseExceptionGroup) as raised:
        await _loop(open_union(), -errno.ECONNABORTED, -errno.ECONNABORTED).run()
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
    messages = [_request(Opcode.STATX, unique) for unique in (2, 4)]
    monkeypatch.setattr(union.files, "take_back", take_back)
    await _loop(union, *messages, device=device, answers={Opcode.STATX: answer}).run()
    device.close()
    assert closed == ["good", "good"]
    assert caplog.text.count("a file could not be closed") == 2
    caplog.clear()


def _request(opcode: Opcode, unique: int, body: bytes | None = None, *, pid: int = 1) -> bytes:
    if body is None:
        body = bytes({Opcode.FORGET: 8, Opcode.STATX: 24}.get(opcode, 16))
    return struct.pack("=IIQQIIIHH", 40 + len(body), int(opcode), unique, 1, 0, 0, pid, 0, 0) + body


async def test_an_interrupt_right_behind_its_request(open_union: OpenUnion) -> None:
    """It is read before the request's task runs. The kernel sends it once, so it must not be lost."""

    async def waits(request: Request) -> Reply:
        await may_wait()
        await trio.sleep_forever()
        raise AssertionError

    reader, writer = os.pipe2(os.O_NONBLOCK)
    device = Device(writer)
    answer = b""

    def answered() -> int | None:
        nonlocal answer
        try:
            answer = os.read(reader, 100)
        except BlockingIOError:
            return None
        return -errno.ENODEV

    loop = _loop(
        open_union(),
        _request(Opcode.FSYNC, 2, pid=2**22 + 1),  # above PID_MAX_LIMIT: its caller does not exist
        _request(Opcode.INTERRUPT, 3, struct.pack("=Q", 2)),
        answered,
        device=device,
        waiting={Opcode.FSYNC: waits},
    )
    with trio.fail_after(patient(5)):
        await loop.run()
    device.close()
    os.close(reader)
    assert struct.unpack("=IiQ", answer) == (16, -errno.EINTR, 2)


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

    def answer(request: Request) -> Reply:
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

    loop = _loop(
        union, *(_request(opcode, unique) for unique, opcode in enumerate((Opcode.STATX, Opcode.FSYNC) * 2)),
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
    loop = _loop(
        open_union(), _request(Opcode.FSYNC, 2), lambda: -errno.ENODEV if over else None, device=device,
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


class _Burst(_Channel):
    """Says twice that no request is there, while CPUs are kept awake."""

    holds = True

    def __init__(self) -> None:
        super().__init__()
        self.did: list[str] = []
        self.reader, self.writer = os.pipe2(os.O_NONBLOCK)
        os.write(self.writer, b"x")

    def next(self) -> int:
        if self.did.count("next") == 2:
            raise OSError(errno.ENODEV, "")
        if self.did:
            os.read(self.reader, 10)
        self.did.append("next")
        return WAIT

    def waited(self) -> None:
        self.did.append("waited")

    def let_go(self) -> None:
        self.did.append("let go")
        os.write(self.writer, b"x")


async def test_cpus_stay_awake_during_a_burst(open_union: OpenUnion) -> None:
    """The device is readable when the loop waits for the first time, and the second time not soon enough."""
    channel: Any = _Burst()
    device = Device(channel.reader)
    loop = Loop(device, _decision(), open_union(), Counter(), {}, {}, Latencies(), channel)
    with trio.fail_after(patient(20)):
        await loop.run()
    device.close()
    os.close(channel.writer)
    assert channel.did == ["next", "waited", "next", "let go", "waited"]


def _fds() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


async def test_latency_only_while_somebody_watches(open_union: OpenUnion) -> None:
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
    steps: list[Callable[[], bytes | int | None]] = []

    def step(opcode: Opcode, before: Callable[[], None] = lambda: None) -> None:
        def run() -> bytes:
            before()
            return _request(opcode, len(steps))

        steps.append(run)

    def over() -> None:
        nonlocal now
        now += 10_000_000_000

    step(Opcode.STATX)
    step(Opcode.STATX, lambda: latencies.watch(5))
    step(Opcode.FSYNC)
    steps.append(lambda: None if len(taken) < 3 else _request(Opcode.FORGET, 9))
    step(Opcode.STATX, over)
    loop = _loop(
        open_union(), *steps, device=device, answers={Opcode.STATX: answer}, waiting={Opcode.FSYNC: waits},
        requests=requests, latencies=latencies,
    )  # fmt: skip
    with trio.fail_after(20):
        await loop.run()
    device.close()
    assert requests == {"statx": 3, "fsync": 1, "forget": 1}
    found = {kind: Histogram.from_json(values) for kind, values in latencies.to_json().items()}
    assert {kind: (one.count, one.total_ns) for kind, one in found.items()} == {
        "statx": (1, 1000),
        "fsync": (1, 1_001_000),
    }
    assert not latencies.watched
