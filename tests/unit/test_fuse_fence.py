"""Requests that wait for the upper's lease, without a mount."""

from __future__ import annotations

import errno
import os
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from unionfs.fuse.fence import Fence


class Lease:
    """Runs out; is renewed, or lost, after some seconds."""

    def __init__(self, until: float, *, lost: bool = False) -> None:
        self._began, self._until, self._lost = trio.current_time(), until, lost
        self.hurried: list[float] = []

    def _is_over(self) -> bool:
        return trio.current_time() - self._began >= self._until

    @property
    def passes(self) -> bool:
        return self._is_over() and not self._lost

    @property
    def lost(self) -> bool:
        return self._is_over() and self._lost

    def hurry(self) -> None:
        self.hurried.append(trio.current_time() - self._began)


@pytest.mark.parametrize("lost", [False, True])
async def test_a_wait(autojump_clock: MockClock, lost: bool) -> None:
    """Until the lease is renewed, which is tried at once and then each second; or for good."""
    lease: Any = Lease(3.5, lost=lost)
    fence = Fence(lease)
    assert not fence.passes
    assert await fence.passed() is not lost
    assert [round(when) for when in lease.hurried] == [0, 1, 2, 3]
    assert fence.passes is not lost
    if lost:
        with pytest.raises(OSError) as raised:  # noqa: PT011
            await fence.must_pass()
        assert raised.value.errno == errno.EIO
    else:
        await fence.must_pass()


async def test_a_mount_that_is_gone(autojump_clock: MockClock) -> None:
    """The next read of its device says so. A pipe stands for it, whose other end is closed."""
    lease: Any = Lease(3.5)
    reader, writer = os.pipe()
    fence = Fence(lease)

    async def close() -> None:
        await trio.sleep(1.5)
        os.close(writer)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(close)
        assert await fence.passed(reader)
    os.close(reader)
    assert not fence.passes
    assert [round(when) for when in lease.hurried] == [0, 1]
