"""System calls on layers: at once, or for a slow layer from the memo of the request; see `memo`.

On an fd without a mark, in other threads, and where no request is being answered, these functions just make the call.
"""

import os

from cpython.bytes cimport PyBytes_AS_STRING
from libc.errno cimport EIO, ERANGE
from libc.errno cimport errno as c_errno
from libc.stdlib cimport strtol
from libc.string cimport memcpy, strncmp
from posix.unistd cimport pread as c_pread

from unionfs.core.marks cimport (
    AT_EMPTY_PATH, MOST_FDS, marked_child, marked_copy, marks, statx, statx_t, xattr_error,
)
from unionfs.core.memo cimport (
    ATTRIBUTES, ENTRIES, FLAGS, FUNCTION, NAMES_SIZE, OPEN, READ, READLINK, STAT, XATTR, Call, answering, current,
    may_ask,
)
from unionfs.core.stats cimport AT_SYMLINK_NOFOLLOW, O_CLOEXEC, failure, result_of
from unionfs.core.stats cimport fstat as c_fstat
from unionfs.core.stats cimport fstatat as c_fstatat
from unionfs.core.stats cimport openat as c_openat

from unionfs.core.memo import Here

cdef extern from "<unistd.h>" nogil:
    ssize_t c_readlinkat "readlinkat"(int fd, const char *path, char *buffer, size_t size)

cdef extern from "<sys/xattr.h>" nogil:
    ssize_t c_getxattr "getxattr"(const char *path, const char *name, void *value, size_t size)
    ssize_t c_lgetxattr "lgetxattr"(const char *path, const char *name, void *value, size_t size)
    ssize_t c_listxattr "listxattr"(const char *path, char *names, size_t size)
    ssize_t c_flistxattr "flistxattr"(int fd, char *names, size_t size)

cdef extern from "<sys/ioctl.h>" nogil:
    int ioctl(int fd, unsigned long request, ...)

cdef extern from "<linux/fs.h>" nogil:
    unsigned long FS_IOC_GETFLAGS

cdef extern from * nogil:
    """
    #include <errno.h>
    static void set_errno(int code) { errno = code; }
    """
    void set_errno(int code)

cdef const char *FDS = b"/proc/self/fd/"


# -- for Python -------------------------------------------------------------------------------------------


cdef int fd_in(object one, list rest) except -2:
    """The fd in an argument: a number, or a path below /proc/self/fd; -1: none."""
    cdef const char *path
    cdef char *end
    cdef int fd
    if type(one) is int:
        rest.append(None)
        return one if 0 <= one < MOST_FDS else -1
    if type(one) is not bytes or not (<bytes>one).startswith(b"/proc/self/fd/"):
        return -1
    path = one
    fd = <int>strtol(path + 14, &end, 10)
    rest.append(<bytes>end)
    return fd if end != path + 14 and 0 <= fd < MOST_FDS else -1


def call(function, *arguments, **options):
    """Call a function whose first argument, or option ``dir_fd``, is an fd, or a path below /proc/self/fd, and which
    uses no other. It may be called anew with another fd of the same object. Raises its exceptions."""
    cdef list rest = []
    cdef int fd = -1
    cdef Call made
    cdef object result
    cdef bint is_in_directory = options.get("dir_fd") is not None
    if marks == NULL:
        return function(*arguments, **options)
    if is_in_directory:
        fd = fd_in(options["dir_fd"], rest)
    else:
        fd = fd_in(arguments[0], rest)
    if fd < 0 or not may_ask(fd):
        try:
            result = function(*arguments, **options)
        except OSError as error:
            if fd >= 0 and error.errno == EIO and function in (os.getxattr, os.listxattr):
                raise failure(xattr_error(fd, EIO)) from None
            raise
        if function is os.open and fd >= 0:
            marked_child(fd, result, arguments[1])
        return result
    if is_in_directory:
        options["dir_fd"] = Here(rest[0])
    else:
        arguments = (Here(rest[0]), *arguments[1:])
    if function is os.open:
        name = arguments[0] if is_in_directory else rest[0][1:]
        return opened(current.ask(OPEN, fd, name, None, arguments[1] | O_CLOEXEC, 0))
    if function is os.listxattr and not rest[0]:
        made = current.ask(XATTR, fd, b"", None, 1, NAMES_SIZE)
        if made.value >= 0:
            return [os.fsdecode(name) for name in (<bytes>made.data)[:made.value].split(b"\0") if name]
        if made.code != ERANGE:
            raise failure(made.code)
    if function is os.fstat or (function is os.stat and isinstance(arguments[0], Here) and rest[0] is None):
        made = current.ask(STAT, fd, b"", None, AT_EMPTY_PATH, 0)
        return attributes(made)
    if function is os.stat and is_in_directory and not options.get("follow_symlinks", True):
        return attributes(current.ask(STAT, fd, arguments[0], None, AT_SYMLINK_NOFOLLOW, 0))
    made = current.ask(FUNCTION, fd, None, None, 0, 0, function, arguments, tuple(options.items()))
    if made.code:
        raise OSError(made.code, made.data)
    return list(made.data) if type(made.data) is list else made.data


