"""What the loop of the direct session makes of the errors that reading /dev/fuse gives."""

from __future__ import annotations

import errno
import os
from collections import Counter
from collections.abc import Sequence

import pytest

from tests.unit.union_support import OpenUnion, open_union
from unionfs.fuse.direct.device import Device
from unionfs.fuse.direct.loop import Loop
from unionfs.fuse.protocol import Init, Privileges, Settings, negotiate
from unionfs.fuse.protocol.requests import InitRequest

__all__ = ["open_union"]


def _loop(open_union: OpenUnion) -> Loop:
    offered = InitRequest.of(major=7, minor=45, max_readahead=1 << 17, flags=int(sum(Init)))
    decision = negotiate(offered, Settings(), Privileges(initial_user_namespace=True, sys_admin=True))
    return Loop(Device(-1), decision, open_union(), Counter(), {}, {})


def _reads(monkeypatch: pytest.MonkeyPatch, *errors: int) -> None:
    """Reading the device gives these errors, one after the other."""
    rest = list(errors)

    def readv(fd: int, buffers: Sequence[bytearray]) -> int:
        number = rest.pop(0)
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "readv", readv)


async def test_an_umount_that_takes_a_request_back(
    open_union: OpenUnion, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fuse_dev_do_read has ECONNABORTED for a request that umount(2) overtakes, and ENODEV afterwards."""
    _reads(monkeypatch, errno.EINTR, errno.ENOENT, errno.ECONNABORTED, errno.ENODEV)
    await _loop(open_union).run()


async def test_a_mount_that_is_cut_off(open_union: OpenUnion, monkeypatch: pytest.MonkeyPatch) -> None:
    _reads(monkeypatch, errno.ECONNABORTED, errno.ECONNABORTED)
    with pytest.raises(BaseExceptionGroup) as raised:
        await _loop(open_union).run()
    assert raised.group_contains(ConnectionAbortedError)
