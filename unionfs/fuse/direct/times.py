"""Modification times under writeback, which are the kernel's.

With WRITEBACK_CACHE the kernel says when a file was modified: at write(2) or a store. It tells that by a
SETATTR, but only if its own time has changed (fs/fuse/inode.c, fuse_flush_times). What it writes back comes
later, and would give the backing file a later time, which nobody corrects when the file was made within the
same tick of the clock, or when the SETATTR was quicker than the data. So such a write leaves the time alone.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from unionfs.union.nodes import Node


class KernelTimes:
    """Keeps the modification times of the files that are being written back."""

    def __init__(self) -> None:
        #: Writes under way, and the time that counts, in nanoseconds.
        self._writes: dict[Node, tuple[int, int]] = {}

    @contextmanager
    def kept(self, node: Node, fd: int) -> Iterator[None]:
        """The node's backing file ``fd`` has the same time after the block, or the one told meanwhile."""
        st = os.fstat(fd)
        count, mtime = self._writes.get(node, (0, st.st_mtime_ns))
        self._writes[node] = count + 1, mtime
        try:
            yield
        finally:
            count, mtime = self._writes.pop(node)
            if count > 1:
                self._writes[node] = count - 1, mtime
            # An ordinary user's daemon may write a file of somebody else, but not set its times.
            with suppress(PermissionError):
                os.utime(fd, ns=(st.st_atime_ns, mtime))

    def told(self, node: Node, mtime_ns: int) -> None:
        """The kernel has set the time."""
        known = self._writes.get(node)
        if known is not None:
            self._writes[node] = known[0], mtime_ns
