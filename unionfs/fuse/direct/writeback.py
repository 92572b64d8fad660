"""Preserves attributes that writing back cached data must not change.

With WRITEBACK_CACHE a write(2) or a store changes the page cache, and the data arrives later. By then the
kernel has made or requested all its other changes, so writing the backing file must not repeat them:

- The time of modification. The kernel sends it in a SETATTR, but only if its own time has changed
  (fs/fuse/inode.c, fuse_flush_times); nothing corrects the later one of the backing file if the file was
  made within the same tick of the clock, or if the SETATTR overtook the data.
- `security.capability`, and in an ordinary user's daemon setuid and setgid. A write(2) removes them (by
  REMOVEXATTR and SETATTR) before it changes the page cache; if they exist now, they were set since then, or
  the data was stored through a mapping, which does not remove them.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from unionfs.core.files import OpenFile, Use
from unionfs.core.node import Node
from unionfs.union.attributes import SET_IDS
from unionfs.union.shortcuts import Capabilities
from unionfs.union.xattrs import CAPABILITY


class WriteBack:
    """Preserves the attributes of files during write-back."""

    def __init__(self, capabilities: Capabilities) -> None:
        self._capabilities = capabilities

    @contextmanager
    def kept(self, node: Node, file: OpenFile) -> Iterator[None]:
        """Restore the attributes of the node's backing file after the context, or those set during it. The
        file stays open until then."""
        use = node.in_use()
        fd = file.fd
        st = os.fstat(fd)
        if use.writebacks == 0:
            use.keep_mtime(st.st_mtime_ns)
            use.keep_capability(self._capability(node, fd))
        use.writes_back(1)
        with file:
            try:
                yield
            finally:
                use.writes_back(-1)
                _restore(fd, st, use)

    def mtime_set(self, node: Node, mtime_ns: int) -> None:
        """The kernel set the time of modification."""
        if node.use is not None:
            node.use.keep_mtime(mtime_ns)

    def capability_set(self, node: Node, value: bytes | None) -> None:
        """Capabilities were set, or removed (None) for a later write."""
        if node.use is not None:
            node.use.keep_capability(value)

    def _capability(self, node: Node, fd: int) -> bytes | None:
        if node.no_capability:
            return None
        try:
            return os.getxattr(fd, CAPABILITY)
        except OSError:
            self._capabilities.none(node)
            return None


def _restore(fd: int, before: os.stat_result, use: Use) -> None:
    # An ordinary user's daemon may write a file of another user, but not set its times.
    with suppress(PermissionError):
        os.utime(fd, ns=(before.st_atime_ns, use.mtime_ns))
    # The kernel sends no SETATTR of the mode during write-back (fs/fuse/dir.c, fuse_do_setattr).
    if before.st_mode & SET_IDS:
        with suppress(PermissionError):
            os.fchmod(fd, stat.S_IMODE(before.st_mode))
    if use.capability is not None:
        with suppress(PermissionError, FileExistsError):  # another one was set in between
            os.setxattr(fd, CAPABILITY, use.capability, os.XATTR_CREATE)
