"""What writing cached data back must leave as it is.

With WRITEBACK_CACHE a write(2) or a store changes the page cache, and its data comes to us later. What else
it changes the kernel has done or told by then, so the write of the backing file must not do it again:

- The time of modification. The kernel tells it by a SETATTR, but only if its own time has changed
  (fs/fuse/inode.c, fuse_flush_times); nobody corrects the later one of the backing file when the file was
  made within the same tick of the clock, or when the SETATTR was quicker than the data.
- `security.capability`, and in an ordinary user's daemon setuid and setgid. A write(2) has had them removed
  (by REMOVEXATTR and SETATTR) before it changed the page cache; those that are there were given since then,
  or the data was stored through a mapping, which removes nothing.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from unionfs.union.files import SET_IDS, OpenFile, Use
from unionfs.union.node import Node
from unionfs.union.shortcuts import Capabilities
from unionfs.union.xattrs import CAPABILITY


class WriteBack:
    """Keeps the attributes of the files that are being written back."""

    def __init__(self, capabilities: Capabilities) -> None:
        self._capabilities = capabilities

    @contextmanager
    def kept(self, node: Node, file: OpenFile) -> Iterator[None]:
        """The node's backing file has the same attributes after the block, or those set meanwhile; and it
        stays open until then."""
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
        """The kernel has set the time."""
        if node.use is not None:
            node.use.keep_mtime(mtime_ns)

    def capability_set(self, node: Node, value: bytes | None) -> None:
        """Capabilities were given, or removed (None) for a write that is yet to come."""
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
    # An ordinary user's daemon may write a file of somebody else, but not set its times.
    with suppress(PermissionError):
        os.utime(fd, ns=(before.st_atime_ns, use.mtime_ns))
    # No SETATTR of the mode comes while data is written back (fs/fuse/dir.c, fuse_do_setattr).
    if before.st_mode & SET_IDS:
        with suppress(PermissionError):
            os.fchmod(fd, stat.S_IMODE(before.st_mode))
    if use.capability is not None:
        with suppress(PermissionError, FileExistsError):  # another one was given meanwhile
            os.setxattr(fd, CAPABILITY, use.capability, os.XATTR_CREATE)
