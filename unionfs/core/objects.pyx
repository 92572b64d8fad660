"""The real objects of nodes: their attributes."""

from libc.errno cimport EACCES, EPERM
from libc.errno cimport errno as c_errno
from libc.stdio cimport snprintf

from unionfs.core.layercalls cimport fstat, fstatat, getxattr, listxattr, openat, readlinkat
from unionfs.core.marks cimport close
from unionfs.core.places cimport Place
from unionfs.core.stats cimport (
    AT_SYMLINK_NOFOLLOW, O_CLOEXEC, O_NOFOLLOW, O_PATH, S_IFDIR, failure, read_result, result_of,
)

cdef enum:
    PATH_MAX = 4096
    # /proc/self/fd/, a number, a null byte
    FD_PATH_SIZE = 32


cdef int path_fd(Gate gate, Node node, bint *mine) except -2:
    """An fd of the node's object, O_PATH; ``mine``: whether the caller must close it. -1 for a name without
    permission. Raises ``OSError``, ESTALE if another object now has its name."""
    cdef stat_t st
    cdef int fd
    mine[0] = False
    if node.held >= 0:
        return node.held
    if node.kind == S_IFDIR:
        return gate.fd(<Place?>node.parts[0])
    fd = openat(gate.fd(node.place), node.stored_name(), O_PATH | O_NOFOLLOW | O_CLOEXEC)
    if fd < 0:
        if c_errno == EACCES or c_errno == EPERM:
            return -1
        raise failure(c_errno)
    try:
        if fstat(fd, &st) != 0:
            raise failure(c_errno)
        node.check_stat(&st)
    except BaseException:
        close(fd)
        raise
    mine[0] = True
    return fd


cdef class Objects:
    """Examines the objects of nodes through the gate."""

    def __init__(self, Gate gate not None):
        self.gate = gate

    def shown(self, Node node, st, fd=-1):
        """The attributes to show for the node's object; ``st``: its own, ``fd``: an fd of it, if open."""
        return st

    def stat(self, Node node not None):
        """The attributes of the real object. Raises ESTALE if another object now has its name."""
        cdef stat_t st
        self.examine(node, &st)
        return result_of(&st)

    cpdef Attributes attributes(self, Node node):
        """stat(2) of a node."""
        cdef stat_t st
        self.examine(node, &st)
        return node.shown(&st)

    cdef int examine(self, Node node, stat_t *st) except -1:
        cdef Place place
        cdef bytes name
        cdef int fd
        if node.held >= 0 or node.kind == S_IFDIR:
            fd = node.held if node.held >= 0 else self.gate.fd(<Place?>node.parts[0])
            if fstat(fd, st) != 0:
                raise failure(c_errno)
        else:
            place, name = node.place, node.stored_name()
            fd = self.gate.fd(place)
            if fstatat(fd, name, st, AT_SYMLINK_NOFOLLOW) != 0:
                self.refused(place, name, st, c_errno)
            node.check_stat(st)
        if node.top_layer().permissions is not None:
            read_result(self.shown(node, result_of(st)), st)
        return 0

    cdef int refused(self, Place place, bytes name, stat_t *st, int code) except -1:
        error = failure(code)
        again = self.gate.stat_refused(place, name, error) if code == EACCES else None
        if again is None:
            raise error
        return read_result(again, st)

    cdef ssize_t xattr(self, Node node, const char *name, char *value, size_t size) except? -1:
        """getxattr(2), or listxattr(2) if ``name`` is NULL: the size, or minus an errno. Raises ``OSError``."""
        cdef char path[FD_PATH_SIZE]
        cdef bint mine
        cdef int fd = path_fd(self.gate, node, &mine)
        cdef ssize_t found
        if fd < 0:
            return -EACCES
        snprintf(path, FD_PATH_SIZE, "/proc/self/fd/%d", fd)
        try:
            found = listxattr(path, value, size) if name == NULL else getxattr(path, name, value, size)
            return -c_errno if found < 0 else found
        finally:
            if mine:
                close(fd)

    cpdef bytes readlink(self, Node node):
        """The target of a symlink."""
        cdef char target[PATH_MAX]
        cdef bytes name
        cdef ssize_t size
        if node.held >= 0:
            size = readlinkat(node.held, b"", target, PATH_MAX)
        else:
            name = node.stored_name()
            size = readlinkat(self.gate.fd(node.place), name, target, PATH_MAX)
            if size < 0 and c_errno == EACCES:
                return self.readlink_refused(node)
        if size < 0:
            raise failure(c_errno)
        return target[:size]
