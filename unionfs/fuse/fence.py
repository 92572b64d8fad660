"""Requests wait while another host may have taken the upper's lease, and fail when one has."""

from __future__ import annotations

import errno
import math
import os
import select
from typing import Final

import trio

from unionfs.union.leasekeeper import Keeper

_LOOK_SECONDS: Final = 0.02
_HURRY_SECONDS: Final = 1.0


def is_cut_off(device: int) -> bool:
    """Whether the mount of an fd of /dev/fuse is gone (fs/fuse/dev.c, fuse_dev_poll)."""
    poll = select.poll()
    poll.register(device, 0)
    return bool(poll.poll(0))


class Fence:
    """What a session asks before it answers a request."""

    def __init__(self, lease: Keeper) -> None:
        self._lease = lease
        self._hurried = -math.inf

    @property
    def passes(self) -> bool:
        """Whether requests may be answered."""
        return self._lease.passes

    async def passed(self, device: int = -1) -> bool:
        """Wait until they may be; False if they never will. Returns True also if the mount of this ``device``
        is gone, which the next read of the device reports."""
        while not self._lease.passes:
            if self._lease.lost:
                return False
            if device >= 0 and is_cut_off(device):
                return True
            if (now := trio.current_time()) >= self._hurried + _HURRY_SECONDS:
                self._hurried = now
                self._lease.hurry()
            await trio.sleep(_LOOK_SECONDS)
        return True

    async def must_pass(self) -> None:
        """Wait until they may be. Raises OSError (EIO) if they never will."""
        if not self.passes and not await self.passed():
            raise OSError(errno.EIO, os.strerror(errno.EIO))
