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

from unionfs.union.files import SET_IDS, OpenFile
from unionfs.union.nodes import Node
from unionfs.union.xattrs import CAPABILITY


class _Kept:
    """What a file has, of which so many writes are under way. The time is in nanoseconds."""

    __slots__ = ("capability", "mtime_ns", "writes")

    def __init__(self, mtime_ns: int, capability: bytes | None) -> None:
        self.writes = 0
        self.mtime_ns = mtime_ns
        self.capability = capability


class WriteBack:
    """Keeps the attributes of the files that are being written back."""

    def __init__(self) -> None:
        self._files: dict[Node, _Kept] = {}

    @contextmanager
    def kept(self, node: Node, file: OpenFile) -> Iterator[None]:
        """The node's backing file has the same attributes after the block, or those told meanwhile; and it
        stays open until then."""
        fd = file.fd
        st = os.fstat(fd)
        kept = self._files.get(node)
        if kept is None:
            kept = _Kept(st.st_mtime_ns, None if node.no_capability else _capability(node, fd))
            self._files[node] = kept
        kept.writes += 1
        file.users += 1
        try:
            yield
        finally:
            kept.writes -= 1
            if kept.writes == 0:
                del self._files[node]
            try:
                _give_back(fd, st, kept)
            finally:
                file.release()

    def told(self, node: Node, mtime_ns: int) -> None:
        """The kernel has set the time."""
        kept = self._files.get(node)
        if kept is not None:
            kept.mtime_ns = mtime_ns

    def told_capability(self, node: Node, value: bytes | None) -> None:
        """Capabilities were given, or removed (None) for a write that is yet to come."""
        kept = self._files.get(node)
        if kept is not None:
            kept.capability = value


def _give_back(fd: int, before: os.stat_result, kept: _Kept) -> None:
    # An ordinary user's daemon may write a file of somebody else, but not set its times.
    with suppress(PermissionError):
        os.utime(fd, ns=(before.st_atime_ns, kept.mtime_ns))
    # No SETATTR of the mode comes while data is written back (fs/fuse/dir.c, fuse_do_setattr).
    if before.st_mode & SET_IDS:
        with suppress(PermissionError):
            os.fchmod(fd, stat.S_IMODE(before.st_mode))
    if kept.capability is not None:
        with suppress(PermissionError, FileExistsError):  # another one was given meanwhile
            os.setxattr(fd, CAPABILITY, kept.capability, os.XATTR_CREATE)


def _capability(node: Node, fd: int) -> bytes | None:
    try:
        return os.getxattr(fd, CAPABILITY)
    except OSError:
        node.no_capability = True
        return None
