"""Which fds belong to slow layers: layers on network and FUSE filesystems, where a call may wait for ever.

The roots of slow layers are marked, and what is opened from a marked fd gets a mark, too (`layercalls`). An fd that is
closed elsewhere leaves its mark behind: so a mark counts only while the fd is the same object, which statx(2) tells
from the inode in memory (AT_STATX_DONT_SYNC).
"""

import os

from libc.errno cimport EIO, EOPNOTSUPP
from libc.errno cimport errno as c_errno
from libc.stdlib cimport calloc
from libc.string cimport memset
from posix.unistd cimport close as c_close

from unionfs.core.stats cimport O_PATH, S_IFDIR, S_IFMT, S_IFREG, failure

cdef extern from "<fcntl.h>" nogil:
    int F_DUPFD_CLOEXEC, F_GETFL
    int fcntl(int fd, int command, ...)

cdef extern from "<sys/stat.h>" nogil:
    int AT_STATX_DONT_SYNC

cdef extern from * nogil:
    """
    #include <stdint.h>
    static uint64_t unionfs_last_id;
    static uint64_t next_id(void) { return __atomic_add_fetch(&unionfs_last_id, 1, __ATOMIC_RELAXED); }
    """
    uint64_t next_id()

#: Of the fds below `MOST_FDS`; NULL without slow layers.
cdef Mark *marks = NULL
#: Called with an fd of a slow file and its layer, to close it: close(2) sends a FLUSH and waits for the answer.
cdef object closer = None


cdef bint is_slow(int fd) noexcept nogil:
    """Whether the fd is marked, and still what was marked."""
    cdef statx_t found
    cdef Mark *mark
    if marks == NULL or not 0 <= fd < MOST_FDS or not marks[fd].id:
        return False
    mark = &marks[fd]
    if statx(fd, "", AT_EMPTY_PATH | AT_STATX_DONT_SYNC, 0, &found) != 0:
        return True  # for example a filesystem that was cut off
    if mark.ino == found.stx_ino and mark.major == found.stx_dev_major and mark.minor == found.stx_dev_minor:
        return True
    mark.id = 0
    return False


cdef int mark_as(int fd, const Mark *mark) noexcept nogil:
    if 0 <= fd < MOST_FDS:
        marks[fd] = mark[0]
    return 0


cdef Mark new_mark(int fd, const Mark *of, bint opened) noexcept nogil:
    """The mark of an object that was just opened from one of the same layer; ``opened``: not with O_PATH."""
    cdef statx_t found
    cdef Mark mark
    memset(&found, 0, sizeof(found))
    statx(fd, "", AT_EMPTY_PATH | AT_STATX_DONT_SYNC, 0, &found)
    mark.id, mark.ino, mark.layer, mark.bare = next_id(), found.stx_ino, of.layer, of.bare
    mark.major, mark.minor = found.stx_dev_major, found.stx_dev_minor
    # files are flushed; SMB and Lustre close directories at the server
    mark.flushes = opened and found.stx_mode & S_IFMT in (S_IFREG, S_IFDIR)
    return mark


def lacks_xattrs(int fd):
    """Whether the filesystem of a layer's root has no xattrs."""
    try:
        os.listxattr(b"/proc/self/fd/%d" % fd)
    except OSError as error:
        return error.errno == EOPNOTSUPP
    return False


def device(int fd):
    """The ``st_dev`` of an fd by which a file or directory is open, not only found (O_PATH); else 0. Asks no server."""
    cdef statx_t found
    cdef int flags = fcntl(fd, F_GETFL)
    memset(&found, 0, sizeof(found))
    if flags < 0 or flags & O_PATH or statx(fd, "", AT_EMPTY_PATH | AT_STATX_DONT_SYNC, 0, &found) != 0:
        return 0
    return os.makedev(found.stx_dev_major, found.stx_dev_minor)


cdef int mark_root(int fd, uint32_t layer, bint bare) except -1:
    """Mark the root of a slow layer with that number. ``bare``: see :func:`lacks_xattrs`."""
    global marks
    cdef Mark mark
    memset(&mark, 0, sizeof(mark))
    if marks == NULL:
        marks = <Mark *>calloc(MOST_FDS, sizeof(Mark))
        if marks == NULL:
            raise MemoryError
    mark.layer, mark.bare = layer, bare
    mark = new_mark(fd, &mark, False)
    return mark_as(fd, &mark)


cdef int mark_held(int fd, int root) noexcept nogil:
    """Mark an O_PATH fd of an object in the layer with that root, if that is marked."""
    cdef Mark mark
    if is_slow(root):
        mark = new_mark(fd, &marks[root], False)
        mark_as(fd, &mark)
    return 0


cdef int marked_copy(int fd, const Mark *mark) noexcept nogil:
    """dup(2) of a marked fd, with that mark; -1 with errno."""
    cdef int copy = fcntl(fd, F_DUPFD_CLOEXEC, 0)
    if copy >= 0:
        mark_as(copy, mark)
    return copy


cdef int marked_child(int fd, int opened, int flags) noexcept nogil:
    """Mark what was opened from a slow fd; returns its fd."""
    cdef Mark mark
    cdef int code
    if opened >= 0 and is_slow(fd):
        code = c_errno
        mark = new_mark(opened, &marks[fd], not flags & O_PATH)
        mark_as(opened, &mark)
    return opened


cdef int xattr_error(int fd, int code) noexcept nogil:
    """What an error of an xattr's call on an fd means."""
    if code == EIO and marks != NULL and 0 <= fd < MOST_FDS and marks[fd].bare and is_slow(fd):
        return EOPNOTSUPP
    return code


def slow(int fd):
    """Whether an fd is one of a slow layer, so that reading it may wait for ever."""
    return bool(is_slow(fd))


def duplicate(int fd):
    """dup(2). Raises ``OSError``."""
    cdef int copy = marked_copy(fd, &marks[fd]) if is_slow(fd) else fcntl(fd, F_DUPFD_CLOEXEC, 0)
    if copy < 0:
        raise failure(c_errno)
    return copy


def close_with(function):
    """Let ``function`` close slow files from now on: called with an fd and the number of its layer."""
    global closer
    closer = function


cdef int close(int fd) noexcept nogil:
    """close(2)."""
    return 0 if is_closed_aside(fd) else c_close(fd)


cdef bint is_closed_aside(int fd) noexcept nogil:
    """Take the mark of an fd away, and let others close it if that waits for a server."""
    cdef bint flushes
    cdef uint32_t layer
    if marks == NULL or not 0 <= fd < MOST_FDS or not marks[fd].id:
        return False
    flushes, layer = marks[fd].flushes and is_slow(fd), marks[fd].layer
    marks[fd].id = 0
    return flushes and close_aside(fd, layer)


cdef bint close_aside(int fd, uint32_t layer) noexcept with gil:
    if closer is None:
        return False
    closer(fd, layer)
    return True


def close_fd(int fd):
    """close(2), aside if it may wait. Raises ``OSError``."""
    if not is_closed_aside(fd):
        os.close(fd)
