"""Open files: backing fds, and reading and writing through them. Who has them: `openfiles`.

What a session knows of a node that is in use is its `Use`, which goes with the node.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from typing import Final, Self

_FLAGS: Final = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
#: Errors of opening a file that a layer has lost; read(2) has none of them.
_GONE: Final = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ESTALE)
#: A privileged bit that a write by an ordinary user clears (inode.c, setattr_should_drop_suidgid).
SET_IDS: Final = stat.S_ISUID | stat.S_ISGID


class OpenFile:
    """A backing fd and the number of its users: one at first. The last one who releases it closes the fd.

    Within ``with file`` there is one more, so that it stays open whoever closes it meanwhile.
    """

    __slots__ = ("fd", "readable", "st", "users", "waits", "writable", "xattrs")

    def __init__(
        self, fd: int, *, readable: bool, writable: bool, waits: bool, st: os.stat_result | None = None
    ) -> None:
        self.fd = fd
        #: Its attributes, and the names of all its xattrs, when it was opened or copied up; None if not
        #: known. A lower's file keeps them, but for the time of access.
        self.st = st
        self.xattrs: list[str] | None = None
        self.readable = readable
        self.writable = writable
        #: Whether a read may wait for a disk (and the filesystem can be asked not to).
        self.waits = waits
        self.users = 1

    def take(self) -> Self:
        """One user more."""
        self.users += 1
        return self

    __enter__ = take

    def __exit__(self, *exception: object) -> None:
        self.release()

    def release(self) -> None:
        """One user fewer; the last one closes the fd."""
        self.users -= 1
        if self.users == 0:
            fd, self.fd = self.fd, -1
            os.close(fd)

    def look_at_xattrs(self) -> list[str] | None:
        """The names of all its xattrs, which are remembered; None: they cannot be listed."""
        try:
            self.xattrs = os.listxattr(self.fd)
        except OSError:  # too many, say
            return None
        return self.xattrs

    def read_into(self, buffer: memoryview, offset: int) -> int | None:
        """Fill a buffer without waiting for a disk; returns the number of bytes, fewer than fit only at the
        end of the file. ``None``: read it in a thread."""
        if not self.waits:
            return os.preadv(self.fd, [buffer], offset)
        try:
            count = os.preadv(self.fd, [buffer], offset, os.RWF_NOWAIT)
        except BlockingIOError:
            return None
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise
            self.waits = False
            return os.preadv(self.fd, [buffer], offset)
        if count < len(buffer) and offset + count < os.fstat(self.fd).st_size:
            return None  # the rest is on the disk
        return count

    def read(self, size: int, offset: int) -> bytes:
        """Read up to ``size`` bytes; fewer only at the end of the file."""
        data = os.pread(self.fd, size, offset)
        while data and len(data) < size:
            more = os.pread(self.fd, size - len(data), offset + len(data))
            if not more:
                break
            data += more
        return data

    def write(self, data: bytes | memoryview, offset: int) -> int:
        """Write all of ``data``, or as much as fits. Raises ``OSError`` when nothing was written."""
        done = os.pwrite(self.fd, data, offset)
        while done < len(data):
            try:
                done += os.pwrite(self.fd, memoryview(data)[done:], offset + done)
            except OSError:
                break  # what fits is written; the next write meets the error
        return done


class UnreadFile(OpenFile):
    """A lower's file that is opened on first use: while the kernel has its data in the page cache, there is
    none. Any access to `fd` opens it, in the caller's thread, and raises ``OSError`` when that fails."""

    __slots__ = ("_fd", "_open")

    def __init__(self, open_: Callable[[], OpenFile], *, waits: bool) -> None:
        self._open = open_
        self._fd = -1
        super().__init__(-1, readable=True, writable=False, waits=waits)

    @property
    def fd(self) -> int:
        if self._fd < 0:
            if self.users <= 0:
                raise OSError(errno.EBADF, os.strerror(errno.EBADF))
            try:
                opened = self._open()
            except OSError as error:
                if error.errno in _GONE:
                    raise OSError(errno.EIO, "the layer no longer holds the file") from None
                raise
            self._fd, self.st, self.xattrs = opened.fd, opened.st, opened.xattrs
        return self._fd

    @fd.setter
    def fd(self, fd: int) -> None:
        self._fd = fd

    def release(self) -> None:
        if self._fd < 0:
            self.users -= 1
        else:
            super().release()


class Handle:
    """One open of one file."""

    __slots__ = ("file", "through", "uid", "writes")

    def __init__(self, file: OpenFile, uid: int, *, writes: bool) -> None:
        self.file = file
        #: The user who opened it: a write by anybody but root clears set-id bits.
        self.uid = uid
        self.writes = writes
        #: Whether it is in passthrough.
        self.through = False

    def go_on(self, file: OpenFile) -> None:
        """Read and write another file from now on; the one until now is released."""
        old, self.file = self.file, file
        old.release()


