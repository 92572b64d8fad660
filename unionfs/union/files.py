"""Open files: backing fds, and reading and writing through them. `openfiles` tracks their users.

A session's state about a node in use is the node's `Use`, and ends with the node.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from typing import Final, Self

from unionfs.sys.fds import open_quietly
from unionfs.union.rights import Rights
from unionfs.union.setids import Who
from unionfs.union.tickets import Tickets

_FLAGS: Final = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
#: Errors of opening a file that a layer has lost; read(2) does not report them.
_GONE: Final = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ESTALE)


class OpenFile:
    """A backing fd and its user count, initially one. The release of the last user closes the fd.

    ``with file`` adds a user, so the fd stays open within the context.
    """

    __slots__ = ("fd", "readable", "st", "users", "waits", "writable", "xattrs")

    def __init__(
        self, fd: int, *, readable: bool, writable: bool, waits: bool, st: os.stat_result | None = None
    ) -> None:
        self.fd = fd
        #: Its attributes and the names of all its xattrs at open or copy-up; None if unknown. They stay valid
        #: for a lower's file, except the access time.
        self.st = st
        self.xattrs: list[str] | None = None
        self.readable = readable
        self.writable = writable
        #: Whether a read may wait for a disk (and the filesystem supports RWF_NOWAIT).
        self.waits = waits
        self.users = 1

    @property
    def is_open(self) -> bool:
        """Whether there is an fd."""
        return self.fd >= 0

    def take(self) -> Self:
        """Add a user."""
        self.users += 1
        return self

    __enter__ = take

    def __exit__(self, *exception: object) -> None:
        self.release()

    def release(self) -> None:
        """Remove a user; the last one closes the fd."""
        self.users -= 1
        if self.users == 0:
            fd, self.fd = self.fd, -1
            os.close(fd)

    def look_at_xattrs(self) -> list[str] | None:
        """List the names of all its xattrs and remember them; None if they cannot be listed."""
        try:
            self.xattrs = os.listxattr(self.fd)
        except OSError:  # for example too many
            return None
        return self.xattrs

    def read_into(self, buffer: memoryview, offset: int) -> int | None:
        """Fill a buffer without waiting for a disk; returns the byte count, short only at the end of the
        file. ``None``: read it in a thread."""
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
        """Write all of ``data``, or as much as fits. Raises ``OSError`` if nothing was written."""
        done = os.pwrite(self.fd, data, offset)
        while done < len(data):
            try:
                done += os.pwrite(self.fd, memoryview(data)[done:], offset + done)
            except OSError:
                break  # the rest did not fit; the next write reports the error
        return done


class UnreadFile(OpenFile):
    """A lower's file that is opened on first use: no fd is open while the kernel has its data in the page
    cache. An access to `fd` opens it in the caller's thread, and raises ``OSError`` on failure."""

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

    @property
    def is_open(self) -> bool:
        return self._fd >= 0

    def release(self) -> None:
        if self._fd < 0:
            self.users -= 1
        else:
            super().release()


class Handle:
    """One open of one file."""

    __slots__ = ("file", "through", "who", "writes")

    def __init__(self, file: OpenFile, who: Who, *, writes: bool) -> None:
        self.file = file
        #: The process that opened it.
        self.who = who
        self.writes = writes
        #: Whether it is in passthrough.
        self.through = False

    def go_on(self, file: OpenFile) -> None:
        """Switch to another file, releasing the current one."""
        old, self.file = self.file, file
        old.release()


