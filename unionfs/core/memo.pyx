"""System calls on slow layers, as a page fault does it: a request that needs one which was not made yet is put aside.

A layer on a network or FUSE filesystem may not answer for minutes, or for ever, and then the loop must go on. So a
request has a `Memo` of what the calls returned that it has made on such layers. While the loop answers the request, the
functions of `layercalls` take results from the memo. If there is none, they raise `Wanted`, which unwinds the whole
handler; the session lets a thread make that one call, and answers the request anew, from its start. So handlers stay
atomic: nothing is half done while a request waits, and threads make raw calls only, on fds of their own.

This is right because all that a handler does before its last such call can be done again: it reads, fills caches, or
makes something in work, which is removed if an exception ends the change.
"""

import os

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.errno cimport EINTR, ENOENT
from libc.errno cimport errno as c_errno
from libc.stdint cimport uint64_t
from libc.stdio cimport snprintf
from posix.unistd cimport pread as c_pread

from unionfs.core.marks cimport (
    AT_EMPTY_PATH, close, is_slow, mark_as, marked_copy, marks, new_mark, statx, statx_t,
    xattr_error,
)
from unionfs.core.stats cimport O_PATH, S_IFMT, S_IFREG, failure, fstatat, openat
from unionfs.core.wire cimport SMALL_FILE

cdef extern from "pythread.h":
    unsigned long PyThread_get_thread_ident() nogil

cdef extern from "<fcntl.h>" nogil:
    int AT_FDCWD
    int O_ACCMODE
    int O_WRONLY

cdef extern from "<unistd.h>" nogil:
    int SEEK_SET
    int64_t lseek(int fd, int64_t offset, int whence)
    ssize_t readlinkat(int fd, const char *path, char *buffer, size_t size)
    long syscall(long number, ...)

cdef extern from "<sys/syscall.h>" nogil:
    long SYS_getdents64

cdef extern from "<sys/xattr.h>" nogil:
    ssize_t getxattr(const char *path, const char *name, void *value, size_t size)
    ssize_t lgetxattr(const char *path, const char *name, void *value, size_t size)
    ssize_t listxattr(const char *path, char *names, size_t size)
    ssize_t llistxattr(const char *path, char *names, size_t size)

cdef extern from "<sys/ioctl.h>" nogil:
    int ioctl(int fd, unsigned long request, ...)

cdef extern from "<linux/fs.h>" nogil:
    unsigned long FS_IOC_GETFLAGS

cdef enum:
    # /proc/self/fd/, a number, a slash, NAME_MAX bytes, a null byte
    PATH_SIZE = 300
    BUFFER = 32 * 1024

#: Which results are still right: those of calls that were wanted since `outdate`.
cdef uint64_t generation = 0
#: Whether the loop answers a request, whose memo is `current`; its thread.
cdef bint answering = False
cdef Memo current = None
cdef unsigned long loop_thread = 0


class Wanted(BaseException):
    """The request needs a call that was not made yet: the memo has it."""


class Here:
    """Where an fd is among arguments; ``rest``: of its path below /proc/self/fd, None: it is a number."""

    def __init__(self, rest):
        self.rest = rest

    def __eq__(self, other):
        return isinstance(other, Here) and self.rest == other.rest

    def __hash__(self):
        return hash(self.rest)

    def at(self, fd):
        """The argument with that fd."""
        return fd if self.rest is None else b"/proc/self/fd/%d%b" % (fd, self.rest)


def outdate():
    """Forget all results before their requests are answered anew: the layers are looked at again."""
    global generation
    generation += 1


cdef bint may_ask(int fd) noexcept nogil:
    """Whether a call on an fd must be asked of the memo."""
    return answering and is_slow(fd) and PyThread_get_thread_ident() == loop_thread


