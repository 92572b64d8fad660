# The real objects of nodes.

from unionfs.core.node cimport Attributes, Node
from unionfs.core.places cimport Gate, Place
from unionfs.core.stats cimport stat_t

cdef class Objects:
    cdef readonly Gate gate

    cdef int examine(self, Node node, stat_t *st) except -1
    cpdef Attributes attributes(self, Node node)
    cdef int refused(self, Place place, bytes name, stat_t *st, int code) except -1
    cpdef bytes readlink(self, Node node)
    cdef ssize_t xattr(self, Node node, const char *name, char *value, size_t size) except? -1

cdef int path_fd(Gate gate, Node node, bint *mine) except -2