class Use:
    """The use of a node: its open files, and the session's agreements with the kernel about them."""

    __slots__ = (
        "backing_id", "cached", "capability", "file", "filled", "handles", "mtime_ns", "of_upper", "resized",
        "through", "tickets", "writebacks", "writers", "written",
    )  # fmt: skip

    def __init__(self) -> None:
        #: The backing file, if it is open, and its open file handles.
        self.file: OpenFile | None = None
        self.handles: list[Handle] = []
        #: Opens whose data goes through the page cache, and opens with a backing file.
        self.cached = 0
        self.through = 0
        #: Whether the first open put the data into the page cache (or could have, for a large file).
        self.filled = False
        #: The backing id, and whether the backing file is the upper's.
        self.backing_id = 0
        self.of_upper = False
        #: Whether the file was truncated (or extended) by name since the backing file was registered.
        self.resized = False
        #: Opens for writing with the backing file, and whether there ever was one.
        self.writers = 0
        self.written = False
        #: Writes of cached data in progress, and the attributes to restore after them.
        self.writebacks = 0
        self.mtime_ns = 0
        self.capability: bytes | None = None
        #: Of a directory: its tickets, once it needs some.
        self.tickets: Tickets | None = None

    def tickets_given(self) -> Tickets:
        """The tickets of the directory."""
        if self.tickets is None:
            self.tickets = Tickets()
        return self.tickets

    def has(self, file: OpenFile | None) -> None:
        """Set the backing file."""
        self.file = file

    def passes_through(self, backing_id: int, *, of_upper: bool) -> None:
        """Record the id under which the kernel knows the backing file."""
        self.backing_id, self.of_upper = backing_id, of_upper
        self.resized = False

    def resize(self) -> None:
        """Record a truncation without an open."""
        self.resized = True

    def opened(self, handle: Handle) -> None:
        """Count an open, with the backing file if that is registered."""
        if not self.backing_id:
            self.cached += 1
            return
        self.through += 1
        handle.through = True
        if handle.writes:
            self.writers += 1
            self.written = True

    def closed(self, handle: Handle) -> int:
        """Count a close; returns the backing id if it is now unused, else 0."""
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
        """Record that the kernel received all data."""
        self.filled = True

    def writes_back(self, count: int) -> None:
        """Count the start (or, with a negative count, the end) of writes of cached data."""
        self.writebacks += count

    def keep_mtime(self, mtime_ns: int) -> None:
        """Set the time of modification to restore after the writes in progress."""
        self.mtime_ns = mtime_ns

    def keep_capability(self, value: bytes | None) -> None:
        """Set the capabilities to restore after the writes in progress."""
        self.capability = value


def open_backing(
    dir_fd: int, name: bytes, *, write: bool, waits: bool, rights: Rights, upper: bool, quiet: bool = False
) -> OpenFile:
    """Open the regular file ``name`` of ``dir_fd``; with ``write`` for reading and writing. ``quiet``: as
    `open_quietly`.

    ``rights`` open a file of the user's own in spite of its mode, which may have changed since the kernel
    checked it. Raises ``OSError``; EIO if it is not a regular file (a layer changed under the union).
    """
    flags, readable = (os.O_RDWR if write else os.O_RDONLY) | _FLAGS, True
    try:
        fd = open_quietly(name, flags, dir_fd) if quiet else os.open(name, flags, dir_fd=dir_fd)
    except PermissionError as error:
        if not write:
            fd = rights.open(dir_fd, name, flags, error, upper=upper)
        else:
            try:  # an ordinary user's own file that is writable but not readable
                fd = os.open(name, os.O_WRONLY | _FLAGS, dir_fd=dir_fd)
                readable = False
            except PermissionError:
                fd = rights.open(dir_fd, name, flags, error, upper=upper)
    return _checked(fd, readable=readable, writable=write, waits=waits)


def open_held(
    held: int,
    *,
    write: bool,
    waits: bool,
    rights: Rights | None = None,
    upper: bool = False,
    quiet: bool = False,
) -> OpenFile:
    """Reopen the file of the O_PATH fd ``held``; see :func:`open_backing`."""
    name = b"/proc/self/fd/%d" % held
    flags = (os.O_RDWR if write else os.O_RDONLY) | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
    try:
        fd = open_quietly(name, flags) if quiet else os.open(name, flags)
    except PermissionError as error:
        if rights is None:
            raise
        fd = rights.reopen(held, flags, error, upper=upper)
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
