"""What is answered when the upper must not be changed any more, without a mount."""

from __future__ import annotations

import errno
import os
import struct

import pytest

from unionfs.fuse.direct.device import Device
from unionfs.fuse.direct.refusing import refuse_all
from unionfs.fuse.protocol import Opcode


async def _refused(
    monkeypatch: pytest.MonkeyPatch, *steps: tuple[Opcode, int] | int
) -> list[tuple[int, int]]:
    """The uniques and errors of the answers; ``steps``: requests, and errors of the device."""
    left = list(steps)

    def readv(fd: int, buffers: list[memoryview]) -> int:
        step = left.pop(0)
        if isinstance(step, int):
            raise OSError(step, os.strerror(step))
        message = struct.pack("=IIQQIIIHH", 40, *step, 1, 0, 0, 1, 0, 0)
        buffers[0][: len(message)] = message
        return len(message)

    reader, writer = os.pipe2(os.O_NONBLOCK)
    monkeypatch.setattr(os, "readv", readv)
    device = Device(writer)
    try:
        await refuse_all(device, memoryview(bytearray(4096)))
    finally:
        device.close()
        answers = os.read(reader, 1000)
        os.close(reader)
        assert left == []
    return [(unique, -error) for _, error, unique in struct.iter_unpack("=IiQ", answers)]


async def test_all_requests_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the mount is gone. A request that was taken back while it was read, or that needs no answer, gets
    none."""
    found = await _refused(
        monkeypatch, errno.ENOENT, (Opcode.LOOKUP, 2), (Opcode.FORGET, 4), errno.EINTR, (Opcode.WRITE, 6),
        (Opcode.INTERRUPT, 8), (Opcode.BATCH_FORGET, 10), errno.ECONNABORTED, (Opcode.OPEN, 12), errno.ENODEV,
    )  # fmt: skip
    assert found == [(unique, errno.EIO) for unique in (2, 6, 12)]


async def test_a_mount_that_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConnectionAbortedError):
        await _refused(monkeypatch, errno.ECONNABORTED, errno.ECONNABORTED)
