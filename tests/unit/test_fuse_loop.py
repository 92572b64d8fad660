"""The handling of /dev/fuse read errors in the loop of the direct session."""

from __future__ import annotations

import errno
import os
import struct
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.support.patience import patient
from tests.unit.loop_support import Requests, decision, message, new_loop
from tests.unit.union_support import OpenUnion, get, open_union
from unionfs.core.loop import WAIT
from unionfs.fuse.direct.device import Device
from unionfs.fuse.direct.loop import Loop
from unionfs.fuse.inline import in_thread, may_wait
from unionfs.fuse.invalidations import Invalidations
from unionfs.fuse.latency import Histogram, Latencies
from unionfs.fuse.protocol import (
    Opcode,
    Reply,
    Request,
    encode,
    notify,
)

__all__ = ["open_union"]


async def test_an_umount_that_takes_a_request_back(
    open_union: OpenUnion,
) -> None:
    """fuse_dev_do_read returns ECONNABORTED for a request overtaken by umount(2), and ENODEV afterwards."""
    await new_loop(open_union(), -errno.ECONNABORTED, -errno.ENODEV).run()


async def test_a_mount_that_is_cut_off(open_union: OpenUnion) -> None:
    with pytest.raises(BaseExceptionGroup) as raised:
        await new_loop(open_union(), -errno.ECONNABORTED, -errno.ECONNABORTED).run()
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
    messages = [message(Opcode.STATX, unique) for unique in (2, 4)]
    monkeypatch.setattr(union.files, "take_back", take_back)
    await new_loop(union, *messages, device=device, answers={Opcode.STATX: answer}).run()
    device.close()
    assert closed == ["good", "good"]
    assert caplog.text.count("a file could not be closed") == 2
    caplog.clear()


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

    loop = new_loop(
        open_union(),
        message(Opcode.FSYNC, 2, pid=2**22 + 1),  # above PID_MAX_LIMIT: its caller does not exist
        message(Opcode.INTERRUPT, 3, struct.pack("=Q", 2)),
        answered,
        device=device,
        waiting={Opcode.FSYNC: waits},
    )
    with trio.fail_after(patient(5)):
        await loop.run()
    device.close()
    os.close(reader)
    assert struct.unpack("=IiQ", answer) == (16, -errno.EINTR, 2)


async def test_the_mount_is_gone_while_a_request_waits(open_union: OpenUnion) -> None:
    """Nobody waits for its answer any more."""
    begun = False

    async def waits(request: Request) -> Reply:
        nonlocal begun
        await may_wait()
        begun = True
        await trio.sleep_forever()
        raise AssertionError

    device = Device(os.open(os.devnull, os.O_WRONLY))
    loop = new_loop(
        open_union(), message(Opcode.FSYNC, 2), lambda: -errno.ENODEV if begun else None, device=device,
        waiting={Opcode.FSYNC: waits},
    )  # fmt: skip
    with trio.fail_after(patient(10)):
        await loop.run()
    device.close()


async def test_a_notice_precedes_the_answer(open_union: OpenUnion, tmp_path: Path) -> None:
    """No process sees old attributes after the answer. Notices name only nodes that the kernel knows."""
    (tmp_path / "l0").mkdir()
    for name in ("f", "g"):
        (tmp_path / "l0" / name).touch()
    union, invalidations = open_union(), Invalidations()
    known, unknown = get(union, "f"), get(union, "g")
    known.looked_up()

    def answer(request: Request) -> Reply:
        for node in (unknown, known):
            invalidations.of_node(node)
        return encode.ok(request.unique)

    reader, writer = os.pipe2(os.O_NONBLOCK)
    device = Device(writer)
    await new_loop(
        union, message(Opcode.STATX, 2), device=device, answers={Opcode.STATX: answer},
        invalidations=invalidations,
    ).run()  # fmt: skip
    device.close()
    sent = os.read(reader, 1000)
    os.close(reader)
    assert sent == b"".join([*notify.inval_inode(known.id, -1, 0), *encode.ok(2)])


class _Burst(Requests):
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
    loop = Loop(device, decision(), open_union(), Counter(), {}, {}, Latencies(), channel)
    with trio.fail_after(patient(20)):
        await loop.run()
    device.close()
    os.close(channel.writer)
    assert channel.did == ["next", "waited", "next", "let go", "waited"]


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
            return message(opcode, len(steps))

        steps.append(run)

    def over() -> None:
        nonlocal now
        now += 10_000_000_000

    step(Opcode.STATX)
    step(Opcode.STATX, lambda: latencies.watch(5))
    step(Opcode.FSYNC)
    steps.append(lambda: None if len(taken) < 3 else message(Opcode.FORGET, 9))
    step(Opcode.STATX, over)
    loop = new_loop(
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