cdef class Memo:
    """The results of calls on slow layers, for one request.

    ``with memo:`` answers the request, or a step of it, in the loop.
    """

    # results, pending: the calls that were made, and those that are wanted, by what they ask.
    # generation: of the results.
    # closed: whether the request has ended.

    def __init__(self):
        self.results, self.pending, self.generation = {}, {}, generation

    def __enter__(self):
        global answering, current, loop_thread
        if self.generation != generation:
            self.forget()
            self.generation = generation
        current, loop_thread, answering = self, PyThread_get_thread_ident(), True
        return self

    def __exit__(self, *exception):
        global answering, current
        current, answering = None, False

    @property
    def used(self):
        """Whether it has, or wants, a result."""
        return bool(self.results) or bool(self.pending)

    def wanted(self):
        """The calls to make before the request is answered anew."""
        return list(self.pending.values())

    def made(self, calls):
        """Calls were made."""
        cdef Call call
        for call in calls:
            self.enter(call)

    cdef int enter(self, Call call) except -1:
        cdef Call more
        self.pending.pop(call.key, None)
        self.results[call.key] = call
        if call.found is not None:
            for more in call.found:
                self.results[more.key] = more
            call.found = None
        return 0

    def close(self):
        """The request has ended: close what was opened for it. A call that is still being made closes its own."""
        self.closed = True
        self.forget()

    cdef int forget(self) except -1:
        cdef Call call
        for call in self.results.values():
            if call.opened:
                close(<int>call.value)
        for call in self.pending.values():
            call.drop()
        self.results, self.pending = {}, {}
        return 0

    cdef Call ask(
        self, int kind, int fd, bytes name, bytes text, int64_t number, size_t size,
        object function=None, tuple arguments=None, object options=None
    ):
        """The call with its result. Raises `Wanted` if it was not made yet."""
        cdef Call call
        key = kind, marks[fd].id, name, text, number, size, function, arguments, options
        call = self.results.get(key)
        if call is not None:
            return call
        if key not in self.pending:
            call = Call.__new__(Call)
            call.kind, call.key, call.name, call.text, call.number, call.size = kind, key, name, text, number, size
            call.function, call.arguments, call.options = function, arguments, options
            call.layer, call.mark = marks[fd].layer, marks[fd]
            call.fd = marked_copy(fd, &call.mark)
            if call.fd < 0:
                raise failure(c_errno)
            self.pending[key] = call
        raise Wanted