cdef object attributes(Call made):
    if made.value != 0:
        raise failure(made.code)
    return result_of(&made.st)


cdef object opened(Call made):
    cdef int fd = handed_out(made)
    if fd < 0:
        raise failure(c_errno)
    return fd


cdef int handed_out(Call made) noexcept:
    """A copy of an fd that was opened, for the handler; -1 with errno."""
    if made.value < 0:
        set_errno(made.code)
        return -1
    return marked_copy(<int>made.value, &made.mark)


def read(int fd, size_t size, int64_t offset):
    """Bytes of a slow file, fewer only at its end. Raises ``OSError``."""
    cdef Call made
    if not may_ask(fd):
        return os.pread(fd, size, offset)
    made = current.ask(READ, fd, None, None, offset, size)
    if made.value < 0:
        raise failure(made.code)
    return made.data


# -- for the core -----------------------------------------------------------------------------------------
# Each is the system call of its name, with -1 and errno for an error.


cdef int fstatat(int fd, const char *name, stat_t *st, int flags) except? -2 nogil:
    return asked_stat(fd, name, st, flags) if may_ask(fd) else c_fstatat(fd, name, st, flags)


cdef int fstat(int fd, stat_t *st) except? -2 nogil:
    return asked_stat(fd, "", st, AT_EMPTY_PATH) if may_ask(fd) else c_fstat(fd, st)


cdef int asked_stat(int fd, const char *name, stat_t *st, int flags) except? -2 with gil:
    cdef Call made = current.ask(STAT, fd, name, None, flags, 0)
    st[0] = made.st
    return result(made)


cdef int result(Call made) except? -2:
    set_errno(made.code)
    return <int>made.value


cdef int openat(int fd, const char *name, int flags) except? -2 nogil:
    """Without O_CREAT."""
    return asked_open(fd, name, flags) if may_ask(fd) else marked_child(fd, c_openat(fd, name, flags), flags)


cdef int asked_open(int fd, const char *name, int flags) except? -2 with gil:
    return handed_out(current.ask(OPEN, fd, name, None, flags, 0))


cdef ssize_t readlinkat(int fd, const char *name, char *buffer, size_t size) except? -2 nogil:
    return asked_link(fd, name, buffer, size) if may_ask(fd) else c_readlinkat(fd, name, buffer, size)


cdef ssize_t asked_link(int fd, const char *name, char *buffer, size_t size) except? -2 with gil:
    return filled(current.ask(READLINK, fd, name, None, 0, size), buffer)


cdef ssize_t filled(Call made, void *buffer) except? -2:
    """The result of a call that fills a buffer."""
    if made.value > 0 and made.size:
        memcpy(buffer, PyBytes_AS_STRING(made.data), made.value)
    set_errno(made.code)
    return made.value


