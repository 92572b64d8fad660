"""The flags of chattr(1), without a mount."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import struct
import sys
from pathlib import Path

import pytest

from tests.unit.union_support import OpenUnion, get, open_union
from unionfs.fuse.direct import ioctl
from unionfs.fuse.operations import Operations
from unionfs.fuse.protocol import requests as rq
from unionfs.sys.calls import FS_IOC_GETFLAGS, FS_IOC_SETFLAGS

__all__ = ["open_union"]

NODUMP = 0x40
"""FS_NODUMP_FL, include/uapi/linux/fs.h."""


async def test_flags_that_are_no_protection(tmp_path: Path, open_union: OpenUnion) -> None:
    """The object itself has them, and the union remembers none."""
    (tmp_path / "upper").mkdir()
    (tmp_path / "upper/f").touch()
    union = open_union()
    operations, node = Operations(union), get(union, "f")
    value = _flags(tmp_path / "upper/f") | NODUMP
    data = value.to_bytes(4, sys.byteorder)
    await ioctl.answer(operations, rq.Ioctl.of(unique=7, nodeid=node.id, cmd=FS_IOC_SETFLAGS, data=data))
    assert _flags(tmp_path / "upper/f") == value
    assert union.flags.of(node) == 0
    assert os.listxattr(tmp_path / "upper/f") == []


def _flags(path: Path) -> int:
    with path.open("rb") as file:
        return int.from_bytes(fcntl.ioctl(file, FS_IOC_GETFLAGS, bytes(4)), sys.byteorder)


async def test_a_file_of_which_a_program_has_a_lease(tmp_path: Path, open_union: OpenUnion) -> None:
    """The loop does not wait for its end, up to 45 seconds; fcntl(2)."""
    (tmp_path / "upper").mkdir()
    (tmp_path / "upper/f").touch()
    union = open_union()
    operations, node = Operations(union), get(union, "f")
    request = rq.Ioctl.of(unique=7, nodeid=node.id, cmd=FS_IOC_GETFLAGS, out_size=4, data=b"")
    fd = os.open(tmp_path / "upper/f", os.O_RDWR)
    natively = bytearray(4)
    fcntl.ioctl(fd, FS_IOC_GETFLAGS, natively)
    before = signal.signal(signal.SIGIO, signal.SIG_IGN)
    try:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        with pytest.raises(BlockingIOError) as raised:
            await ioctl.answer(operations, request)
        assert raised.value.errno == errno.EWOULDBLOCK
    finally:
        os.close(fd)  # which ends it
        signal.signal(signal.SIGIO, before)
    answer = b"".join(await ioctl.answer(operations, request))
    assert struct.unpack("=IiQ", answer[:16]) == (len(answer), 0, 7)
    assert answer[-4:] == natively
