"""The real objects of nodes: their attributes."""

from libc.errno cimport EACCES
from libc.errno cimport errno as c_errno

from unionfs.core.places cimport Place
from unionfs.core.stats cimport (
    AT_SYMLINK_NOFOLLOW, S_IFDIR, failure, fstat, fstatat, read_result, result_of,
)

cdef extern from "<unistd.h>" nogil:
    ssize_t readlinkat(int fd, const char *path, char *buffer, size_t size)

cdef enum:
    PATH_MAX = 4096


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
