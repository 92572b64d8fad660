"""Open files: backing fds, reading and writing through them, and the use of a node.

A session's state about a node in use is the node's `Use`, and ends with the node.
"""

import errno
import os

from libc.errno cimport EAGAIN, EINTR, EINVAL, EOPNOTSUPP
from libc.errno cimport errno as c_errno
from posix.unistd cimport pread

from unionfs.core.layercalls cimport pread as read_in_layer
from unionfs.core.marks cimport close, is_slow
from unionfs.core.state cimport COUNTED, OF_UPPER, THROUGH
from unionfs.core.stats cimport failure, fstat, result_of

from unionfs.core.layercalls import call
from unionfs.core.marks import close_fd
from unionfs.core.layercalls import read as read_slow

cdef extern from "<sys/uio.h>" nogil:
    int RWF_NOWAIT
    ssize_t preadv2(int fd, const iovec *parts, int count, long offset, int flags)

cdef enum:
    AT_ONCE = 8

#: Errors of opening a file that a layer has lost; read(2) does not report them.
cdef object GONE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ESTALE)


cdef class OpenFile:
    """A backing fd and its user count, initially one. The release of the last user closes the fd.

    ``with file`` adds a user, so the fd stays open within the context.
    """

    # st, xattrs: its attributes and the names of all its xattrs at open or copy-up; None if unknown. They
    #     stay valid for a lower's file, except the access time.
    # waits: whether a read may wait for a disk (and the filesystem supports RWF_NOWAIT).
    # counted: whether one of its opens holds it; see `Handles`.

    def __init__(self, int fd, *, bint readable, bint writable, bint waits, st=None):
        self.number = fd
        self.result = st
        self.readable, self.writable, self.waits = readable, writable, waits
        self.users = 1

    @property
    def st(self):
        if self.result is None and self.has_stat:
            self.result = result_of(&self.stat)
        return self.result

    cdef int descriptor(self) except -2:
        return self.number

    @property
    def fd(self):
        """The fd, -1 if it is closed. Raises ``OSError``."""
        return self.descriptor()

    @property
    def is_open(self):
        """Whether there is an fd."""
        return self.number >= 0

    cpdef take(self):
        """Add a user."""
        self.users += 1
        return self

    def __enter__(self):
        self.users += 1
        return self

    def __exit__(self, *exception):
        self.release()

    cpdef release(self):
        """Remove a user; the last one closes the fd. Raises ``OSError``."""
        self.users -= 1
        if self.users == 0:
            fd, self.number = self.number, -1
            if fd >= 0:
                close_fd(fd)

    cdef void leave(self):
        """The same, without a report of errors."""
        self.users -= 1
        if self.users == 0 and self.number >= 0:
            close(self.number)
            self.number = -1

    def only_reads(self):
        """Record that it must not be written any more: it lies in a lower."""
        self.writable = False

    def look_at_xattrs(self):
        """List the names of all its xattrs and remember them; None if they cannot be listed."""
        try:
            self.xattrs = call(os.listxattr, self.descriptor())
        except OSError:  # for example too many
            return None
        return self.xattrs

    def read_into(self, buffer, offset):
        """Fill a buffer without waiting for a disk; returns the byte count, short only at the end of the
        file. ``None``: read it in a thread."""
        fd = self.descriptor()
        if is_slow(fd):
            data = read_slow(fd, len(buffer), offset)
            buffer[:len(data)] = data
            return len(data)
        if not self.waits:
            return os.preadv(fd, [buffer], offset)
        try:
            count = os.preadv(fd, [buffer], offset, os.RWF_NOWAIT)
        except BlockingIOError:
            return None
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise
            self.waits = False
            return os.preadv(fd, [buffer], offset)
        if count < len(buffer) and offset + count < os.fstat(fd).st_size:
            return None  # the rest is on the disk
        return count

    cdef ssize_t read_now(self, char *buffer, size_t size, uint64_t offset) except -2:
        """The same for compiled code; -1: read it in a thread. Raises ``OSError``."""
        cdef int fd = self.descriptor()
        cdef iovec part
        cdef stat_t st
        cdef ssize_t count
        if <int64_t>offset < 0:  # preadv2(2) takes -1 for the offset of the fd
            raise failure(EINVAL)
        if is_slow(fd):
            count = read_in_layer(fd, buffer, size, <int64_t>offset)
            if count < 0:
                raise failure(c_errno)
            return count
        part.iov_base, part.iov_len = buffer, size
        if self.waits:
            count = preadv2(fd, &part, 1, <long>offset, RWF_NOWAIT)
            if count >= 0:
                if <size_t>count < size and fstat(fd, &st) == 0 and <int64_t>(offset + count) < st.st_size:
                    return -1  # the rest is on the disk
                return count
            if c_errno == EOPNOTSUPP or c_errno == EINVAL:
                self.waits = False
        if not self.waits:
            count = pread(fd, buffer, size, <long>offset)
        if count < 0:
            if c_errno == EAGAIN or c_errno == EINTR:  # a signal of this process, not of the reader
                return -1
            raise failure(c_errno)
        return count

    def read(self, size, offset):
        """Read up to ``size`` bytes; fewer only at the end of the file."""
        fd = self.descriptor()
        data = os.pread(fd, size, offset)
        while data and len(data) < size:
            more = os.pread(fd, size - len(data), offset + len(data))
            if not more:
                break
            data += more
        return data

    def write(self, data, offset):
        """Write all of ``data``, or as much as fits. Raises ``OSError`` if nothing was written."""
        fd = self.descriptor()
        done = os.pwrite(fd, data, offset)
        while done < len(data):
            try:
                done += os.pwrite(fd, memoryview(data)[done:], offset + done)
            except OSError:
                break  # the rest did not fit; the next write reports the error
        return done


