"""The loop of the direct session without a mount: a test gives it requests."""

from __future__ import annotations

import errno
import struct
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from unionfs.core.loop import FAIR
from unionfs.core.memo import Memo
from unionfs.fuse.asides import Asides
from unionfs.fuse.direct.device import Device
from unionfs.fuse.direct.loop import Loop
from unionfs.fuse.invalidations import Invalidations
from unionfs.fuse.latency import Latencies
from unionfs.fuse.protocol import Decision, Init, Opcode, Privileges, Reply, Settings, negotiate
from unionfs.fuse.protocol.requests import InitRequest
from unionfs.union.tree import Union


def decision() -> Decision:
    offered = InitRequest.of(major=7, minor=45, max_readahead=1 << 17, flags=int(sum(Init)))
    return negotiate(offered, Settings(), Privileges(initial_user_namespace=True, sys_admin=True))


Step = bytes | int | Callable[[], bytes | int | None]


class Requests:
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


def new_loop(
    union: Union,
    *steps: Step,
    device: Device | None = None,
    answers: Mapping[Opcode, Callable[[Any], Reply]] | None = None,
    waiting: Mapping[Opcode, Callable[[Any], Coroutine[Any, Any, Reply]]] | None = None,
    requests: Counter[str] | None = None,
    latencies: Latencies | None = None,
    asides: Asides | None = None,
    invalidations: Invalidations | None = None,
) -> Loop:
    channel: Any = Requests(*steps)
    return Loop(
        device or Device(-1), decision(), union, Counter() if requests is None else requests, answers or {},
        waiting or {}, latencies or Latencies(), channel, invalidations, asides,
    )  # fmt: skip


def message(opcode: Opcode, unique: int, body: bytes | None = None, *, pid: int = 1) -> bytes:
    if body is None:
        body = bytes({Opcode.FORGET: 8, Opcode.STATX: 24}.get(opcode, 16))
    return struct.pack("=IIQQIIIHH", 40 + len(body), int(opcode), unique, 1, 0, 0, pid, 0, 0) + body