cdef class Call:
    """One system call on a slow layer. :meth:`make` makes it, in a thread, and uses nothing but the call's own fd."""

    # layer: the number of the slow layer.
    # opened, mark: whether `value` is an fd that belongs to the memo, and its mark.
    # found: further calls, made at once since they usually follow.

    @property
    def read_from(self):
        """Of a read: which open file, and where it begins; else None."""
        return (self.mark.id, self.number) if self.kind == READ else None

    def make(self, Memo memo not None):
        """Make the call. Whatever it returns is the result; a request that has ended does not need it any more."""
        if self.fd < 0:
            return  # dropped
        self.carry_out()
        if self.opened and not memo.closed:
            self.look_at_opened()
        self.done = True
        fd, self.fd = self.fd, -1
        with nogil:
            if fd >= 0:
                close(fd)
        if memo.closed:
            self.drop()

    def drop(self):
        """The request has ended. A call that is being made closes its fd itself."""
        if not self.started:
            fd, self.fd = self.fd, -1
            if fd >= 0:
                close(fd)
        if self.done and self.opened:
            self.opened = False
            fd = <int>self.value
            with nogil:
                close(fd)

    cdef int carry_out(self) except -1:
        cdef int fd = self.fd, flags = <int>self.number, code = 0, kind = self.kind
        cdef bytes given = self.name if self.name is not None else b"", text_of = self.text
        cdef const char *name = given
        cdef const char *text = NULL
        cdef char path[PATH_SIZE]
        cdef char *buffer = NULL
        cdef size_t size = self.size
        cdef long value = 0
        cdef stat_t st
        cdef statx_t found
        cdef int inner = 0
        if text_of is not None:
            text = text_of
        self.started = True
        if kind == FUNCTION:
            return self.call()
        if kind == READ:
            return self.read()
        if kind == ENTRIES:
            return self.list_entries()
        if kind == READLINK or kind == XATTR:
            self.data = PyBytes_FromStringAndSize(NULL, size)
            buffer = PyBytes_AS_STRING(self.data)
        if snprintf(path, PATH_SIZE, "/proc/self/fd/%d%s%s", fd, b"/" if name[0] else b"", name) >= PATH_SIZE:
            self.value, self.code = -1, ENOENT
            return 0
        with nogil:
            if kind == STAT:
                value = fstatat(fd, name, &st, flags)
            elif kind == OPEN:
                value = openat(fd, name, flags) if name[0] else openat(AT_FDCWD, path, flags)
            elif kind == READLINK:
                value = readlinkat(fd, name, buffer, size)
            elif kind == XATTR:
                value = xattr(path, text, flags, buffer if size else NULL, size)
            elif kind == FLAGS:
                value = ioctl(fd, FS_IOC_GETFLAGS, &inner)
            elif kind == ATTRIBUTES:
                value = statx(fd, name, flags, 0, &found)
            code = c_errno
            if kind == XATTR:
                code = xattr_error(fd, code)
        self.value, self.code = value, code if value < 0 else 0
        if kind == STAT:
            self.st = st
        elif kind == ATTRIBUTES:
            self.data = found.stx_attributes if value == 0 else 0
        elif kind == FLAGS:
            self.data = inner
        elif kind == OPEN and value >= 0:
            self.opened = True
            self.mark = new_mark(<int>value, &self.mark, not flags & O_PATH)
            mark_as(<int>value, &self.mark)
        return 0

    cdef int call(self) except -1:
        try:
            self.data = self.function(
                *[placed(one, self.fd) for one in self.arguments],
                **{name: placed(one, self.fd) for name, one in self.options},
            )
        except OSError as error:
            self.code = error.errno or ENOENT
            if self.function in (os.getxattr, os.listxattr):
                self.code = xattr_error(self.fd, self.code)
            self.value, self.data = -1, os.strerror(self.code)
        return 0

    cdef int read(self) except -1:
        cdef bytes data = PyBytes_FromStringAndSize(NULL, self.size)
        cdef char *buffer = PyBytes_AS_STRING(data)
        cdef size_t done = 0, size = self.size
        cdef ssize_t count = 1
        cdef int fd = self.fd
        cdef int64_t offset = self.number
        with nogil:
            while done < size and count > 0:
                count = c_pread(fd, buffer + done, size - done, offset + <int64_t>done)
                if count > 0:
                    done += count
                elif count < 0 and c_errno == EINTR:
                    count = 1
        if count < 0 and not done:
            self.value, self.code = -1, c_errno
        else:
            self.value, self.data = <long>done, data if done == size else data[:done]
        return 0

    cdef int list_entries(self) except -1:
        """All records of a directory, in pieces, from the first one."""
        cdef bytes piece
        cdef char *buffer
        cdef long size = 1
        cdef int fd = self.fd
        self.data = []
        with nogil:
            lseek(fd, 0, SEEK_SET)
        while size > 0:
            piece = PyBytes_FromStringAndSize(NULL, BUFFER)
            buffer = PyBytes_AS_STRING(piece)
            with nogil:
                size = syscall(SYS_getdents64, fd, buffer, <size_t>BUFFER)
                if size < 0 and c_errno == EINTR:
                    size = syscall(SYS_getdents64, fd, buffer, <size_t>BUFFER)
            if size < 0 and c_errno != ENOENT:  # a removed directory has no names
                self.value, self.code = -1, c_errno
                return 0
            if size > 0:
                self.data.append(piece[:size])
        return 0

    cdef int look_at_opened(self) except -1:
        """Make the calls that follow an open: attributes, xattrs, and the data of a small file."""
        cdef Call st = self.follow(STAT, b"", AT_EMPTY_PATH, 0), more
        cdef int flags = <int>self.number
        st.carry_out()
        self.found = [st]
        if flags & O_PATH or st.value != 0 or st.st.st_mode & S_IFMT != S_IFREG or flags & O_ACCMODE == O_WRONLY:
            return 0
        more = self.follow(XATTR, b"", 1, NAMES_SIZE)
        more.carry_out()
        self.found.append(more)
        if 0 < st.st.st_size <= SMALL_FILE:
            more = self.follow(READ, None, 0, st.st.st_size)
            more.carry_out()
            self.found.append(more)
        return 0

    cdef Call follow(self, int kind, bytes name, int64_t number, size_t size):
        cdef Call more = Call.__new__(Call)
        more.kind, more.name, more.number, more.size = kind, name, number, size
        more.key = kind, self.mark.id, name, None, number, size, None, None, None
        more.layer, more.fd, more.done = self.layer, <int>self.value, True
        return more


cdef ssize_t xattr(const char *path, const char *name, bint follow, char *value, size_t size) noexcept nogil:
    """getxattr(2), or listxattr(2) if ``name`` is NULL."""
    if name == NULL:
        return listxattr(path, value, size) if follow else llistxattr(path, value, size)
    return getxattr(path, name, value, size) if follow else lgetxattr(path, name, value, size)


cdef object placed(object one, int fd):
    return one.at(fd) if isinstance(one, Here) else one