cdef OpenFile new_file(int fd, bint waits, st):
    """One for reading and writing."""
    cdef OpenFile file = OpenFile.__new__(OpenFile)
    file.number, file.result = fd, st
    file.readable = file.writable = True
    file.waits, file.users = waits, 1
    return file


cdef class RestingFiles:
    """The lower files that have an fd now. Of those beyond ``most`` the ones opened first are closed if nobody uses
    them at the moment: each is opened again when it is needed."""

    # open_now: the files, those opened first at the beginning; rested: how many were closed.

    def __init__(self, Py_ssize_t most):
        self.open_now, self.most = {}, most

    def __len__(self):
        return len(self.open_now)

    cdef int opened(self, UnreadFile file) except -1:
        cdef UnreadFile first
        cdef Py_ssize_t tries
        self.open_now[file] = None
        file.resting = self
        for tries in range(AT_ONCE):
            if len(self.open_now) <= self.most:
                break
            first = next(iter(self.open_now))
            if first.is_idle():
                first.rest()
                self.rested += 1
            else:
                del self.open_now[first]
                self.open_now[first] = None
        return 0


cdef class UnreadFile(OpenFile):
    """A lower's file that is opened on first use: no fd is open while the kernel has its data in the page
    cache. An access to `fd` opens it in the caller's thread, and raises ``OSError`` on failure. So it may also be
    closed while it is not used; see `RestingFiles`."""

    def __init__(self, open, node, *, bint waits):
        """``open`` returns an `OpenFile` of ``node``, whose fd it takes over."""
        super().__init__(-1, readable=True, writable=False, waits=waits)
        self.open, self.node = open, node

    cdef int descriptor(self) except -2:
        if self.number < 0:
            if self.users <= 0:
                raise OSError(errno.EBADF, os.strerror(errno.EBADF))
            try:
                opened = self.open(self.node)
            except OSError as error:
                if error.errno in GONE:
                    raise OSError(errno.EIO, "the layer no longer holds the file") from None
                raise
            self.number, self.result, self.xattrs = opened.fd, opened.st, opened.xattrs
            if isinstance(opened, UnreadFile) and (<UnreadFile>opened).resting is not None:
                resting = (<UnreadFile>opened).resting
                (<UnreadFile>opened).leaves()
                (<UnreadFile>opened).number = -1
                resting.opened(self)
        return self.number

    cpdef release(self):
        try:
            OpenFile.release(self)
        finally:
            if self.users == 0:
                self.leaves()

    cdef void leave(self):
        OpenFile.leave(self)
        if self.users == 0:
            self.leaves()

    cdef void leaves(self) noexcept:
        """It has no fd of its own any more."""
        if self.resting is not None:
            self.resting.open_now.pop(self, None)
            self.resting = None

    cdef bint is_idle(self):
        """Whether all its users are open files, or the table of those that stay open: no thread reads it, and no
        request is about to."""
        cdef Use use = None if self.node is None else self.node.use
        return use is not None and use.file is self and self.users <= len(use.handles) + use.kept

    cdef void rest(self) noexcept:
        """Close the fd until it is needed."""
        fd, self.number = self.number, -1
        self.leaves()
        if fd >= 0:
            close(fd)