cdef int fd_of(const char *path, const char **name) noexcept nogil:
    """The fd in a path below /proc/self/fd, and the ``name`` behind it; -1 for another path."""
    cdef char *end
    cdef long fd
    if marks == NULL or not answering or strncmp(path, FDS, 14) != 0:
        return -1
    fd = strtol(path + 14, &end, 10)
    name[0] = end + 1 if end[0] == c"/" else end
    return <int>fd if end != path + 14 and 0 <= fd < MOST_FDS else -1


cdef ssize_t getxattr(const char *path, const char *name, void *value, size_t size) except? -2 nogil:
    cdef const char *rest
    cdef int fd = fd_of(path, &rest)
    if fd >= 0 and may_ask(fd):
        return xattr_of(fd, rest, name, True, value, size)
    return c_getxattr(path, name, value, size)


cdef ssize_t lgetxattr(const char *path, const char *name, void *value, size_t size) except? -2 nogil:
    cdef const char *rest
    cdef int fd = fd_of(path, &rest)
    if fd >= 0 and may_ask(fd):
        return xattr_of(fd, rest, name, False, value, size)
    return c_lgetxattr(path, name, value, size)


cdef ssize_t listxattr(const char *path, char *names, size_t size) except? -2 nogil:
    cdef const char *rest
    cdef int fd = fd_of(path, &rest)
    if fd >= 0 and may_ask(fd):
        return xattr_of(fd, rest, NULL, True, names, size)
    return c_listxattr(path, names, size)


cdef ssize_t flistxattr(int fd, char *names, size_t size) except? -2 nogil:
    return xattr_of(fd, "", NULL, True, names, size) if may_ask(fd) else c_flistxattr(fd, names, size)


cdef ssize_t xattr_of(
    int fd, const char *name, const char *xattr, bint follow, void *value, size_t size
) except? -2 with gil:
    """An xattr of a name in a slow directory, or of its own; all their names if ``xattr`` is NULL. See `may_ask`."""
    cdef bytes wanted = None if xattr == NULL else <bytes>xattr
    cdef Call made = current.ask(XATTR, fd, name, wanted, follow, NAMES_SIZE if xattr == NULL else size)
    if xattr == NULL and made.value >= 0 and size < <size_t>made.value:
        if size:
            set_errno(ERANGE)
            return -1
        return made.value
    return filled(made, value)


cdef int get_flags(int fd, int *flags) except? -2 nogil:
    """ioctl FS_IOC_GETFLAGS."""
    return asked_flags(fd, flags) if may_ask(fd) else ioctl(fd, FS_IOC_GETFLAGS, flags)


cdef int asked_flags(int fd, int *flags) except? -2 with gil:
    cdef Call made = current.ask(FLAGS, fd, None, None, 0, 0)
    flags[0] = made.data
    return result(made)


cdef int attributes_of(int fd, const char *name, int flags, uint64_t *attributes) except? -2 nogil:
    """``stx_attributes`` of statx(2)."""
    cdef statx_t found
    cdef int failed
    if may_ask(fd):
        return asked_attributes(fd, name, flags, attributes)
    failed = statx(fd, name, flags, 0, &found)
    attributes[0] = found.stx_attributes
    return failed


cdef int asked_attributes(int fd, const char *name, int flags, uint64_t *attributes) except? -2 with gil:
    cdef Call made = current.ask(ATTRIBUTES, fd, name, None, flags, 0)
    attributes[0] = made.data
    return result(made)


cdef ssize_t pread(int fd, void *buffer, size_t size, int64_t offset) except? -2 nogil:
    return asked_data(fd, buffer, size, offset) if may_ask(fd) else c_pread(fd, buffer, size, offset)


cdef ssize_t asked_data(int fd, void *buffer, size_t size, int64_t offset) except? -2 with gil:
    return filled(current.ask(READ, fd, None, None, offset, size), buffer)


cdef list entries_of(int fd):
    """The records of a slow directory, in pieces; see `may_ask`. Raises ``OSError``."""
    cdef Call made = current.ask(ENTRIES, fd, None, None, 0, 0)
    if made.value < 0:
        raise failure(made.code)
    return made.data
