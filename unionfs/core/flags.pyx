"""The flags of nodes, read where one system call does; see `union.flags`, which reads the others."""

from libc.errno cimport EACCES, ENODATA, EOPNOTSUPP, EPERM
from libc.errno cimport errno as c_errno
from libc.stdint cimport uint64_t
from libc.stdio cimport snprintf

from unionfs.core.layercalls cimport attributes_of, getxattr, lgetxattr
from unionfs.core.stats cimport AT_SYMLINK_NOFOLLOW, S_IFDIR, S_IFREG

cdef extern from "<sys/stat.h>" nogil:
    uint64_t STATX_ATTR_IMMUTABLE, STATX_ATTR_APPEND

cdef enum:
    # Of a name in a directory, as in `search`
    PATH_SIZE = 300
    # FS_IMMUTABLE_FL, FS_APPEND_FL: of `Node.flags`, include/uapi/linux/fs.h
    PROTECTED = 0x30


cdef class NodeFlags:
    """The flags of one union's nodes."""

    def __init__(self, Gate gate not None, bytes protattr not None):
        """``protattr``: the xattr of an object of the upper with its flags."""
        self.gate, self.protattr = gate, protattr

    cpdef int of(self, Node node) except -1:
        """IMMUTABLE and APPEND of a node. Raises ``OSError``."""
        if node.flags is None:
            node.flags = 0 if self.has_none(node) else self.read(node)
        return <int>node.flags & PROTECTED

    def read(self, node):
        """All flags of a node that may have some. Raises ``OSError``."""
        raise NotImplementedError

    cdef bint has_none(self, Node node) except -1:
        """Whether a node is known to have none."""
        cdef uint64_t found
        if (node.kind != S_IFREG and node.kind != S_IFDIR) or not node.territory.has_markers:
            return True
        if node.is_changed_in_place():
            return self.stores_none(node)
        if node.kind == S_IFDIR or node.held >= 0:
            return False
        if attributes_of(self.gate.fd(node.place), node.name, AT_SYMLINK_NOFOLLOW, &found) != 0:
            return False
        return not found & (STATX_ATTR_IMMUTABLE | STATX_ATTR_APPEND)

    cdef bint stores_none(self, Node node) except -1:
        """The same for an object of the upper."""
        cdef char path[PATH_SIZE]
        cdef ssize_t size
        cdef bytes name
        cdef int fd
        if node.held >= 0 or node.kind == S_IFDIR:
            fd = node.held if node.held >= 0 else self.gate.fd(node.parts[0])
            snprintf(path, PATH_SIZE, "/proc/self/fd/%d", fd)
            size = getxattr(path, self.protattr, NULL, 0)
        else:
            fd, name = self.gate.fd(node.place), node.stored_name()
            snprintf(path, PATH_SIZE, "/proc/self/fd/%d/%s", fd, <const char *>name)
            size = lgetxattr(path, self.protattr, NULL, 0)
        return size < 0 and c_errno in (ENODATA, EOPNOTSUPP, EPERM, EACCES)  # as `markers.ABSENT`