cdef class Handle:
    """One open of one file."""

    # who: the process that opened it.
    # node: its node.
    # maps: whether the file can be mapped to write: open for both (mmap(2)).
    # record: what another daemon would need; see `state`.
    # through: whether it is in passthrough.
    # late: whether a former daemon opened it, and this one has not yet.
    # table, holds, uid: the `Handles` that it is in, whether its file's fd is charged to it there, and the user that
    #     opened it.

    def __init__(self, OpenFile file not None, who, *, bint writes, bint maps=False, node=None):
        self.file = file
        self.who = who
        self.node = node
        self.writes = writes
        self.maps = maps

    def go_on(self, OpenFile file not None):
        """Switch to another file, releasing the current one."""
        cdef OpenFile old = self.file
        self.file = file
        old.leave()


cdef class Use:
    """The use of a node: its open files, and the session's agreements with the kernel about them."""

    # file, handles: the backing file, if it is open, and its open file handles.
    # kept: whether the backing file stays open without a file handle; then a table of those has it.
    # cached, through: opens whose data goes through the page cache, and opens with a backing file.
    # filled: whether the first open put the data into the page cache (or could have, for a large file).
    # backing_id, of_upper: the backing id, and whether the backing file is the upper's.
    # resized: whether the file was truncated (or extended) by name since the backing file was registered.
    # writers, written: opens for writing with the backing file, and whether there ever was one.
    # mappers, mapped: those of them that can be mapped, and whether a mapping may still write to the file.
    # writebacks, mtime_ns, capability: writes of cached data in progress, and the attributes to restore after
    #     them.
    # tickets: of a directory: its tickets, once it needs some.

    def __init__(self):
        self.handles, self.mtime_ns = [], 0

    def has_tickets(self, tickets):
        """Set the tickets of the directory."""
        self.tickets = tickets

    def stays_open(self, *, bint kept):
        """Record whether the backing file stays open without an open file handle."""
        self.kept = kept

    def has(self, OpenFile file):
        """Set the backing file."""
        self.file = file

    def passes_through(self, int backing_id, *, bint of_upper):
        """Record the id under which the kernel knows the backing file."""
        self.backing_id, self.of_upper, self.resized = backing_id, of_upper, False

    def becomes_lower(self):
        """Record that the backing file belongs to a lower now."""
        self.of_upper = False
        if self.file is not None:
            self.file.only_reads()

    def resize(self):
        """Record a truncation without an open."""
        self.resized = True

    cpdef opened(self, Handle handle):
        """Count an open, with the backing file if that is registered."""
        if handle.record != NULL:
            handle.record.backing_id = self.backing_id
            handle.record.flags |= COUNTED | (THROUGH if self.backing_id else 0) | (OF_UPPER if self.of_upper else 0)
        if not self.backing_id:
            self.cached += 1
            return
        self.through += 1
        handle.through = True
        if handle.writes:
            self.writers += 1
            self.written = True
            if handle.maps:
                self.mappers += 1
                self.mapped = True

    cpdef int closed(self, Handle handle):
        """Count a close; returns the backing id if it is now unused, else 0."""
        if not handle.through:
            self.cached -= 1
            return 0
        self.through -= 1
        if handle.writes:
            self.writers -= 1
            if handle.maps:
                self.mappers -= 1
        if self.through:
            return 0
        backing_id, self.backing_id = self.backing_id, 0
        return backing_id

    def was_written(self, bint written, bint mapped):
        """Record what a former daemon knew about opens with a backing file."""
        self.written, self.mapped = written, mapped

    def fill(self):
        """Record that the kernel received all data."""
        self.filled = True

    def writes_back(self, Py_ssize_t count):
        """Count the start (or, with a negative count, the end) of writes of cached data."""
        self.writebacks += count

    def keep_mtime(self, mtime_ns not None):
        """Set the time of modification to restore after the writes in progress."""
        self.mtime_ns = mtime_ns

    def keep_capability(self, bytes value):
        """Set the capabilities to restore after the writes in progress."""
        self.capability = value