class Use:
    """How a node is used: its open files, and what its session agreed with the kernel about them."""

    __slots__ = (
        "backing_id", "cached", "capability", "file", "filled", "handles", "mtime_ns", "of_upper", "through",
        "writebacks", "writers", "written",
    )  # fmt: skip

    def __init__(self) -> None:
        #: The backing file, if it is open, and who has it open by a number.
        self.file: OpenFile | None = None
        self.handles: list[Handle] = []
        #: Opens whose data goes through the page cache, and opens with a backing file.
        self.cached = 0
        self.through = 0
        #: Whether the data was put into the page cache with the first open (or, of a large file, could have
        #: been).
        self.filled = False
        #: What the backing file is registered as, and whether it is the upper's.
        self.backing_id = 0
        self.of_upper = False
        #: Opens for writing, with the backing file; and whether there ever was one.
        self.writers = 0
        self.written = False
        #: Writes of cached data that are under way, and what the file has to have after them.
        self.writebacks = 0
        self.mtime_ns = 0
        self.capability: bytes | None = None

    def has(self, file: OpenFile | None) -> None:
        """This is the backing file from now on."""
        self.file = file

    def passes_through(self, backing_id: int, *, of_upper: bool) -> None:
        """The kernel knows the backing file by that id."""
        self.backing_id, self.of_upper = backing_id, of_upper

    def opened(self, handle: Handle) -> None:
        """One open more, with the backing file if that is registered."""
        if not self.backing_id:
            self.cached += 1
            return
        self.through += 1
        handle.through = True
        if handle.writes:
            self.writers += 1
            self.written = True

    def closed(self, handle: Handle) -> int:
        """One open fewer; returns the backing id if nobody uses it any more, else 0."""
        if not handle.through:
            self.cached -= 1
            return 0
        self.through -= 1
        if handle.writes:
            self.writers -= 1
        if self.through:
            return 0
        backing_id, self.backing_id = self.backing_id, 0
        return backing_id

    def fill(self) -> None:
        """The kernel is given all data."""
        self.filled = True

    def writes_back(self, count: int) -> None:
        """So many writes of cached data more are under way."""
        self.writebacks += count

    def keep_mtime(self, mtime_ns: int) -> None:
        """The file is to have that time after the writes that are under way."""
        self.mtime_ns = mtime_ns

    def keep_capability(self, value: bytes | None) -> None:
        """The file is to have these capabilities after the writes that are under way."""
        self.capability = value


def open_backing(dir_fd: int, name: bytes, *, write: bool, waits: bool) -> OpenFile:
    """Open the regular file ``name`` of ``dir_fd``, for reading also when ``write`` is asked for.

    Raises ``OSError``; EIO when it is no regular file (a layer changed under the union).
    """
    readable = True
    if write:
        try:
            fd = os.open(name, os.O_RDWR | _FLAGS, dir_fd=dir_fd)
        except PermissionError:  # an ordinary user's own file that may be written but not read
            fd = os.open(name, os.O_WRONLY | _FLAGS, dir_fd=dir_fd)
            readable = False
    else:
        fd = os.open(name, os.O_RDONLY | _FLAGS, dir_fd=dir_fd)
    return _checked(fd, readable=readable, writable=write, waits=waits)


def open_held(held: int, *, write: bool, waits: bool) -> OpenFile:
    """Open again the file that the O_PATH fd ``held`` stands for."""
    fd = os.open(
        b"/proc/self/fd/%d" % held,
        (os.O_RDWR if write else os.O_RDONLY) | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY,
    )
    return _checked(fd, readable=True, writable=write, waits=waits)


def _checked(fd: int, *, readable: bool, writable: bool, waits: bool) -> OpenFile:
    try:
        st = os.fstat(fd)
        if not stat.S_ISREG(st.st_mode):
            raise OSError(errno.EIO, "the layer no longer holds a regular file there")
    except OSError:
        os.close(fd)
        raise
    return OpenFile(fd, readable=readable, writable=writable, waits=waits, st=st)


def mode_without_set_ids(mode: int) -> int | None:
    """The mode after a write by an ordinary user, or ``None`` when it stays.

    setgid without group execute is a mark for mandatory locking, and stays for members of the group;
    the kernel of the merged tree decides about that one.
    """
    if not mode & SET_IDS:
        return None
    kept = mode & ~stat.S_ISUID
    if mode & stat.S_IXGRP:
        kept &= ~stat.S_ISGID
    return stat.S_IMODE(kept) if kept != mode else None
